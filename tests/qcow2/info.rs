//! What `query-named-block-nodes` says of images: the same as the reference says of the same image.

use crate::qemu_img;
use serde_json::{Value, json};
use std::path::Path;
use tests::{Setup, program};

/// The description of the node `q` of an image that is only read, by the program at `program`.
fn described(program: &Path, dir: &Path, image: &str) -> Value {
    let daemon = Setup::of(program).qmp().start();
    let mut qmp = daemon.qmp();
    let path = dir.join(image);
    let file = json!({"driver": "file", "filename": path.to_str().unwrap()});
    qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": file, "read-only": true}));
    crate::node(&mut qmp, "q")
}

#[test]
fn the_same_as_the_reference() {
    let Some(reference) = program::reference() else { tests::skip!("the reference is not installed") };
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let create = |args: &str| {
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend(args.split_whitespace());
        qemu_img(dir, &all);
    };
    create("plain 3M");
    create("-o compat=0.10 old 3M");
    create("-o cluster_size=4k,refcount_bits=64,lazy_refcounts=on lazy 3M");
    create("-o extended_l2=on extended 3M");
    create("-o compression_type=zstd zstd 3M");
    // The reference takes a relative name as one from the directory that it runs in.
    let outside = dir.join("outside");
    create(&format!("-o data_file={},data_file_raw=on external 3M", outside.display()));
    create(&format!("-o data_file={}2 external2 3M", outside.display()));
    create("-b plain -F qcow2 overlay 3M");
    create("-b lazy -F qcow2 snapshots 3M");
    qemu_img(dir, &["snapshot", "-c", "one", "snapshots"]);
    qemu_img(dir, &["snapshot", "-c", "another with a longer name", "snapshots"]);
    create("bitmaps 3M");
    qemu_img(dir, &["bitmap", "--add", "bitmaps", "first"]);
    qemu_img(dir, &["bitmap", "--add", "-g", "512", "--disable", "bitmaps", "second"]);
    crate::poke(
        &{
            create("dirty 1M");
            dir.join("dirty")
        },
        79,
        &[1],
    );
    crate::poke(
        &{
            create("corrupt 1M");
            dir.join("corrupt")
        },
        79,
        &[2],
    );
    for image in [
        "plain",
        "old",
        "lazy",
        "extended",
        "zstd",
        "external",
        "external2",
        "overlay",
        "snapshots",
        "bitmaps",
        "dirty",
        "corrupt",
    ] {
        let (ours, theirs) = (described(program::under_test(), dir, image), described(&reference, dir, image));
        for member in ["file", "drv", "backing_file", "backing_file_depth", "encrypted", "ro"] {
            assert_eq!(ours[member], theirs[member], "{member} of {image}");
        }
        // Newer releases tell more.
        let (mut ours, mut theirs) = (ours["image"].clone(), theirs["image"].clone());
        for image in [&mut ours, &mut theirs] {
            strip(image);
        }
        assert_eq!(ours, theirs, "{image}");
    }
}

/// Takes the limits out, also of what is below.
fn strip(image: &mut Value) {
    let Some(members) = image.as_object_mut() else { return };
    members.remove("limits");
    if let Some(below) = members.get_mut("backing-image") {
        strip(below);
    }
}
