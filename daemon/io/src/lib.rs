//! IOThreads, file engines, image locks.
