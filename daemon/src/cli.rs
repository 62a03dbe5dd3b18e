//! The command line, as text: which options there are, and in which order they were given.
//!
//! One definition makes `--help`, the manual page and the parser. What an option's value means is not known here: values are
//! parsed through the QAPI types when their turn comes, for each may refer to what an earlier one made.

use clap::{Arg, ArgAction, Command};
use qapi::{Error, Result};

/// The options that are carried out in the order in which they are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `--blockdev`
    Blockdev,
    /// `--chardev`
    Chardev,
    /// `--export`
    Export,
    /// `--monitor`
    Monitor,
    /// `--nbd-server`
    NbdServer,
    /// `--object`
    Object,
    /// `--sandbox`
    Sandbox,
    /// `--trace`
    Trace,
    /// Not an option.
    Unexpected,
}

const ORDERED: &[(&str, Kind)] = &[
    ("blockdev", Kind::Blockdev),
    ("chardev", Kind::Chardev),
    ("export", Kind::Export),
    ("monitor", Kind::Monitor),
    ("nbd-server", Kind::NbdServer),
    ("object", Kind::Object),
    ("sandbox", Kind::Sandbox),
    ("trace", Kind::Trace),
    ("unexpected", Kind::Unexpected),
];

impl Kind {
    /// The option's name.
    fn name(self) -> &'static str {
        ORDERED.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// One option on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which.
    pub kind: Kind,
    /// Its value.
    pub value: String,
    /// What was typed, for messages.
    pub text: String,
}

impl Step {
    /// Where a person finds what the option's value can be, after an error in it; `implied` is the key that may be left out,
    /// and says of which sort the value is.
    pub fn where_to_look(&self, implied: Option<&str>, error: &Error) -> String {
        let option = self.kind.name();
        let first = self.value.split(',').next().unwrap_or_default();
        let sort = implied.and_then(|key| match first.split_once('=') {
            Some((named, sort)) => (named == key).then_some(sort),
            None => Some(first),
        });
        match sort {
            Some(sort) if is_word(sort) && !error.desc.contains(&format!("'{sort}'")) => {
                format!("What it takes: --{option} {sort},help")
            }
            _ => format!("What it takes: --{option} help"),
        }
    }

    /// What was typed, for messages, without what may be a secret.
    pub fn shown(&self) -> &str {
        let secret = self.kind == Kind::Object && self.value.contains("secret") && self.value.contains("data");
        if secret { "--object secret" } else { &self.text }
    }
}

/// What a command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// To serve.
    Serve {
        /// `--daemonize`
        daemonize: bool,
        /// `--pidfile`
        pidfile: Option<String>,
        /// The rest, in order.
        steps: Vec<Step>,
    },
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).action(ArgAction::Append).allow_hyphen_values(true).help(help)
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
}

