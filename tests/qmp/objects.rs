//! Objects and the tree they stand in: every property, wrong values, deletion while in use [drop-in A.9].

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tests::{Setup, on_reference, qmp, skip};

fn add(client: &mut qmp::Client, ty: &str, id: &str, properties: Value) -> Result<Value, String> {
    let mut arguments = json!({"qom-type": ty, "id": id});
    for (name, value) in properties.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    client.execute("object-add", arguments).map_err(|refusal| refusal.desc)
}

fn get(client: &mut qmp::Client, id: &str, property: &str) -> Result<Value, String> {
    let arguments = json!({"path": format!("/objects/{id}"), "property": property});
    client.execute("qom-get", arguments).map_err(|refusal| refusal.desc)
}

fn set(client: &mut qmp::Client, id: &str, property: &str, value: Value) -> Result<Value, String> {
    let arguments = json!({"path": format!("/objects/{id}"), "property": property, "value": value});
    client.execute("qom-set", arguments).map_err(|refusal| refusal.desc)
}

/// Base64 as a program of others makes it.
fn base64(bytes: &[u8]) -> String {
    let mut child = Command::new("base64").arg("-w0").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}

#[test]
fn secrets() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    fs::write(daemon.path("secret.txt"), "from a file").unwrap();
    let (key, iv) = (base64(&[b'k'; 32]), base64(&[b'i'; 16]));
    for (id, properties) in [
        ("plain", json!({"data": "abc"})),
        ("empty", json!({"data": ""})),
        ("file", json!({"file": "secret.txt"})),
        ("encoded", json!({"data": "//4=", "format": "base64"})),
        ("key", json!({"data": key, "format": "base64"})),
        ("nothing", json!({"data": "", "keyid": "key", "iv": iv, "format": "base64"})),
    ] {
        assert_eq!(add(&mut qmp, "secret", id, properties), Ok(json!({})), "{id}");
    }
    let not_encrypted = base64(&[b'x'; 16]);
    for (properties, text) in [
        (json!({}), "Either 'file' or 'data' must be provided"),
        (json!({"data": "a", "file": "secret.txt"}), "'file' and 'data' are mutually exclusive"),
        (json!({"data": "!!", "format": "base64"}), "Base64 data contains invalid characters"),
        (json!({"data": "x", "format": "hex"}), "Parameter 'format' does not accept value 'hex'"),
        (json!({"data": "x", "keyid": "none", "iv": iv}), "No secret with id 'none'"),
        (json!({"data": "x", "keyid": "plain", "iv": iv}), "Key should be 32 bytes in length"),
        (json!({"data": "x", "keyid": "key"}), "IV is required to decrypt secret"),
        (json!({"data": "x", "keyid": "key", "iv": base64(b"short")}), "IV should be 16 bytes in length not 5"),
        (json!({"data": "abcd", "keyid": "key", "iv": iv}), "Length 4 must be a multiple of block size 16"),
        (json!({"data": 5}), "Invalid parameter type for 'data', expected: string"),
        (json!({"data": "x", "color": "red"}), "Parameter 'color' is unexpected"),
    ] {
        assert_eq!(add(&mut qmp, "secret", "x", properties.clone()), Err(text.to_owned()), "{properties}");
    }
    let wrong = json!({"data": not_encrypted, "format": "base64", "keyid": "key", "iv": iv});
    let refusal = add(&mut qmp, "secret", "x", wrong).unwrap_err();
    assert!(refusal.starts_with("Incorrect number of padding bytes"), "{refusal}");
    let refusal = add(&mut qmp, "secret", "x", json!({"file": "/nonexistent"})).unwrap_err();
    assert!(refusal.starts_with("Unable to read /nonexistent: "), "{refusal}");
    add(&mut qmp, "iothread", "io", json!({})).unwrap();
    let refusal = add(&mut qmp, "secret", "x", json!({"data": "x", "keyid": "io", "iv": iv}));
    assert_eq!(refusal, Err("Object with id 'io' is not a secret".to_owned()));
    for (id, property, value) in [
        ("plain", "data", "abc"),
        ("plain", "file", ""),
        ("plain", "format", "raw"),
        ("plain", "keyid", ""),
        ("file", "file", "secret.txt"),
        ("file", "data", ""),
        ("encoded", "format", "base64"),
        ("nothing", "keyid", "key"),
        ("nothing", "iv", &iv),
        ("plain", "type", "secret"),
    ] {
        assert_eq!(get(&mut qmp, id, property), Ok(json!(value)), "{id}.{property}");
    }
    assert_eq!(get(&mut qmp, "plain", "color"), Err("Property 'secret.color' not found".to_owned()));
    assert_eq!(set(&mut qmp, "plain", "color", json!(1)), Err("Property 'secret.color' not found".to_owned()));
    for id in ["key", "plain", "empty", "file", "encoded", "nothing"] {
        qmp.ok("object-del", json!({"id": id}));
    }
}

