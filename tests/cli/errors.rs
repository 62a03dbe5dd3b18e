//! Wrong options: the text names the option, the exit code is 1, and nothing is left behind.

use tests::{Setup, on_reference};

/// Runs a line that must fail, in a directory with the image `a.img`; gives the message without the program's name.
fn refusal(args: &[&str]) -> String {
    let ended = args.iter().fold(Setup::new().image("a.img", 1 << 20), Setup::arg).run();
    assert_eq!(ended.status.code(), Some(1), "{args:?}: {}", ended.stderr);
    assert_eq!(ended.stdout, "", "{args:?}");
    // Hints may follow in lines of their own.
    let line = ended.stderr.split_inclusive('\n').next().and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("{args:?}: no whole line: {}", ended.stderr));
    let text = line.split_once(": ").unwrap_or_else(|| panic!("{args:?}: no program name: {line}"));
    assert!(text.0.ends_with("qemu-storage-daemon"), "{args:?}: {line}");
    text.1.to_owned()
}

/// The last pair of arguments fails with this text after the option's own.
fn fails(args: &[&str], text: &str) {
    let [.., option, value] = args else { panic!("{args:?}: an option and its value") };
    assert_eq!(refusal(args), format!("{option} {value}: {text}"));
}

const SERVER: [&str; 2] = ["--nbd-server", "addr.type=unix,addr.path=n.sock"];
const NULL: [&str; 2] = ["--blockdev", "driver=null-co,node-name=f"];
const CHARDEV: [&str; 2] = ["--chardev", "socket,path=q.sock,server=on,wait=off,id=c"];

#[test]
fn wrong_option_names() {
    assert_eq!(refusal(&["foo"]), "foo: Unexpected argument");
    assert_eq!(refusal(&["--nosuch"]), "unrecognized option '--nosuch'");
    assert_eq!(refusal(&["--blockdev"]), "option '--blockdev' requires an argument");
    assert_eq!(refusal(&["--pidfile"]), "option '--pidfile' requires an argument");
}

#[test]
fn blockdev_members() {
    fails(&["--blockdev", "driver=nosuch,node-name=f"], "Parameter 'driver' does not accept value 'nosuch'");
    fails(&["--blockdev", "node-name=f"], "Parameter 'driver' is missing");
    fails(&["--blockdev", "driver=file,node-name=f,filename=a.img,foo=1"], "Parameter 'foo' is unexpected");
    fails(&["--blockdev", "driver=file,node-name=f"], "Parameter 'filename' is missing");
    fails(
        &["--blockdev", "driver=file,node-name=f,filename=a.img,read-only=maybe"],
        "Parameter 'read-only' expects 'on' or 'off'",
    );
    fails(&["--blockdev", "null-co,node-name=f,size=1Z"], "Parameter 'size' expects integer");
}

