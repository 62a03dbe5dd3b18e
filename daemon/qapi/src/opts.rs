//! The older command line form, which `--chardev` still has: `socket,id=c,path=x,server=on,wait=off`.
//!
//! A flat list of options from a table: no dots, no lists, no JSON. A key without a value is a truth value: `server` is
//! `server=on` and `nowait` is `wait=off`; both are deprecated. Of several values for one key the last one counts.
//!
//! An option that the chosen device has no use for is an error here, where the reference ignores it.

use crate::{
    Error, Result, keyval,
    types::{
        chardev::{
            ChardevAdd, ChardevBackend, ChardevBackendKind, ChardevBackendVariant, ChardevSocket, ChardevSocketWrapper,
            ChardevStdio, ChardevStdioWrapper,
        },
        sockets::{FdSocketAddress, InetSocketAddress, SocketAddress, SocketAddressVariant, UnixSocketAddress},
    },
};

/// An option as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pair {
    key: String,
    value: String,
}

/// Options in the order they were written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Opts {
    pairs: Vec<Pair>,
    /// What to tell the user although the options are right.
    pub warnings: Vec<String>,
    /// `help` or `?` stood among them.
    pub help: bool,
}

/// What the value of an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Str,
    Bool,
    Number,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Type::Str => "str",
            Type::Bool => "bool (on/off)",
            Type::Number => "num",
        }
    }
}

/// The options of character devices, in alphabetical order, and the devices that have them.
const CHARDEV: &[(&str, Type, &[ChardevBackendKind])] = {
    use ChardevBackendKind::{Socket, Stdio};
    &[
        ("abstract", Type::Bool, &[Socket]),
        ("delay", Type::Bool, &[Socket]),
        ("fd", Type::Str, &[Socket]),
        ("host", Type::Str, &[Socket]),
        ("ipv4", Type::Bool, &[Socket]),
        ("ipv6", Type::Bool, &[Socket]),
        ("nodelay", Type::Bool, &[Socket]),
        ("path", Type::Str, &[Socket]),
        ("port", Type::Str, &[Socket]),
        ("reconnect", Type::Number, &[Socket]),
        ("reconnect-ms", Type::Number, &[Socket]),
        ("server", Type::Bool, &[Socket]),
        ("signal", Type::Bool, &[Stdio]),
        ("tight", Type::Bool, &[Socket]),
        ("to", Type::Number, &[Socket]),
        ("wait", Type::Bool, &[Socket]),
    ]
};

/// Options of character devices that the reference has and this program does not.
const CHARDEV_MISSING: &[&str] = &[
    "append",
    "chardev",
    "cols",
    "height",
    "input-path",
    "localaddr",
    "localport",
    "logappend",
    "logfile",
    "mux",
    "name",
    "rows",
    "size",
    "telnet",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "websocket",
    "width",
];

/// The argument of `--chardev`, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevArgument {
    /// A device to make, and what to tell the user besides.
    Add(ChardevAdd, Vec<String>),
    /// It asks for help: print this and leave.
    Help(String),
}

impl Opts {
    /// Takes a text apart. A first option without `=` is the value of `implied_key`.
    ///
    /// Fails if a key is empty.
    pub fn parse(text: &str, implied_key: &str) -> Result<Opts> {
        let mut opts = Opts::default();
        let mut rest = text;
        let mut first = true;
        while !rest.is_empty() {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            let (key, behind) = rest.split_at(end);
            let (key, value) = if let Some(behind) = behind.strip_prefix('=') {
                let (value, behind) = keyval::value(behind);
                rest = behind;
                (key.to_owned(), value)
            } else {
                let (word, behind) = keyval::value(rest);
                rest = behind;
                if matches!(word.as_str(), "help" | "?") {
                    opts.help = true;
                    first = false;
                    continue;
                }
                if first { (implied_key.to_owned(), word) } else { opts.short_form(&word) }
            };
            if key.is_empty() {
                return Err(Error::generic("Invalid parameter ''"));
            }
            opts.pairs.push(Pair { key, value });
            first = false;
        }
        Ok(opts)
    }

