//! Takes from a process what it does not need.
