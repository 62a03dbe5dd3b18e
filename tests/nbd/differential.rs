//! The same sequences of requests to the program under test and to the reference: the same replies, the same images.

use tests::image::{Noise, contents};
use tests::nbd::{Client, Headers, Reply, Request, cmd, flag, opt};
use tests::{Daemon, Setup, program, skip};

const SIZE: u64 = 1 << 20;

/// One daemon with the image, one client of it.
fn side(setup: Setup, image: &[u8], headers: Headers, options: &str) -> (Daemon, Client, u32) {
    std::fs::write(setup.path("a.img"), image).unwrap();
    let daemon = setup
        .line(&format!("--blockdev file,node-name=f,filename=a.img{options}"))
        .nbd_server()
        .line("--export nbd,id=e,node-name=f,name=disk,writable=on")
        .start();
    let mut client = daemon.nbd();
    client.greet();
    client.negotiate(headers);
    let mut context = u32::MAX;
    if headers != Headers::Simple {
        context = client.set_contexts("disk", &["base:allocation"]).unwrap()["base:allocation"];
    }
    // Without asking for block sizes: a client that asks has promised to keep them.
    client.info(opt::GO, "disk", &[]).unwrap();
    (daemon, client, context)
}

/// A request that may be sound or not: near block borders, near the end, beyond it, with flags that fit or not.
fn request(noise: &mut Noise) -> Request {
    let cmd = [cmd::READ, cmd::READ, cmd::WRITE, cmd::WRITE, cmd::WRITE_ZEROES, cmd::TRIM, cmd::CACHE, cmd::FLUSH]
        .get(usize::try_from(noise.below(9)).unwrap())
        .copied()
        .unwrap_or(cmd::BLOCK_STATUS);
    let near = |noise: &mut Noise, unit: u64| (noise.below(SIZE / unit + 2) * unit).saturating_add(noise.below(5));
    let unit = [1, 512, 4096, 65536][usize::try_from(noise.below(4)).unwrap()];
    let offset = near(noise, unit).saturating_sub(2);
    let len = match noise.below(8) {
        0 => noise.below(4),
        1 => 4096 * (1 + noise.below(8)),
        2 => 65536 * (1 + noise.below(4)),
        _ => 1 + noise.below(10_000),
    };
    let mut flags =
        [0, 0, 0, flag::FUA, flag::NO_HOLE, flag::DF, flag::REQ_ONE][usize::try_from(noise.below(7)).unwrap()];
    let (offset, len) = if cmd == cmd::FLUSH { (0, 0) } else { (offset, len) };
    if cmd == cmd::CACHE {
        flags = 0;
    }
    let payload = if cmd == cmd::WRITE { noise.bytes(usize::try_from(len).unwrap()) } else { Vec::new() };
    Request { cmd, flags, offset, len, payload }
}

/// What must be equal in a reply: not how a read is cut into chunks or an extent list, not the words of an error.
fn essence(request: &Request, reply: &Reply, context: u32) -> (u32, Vec<u8>, Vec<u64>) {
    let mut status = Vec::new();
    if request.cmd == cmd::BLOCK_STATUS && reply.error == 0 {
        // The status of each 512-byte block that the first reply is sure to cover.
        let mut at = 0;
        for extent in &reply.extents[&context] {
            at += extent.len;
        }
        assert!(at > 0, "a status that does not progress");
        status.push(reply.extents[&context][0].flags);
    }
    let data = if reply.error == 0 { reply.data.clone() } else { Vec::new() };
    // The protocol asks for ENOSPC beyond the end; the reference says EINVAL.
    let error = if reply.error == crate::errno::ENOSPC { crate::errno::EINVAL } else { reply.error };
    (error, data, status)
}

#[test]
fn random_sequences() {
    let Some(reference) = program::reference() else {
        skip!("no reference program is installed");
    };
    for seed in 0..24 {
        let headers = [Headers::Simple, Headers::Structured, Headers::Extended][usize::try_from(seed % 3).unwrap()];
        let options = ["", ",discard=unmap", ",cache.direct=on", ",discard=unmap,detect-zeroes=unmap"]
            [usize::try_from(seed % 4).unwrap()];
        let mut noise = Noise::new(1000 + seed);
        let image = noise.bytes(usize::try_from(SIZE).unwrap());
        let (ours, mut our_client, our_context) = side(Setup::new(), &image, headers, options);
        let (theirs, mut their_client, their_context) = side(Setup::of(&reference), &image, headers, options);
        for step in 0..300 {
            let request = request(&mut noise);
            let ours = essence(&request, &our_client.call(&request), our_context);
            let theirs = essence(&request, &their_client.call(&request), their_context);
            assert!(
                ours == theirs,
                "seed {seed} step {step} {headers:?}{options}: cmd {} flags {:#x} {}+{}: errors {} and {}, status {:?} and {:?}",
                request.cmd,
                request.flags,
                request.offset,
                request.len,
                ours.0,
                theirs.0,
                ours.2,
                theirs.2
            );
        }
        assert!(contents(&ours.path("a.img")) == contents(&theirs.path("a.img")), "seed {seed}: the images differ");
    }
}
