//! The argument of `--chardev`: which options each device has, and what they mean for `chardev-add`.
//!
//! An option that the chosen device has no use for is an error here, where the reference ignores it.

use super::{Opts, Pair, is_identifier};
use crate::{
    Error, Result,
    types::{
        chardev::{
            ChardevAdd, ChardevBackend, ChardevBackendKind, ChardevBackendVariant, ChardevCommon, ChardevCommonWrapper,
            ChardevFile, ChardevFileWrapper, ChardevHostdev, ChardevHostdevWrapper, ChardevHub, ChardevHubWrapper,
            ChardevMux, ChardevMuxWrapper, ChardevPty, ChardevPtyWrapper, ChardevRingbuf, ChardevRingbufWrapper,
            ChardevSocket, ChardevSocketWrapper, ChardevStdio, ChardevStdioWrapper, ChardevUdp, ChardevUdpWrapper,
        },
        sockets::{FdSocketAddress, InetSocketAddress, SocketAddress, SocketAddressVariant, UnixSocketAddress},
    },
};
use ChardevBackendKind::{File, Hub, Memory, Mux, Parallel, Pipe, Pty, Ringbuf, Serial, Socket, Stdio, Udp};

/// What the value of an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    Str,
    Bool,
    Number,
    Size,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Type::Str => "str",
            Type::Bool => "bool (on/off)",
            Type::Number => "num",
            Type::Size => "size",
        }
    }
}

/// The options of character devices, in alphabetical order, and the devices that have them.
const OPTIONS: &[(&str, Type, &[ChardevBackendKind])] = &[
    ("abstract", Type::Bool, &[Socket]),
    ("append", Type::Bool, &[File]),
    ("chardev", Type::Str, &[Mux]),
    ("chardevs.0", Type::Str, &[Hub]),
    ("chardevs.1", Type::Str, &[Hub]),
    ("chardevs.2", Type::Str, &[Hub]),
    ("chardevs.3", Type::Str, &[Hub]),
    ("delay", Type::Bool, &[Socket]),
    ("fd", Type::Str, &[Socket]),
    ("host", Type::Str, &[Socket, Udp]),
    ("input-path", Type::Str, &[File]),
    ("ipv4", Type::Bool, &[Socket, Udp]),
    ("ipv6", Type::Bool, &[Socket, Udp]),
    ("localaddr", Type::Str, &[Udp]),
    ("localport", Type::Str, &[Udp]),
    ("logappend", Type::Bool, ChardevBackendKind::ALL),
    ("logfile", Type::Str, ChardevBackendKind::ALL),
    ("logtimestamp", Type::Bool, ChardevBackendKind::ALL),
    ("mux", Type::Bool, ChardevBackendKind::ALL),
    ("nodelay", Type::Bool, &[Socket]),
    ("path", Type::Str, &[File, Serial, Parallel, Pipe, Pty, Socket]),
    ("port", Type::Str, &[Socket, Udp]),
    ("reconnect", Type::Number, &[Socket]),
    ("reconnect-ms", Type::Number, &[Socket]),
    ("server", Type::Bool, &[Socket]),
    ("signal", Type::Bool, &[Stdio]),
    ("size", Type::Size, &[Ringbuf, Memory]),
    ("telnet", Type::Bool, &[Socket]),
    ("tight", Type::Bool, &[Socket]),
    ("tls-authz", Type::Str, &[Socket]),
    ("tls-creds", Type::Str, &[Socket]),
    ("tn3270", Type::Bool, &[Socket]),
    ("to", Type::Number, &[Socket]),
    ("wait", Type::Bool, &[Socket]),
    ("websocket", Type::Bool, &[Socket]),
];

/// Options of devices that are only there with a virtual machine.
const OF_OTHERS: &[&str] = &["clipboard", "cols", "debug", "encoding", "height", "mouse", "name", "rows", "width"];

/// The argument of `--chardev`, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevArgument {
    /// Devices to make, in this order, and what to tell the user besides.
    Add(Vec<ChardevAdd>, Vec<String>),
    /// It asks for help: print this and leave.
    Help(String),
}

