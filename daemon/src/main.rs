//! Serves disk images without a virtual machine.
fn main() {}
