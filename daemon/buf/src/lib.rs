//! Reference-counted I/O buffers.