    /// The key and the value of an option without a value.
    fn short_form(&mut self, word: &str) -> (String, String) {
        let (key, value) = match word.strip_prefix("no") {
            Some(key) => (key, "off"),
            None => (word, "on"),
        };
        self.warnings.push(format!("short-form boolean option '{word}' deprecated\nPlease use {key}={value} instead"));
        (key.to_owned(), value.to_owned())
    }

    /// The last value of an option.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|pair| pair.key == key).map(|pair| pair.value.as_str())
    }

    /// Every option with its value, in the order they were written.
    pub fn into_pairs(self) -> impl Iterator<Item = (String, String)> {
        self.pairs.into_iter().map(|pair| (pair.key, pair.value))
    }

    fn string(&self, key: &str) -> Option<String> {
        self.get(key).map(str::to_owned)
    }

    /// The last value of an option that is a truth value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|text| {
                crate::builtin::parse_bool(text)
                    .ok_or_else(|| Error::generic(format!("Parameter '{key}' expects 'on' or 'off'")))
            })
            .transpose()
    }

    /// The last value of an option that is a number.
    pub fn number<T: TryFrom<i128>>(&self, key: &str) -> Result<Option<T>> {
        self.get(key)
            .map(|text| {
                crate::builtin::parse_integer(text)
                    .and_then(|number| T::try_from(number).ok())
                    .ok_or_else(|| Error::generic(format!("Parameter '{key}' expects a number")))
            })
            .transpose()
    }
}

/// Reads the argument of `--chardev`.
///
/// Fails with the reference's messages where it has them.
pub fn chardev(text: &str) -> Result<ChardevArgument> {
    let opts = Opts::parse(text, "backend")?;
    let kind = opts.get("backend").map(str::parse::<ChardevBackendKind>);
    if opts.help {
        return Ok(ChardevArgument::Help(chardev_help(kind.and_then(Result::ok))));
    }
    for Pair { key, value } in &opts.pairs {
        if matches!(key.as_str(), "backend" | "id") {
            continue;
        }
        if CHARDEV_MISSING.contains(&key.as_str()) {
            return Err(Error::generic(format!("Parameter '{key}' is not supported")));
        }
        let Some((name, ty, _)) = CHARDEV.iter().find(|(name, ..)| name == key) else {
            return Err(Error::generic(format!("Invalid parameter '{key}'")));
        };
        // Each value has to be right, also one that a later value replaces.
        let alone = Opts { pairs: vec![Pair { key: key.clone(), value: value.clone() }], ..Opts::default() };
        match ty {
            Type::Str => {}
            Type::Bool => drop(alone.bool(name)?),
            Type::Number => drop(alone.number::<i64>(name)?),
        }
    }
    let id = opts.string("id").ok_or_else(|| Error::generic("chardev: no id specified"))?;
    if !is_identifier(&id) {
        return Err(Error::generic("Parameter 'id' expects an identifier")
            .with_hint("Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."));
    }
    let kind = match (kind, opts.get("backend")) {
        (Some(Ok(kind)), _) => kind,
        (_, Some(name)) => return Err(Error::generic(format!("'{name}' is not a valid char driver name"))),
        (_, None) => return Err(Error::generic(format!("chardev: \"{id}\" missing backend"))),
    };
    for pair in &opts.pairs {
        if CHARDEV.iter().any(|(name, _, kinds)| *name == pair.key && !kinds.contains(&kind)) {
            return Err(Error::generic(format!("Parameter '{}' has no meaning for chardev '{kind}'", pair.key)));
        }
    }
    let kind = match kind {
        ChardevBackendKind::Socket => ChardevBackendVariant::Socket(ChardevSocketWrapper { data: socket(&opts)? }),
        ChardevBackendKind::Stdio => ChardevBackendVariant::Stdio(ChardevStdioWrapper {
            data: ChardevStdio { signal: opts.bool("signal")?.unwrap_or(true) },
        }),
    };
    Ok(ChardevArgument::Add(ChardevAdd { id, backend: ChardevBackend { kind } }, opts.warnings))
}