/// The definition of the command line, as `--help` and the manual page show it.
pub fn command() -> Command {
    Command::new("qemu-storage-daemon")
        .about("Serves disk images without a virtual machine")
        .override_usage("qemu-storage-daemon [options]")
        .disable_help_flag(true)
        .disable_version_flag(true)
        .infer_long_args(true)
        .args_override_self(true)
        .args([
            option(
                "blockdev",
                "[driver=]DRIVER,node-name=NAME[,KEY=VALUE...]",
                "Make a block node. \"help\" lists the drivers, \"DRIVER,help\" the keys of one.\n\
                 All drivers: read-only=on|off, auto-read-only=on|off, force-share=on|off,\n\
                 cache.direct=on|off, cache.no-flush=on|off, discard=ignore|unmap,\n\
                 detect-zeroes=off|on|unmap",
            ),
            option(
                "chardev",
                "[backend=]TYPE,id=ID[,KEY=VALUE...]",
                "Make a character device, for a monitor to talk on. \"help\" lists the types,\n\
                 \"TYPE,help\" the keys of one. The usual one:\n\
                 socket,id=ID,path=PATH,server=on,wait=off",
            ),
            flag("daemonize", "Go to the background once everything is set up; the exit status tells if it worked"),
            option(
                "export",
                "[type=]TYPE,id=ID,node-name=NAME[,KEY=VALUE...]",
                "Export a block node. \"help\" lists the types, \"TYPE,help\" the keys of one.\n\
                 nbd (needs --nbd-server): name=NAME, description=TEXT, allocation-depth=on|off.\n\
                 vhost-user-blk: addr.type=unix,addr.path=PATH or addr.type=fd,addr.str=FD,\n\
                 num-queues=N, logical-block-size=BYTES, serial=TEXT.\n\
                 fuse: mountpoint=FILE, growable=on|off, allow-other=on|off|auto.\n\
                 vduse-blk: name=NAME, num-queues=N, queue-size=N, logical-block-size=BYTES,\n\
                 serial=TEXT.\n\
                 All types: writable=on|off, writethrough=on|off, fixed-iothread=on|off,\n\
                 iothread=ID or iothread.0=ID,iothread.1=ID,...",
            ),
            option(
                "monitor",
                "[chardev=]ID[,mode=control][,pretty=on|off]",
                "Serve the QEMU Monitor Protocol (QMP) on a character device",
            ),
            option(
                "nbd-server",
                "addr.type=TYPE,addr.KEY=VALUE...[,KEY=VALUE...]",
                "Start the NBD server.\n\
                 unix: addr.path=PATH; inet: addr.host=HOST,addr.port=PORT;\n\
                 vsock: addr.cid=CID,addr.port=PORT;\n\
                 fd: addr.str=NUMBER, or the NAME that systemd passes the sockets under.\n\
                 All: max-connections=N (100 if not given; 0 is no limit),\n\
                 handshake-max-seconds=N (10 if not given; 0 is no limit)",
            ),
            option(
                "object",
                "[qom-type=]TYPE,id=ID[,KEY=VALUE...]",
                "Make an object. \"help\" lists the types, \"TYPE,help\" the properties of one",
            ),
            option(
                "pidfile",
                "PATH",
                "Write the process ID to this file when everything is set up, keep it locked,\n\
                 and remove it at the end",
            ),
            option(
                "sandbox",
                "[mode=]default|strict|off[,paths.0=PATH,paths.1=PATH...]",
                "What the process gives up before it serves. default: programs, mounts, other\n\
                 processes, privileges that serving does not need. strict: also every privilege,\n\
                 and all files but those that the other options name and what is below each PATH.\n\
                 off: nothing",
            ),
            option(
                "trace",
                "[[enable=]PATTERN][,events=FILE][,file=FILE]",
                "Write trace events whose names match PATTERN (with * and ?), or the patterns in\n\
                 the events file, to standard error or a file. \"help\" lists the events",
            )
            .short('T'),
            flag("help", "Print this help").short('h'),
            flag("version", "Print the version").short('V'),
        ])
        .after_help(
            "Options are carried out in the order given: define a thing before you use it.\n\
             Values are KEY=VALUE lists (a comma inside a value is doubled, nested keys are\n\
             dotted) or JSON objects in braces.\n\n\
             Examples:\n\
             \x20 Serve disk.img to NBD clients, with a monitor:\n\
             \x20   qemu-storage-daemon \\\n\
             \x20     --blockdev file,node-name=disk,filename=disk.img \\\n\
             \x20     --nbd-server addr.type=unix,addr.path=nbd.sock \\\n\
             \x20     --export nbd,id=export,node-name=disk,name=disk,writable=on \\\n\
             \x20     --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off --monitor qmp\n\
             \x20 See it:\n\
             \x20   nbdinfo 'nbd+unix:///disk?socket=nbd.sock'\n\n\
             The daemon ends on SIGINT, SIGTERM, SIGHUP, or the QMP command quit.",
        )
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// An option that does not exist, or one without its value.
pub fn parse(arguments: &[String]) -> Result<Invocation> {
    // What is no option is caught in its place in the order.
    let stray = Arg::new("unexpected").action(ArgAction::Append).num_args(0..);
    let definition = command().arg(stray).no_binary_name(true);
    let matches = definition.try_get_matches_from(arguments).map_err(|error| refusal(&error))?;
    let given = |name: &str| matches.get_flag(name);
    let first = |name: &str| matches.index_of(name).unwrap_or(usize::MAX);
    match (given("help"), given("version")) {
        (true, true) if first("version") < first("help") => return Ok(Invocation::Version),
        (true, _) => return Ok(Invocation::Help),
        (false, true) => return Ok(Invocation::Version),
        (false, false) => {}
    }
    let mut found: Vec<(usize, Kind, String)> = Vec::new();
    for (name, kind) in ORDERED {
        let indices = matches.indices_of(name).into_iter().flatten();
        let values = matches.get_many::<String>(name).into_iter().flatten();
        found.extend(indices.zip(values).map(|(index, value)| (index, *kind, value.clone())));
    }
    found.sort_by_key(|(index, ..)| *index);
    let mut typed = arguments.iter().peekable();
    let steps =
        found.into_iter().map(|(_, kind, value)| Step { kind, text: as_typed(&mut typed, &value), value }).collect();
    let pidfile = matches.get_many::<String>("pidfile").into_iter().flatten().last().cloned();
    Ok(Invocation::Serve { daemonize: given("daemonize"), pidfile, steps })
}

/// The words of the next option that has this value: `--opt value`, `--opt=value`, `-Ovalue` or the value alone.
fn as_typed<'a>(words: &mut std::iter::Peekable<impl Iterator<Item = &'a String>>, value: &str) -> String {
    while let Some(word) = words.next() {
        let is_option = word.len() > 1 && word.starts_with('-');
        if !is_option && word == value {
            return word.clone();
        }
        if is_option && words.peek().is_some_and(|next| *next == value) {
            words.next();
            return format!("{word} {value}");
        }
        if is_option && word.ends_with(value) {
            return word.clone();
        }
    }
    value.to_owned()
}