/// A pipe whose other end takes its time holds up nobody but who asked.
#[test]
fn a_secret_from_a_slow_pipe() {
    if on_reference() {
        skip!("the reference waits for the pipe and does nothing else");
    }
    let mut daemon =
        Setup::new().qmp().line("--chardev socket,path=other.sock,server=on,wait=off,id=other --monitor other").start();
    let pipe = daemon.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let (mut qmp, mut other) = (daemon.qmp(), tests::qmp::Client::connect(&daemon.path("other.sock")));
    other.negotiate();
    let ask = json!({"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s", "file": pipe}});
    other.send(&ask.to_string());
    // A pipe can be opened for writing like this as soon as somebody reads.
    let open = || {
        let mut options = fs::OpenOptions::new();
        options.write(true).custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits()).open(&pipe).ok()
    };
    let mut writer = tests::wait_for("the command", open);
    // The name is taken, and nothing is to be seen of the object before it is there.
    let twice = add(&mut qmp, "secret", "s", json!({"data": "x"}));
    assert_eq!(twice, Err("attempt to add duplicate property 's' to object (type 'container')".to_owned()));
    assert_eq!(qmp.refused("object-del", json!({"id": "s"})), "object 's' not found");
    writer.write_all(b"0123456789").unwrap();
    qmp.ok("query-version", json!({}));
    writer.write_all(b"0123456789012345678901").unwrap();
    drop(writer);
    assert_eq!(other.answer(), json!({"return": {}}));
    // It is a key of 32 bytes.
    let refusal = add(&mut qmp, "secret", "t", json!({"data": "x", "keyid": "s", "iv": "MDEyMzQ1Njc4OWFiY2RlZg=="}));
    assert_eq!(refusal, Err("Length 1 must be a multiple of block size 16".to_owned()));
    // Nobody ever writes to this one: the daemon ends all the same.
    other.send(&ask.to_string().replace("\"s\"", "\"u\""));
    let _writer = tests::wait_for("the command", open);
    qmp.ok("quit", json!({}));
    assert!(daemon.wait().success());
}

#[test]
fn a_secret_that_openssl_encrypted_is_a_key_in_turn() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let spawned = Command::new("openssl")
        .args(["enc", "-aes-256-cbc", "-K", &hex(&[b'k'; 32]), "-iv", &hex(&[b'i'; 16])])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let Ok(mut openssl) = spawned else { skip!("there is no openssl") };
    openssl.stdin.take().unwrap().write_all(&[b'z'; 32]).unwrap();
    let encrypted = openssl.wait_with_output().unwrap().stdout;
    let (key, iv) = (base64(&[b'k'; 32]), base64(&[b'i'; 16]));
    add(&mut qmp, "secret", "key", json!({"data": key, "format": "base64"})).unwrap();
    let properties = json!({"data": base64(&encrypted), "format": "base64", "keyid": "key", "iv": iv});
    add(&mut qmp, "secret", "inner", properties).unwrap();
    // It has 32 bytes only if it was decrypted, padding and all; then it can be a key itself, of nothing here.
    let properties = json!({"data": "", "keyid": "inner", "iv": iv});
    assert_eq!(add(&mut qmp, "secret", "last", properties), Ok(json!({})));
    assert_eq!(get(&mut qmp, "inner", "data"), Ok(json!(base64(&encrypted))), "what is shown is what was given");
    if !on_reference() {
        let refusal = set(&mut qmp, "key", "data", json!("new")).unwrap_err();
        assert_eq!(refusal, "Property 'data' of a secret cannot be changed: make a new one");
    }
}

