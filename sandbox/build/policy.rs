//! Reads a policy file and compiles it: part of the build script, and of the tests.
//!
//! A file has named sections of rows as `seccompiler` reads them: each allows a call (with conditions on its arguments)
//! and says what for in its `comment`. A row with `only` is for that architecture alone. Beside the sections there are
//!
//! - `roles`: which sections make up the filter of a role;
//! - `optional`: sections that a filter has only if its process asks for them, so that a call that one option needs
//!   is allowed only with that option; there is a program for each set of them;
//! - `absent`: calls that are answered as if the kernel did not know them;
//! - `never`: calls that end the process also where others only fail.

use seccompiler::BpfProgram;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// `SECCOMP_RET_ERRNO` with it is what an unknown call is answered with; the same on all architectures of this project.
const ENOSYS: u32 = 38;

/// The filter of a role.
pub struct Program {
    pub role: String,
    /// The optional sections that it has, of those that the role knows.
    pub options: Vec<String>,
    pub code: BpfProgram,
}

/// A file.
pub struct Policy(pub Value);

impl Policy {
    pub fn parse(text: &str) -> Result<Self, String> {
        serde_json::from_str(text).map(Self).map_err(|error| error.to_string())
    }

    fn words(list: &Value) -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The roles, in alphabetical order, with their sections.
    pub fn roles(&self) -> Vec<(String, Vec<String>)> {
        let roles = self.0["roles"].as_object().into_iter().flatten();
        roles.map(|(role, sections)| (role.clone(), Self::words(sections))).collect()
    }

    /// The rows of some sections, those of this architecture, as `seccompiler` reads them.
    ///
    /// A row without conditions stands for all rows of its call: together with conditions `seccompiler` would forget it.
    pub fn join(&self, sections: &[String], arch: &str) -> Result<Vec<Value>, String> {
        let mut rows = Vec::new();
        for section in sections {
            let section = self.0[section].as_array().ok_or_else(|| format!("there is no section '{section}'"))?;
            rows.extend(section.iter().cloned());
        }
        rows.retain(|row| row.get("only").is_none_or(|only| only == arch));
        let free: HashSet<String> =
            rows.iter().filter(|row| row.get("args").is_none()).map(|row| row["syscall"].to_string()).collect();
        rows.retain(|row| row.get("args").is_none() || !free.contains(&row["syscall"].to_string()));
        for row in &mut rows {
            row.as_object_mut().map(|row| row.remove("only"));
        }
        Ok(rows)
    }

    /// One program for each role and each set of its optional sections.
    pub fn programs(&self, arch: &str) -> Result<Vec<Program>, String> {
        let optional = Self::words(&self.0["optional"]);
        let mut programs = Vec::new();
        for (role, sections) in self.roles() {
            let (optional, fixed): (Vec<_>, Vec<_>) = sections.into_iter().partition(|name| optional.contains(name));
            for set in 0..1u32 << optional.len() {
                let chosen = optional.iter().enumerate().filter(|(bit, _)| set & (1 << bit) != 0);
                let options: Vec<String> = chosen.map(|(_, name)| name.clone()).collect();
                let rows = self.join(&[&fixed[..], &options].concat(), arch)?;
                let code = compile(&rows, &json!("trap"), &json!("allow"), arch)?;
                programs.push(Program { role: role.clone(), options, code });
            }
        }
        Ok(programs)
    }

    /// The program that hides the calls of `absent`, if there are any.
    pub fn absent(&self, arch: &str) -> Result<BpfProgram, String> {
        if self.0.get("absent").is_none() {
            return Ok(Vec::new());
        }
        let rows = self.join(&["absent".to_owned()], arch)?;
        compile(&rows, &json!("allow"), &json!({ "errno": ENOSYS }), arch)
    }

    /// The names of the calls of `never`.
    pub fn never(&self, arch: &str) -> Result<Vec<String>, String> {
        if self.0.get("never").is_none() {
            return Ok(Vec::new());
        }
        let rows = self.join(&["never".to_owned()], arch)?;
        Ok(rows.iter().filter_map(|row| row["syscall"].as_str()).map(str::to_owned).collect())
    }
}

/// One filter: what it answers to calls that no row names, and to those that one does.
fn compile(rows: &[Value], otherwise: &Value, matched: &Value, arch: &str) -> Result<BpfProgram, String> {
    const NAME: &str = "filter";
    let filter = json!({ "mismatch_action": otherwise, "match_action": matched, "filter": rows });
    let text = Value::Object(Map::from_iter([(NAME.to_owned(), filter)])).to_string();
    let arch = arch.try_into().map_err(|error| format!("{error}"))?;
    let mut programs = seccompiler::compile_from_json(text.as_bytes(), arch).map_err(|error| error.to_string())?;
    programs.remove(NAME).ok_or_else(|| "the compiler made nothing".to_owned())
}