fn refusal(error: &clap::Error) -> Error {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let word = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) => word.split_whitespace().next().unwrap_or_default().to_owned(),
        _ => String::new(),
    };
    let text = match error.kind() {
        ErrorKind::InvalidValue | ErrorKind::TooFewValues => format!("option '{word}' requires an argument"),
        ErrorKind::TooManyValues => format!("option '{word}' doesn't allow an argument"),
        ErrorKind::UnknownArgument => match word.strip_prefix('-') {
            Some(short) if !short.starts_with('-') => format!("invalid option -- '{short}'"),
            _ => format!("unrecognized option '{word}'"),
        },
        _ => error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    };
    let hint = match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(similar)) => format!("Did you mean '{similar}'? All options: --help"),
        _ => "All options: --help".to_owned(),
    };
    Error::generic(text).with_hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(words: &[&str]) -> Vec<(Kind, String, String)> {
        let words: Vec<_> = words.iter().map(|w| (*w).to_owned()).collect();
        match parse(&words) {
            Ok(Invocation::Serve { steps, .. }) => steps.into_iter().map(|s| (s.kind, s.value, s.text)).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn options_keep_their_order_and_their_words() {
        let found = steps(&[
            "--blockdev",
            "a",
            "--daemonize",
            "--export=b",
            "--bl",
            "a",
            "-T",
            "x",
            "-Ty",
            "stray",
            "--object",
            "-",
        ]);
        let expected = [
            (Kind::Blockdev, "a", "--blockdev a"),
            (Kind::Export, "b", "--export=b"),
            (Kind::Blockdev, "a", "--bl a"),
            (Kind::Trace, "x", "-T x"),
            (Kind::Trace, "y", "-Ty"),
            (Kind::Unexpected, "stray", "stray"),
            (Kind::Object, "-", "--object -"),
        ];
        let expected: Vec<_> = expected.map(|(k, v, t)| (k, v.to_owned(), t.to_owned())).into();
        assert_eq!(found, expected);
    }

    #[test]
    fn messages_do_not_show_secrets() {
        let words = ["--object", "secret,id=s,data=word", "--object", "iothread,id=i"].map(str::to_owned);
        let Ok(Invocation::Serve { steps, .. }) = parse(&words) else { panic!("no steps") };
        let shown: Vec<_> = steps.iter().map(Step::shown).collect();
        assert_eq!(shown, ["--object secret", "--object iothread,id=i"]);
    }

    #[test]
    fn refusals_read_like_getopt() {
        let text = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|w| (*w).to_owned()).collect();
            parse(&words).unwrap_err().desc
        };
        assert_eq!(text(&["--blockdev"]), "option '--blockdev' requires an argument");
        assert_eq!(text(&["--nope"]), "unrecognized option '--nope'");
        assert_eq!(text(&["-x"]), "invalid option -- 'x'");
        assert_eq!(text(&["--daemonize=3"]), "option '--daemonize' doesn't allow an argument");
        let hint = |word: &str| parse(&[word.to_owned()]).unwrap_err().hint.unwrap();
        assert_eq!(hint("--bockdev"), "Did you mean '--blockdev'? All options: --help");
        assert_eq!(hint("--nope"), "All options: --help");
    }

    #[test]
    fn errors_in_values_say_where_to_look() {
        let look = |option: &str, value: &str, key: Option<&str>, text: &str| {
            let words = [option.to_owned(), value.to_owned()];
            let Ok(Invocation::Serve { steps, .. }) = parse(&words) else { panic!("no steps") };
            steps[0].where_to_look(key, &Error::generic(text))
        };
        let missing = "Parameter 'filename' is missing";
        let wrong = "Parameter 'driver' does not accept value 'fil'";
        for (value, text, hint) in [
            ("file", missing, "--blockdev file,help"),
            ("driver=file,node-name=x", missing, "--blockdev file,help"),
            ("node-name=x,driver=file", missing, "--blockdev help"),
            ("fil,filename=x", wrong, "--blockdev help"),
            ("{'driver': 'file'}", missing, "--blockdev help"),
        ] {
            assert_eq!(look("--blockdev", value, Some("driver"), text), format!("What it takes: {hint}"));
        }
        let hint = look("--nbd-server", "addr.type=unix", None, "Parameter 'addr.path' is missing");
        assert_eq!(hint, "What it takes: --nbd-server help");
    }

    #[test]
    fn help_and_version_come_first() {
        let parse = |words: &[&str]| parse(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>()).unwrap();
        assert_eq!(parse(&["--blockdev", "bad", "-h", "foo"]), Invocation::Help);
        assert_eq!(parse(&["-V", "--help"]), Invocation::Version);
    }
}