#[test]
fn secrets_of_the_keyring() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    for (properties, text) in [
        (json!({}), "Parameter 'serial' is missing"),
        (json!({"serial": "x"}), "Invalid parameter type for 'serial', expected: integer"),
    ] {
        assert_eq!(add(&mut qmp, "secret_keyring", "x", properties), Err(text.to_owned()));
    }
    let refusal = add(&mut qmp, "secret_keyring", "x", json!({"serial": 12345})).unwrap_err();
    assert!(refusal.starts_with("Unable to read serial key 00003039: "), "{refusal}");
    // A key that the kernel lets the daemon read, if the machine has the service and its tool.
    let made = Command::new("keyctl").args(["add", "user", "qsd-test", "abc", "@u"]).output();
    let Some(serial) = made.ok().and_then(|made| String::from_utf8(made.stdout).ok()?.trim().parse::<i32>().ok())
    else {
        skip!("no key can be made here")
    };
    add(&mut qmp, "secret_keyring", "k", json!({"serial": serial})).unwrap();
    assert_eq!(get(&mut qmp, "k", "serial"), Ok(json!(serial)));
    let removed = Command::new("keyctl").args(["unlink", &serial.to_string(), "@u"]).status();
    assert!(removed.is_ok());
}

#[test]
fn the_main_loop() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let bad = "bad thread-pool-min/thread-pool-max values";
    let out_of_range = "aio-max-batch value must be in range [0, 9223372036854775807]";
    assert_eq!(add(&mut qmp, "main-loop", "m", json!({"aio-max-batch": -1})), Err(out_of_range.to_owned()));
    let wrong = json!({"thread-pool-min": 5, "thread-pool-max": 4});
    assert_eq!(add(&mut qmp, "main-loop", "m", wrong), Err(bad.to_owned()));
    add(&mut qmp, "main-loop", "m", json!({"thread-pool-max": 8})).unwrap();
    assert_eq!(add(&mut qmp, "main-loop", "n", json!({})), Err("only one main-loop instance allowed".to_owned()));
    for (property, value) in [("aio-max-batch", 0), ("thread-pool-min", 0), ("thread-pool-max", 8)] {
        assert_eq!(get(&mut qmp, "m", property), Ok(json!(value)));
    }
    set(&mut qmp, "m", "aio-max-batch", json!(7)).unwrap();
    assert_eq!(get(&mut qmp, "m", "aio-max-batch"), Ok(json!(7)));
    assert_eq!(set(&mut qmp, "m", "thread-pool-min", json!(9)), Err(bad.to_owned()));
    assert_eq!(set(&mut qmp, "m", "aio-max-batch", json!(-1)), Err(out_of_range.to_owned()));
    let wrong = "Invalid parameter type for 'thread-pool-min', expected: integer";
    assert_eq!(set(&mut qmp, "m", "thread-pool-min", json!("x")), Err(wrong.to_owned()));
    assert_eq!(get(&mut qmp, "m", "poll-max-ns"), Err("Property 'main-loop.poll-max-ns' not found".to_owned()));
    assert_eq!(qmp.refused("object-del", json!({"id": "m"})), "object 'm' is in use, can not be deleted");
}

#[test]
fn threads_on_chosen_processors() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let affinity = |id: i64| {
        let status = fs::read_to_string(format!("/proc/{}/task/{id}/status", daemon.pid())).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
    };
    // Whichever processors there are, the test itself runs on one of them.
    let own = fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
    let first: u16 = own.split([',', '-']).next().unwrap().parse().unwrap();
    add(&mut qmp, "thread-context", "all", json!({})).unwrap();
    add(&mut qmp, "thread-context", "one", json!({"cpu-affinity": [first, 5000]})).unwrap();
    let id = get(&mut qmp, "one", "thread-id").unwrap().as_i64().unwrap();
    assert_eq!(affinity(id), first.to_string());
    assert_eq!(get(&mut qmp, "one", "cpu-affinity"), Ok(json!([first])));
    assert_eq!(affinity(get(&mut qmp, "all", "thread-id").unwrap().as_i64().unwrap()), own);
    for (properties, text) in [
        (json!({"cpu-affinity": []}), "CPU list is empty"),
        (json!({"cpu-affinity": [1000]}), "Setting CPU affinity failed: Invalid argument"),
        (json!({"node-affinity": [1000]}), "The nodes select no CPUs"),
        (json!({"node-affinity": [0], "cpu-affinity": [0]}), "Mixing CPU and node affinity not supported"),
        (json!({"cpu-affinity": 0}), "Invalid parameter type for 'cpu-affinity', expected: array"),
    ] {
        assert_eq!(add(&mut qmp, "thread-context", "x", properties.clone()), Err(text.to_owned()), "{properties}");
    }
    let not = |what: &str| Err(format!("Property 'thread-context.{what}"));
    assert_eq!(get(&mut qmp, "one", "node-affinity"), not("node-affinity' is not readable"));
    assert_eq!(set(&mut qmp, "one", "thread-id", json!(5)), not("thread-id' is not writable"));
    set(&mut qmp, "all", "cpu-affinity", json!([first])).unwrap();
    assert_eq!(get(&mut qmp, "all", "cpu-affinity"), Ok(json!([first])));
    qmp.ok("object-del", json!({"id": "one"}));
    tests::wait_for("its thread to end", || {
        (!fs::exists(format!("/proc/{}/task/{id}", daemon.pid())).unwrap()).then_some(())
    });
}