/// Reads the argument of `--chardev`.
///
/// Fails with the reference's messages where it has them.
pub fn chardev(text: &str) -> Result<ChardevArgument> {
    let opts = Opts::parse(text, "backend")?;
    let kind = opts.get("backend").map(str::parse::<ChardevBackendKind>);
    if opts.help {
        return Ok(ChardevArgument::Help(help(kind.and_then(Result::ok))));
    }
    for Pair { key, value } in &opts.pairs {
        if matches!(key.as_str(), "backend" | "id") {
            continue;
        }
        if OF_OTHERS.contains(&key.as_str()) {
            return Err(Error::generic(format!("Parameter '{key}' is not supported")));
        }
        let Some((name, ty, _)) = OPTIONS.iter().find(|(name, ..)| name == key) else {
            return Err(Error::generic(format!("Invalid parameter '{key}'")));
        };
        // Each value has to be right, also one that a later value replaces.
        let alone = Opts { pairs: vec![Pair { key: key.clone(), value: value.clone() }], ..Opts::default() };
        match ty {
            Type::Str => {}
            Type::Bool => drop(alone.bool(name)?),
            Type::Number => drop(alone.number::<i64>(name)?),
            Type::Size => drop(alone.size(name)?),
        }
    }
    let id = opts.string("id").ok_or_else(|| Error::generic("chardev: no id specified"))?;
    if !is_identifier(&id) {
        return Err(Error::identifier_expected("id"));
    }
    let kind = match (kind, opts.get("backend")) {
        (Some(Ok(kind)), _) => kind,
        (_, Some(name)) => return Err(Error::generic(format!("'{name}' is not a valid char driver name"))),
        (_, None) => return Err(Error::generic(format!("chardev: \"{id}\" missing backend"))),
    };
    for pair in &opts.pairs {
        if OPTIONS.iter().any(|(name, _, kinds)| *name == pair.key && !kinds.contains(&kind)) {
            return Err(Error::generic(format!("Parameter '{}' has no meaning for chardev '{kind}'", pair.key)));
        }
    }
    let kind = backend(kind, &opts)?;
    let add = |id: String, kind| ChardevAdd { id, backend: ChardevBackend { kind } };
    let devices = if opts.bool("mux")?.unwrap_or(false) {
        let base = format!("{id}-base");
        let data = ChardevMux { common: ChardevCommon::default(), chardev: base.clone() };
        vec![add(base, kind), add(id, ChardevBackendVariant::Mux(ChardevMuxWrapper { data }))]
    } else {
        vec![add(id, kind)]
    };
    Ok(ChardevArgument::Add(devices, opts.warnings))
}

fn backend(kind: ChardevBackendKind, opts: &Opts) -> Result<ChardevBackendVariant> {
    use ChardevBackendVariant as Variant;
    let common = ChardevCommon {
        logfile: opts.string("logfile"),
        logappend: opts.bool("logappend")?.unwrap_or(false),
        logtimestamp: opts.bool("logtimestamp")?.unwrap_or(false),
    };
    let needed = |key: &str, text: &str| opts.string(key).ok_or_else(|| Error::generic(format!("chardev: {text}")));
    let device = |common, what: &str| {
        let device = needed("path", &format!("{what}: no device path given"))?;
        Ok(ChardevHostdevWrapper { data: ChardevHostdev { common, device } })
    };
    let ring = |common| {
        // More than this is refused when the device is made.
        let size = opts.size("size")?.map(|size| i64::try_from(size).unwrap_or(i64::MAX));
        Ok(ChardevRingbufWrapper { data: ChardevRingbuf { common, size } })
    };
    Ok(match kind {
        File => Variant::File(ChardevFileWrapper {
            data: ChardevFile {
                common,
                input: opts.string("input-path"),
                out: needed("path", "file: no filename given")?,
                append: opts.bool("append")?.unwrap_or(false),
            },
        }),
        Serial => Variant::Serial(device(common, "serial/tty")?),
        Parallel => Variant::Parallel(device(common, "parallel")?),
        Pipe => Variant::Pipe(device(common, "pipe")?),
        Socket => Variant::Socket(ChardevSocketWrapper { data: socket(opts, common)? }),
        Udp => Variant::Udp(ChardevUdpWrapper { data: udp(opts, common)? }),
        Pty => Variant::Pty(ChardevPtyWrapper { data: ChardevPty { common, path: opts.string("path") } }),
        ChardevBackendKind::Null => Variant::Null(ChardevCommonWrapper { data: common }),
        Mux => Variant::Mux(ChardevMuxWrapper {
            data: ChardevMux { common, chardev: needed("chardev", "mux: no chardev given")? },
        }),
        Hub => {
            let keys = ["chardevs.0", "chardevs.1", "chardevs.2", "chardevs.3"];
            let chardevs = keys.iter().map_while(|key| opts.string(key)).collect();
            Variant::Hub(ChardevHubWrapper { data: ChardevHub { common, chardevs } })
        }
        Stdio => Variant::Stdio(ChardevStdioWrapper {
            data: ChardevStdio { common, signal: opts.bool("signal")?.unwrap_or(true) },
        }),
        Ringbuf => Variant::Ringbuf(ring(common)?),
        Memory => Variant::Memory(ring(common)?),
    })
}

