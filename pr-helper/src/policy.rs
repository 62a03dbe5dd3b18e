//! Who may do what: rules from a file and from options, read at the start and never changed.
//!
//! A request is refused if a `deny` rule matches it, or if there are `allow` rules and none matches; without rules
//! everything is allowed, as in the reference. A rule names any of: users, groups, units, devices, actions, keys; what
//! it does not name matches everything. The refused client sees ILLEGAL REQUEST, ACCESS DENIED - NO ACCESS RIGHTS.
//!
//! Keys: an `allow` rule matches if every non-zero key of the command does, a `deny` rule if any does; so neither lets a
//! command pass by the key that it did not look at.

use crate::device::Number;
use ipc::scsi::{Action, Key};
use serde::Deserialize;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Who asks, as the kernel says (SO_PEERCRED) and /proc at the time of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// systemd unit (service or scope), if a rule asks for it and it could be told.
    pub unit: Option<String>,
}

/// One request, as far as rules see it.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Who.
    pub peer: &'a Peer,
    /// On which device.
    pub device: Number,
    /// What; `None` for an unknown service action.
    pub action: Option<Action>,
    /// With which keys.
    pub keys: Option<(Key, Key)>,
}

/// A rule, as the file and the options spell it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Spelling {
    /// Why the rule is there; for people.
    #[serde(default)]
    #[expect(dead_code, reason = "only people read it")]
    comment: String,
    /// User names or numbers.
    #[serde(default)]
    users: Vec<String>,
    /// Group names or numbers.
    #[serde(default)]
    groups: Vec<String>,
    /// Units; `*` at the end stands for anything.
    #[serde(default)]
    units: Vec<String>,
    /// Devices: MAJOR:MINOR, or a path, which must exist at the start.
    #[serde(default)]
    devices: Vec<String>,
    /// Names of actions; `in` and `out` for all of either.
    #[serde(default)]
    actions: Vec<String>,
    /// `VALUE/MASK`, or `VALUE` for exactly one key; in hex with 0x.
    #[serde(default)]
    keys: Vec<String>,
}

/// The file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spellings {
    #[serde(default)]
    allow: Vec<Spelling>,
    #[serde(default)]
    deny: Vec<Spelling>,
}

/// Keys by value and mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct KeyMask {
    value: u64,
    mask: u64,
}

/// A rule, understood. An empty list matches everything.
#[derive(Debug)]
struct Rule {
    users: Vec<u32>,
    groups: Vec<u32>,
    units: Vec<String>,
    devices: Vec<Number>,
    actions: Vec<Action>,
    keys: Vec<KeyMask>,
}

/// All rules.
#[derive(Debug, Default)]
pub struct Policy {
    allow: Vec<Rule>,
    deny: Vec<Rule>,
}

/// What is wrong with a rule.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Wrong(String);

impl Policy {
    /// Rules of a file (its text) and of `--allow` and `--deny`, each `name=value[+value...][,...]`.
    pub fn new(file: Option<&str>, allow: &[String], deny: &[String]) -> Result<Self, Wrong> {
        let mut all = match file {
            Some(text) => serde_json::from_str(text).map_err(|e| Wrong(e.to_string()))?,
            None => Spellings::default(),
        };
        for (options, rules) in [(allow, &mut all.allow), (deny, &mut all.deny)] {
            for option in options {
                rules.push(parse_option(option)?);
            }
        }
        let understood = |rules: Vec<Spelling>| rules.iter().map(Rule::new).collect::<Result<_, _>>();
        Ok(Self { allow: understood(all.allow)?, deny: understood(all.deny)? })
    }

    /// Does any rule ask for the peer's unit?
    pub fn asks_for_units(&self) -> bool {
        self.allow.iter().chain(&self.deny).any(|rule| !rule.units.is_empty())
    }

    /// May it?
    pub fn allows(&self, question: &Question<'_>) -> bool {
        let denied = self.deny.iter().any(|rule| rule.matches(question) && rule.any_key(question.keys));
        let allowed = || self.allow.iter().any(|rule| rule.matches(question) && rule.every_key(question.keys));
        !denied && (self.allow.is_empty() || allowed())
    }
}

fn parse_option(text: &str) -> Result<Spelling, Wrong> {
    let mut rule = Spelling::default();
    for part in text.split(',') {
        let (name, values) = part.split_once('=').ok_or_else(|| Wrong(format!("'{part}' is not name=value")))?;
        let list = match name {
            "user" => &mut rule.users,
            "group" => &mut rule.groups,
            "unit" => &mut rule.units,
            "device" => &mut rule.devices,
            "action" => &mut rule.actions,
            "key" => &mut rule.keys,
            _ => return Err(Wrong(format!("'{name}' is none of user, group, unit, device, action, key"))),
        };
        list.extend(values.split('+').map(str::to_owned));
    }
    Ok(rule)
}