#[test]
fn types_and_their_properties() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let names = |list: &Value| -> Vec<String> {
        let mut names: Vec<_> =
            list.as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    let users = names(&qmp.ok("qom-list-types", json!({"implements": "user-creatable"})));
    for ty in ["iothread", "main-loop", "secret", "secret_keyring", "thread-context", "throttle-group"] {
        assert!(users.iter().any(|name| name == ty), "{ty} is not in {users:?}");
    }
    let files = names(&qmp.ok("qom-list-types", json!({"implements": "chardev-fd"})));
    assert_eq!(files, ["chardev-file", "chardev-pipe", "chardev-serial", "chardev-stdio"]);
    for (ty, expected) in [
        ("secret_common", "format iv keyid type"),
        ("secret", "data file format iv keyid type"),
        ("secret_keyring", "format iv keyid serial type"),
        ("main-loop", "aio-max-batch thread-pool-max thread-pool-min type"),
        ("thread-context", "cpu-affinity node-affinity thread-id type"),
        ("chardev-socket", "addr connected type"),
        ("chardev-mux", "type"),
    ] {
        let found = names(&qmp.ok("qom-list-properties", json!({"typename": ty})));
        assert_eq!(found.join(" "), expected, "{ty}");
    }
    if on_reference() {
        skip!("qom-list-get is of a newer release");
    }
    add(&mut qmp, "main-loop", "m", json!({})).unwrap();
    let both = qmp.ok("qom-list-get", json!({"paths": ["/objects/m", "/chardevs/qmp"]}));
    let value = |at: usize, name: &str| {
        let properties = both[at]["properties"].as_array().unwrap().clone();
        properties.into_iter().find(|property| property["name"] == name).unwrap()
    };
    assert_eq!(value(0, "thread-pool-max"), json!({"name": "thread-pool-max", "type": "int", "value": 64}));
    assert_eq!(value(1, "connected")["value"], true);
    assert_eq!(qmp.refused("qom-list-get", json!({"paths": ["/objects/none"]})), "Device '/objects/none' not found");
}

#[test]
fn thousands_of_objects_leave_nothing() {
    let daemon = super::monitored();
    let mut qmp = daemon.qmp();
    let round = |qmp: &mut qmp::Client| {
        add(qmp, "secret", "s", json!({"data": "x".repeat(5000)})).unwrap();
        add(qmp, "thread-context", "t", json!({})).unwrap();
        add(qmp, "throttle-group", "g", json!({})).unwrap();
        assert_eq!(
            add(qmp, "secret", "t", json!({"data": "x"})),
            Err("attempt to add duplicate property 't' to object (type 'container')".to_owned())
        );
        for id in ["s", "t", "g"] {
            qmp.ok("object-del", json!({"id": id}));
        }
    };
    round(&mut qmp);
    let before = daemon.usage();
    (0..500).for_each(|_| round(&mut qmp));
    tests::wait_for("the threads to end", || (daemon.usage().threads <= before.threads).then_some(()));
    assert_eq!(daemon.usage().descriptors, before.descriptors);
}

#[test]
fn help_names_types_and_properties() {
    let help = |text: &str| Setup::new().arg("--object").arg(text).run().stdout;
    let list = help("help");
    assert!(list.starts_with("List of user creatable objects:\n"), "{list}");
    for ty in ["main-loop", "secret", "secret_keyring", "thread-context"] {
        assert!(list.lines().any(|line| line == format!("  {ty}")), "{list}");
        assert!(help(&format!("{ty},help")).starts_with(&format!("{ty} options:\n")));
    }
    assert!(help("secret,help").contains("  keyid=<"));
}