/// The options of a socket. Unlike over QMP it connects unless told to listen.
fn socket(opts: &Opts) -> Result<ChardevSocket> {
    let (path, host, fd) = (opts.string("path"), opts.string("host"), opts.string("fd"));
    if [path.is_some(), host.is_some(), fd.is_some()].iter().filter(|given| **given).count() > 1 {
        return Err(Error::generic("None or one of 'path', 'fd' or 'host' option required."));
    }
    let only_for = |given: &[&str], what: &str| match given.iter().find(|key| opts.get(key).is_some()) {
        Some(key) => Err(Error::generic(format!("chardev: socket: '{key}' has no meaning {what}"))),
        None => Ok(()),
    };
    const UNIX: &[&str] = &["abstract", "tight"];
    const INET: &[&str] = &["port", "to", "ipv4", "ipv6"];
    let address = if let Some(path) = path {
        only_for(INET, "for a path")?;
        SocketAddressVariant::Unix(UnixSocketAddress {
            path,
            is_abstract: opts.bool("abstract")?.unwrap_or(false),
            tight: opts.bool("tight")?.unwrap_or(true),
        })
    } else if let Some(str) = fd {
        only_for(INET, "for a file descriptor")?;
        only_for(UNIX, "for a file descriptor")?;
        SocketAddressVariant::Fd(FdSocketAddress { str })
    } else if host.is_some() || opts.get("port").is_some() {
        only_for(UNIX, "for a host")?;
        SocketAddressVariant::Inet(InetSocketAddress {
            host: host.unwrap_or_default(),
            port: opts.string("port").ok_or_else(|| Error::generic("chardev: socket: no port given"))?,
            numeric: false,
            to: opts.number("to")?,
            ipv4: opts.bool("ipv4")?,
            ipv6: opts.bool("ipv6")?,
            keep_alive: None,
            keep_alive_count: None,
            keep_alive_idle: None,
            keep_alive_interval: None,
            mptcp: None,
        })
    } else {
        return Err(Error::generic("chardev: socket: one of 'path', 'fd' or 'host' and 'port' is needed"));
    };
    let server = opts.bool("server")?.unwrap_or(false);
    Ok(ChardevSocket {
        addr: SocketAddress { addr: address }.into(),
        server,
        // Unlike over QMP a listening socket waits for a client unless told not to.
        wait: opts.bool("wait")?.or(server.then_some(true)),
        nodelay: match opts.bool("nodelay")? {
            Some(nodelay) => nodelay,
            None => !opts.bool("delay")?.unwrap_or(true),
        },
        reconnect: opts.number("reconnect")?,
        reconnect_ms: opts.number("reconnect-ms")?,
    })
}

fn chardev_help(kind: Option<ChardevBackendKind>) -> String {
    match kind {
        None => {
            let names = ChardevBackendKind::ALL.iter().map(|kind| format!("  {kind}\n"));
            std::iter::once("Available chardev backend types: \n".to_owned()).chain(names).collect()
        }
        Some(kind) => {
            let options = CHARDEV
                .iter()
                .filter(|(_, _, kinds)| kinds.contains(&kind))
                .map(|(name, ty, _)| format!("  {name}=<{}>\n", ty.name()));
            std::iter::once("chardev options:\n".to_owned()).chain(options).collect()
        }
    }
}