fn inet(host: String, port: String) -> InetSocketAddress {
    InetSocketAddress {
        host,
        port,
        numeric: false,
        to: None,
        ipv4: None,
        ipv6: None,
        keep_alive: None,
        keep_alive_count: None,
        keep_alive_idle: None,
        keep_alive_interval: None,
        mptcp: None,
    }
}

/// The options of a socket. Unlike over QMP it connects unless told to listen.
fn socket(opts: &Opts, common: ChardevCommon) -> Result<ChardevSocket> {
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
        let port = opts.string("port").ok_or_else(|| Error::generic("chardev: socket: no port given"))?;
        SocketAddressVariant::Inet(InetSocketAddress {
            to: opts.number("to")?,
            ipv4: opts.bool("ipv4")?,
            ipv6: opts.bool("ipv6")?,
            ..inet(host.unwrap_or_default(), port)
        })
    } else {
        return Err(Error::generic("chardev: socket: one of 'path', 'fd' or 'host' and 'port' is needed"));
    };
    let server = opts.bool("server")?.unwrap_or(false);
    let nodelay = match (opts.bool("delay")?, opts.bool("nodelay")?) {
        (Some(_), Some(_)) => return Err(Error::generic("'delay' and 'nodelay' are mutually exclusive")),
        (Some(delay), None) => !delay,
        (None, nodelay) => nodelay.unwrap_or(false),
    };
    Ok(ChardevSocket {
        common,
        addr: SocketAddress { addr: address }.into(),
        tls_creds: opts.string("tls-creds"),
        tls_authz: opts.string("tls-authz"),
        server,
        // Unlike over QMP a listening socket waits for a client unless told not to.
        wait: opts.bool("wait")?.or(server.then_some(true)),
        nodelay,
        telnet: opts.bool("telnet")?.unwrap_or(false),
        tn3270: opts.bool("tn3270")?.unwrap_or(false),
        websocket: opts.bool("websocket")?.unwrap_or(false),
        reconnect: opts.number("reconnect")?,
        reconnect_ms: opts.number("reconnect-ms")?,
    })
}

fn udp(opts: &Opts, common: ChardevCommon) -> Result<ChardevUdp> {
    let text = |key: &str| opts.string(key).filter(|text| !text.is_empty());
    let port = text("port").ok_or_else(|| Error::generic("chardev: udp: remote port not specified"))?;
    let remote = InetSocketAddress {
        ipv4: opts.bool("ipv4")?,
        ipv6: opts.bool("ipv6")?,
        ..inet(text("host").unwrap_or_else(|| "localhost".to_owned()), port)
    };
    let local = match (opts.string("localaddr"), opts.string("localport")) {
        (None, None) => None,
        (host, port) => Some(inet(host.unwrap_or_default(), port.unwrap_or_else(|| "0".to_owned()))),
    };
    let address = |inet| SocketAddress { addr: SocketAddressVariant::Inet(inet) }.into();
    Ok(ChardevUdp { common, remote: address(remote), local: local.map(address) })
}