impl Rule {
    fn new(spelling: &Spelling) -> Result<Self, Wrong> {
        fn all<T>(from: &[String], what: &str, read: impl Fn(&str) -> Option<Vec<T>>) -> Result<Vec<T>, Wrong> {
            let mut list = Vec::new();
            for text in from {
                list.extend(read(text).ok_or_else(|| Wrong(format!("invalid {what} '{text}'")))?);
            }
            Ok(list)
        }
        let unit = |text: &str| (!text.is_empty()).then(|| vec![text.to_owned()]);
        Ok(Self {
            users: all(&spelling.users, "user", |t| Some(vec![sandbox::identity::user(t)?.0.as_raw()]))?,
            groups: all(&spelling.groups, "group", |t| Some(vec![sandbox::identity::group(t)?.as_raw()]))?,
            units: all(&spelling.units, "unit", unit)?,
            devices: all(&spelling.devices, "device", |t| Some(vec![device(t)?]))?,
            actions: all(&spelling.actions, "action", actions)?,
            keys: all(&spelling.keys, "key", |t| Some(vec![key_mask(t)?]))?,
        })
    }

    /// All but keys.
    fn matches(&self, q: &Question<'_>) -> bool {
        fn named<T>(list: &[T], test: impl Fn(&T) -> bool) -> bool {
            list.is_empty() || list.iter().any(test)
        }
        named(&self.users, |u| *u == q.peer.uid)
            && named(&self.groups, |g| *g == q.peer.gid)
            && named(&self.units, |u| q.peer.unit.as_deref().is_some_and(|unit| unit_matches(u, unit)))
            && named(&self.devices, |d| *d == q.device)
            && named(&self.actions, |a| Some(*a) == q.action)
    }

    fn has(&self, key: Key) -> bool {
        self.keys.iter().any(|k| key.0 & k.mask == k.value & k.mask)
    }

    fn every_key(&self, keys: Option<(Key, Key)>) -> bool {
        self.keys.is_empty() || present(keys).all(|key| self.has(key))
    }

    fn any_key(&self, keys: Option<(Key, Key)>) -> bool {
        self.keys.is_empty() || present(keys).any(|key| self.has(key))
    }
}

/// The keys that are not zero.
fn present(keys: Option<(Key, Key)>) -> impl Iterator<Item = Key> {
    keys.into_iter().flat_map(|(a, b)| [a, b]).filter(|k| k.0 != 0)
}

fn unit_matches(pattern: &str, unit: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => unit.starts_with(start),
        None => pattern == unit,
    }
}