/// Whether a text can be the name of an object, a device or an export: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Qapi;
    use serde_json::json;

    fn add(text: &str) -> (crate::Value, Vec<String>) {
        match chardev(text).unwrap_or_else(|e| panic!("{text}: {e}")) {
            ChardevArgument::Add(add, warnings) => (add.to_value(), warnings),
            ChardevArgument::Help(help) => panic!("{text}: {help}"),
        }
    }

    #[test]
    fn options_become_what_chardev_add_takes() {
        let (value, warnings) = add("socket,id=c,path=/tmp/a,,b,server,nowait");
        assert_eq!(
            value,
            json!({"id": "c", "backend": {"type": "socket", "data": {
                "addr": {"type": "unix", "data": {"path": "/tmp/a,b", "abstract": false, "tight": true}},
                "server": true, "wait": false, "nodelay": false}}})
        );
        assert_eq!(
            warnings,
            [
                "short-form boolean option 'server' deprecated\nPlease use server=on instead",
                "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead",
            ]
        );
        let (value, warnings) = add("id=c,server=off,backend=socket,host=h,port=1,to=0x10,server=on,ipv4=on,delay=off");
        assert_eq!(
            value["backend"]["data"],
            json!({"addr": {"type": "inet", "data": {"host": "h", "port": "1", "numeric": false, "to": 16, "ipv4": true}},
                "server": true, "wait": true, "nodelay": true})
        );
        assert!(warnings.is_empty());
        assert_eq!(add("socket,id=c,fd=3").0["backend"]["data"]["addr"]["data"]["str"], "3");
        assert_eq!(add("stdio,id=c,signal=off").0["backend"]["data"]["signal"], false);
        assert_eq!(add("stdio,id=c,nosignal").0["backend"]["data"]["signal"], false);
    }

    /// The messages without a comment are the reference's.
    #[test]
    fn wrong_options_are_refused() {
        for (text, message) in [
            ("", "chardev: no id specified"),
            ("socket", "chardev: no id specified"),
            ("id=a", "chardev: \"a\" missing backend"),
            ("foo,id=a", "'foo' is not a valid char driver name"),
            ("socket,id=1", "Parameter 'id' expects an identifier"),
            ("socket,id=a,path=x,foo=1", "Invalid parameter 'foo'"),
            ("stdio,id=a,=x", "Invalid parameter ''"),
            ("stdio,id=a,no", "Invalid parameter ''"),
            ("help=on", "Invalid parameter 'help'"),
            ("socket,id=a,path=x,server=x", "Parameter 'server' expects 'on' or 'off'"),
            ("socket,id=a,path=x,server=x,server=on", "Parameter 'server' expects 'on' or 'off'"),
            ("socket,id=a,path=x,reconnect=x", "Parameter 'reconnect' expects a number"),
            ("socket,id=a,host=x", "chardev: socket: no port given"),
            ("socket,id=a,host=x,port=1,path=x", "None or one of 'path', 'fd' or 'host' option required."),
            // The reference ignores these.
            ("stdio,id=a,path=x", "Parameter 'path' has no meaning for chardev 'stdio'"),
            ("socket,id=a,path=x,ipv4=on", "chardev: socket: 'ipv4' has no meaning for a path"),
            // The reference can do it.
            ("socket,id=a,path=x,telnet=on", "Parameter 'telnet' is not supported"),
            // The reference tries to read a number.
            ("socket,id=a", "chardev: socket: one of 'path', 'fd' or 'host' and 'port' is needed"),
        ] {
            assert_eq!(chardev(text).expect_err(text).to_string(), message, "{text}");
        }
    }

    #[test]
    fn help_lists_devices_and_their_options() {
        let list = ChardevArgument::Help("Available chardev backend types: \n  socket\n  stdio\n".to_owned());
        assert_eq!(chardev("help").expect("help"), list);
        assert_eq!(chardev("?").expect("help"), list);
        let stdio = ChardevArgument::Help("chardev options:\n  signal=<bool (on/off)>\n".to_owned());
        assert_eq!(chardev("stdio,id=a,help").expect("help"), stdio);
    }
}
