//! The daemon's manual page: the definition of its command line, an example for each option, and the recipes of the book's
//! cookbook, which the test suite runs.

use crate::cli;
use clap::Command;
use std::fmt::Write;

const COOKBOOK: &str = include_str!("../../../docs/book/src/cookbook.md");

/// An example for each option that has a value.
const EXAMPLES: &[(&str, &str)] = &[
    ("blockdev", "--blockdev file,node-name=file,filename=disk.qcow2 --blockdev qcow2,node-name=disk,file=file"),
    ("chardev", "--chardev socket,id=char1,path=qmp.sock,server=on,wait=off"),
    ("export", "--export nbd,id=export,node-name=disk,name=disk,writable=on"),
    ("monitor", "--monitor chardev=char1"),
    ("nbd-server", "--nbd-server addr.type=inet,addr.host=::1,addr.port=10809,max-connections=10"),
    ("object", "--object throttle-group,id=limit,limits.iops-total=1000"),
    ("pidfile", "--pidfile /run/qsd.pid"),
    ("sandbox", "--sandbox strict,paths.0=/var/lib/images"),
    ("trace", "--trace 'control_*' --trace file=trace.log"),
];

/// The page.
pub fn page() -> String {
    let mut roff = Vec::new();
    clap_mangen::Man::new(with_examples(cli::command())).manual("Storage suite").render(&mut roff).unwrap();
    let mut page = String::from_utf8(roff).unwrap();
    page.push_str(".SH EXAMPLES\n");
    cookbook(&mut page);
    page.push_str(
        ".SH \"EXIT STATUS\"\n0 after it has served and ended as it was told to, 1 when it could not be set up. A signal that it does not \
         expect ends it as usual.\n\
         .SH \"SEE ALSO\"\n\\fBqemu\\-storage\\-daemon\\-qmp\\-ref\\fR(7), \\fBqemu\\-pr\\-helper\\fR(8), \\fBqemu\\fR(1), \
         \\fBqemu\\-block\\-drivers\\fR(7), \\fBnbdinfo\\fR(1)\n",
    );
    page
}

const ABOUT: &str = "Provides the disk images of QEMU, and what can be done with them, in a process of its own without a virtual \
    machine: block nodes, block jobs, exports, throttle groups, character devices, secrets, IOThreads. It is set up by \
    options and controlled over the QEMU Monitor Protocol (QMP), whose commands are in \
    qemu-storage-daemon-qmp-ref(7).\n\nNever modify an image that a running virtual machine or any other process uses: that may destroy it.";

fn with_examples(command: Command) -> Command {
    let command = command.long_about(ABOUT);
    EXAMPLES.iter().fold(command, |command, (name, example)| {
        command.mut_arg(name, |arg| {
            let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
            arg.long_help(format!("{help}\n\nExample: {example}"))
        })
    })
}

/// Text for roff: no character of it is a request.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

/// A line of a paragraph, with what stands in backticks in bold.
fn prose(line: &str) -> String {
    let mut out = String::new();
    for (number, part) in line.split('`').enumerate() {
        let part = escaped(part);
        let _ = if number % 2 == 1 { write!(out, "\\fB{part}\\fR") } else { write!(out, "{part}") };
    }
    out
}

/// The recipes, without what they print.
fn cookbook(page: &mut String) {
    let mut lines = COOKBOOK.lines().skip_while(|line| !line.starts_with("## "));
    while let Some(line) = lines.next() {
        if let Some(title) = line.strip_prefix("## ") {
            let _ = writeln!(page, ".SS \"{}\"", escaped(title));
        } else if let Some(info) = line.strip_prefix("```") {
            let text: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            if !info.ends_with("output") {
                let text: Vec<_> = text.into_iter().map(escaped).collect();
                let _ = writeln!(page, ".RS 4\n.nf\n{}\n.fi\n.RE", text.join("\n"));
            }
        } else if line.is_empty() {
            page.push_str(".PP\n");
        } else {
            let _ = writeln!(page, "{}", prose(line));
        }
    }
}

#[test]
fn every_option_with_a_value_has_an_example() {
    for arg in cli::command().get_arguments().filter(|arg| arg.get_action().takes_values()) {
        let name = arg.get_long().unwrap_or_default();
        assert!(EXAMPLES.iter().any(|(other, _)| *other == name), "--{name} has no example");
    }
    for (name, example) in EXAMPLES {
        let words: Vec<String> = example.split(' ').map(str::to_owned).collect();
        assert!(matches!(cli::parse(&words), Ok(cli::Invocation::Serve { .. })), "{name}: {example}");
    }
}

#[test]
fn text_is_no_request() {
    assert_eq!(escaped(".SH \\-x"), "\\&.SH \\e\\-x");
    assert_eq!(prose("as `-x` has it"), "as \\fB\\-x\\fR has it");
}
