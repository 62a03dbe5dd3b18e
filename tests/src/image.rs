//! Image contents: repeatable noise, patterns, allocation.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A small generator of repeatable noise (xorshift64*).
#[derive(Debug, Clone)]
pub struct Noise(u64);

impl Noise {
    /// Noise from a seed; every seed gives another sequence.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next_u64() >> 11) % bound
    }

    /// That many bytes of noise.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next_u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// How many bytes of the file are allocated on its file system.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).expect("look at an image").blocks() * 512
}

/// The whole file.
pub fn contents(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("read an image")
}
