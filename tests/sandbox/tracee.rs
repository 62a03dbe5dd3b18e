//! A thread of another process, stopped and made to make system calls: as an intruder would who runs code in it.
//!
//! The calls are made by the thread itself, under its own filter. A filter that refuses one raises SIGSYS, which is seen
//! here and goes no further, so that one thread can be asked many times and goes on afterwards as if nothing had been.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What became of a call.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made and gave this.
    Made(i64),
    /// The filter raised SIGSYS.
    Refused,
}

/// A stopped thread; it goes on when this is dropped.
pub struct Tracee {
    thread: Pid,
    /// Its registers where it was stopped.
    saved: libc::user_regs_struct,
    /// Where a `syscall` instruction is.
    instruction: u64,
}

fn wait(thread: Pid) -> WaitStatus {
    waitpid(thread, Some(WaitPidFlag::__WALL)).expect("wait for the thread")
}

impl Tracee {
    /// Stops a thread that waits in a system call.
    pub fn stop(thread: i32) -> Self {
        let thread = Pid::from_raw(thread);
        ptrace::attach(thread).expect("attach to the thread");
        assert!(matches!(wait(thread), WaitStatus::Stopped(_, Signal::SIGSTOP)));
        let saved = ptrace::getregs(thread).expect("read the registers");
        let instruction = saved.rip - 2;
        let mut bytes = [0; 2];
        let memory = File::open(format!("/proc/{thread}/mem")).expect("open the memory");
        memory.read_exact_at(&mut bytes, instruction).expect("read the memory");
        assert_eq!(bytes, [0x0f, 0x05], "the thread does not wait in a system call");
        Self { thread, saved, instruction }
    }

    /// Has it make a call; the arguments beyond the third are zero.
    pub fn call(&self, number: i64, [a, b, c]: [i64; 3]) -> Outcome {
        let mut regs = self.saved;
        regs.rip = self.instruction;
        // Not in a system call, so none is begun again.
        regs.orig_rax = u64::MAX;
        regs.rax = number.cast_unsigned();
        regs.rdi = a.cast_unsigned();
        regs.rsi = b.cast_unsigned();
        regs.rdx = c.cast_unsigned();
        (regs.r10, regs.r8, regs.r9) = (0, 0, 0);
        ptrace::setregs(self.thread, regs).expect("set the registers");
        loop {
            ptrace::step(self.thread, None).expect("make one step");
            match wait(self.thread) {
                WaitStatus::Stopped(_, Signal::SIGSYS) => return Outcome::Refused,
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    let regs = ptrace::getregs(self.thread).expect("read the registers");
                    // The end of the last step is told after its SIGSYS: this one has not begun.
                    if regs.rip != self.instruction {
                        return Outcome::Made(regs.rax.cast_signed());
                    }
                }
                other => panic!("{other:?} after call {number}"),
            }
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // If the thread is gone, so is what was to be restored.
        let _ = ptrace::setregs(self.thread, self.saved);
        let _ = ptrace::detach(self.thread, None);
    }
}