fn help(kind: Option<ChardevBackendKind>) -> String {
    match kind {
        None => {
            let names = ChardevBackendKind::ALL.iter().map(|kind| format!("  {kind}\n"));
            std::iter::once("Available chardev backend types: \n".to_owned()).chain(names).collect()
        }
        Some(kind) => {
            let options = OPTIONS
                .iter()
                .filter(|(_, _, kinds)| kinds.contains(&kind))
                .map(|(name, ty, _)| format!("  {name}=<{}>\n", ty.name()));
            std::iter::once("chardev options:\n".to_owned()).chain(options).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Qapi;
    use serde_json::json;

    fn add(text: &str) -> (crate::Value, Vec<String>) {
        match chardev(text).unwrap_or_else(|e| panic!("{text}: {e}")) {
            ChardevArgument::Add(mut devices, warnings) => {
                assert_eq!(devices.len(), 1, "{text}");
                (devices.remove(0).to_value(), warnings)
            }
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
                "server": true, "wait": false, "nodelay": false, "logappend": false, "logtimestamp": false,
                "telnet": false, "tn3270": false, "websocket": false}}})
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
                "server": true, "wait": true, "nodelay": true, "logappend": false, "logtimestamp": false,
                "telnet": false, "tn3270": false, "websocket": false})
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
            ("socket,id=a,host=x,port=1,delay=on,nodelay=on", "'delay' and 'nodelay' are mutually exclusive"),
            ("file,id=a", "chardev: file: no filename given"),
            ("pipe,id=a", "chardev: pipe: no device path given"),
            ("serial,id=a", "chardev: serial/tty: no device path given"),
            ("parallel,id=a", "chardev: parallel: no device path given"),
            ("udp,id=a", "chardev: udp: remote port not specified"),
            ("udp,id=a,port=", "chardev: udp: remote port not specified"),
            ("mux,id=a", "chardev: mux: no chardev given"),
            ("ringbuf,id=a,size=x", "Parameter 'size' expects a non-negative number below 2^64"),
            ("testdev,id=a", "'testdev' is not a valid char driver name"),
            ("hub,id=a,chardevs.4=b", "Invalid parameter 'chardevs.4'"),
            // The reference ignores these.
            ("stdio,id=a,path=x", "Parameter 'path' has no meaning for chardev 'stdio'"),
            ("socket,id=a,path=x,ipv4=on", "chardev: socket: 'ipv4' has no meaning for a path"),
            ("null,id=a,cols=3", "Parameter 'cols' is not supported"),
            // The reference tries to read a number.
            ("socket,id=a", "chardev: socket: one of 'path', 'fd' or 'host' and 'port' is needed"),
        ] {
            assert_eq!(chardev(text).expect_err(text).to_string(), message, "{text}");
        }
    }

    #[test]
    fn every_device_has_its_options() {
        let data = |text: &str| add(text).0["backend"]["data"].clone();
        let log = json!({"logfile": "l", "logappend": true, "logtimestamp": true});
        let file = json!({"logappend": false, "logtimestamp": false, "in": "i", "out": "o", "append": true});
        assert_eq!(data("file,id=a,path=o,input-path=i,append=on"), file);
        assert_eq!(data("null,id=a,logfile=l,logappend=on,logtimestamp=on"), log);
        for kind in ["serial", "parallel", "pipe"] {
            assert_eq!(data(&format!("{kind},id=a,path=p"))["device"], "p", "{kind}");
        }
        assert_eq!(data("pty,id=a,path=p")["path"], "p");
        assert_eq!(data("mux,id=a,chardev=b")["chardev"], "b");
        assert_eq!(data("hub,id=a,chardevs.0=b,chardevs.1=c")["chardevs"], json!(["b", "c"]));
        assert_eq!(data("memory,id=a,size=4k")["size"], 4096);
        let udp = data("udp,id=a,port=7,localport=8,ipv4=on");
        let (remote, local) = (&udp["remote"]["data"], &udp["local"]["data"]);
        assert_eq!(remote, &json!({"host": "localhost", "port": "7", "numeric": false, "ipv4": true}));
        assert_eq!(local, &json!({"host": "", "port": "8", "numeric": false}));
        assert!(data("udp,id=a,port=7").get("local").is_none());
        let socket = data("socket,id=a,path=p,telnet=on,tls-creds=c");
        assert!(socket["telnet"] == true && socket["websocket"] == false && socket["tls-creds"] == "c");
    }

    #[test]
    fn mux_makes_two_devices() {
        let ChardevArgument::Add(devices, _) = chardev("null,id=a,mux=on,logfile=l").unwrap() else { panic!("help") };
        let [base, mux] = &devices[..] else { panic!("{devices:?}") };
        assert_eq!((base.id.as_str(), mux.id.as_str()), ("a-base", "a"));
        assert_eq!(base.to_value()["backend"]["data"]["logfile"], "l");
        assert_eq!(mux.to_value()["backend"]["data"]["chardev"], "a-base");
    }

    #[test]
    fn help_lists_devices_and_their_options() {
        let names = "file serial parallel pipe socket udp pty null mux hub stdio ringbuf memory";
        let lines = names.split(' ').map(|name| format!("  {name}\n")).collect::<String>();
        let list = ChardevArgument::Help(format!("Available chardev backend types: \n{lines}"));
        assert_eq!(chardev("help").expect("help"), list);
        assert_eq!(chardev("?").expect("help"), list);
        let ChardevArgument::Help(stdio) = chardev("stdio,id=a,help").expect("help") else { panic!("a device") };
        assert!(stdio.starts_with("chardev options:\n  logappend=<bool (on/off)>\n") && stdio.contains("signal"));
        assert!(!stdio.contains("path"), "{stdio}");
    }
}