#[test]
fn blockdev_json() {
    fails(&["--blockdev", r#"{"driver":"file","node-name":"f""#], "JSON parse error, premature EOI");
    fails(&["--blockdev", r#"{"driver":"file","node-name":"f"}"#], "Parameter 'filename' is missing");
    fails(
        &["--blockdev", r#"{"driver":"file","node-name":"f","filename":"a.img","x":1}"#],
        "Parameter 'x' is unexpected",
    );
    fails(&["--blockdev", "[]"], "Parameter 'driver' does not accept value '[]'");
}

#[test]
fn node_names() {
    fails(&["--blockdev", "driver=file,filename=a.img"], "'node-name' must be specified for the root node");
    fails(&["--blockdev", "driver=file,node-name=1x,filename=a.img"], "Invalid node-name: '1x'");
    let long = "file,node-name=abcdefghijklmnopqrstuvwxyz0123456,filename=a.img";
    fails(&["--blockdev", long], "Node name too long");
    let twice = "driver=file,node-name=f,filename=a.img";
    fails(&["--blockdev", twice, "--blockdev", twice], "Duplicate nodes with node-name='f'");
    fails(&["--blockdev", "raw,node-name=r,file=q"], "Cannot find device='q' nor node-name='q'");
}

#[test]
fn files_that_do_not_open() {
    fails(
        &["--blockdev", "driver=file,node-name=f,filename=/nonexistent"],
        "Could not open '/nonexistent': No such file or directory",
    );
    let text = refusal(&["--blockdev", "driver=file,node-name=f,filename=."]);
    assert!(text.contains("'.'") || text.contains("regular file"), "{text}");
}

#[test]
fn a_negative_size_is_an_error_and_no_abort() {
    if on_reference() {
        tests::skip!("the reference aborts");
    }
    let text = refusal(&["--blockdev", "null-co,node-name=f,size=-1"]);
    assert!(text.starts_with("--blockdev null-co,node-name=f,size=-1: ") && text.contains("size"), "{text}");
}

#[test]
fn things_are_defined_before_use() {
    let export = ["--export", "nbd,id=e,node-name=f"];
    fails(&[NULL, export].concat(), "NBD server not running");
    let text = refusal(&[NULL, export, SERVER].concat());
    assert_eq!(text, "--export nbd,id=e,node-name=f: NBD server not running");
    fails(&[SERVER, export].concat(), "Cannot find device='' nor node-name='f'");
    fails(&["--monitor", "c"], "chardev \"c\" not found");
}

#[test]
fn exports() {
    let read_only = ["--blockdev", "null-co,node-name=f,read-only=on"];
    let export = ["--export", "nbd,id=e,node-name=f"];
    fails(
        &[SERVER, read_only, ["--export", "nbd,id=e,node-name=f,writable=on"]].concat(),
        "Cannot export read-only node as writable",
    );
    fails(&[SERVER, NULL, export, export].concat(), "Block export id 'e' is already in use");
    let same_name = ["--export", "nbd,id=e2,node-name=f"];
    fails(&[SERVER, NULL, export, same_name].concat(), "NBD server already has export named 'f'");
    fails(&[SERVER, NULL, ["--export", "nbd,id=1e,node-name=f"]].concat(), "Invalid block export id");
    fails(&["--export", "type=foo,id=e,node-name=q"], "Parameter 'type' does not accept value 'foo'");
    fails(&["--export", "nbd,node-name=q"], "Parameter 'id' is missing");
}

#[test]
fn vduse_exports() {
    let export = |options: &str, text: &str| {
        let value = format!("vduse-blk,id=e,node-name=f{options}");
        fails(&[NULL[0], NULL[1], "--export", &value], text);
    };
    export("", "Parameter 'name' is missing");
    export(",name=x,num-queues=0", "num-queues must be greater than 0");
    export(",name=x,num-queues=65536", "Parameter 'num-queues' expects uint16_t");
    for size in [0, 1, 2, 3, 2048] {
        export(&format!(",name=x,queue-size={size}"), "queue-size is invalid");
    }
    for size in [511, 1 << 22] {
        let text = "parameter logical-block-size must be a power of 2 between 512 and 2097152";
        export(&format!(",name=x,logical-block-size={size}"), text);
    }
    if on_reference() {
        return;
    }
    for name in ["", "a/b", "..", "control"] {
        let text = format!("failed to create vduse device: '{name}' cannot be the name of a device");
        export(&format!(",name={name}"), &text);
    }
    if !std::path::Path::new("/dev/vduse/control").exists() {
        let text = "failed to create vduse device: /dev/vduse/control: No such file or directory (os error 2)";
        export(",name=x", text);
    }
}

#[test]
fn servers() {
    let second = ["--nbd-server", "addr.type=unix,addr.path=m.sock"];
    fails(&[SERVER, second].concat(), "NBD server already running");
    fails(
        &["--nbd-server", "addr.type=unix,addr.path=/nonexistent/n.sock"],
        "Failed to bind socket to /nonexistent/n.sock: No such file or directory",
    );
    fails(&["--nbd-server", "addr.type=inet,addr.host=127.0.0.1"], "Parameter 'addr.port' is missing");
    // The reference names the last part of a member only.
    let text = refusal(&["--nbd-server", "addr.type=foo"]).replace("'addr.type'", "'type'");
    assert_eq!(text, "--nbd-server addr.type=foo: Parameter 'type' does not accept value 'foo'");
    fails(
        &["--nbd-server", "addr.type=unix,addr.path=n.sock,max-connections=-1"],
        "Parameter 'max-connections' expects uint32_t",
    );
}

#[test]
fn chardevs_and_monitors() {
    fails(&["--chardev", "foo,id=c"], "'foo' is not a valid char driver name");
    fails(&["--chardev", "socket,path=q.sock,server=on,wait=off"], "chardev: no id specified");
    fails(&[CHARDEV, ["--monitor", "c,mode=readline"]].concat(), "Only QMP is supported");
    fails(&[CHARDEV, ["--monitor", "c"], ["--monitor", "c"]].concat(), "chardev 'c' is already in use");
}

#[test]
fn objects() {
    fails(&["--object", "iothread"], "Parameter 'id' is missing");
    fails(&["--object", "foo,id=a"], "Parameter 'qom-type' does not accept value 'foo'");
    let twice = ["--object", "iothread,id=a"];
    fails(&[twice, twice].concat(), "attempt to add duplicate property 'a' to object (type 'container')");
}

#[test]
fn pid_files_that_cannot_be_made() {
    assert_eq!(
        refusal(&["--pidfile", "/nonexistent/p"]),
        "cannot create PID file: Could not create '/nonexistent/p': No such file or directory"
    );
}

#[test]
fn help_as_a_value_starts_nothing() {
    for option in ["--blockdev", "--export", "--nbd-server"] {
        let ended = Setup::new().arg(option).arg("help").run();
        if on_reference() {
            assert_eq!(ended.status.code(), Some(1));
            assert!(ended.stderr.contains("Help is not available for this option"), "{}", ended.stderr);
        } else {
            assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
            assert!(ended.stdout.lines().count() > 1, "{option} help: {}", ended.stdout);
        }
    }
}