fn device(text: &str) -> Option<Number> {
    if text.starts_with('/') {
        let meta = std::fs::metadata(Path::new(text)).ok()?;
        let kind = meta.file_type();
        let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        return (kind.is_block_device() || kind.is_char_device()).then_some(Number { major, minor });
    }
    let (major, minor) = text.split_once(':')?;
    Some(Number { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn actions(text: &str) -> Option<Vec<Action>> {
    let is_out = |a: &Action| ipc::scsi::Cdb::build(*a, 0, 0).is_out();
    match text {
        "in" => Some(Action::all().filter(|a| !is_out(a)).collect()),
        "out" => Some(Action::all().filter(is_out).collect()),
        name => Some(vec![Action::from_name(name)?]),
    }
}

fn key_mask(text: &str) -> Option<KeyMask> {
    let hex = |t: &str| u64::from_str_radix(t.strip_prefix("0x")?, 16).ok();
    match text.split_once('/') {
        Some((value, mask)) => Some(KeyMask { value: hex(value)?, mask: hex(mask)? }),
        None => Some(KeyMask { value: hex(text)?, mask: u64::MAX }),
    }
}

/// The unit in the text of /proc/PID/cgroup (version 2): the first component below the slices, if it is a service or a
/// scope, `[cgroups(7)]`.
///
/// What is below it has names that the unit gave: the services of a user's own manager, or of a container, can be called
/// anything.
pub fn unit_of_cgroup(text: &str) -> Option<String> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let unit = path.split('/').find(|part| !part.ends_with(".slice"))?;
    (unit.ends_with(".service") || unit.ends_with(".scope")).then(|| unit.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, unit: Option<&str>) -> Peer {
        Peer { pid: 1, uid, gid: 7, unit: unit.map(str::to_owned) }
    }

    fn ask(policy: &Policy, peer: &Peer, action: Action, keys: (u64, u64)) -> bool {
        let device = Number { major: 8, minor: 16 };
        let keys = Some((Key(keys.0), Key(keys.1)));
        policy.allows(&Question { peer, device, action: Some(action), keys })
    }

    fn options(allow: &[&str], deny: &[&str]) -> Result<Policy, Wrong> {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        Policy::new(None, &owned(allow), &owned(deny))
    }

    #[test]
    fn without_rules_all_is_allowed() {
        assert!(ask(&Policy::default(), &peer(5, None), Action::Clear, (1, 2)));
    }

    #[test]
    fn deny_goes_before_allow() {
        let policy = options(&["user=5"], &["action=clear+preempt-and-abort"]).unwrap();
        assert!(ask(&policy, &peer(5, None), Action::Register, (0, 1)));
        assert!(!ask(&policy, &peer(5, None), Action::Clear, (0, 1)));
        assert!(!ask(&policy, &peer(6, None), Action::Register, (0, 1)));
        assert!(!policy.asks_for_units());
    }

    #[test]
    fn devices_and_unknown_actions() {
        let policy = options(&["device=8:16,action=in", "group=7,device=8:17"], &[]).unwrap();
        assert!(ask(&policy, &peer(1, None), Action::ReadKeys, (0, 0)));
        assert!(!ask(&policy, &peer(1, None), Action::Reserve, (1, 0)));
        let other = Question { peer: &peer(1, None), device: Number { major: 8, minor: 17 }, action: None, keys: None };
        assert!(policy.allows(&other));
        assert!(!policy.allows(&Question { device: Number { major: 8, minor: 18 }, ..other }));
        // An unknown action is none that a rule can name.
        assert!(!policy.allows(&Question { device: Number { major: 8, minor: 16 }, ..other }));
    }

    #[test]
    fn keys_cannot_hide_behind_each_other() {
        let allow = options(&["key=0x1200/0xff00"], &[]).unwrap();
        assert!(ask(&allow, &peer(1, None), Action::Register, (0, 0x12ab)));
        assert!(!ask(&allow, &peer(1, None), Action::Preempt, (0x1201, 0x1301)));
        let deny = options(&[], &["key=0x1300/0xff00"]).unwrap();
        assert!(!ask(&deny, &peer(1, None), Action::Preempt, (0x1201, 0x1301)));
        assert!(ask(&deny, &peer(1, None), Action::Preempt, (0x1201, 0x1202)));
        // What carries no key is not stopped by a rule about keys.
        assert!(ask(&deny, &peer(1, None), Action::ReadKeys, (0, 0)));
    }

    #[test]
    fn units() {
        let policy = options(&["unit=qemu-*+one.service"], &[]).unwrap();
        assert!(policy.asks_for_units());
        assert!(ask(&policy, &peer(1, Some("qemu-7.scope")), Action::Clear, (1, 0)));
        assert!(ask(&policy, &peer(1, Some("one.service")), Action::Clear, (1, 0)));
        assert!(!ask(&policy, &peer(1, Some("two.service")), Action::Clear, (1, 0)));
        assert!(!ask(&policy, &peer(1, None), Action::Clear, (1, 0)));
        let cgroup = "0::/machine.slice/machine-qemu.scope/libvirt/emulator\n";
        assert_eq!(unit_of_cgroup(cgroup).as_deref(), Some("machine-qemu.scope"));
        assert_eq!(unit_of_cgroup("0::/\n"), None);
        // A user's own manager, and a container, name their units as they like.
        let users = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/qemu-7.scope\n";
        assert_eq!(unit_of_cgroup(users).as_deref(), Some("user@1000.service"));
        assert_eq!(unit_of_cgroup("0::/lxc/one/system.slice/one.service\n"), None);
        assert_eq!(unit_of_cgroup("0::/../one.service\n"), None);
        assert_eq!(unit_of_cgroup("1:cpu:/x.service\n"), None);
    }

    #[test]
    fn file() {
        let text = r#"{"deny": [{"comment": "why", "users": ["root"], "actions": ["out"]}],
                       "allow": [{"devices": ["/dev/null"], "keys": ["0xff"]}]}"#;
        let policy = Policy::new(Some(text), &[], &[]).unwrap();
        let q = Question { peer: &peer(1, None), device: Number { major: 1, minor: 3 }, action: None, keys: None };
        assert!(policy.allows(&q));
        assert!(policy.allows(&Question { action: Some(Action::Clear), ..q }));
        assert!(!policy.allows(&Question { action: Some(Action::Clear), peer: &peer(0, None), ..q }));
    }

    #[test]
    fn wrong_rules_are_errors() {
        for text in [
            "user=no such user",
            "device=/nonexistent",
            "device=/",
            "device=8",
            "action=write",
            "key=12",
            "x=1",
            "user",
        ] {
            assert!(options(&[text], &[]).is_err(), "{text}");
        }
        for text in
            ["", "[1]", r#"{"permit": []}"#, r#"{"allow": [{"uid": [1]}]}"#, r#"{"allow": [{"keys": ["0x1/"]}]}"#]
        {
            assert!(Policy::new(Some(text), &[], &[]).is_err(), "{text}");
        }
    }
}
