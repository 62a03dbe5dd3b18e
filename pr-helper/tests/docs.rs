//! The manual page of the helper, made from the definition of its command line.
//!
//! It is committed so that it can be read without a build. The test fails when it is not what the code says; `make docs`
//! (which sets `UPDATE_DOCS=1`) writes it anew.
#![allow(clippy::unwrap_used, reason = "a test")]

use clap::CommandFactory;
use qemu_pr_helper::options::Options;

const MORE: &str = r#".SH "SOCKET ACTIVATION"
The helper takes one listening Unix socket from systemd:
.PP
.RS 4
.nf
[Socket]
ListenStream=/var/run/qemu\-pr\-helper.sock
.fi
.RE
.PP
\fB\-\-socket\fR and the options for its owner, permissions and label are the unit's affair then, and an error here.
.SH PRIVILEGES
After opening its socket the helper keeps CAP_SYS_RAWIO and no other capability, changes to \fB\-\-user\fR and \fB\-\-group\fR
if they are given, and gives up files and all system calls that it does not need. Who may connect is decided by the permissions of the
socket; who may do what, by \fB\-\-policy\fR, \fB\-\-allow\fR and \fB\-\-deny\fR.
.SH RULES
A command is refused if a \fB\-\-deny\fR rule matches it, or if there are \fB\-\-allow\fR rules and none does. A rule
names users, groups, units (a star may end them), devices (MAJOR:MINOR or a path), actions and keys; what it does not
name matches everything. The same in a file, for \fB\-\-policy\fR:
.PP
.RS 4
.nf
{ "allow": [ { "comment": "the cluster's guests, with keys of their own range",
               "units": ["machine\-qemu*"], "devices": ["/dev/sdb"],
               "keys": ["0xc100000000000000/0xff00000000000000"] },
             { "comment": "everybody may look", "actions": ["in"] } ],
  "deny":  [ { "comment": "only by hand", "actions": ["clear"] } ] }
.fi
.RE
.PP
Actions: \fBin\fR, \fBout\fR, read\-keys, read\-reservation, report\-capabilities, read\-full\-status, register,
register\-and\-ignore, register\-and\-move, reserve, release, clear, preempt, preempt\-and\-abort,
replace\-lost\-reservation. Keys are VALUE/MASK or VALUE, in hexadecimal; every key of a command that is not zero must
match an \fBallow\fR rule, any one a \fBdeny\fR rule.
.SH EXAMPLES
Serve QEMU and the storage daemon of the group \fIkvm\fR:
.PP
.RS 4
.nf
qemu\-pr\-helper \-\-socket /run/qemu\-pr\-helper.sock \-\-socket\-group kvm \-\-socket\-mode 660
.fi
.RE
.PP
Only the members of one group may change reservations, others may look:
.PP
.RS 4
.nf
qemu\-pr\-helper \-\-allow group=storage \-\-allow action=in
.fi
.RE
.PP
Use it:
.PP
.RS 4
.nf
qemu\-storage\-daemon \e
  \-\-object pr\-manager\-helper,id=helper,path=/run/qemu\-pr\-helper.sock \e
  \-\-blockdev host_device,node\-name=disk,filename=/dev/sdb,pr\-manager=helper
.fi
.RE
.SH SIGNALS
SIGTERM, SIGINT and SIGHUP: commands that run are finished and answered, the socket and the pid file are removed.
.SH "SEE ALSO"
\fBqemu\-storage\-daemon\fR(1), \fBsg_persist\fR(8), \fBsystemd.socket\fR(5)
"#;

#[test]
fn the_manual_page_is_current() {
    let mut page = Vec::new();
    clap_mangen::Man::new(Options::command()).section("8").manual("Storage suite").render(&mut page).unwrap();
    let page = String::from_utf8(page).unwrap() + MORE;
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/man/qemu-pr-helper.8");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, page).unwrap();
        return;
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        found == page,
        "docs/man/qemu-pr-helper.8 is not what the code says: run `make docs` and commit the result"
    );
}
