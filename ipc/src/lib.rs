//! The protocols between the daemon, QEMU and the persistent-reservation helper.
