//! Random reads or writes of one file at a depth, to look at the system calls and the time of the engines:
//!
//! `strace -f -c target/debug/examples/engine FILE ring|threads direct|cached read|write DEPTH OPS`
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use buf::IoBuf;
use io::{Access, Engine, File, OpenHow, Params};
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

const BLOCK: usize = 4096;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, engine, cache, kind, depth, ops] = args.as_slice() else {
        println!("usage: engine FILE ring|threads direct|cached read|write DEPTH OPS");
        return;
    };
    let how = OpenHow {
        access: Access::ReadWrite,
        direct: cache == "direct",
        engine: if engine == "ring" { Engine::Ring } else { Engine::Threads },
    };
    let (writes, depth, ops) = (kind == "write", depth.parse::<u64>().unwrap(), ops.parse::<u64>().unwrap());
    io::run_main("engine", Params::default(), |thread| async move {
        println!("ring: {:?}", thread.ring_error());
        let file = Rc::new(File::open(Path::new(path), how).await.unwrap());
        let blocks = file.stat().await.unwrap().size / BLOCK as u64;
        let started = Instant::now();
        let lanes: Vec<_> = (0..depth)
            .map(|lane| {
                let file = Rc::clone(&file);
                tokio::task::spawn_local(async move {
                    let mut random = lane * 2_654_435_761 + 1;
                    for _ in 0..ops / depth {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let at = random % blocks * BLOCK as u64;
                        let buf = IoBuf::alloc(BLOCK);
                        if writes {
                            file.write_at(at, &buf, false).await.unwrap();
                        } else {
                            file.read_at(at, &buf).await.unwrap();
                        }
                    }
                })
            })
            .collect();
        for lane in lanes {
            lane.await.unwrap();
        }
        let time = started.elapsed();
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
        println!("{ops} in {time:?}; user {:?}, system {:?}", usage.user_time(), usage.system_time());
    })
    .unwrap();
}
