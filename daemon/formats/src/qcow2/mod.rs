//! QCOW2, versions 2 and 3, by the format's specification (docs/interop/qcow2 of QEMU).
//!
//! | module | noun |
//! | --- | --- |
//! | `header`, `extensions`, `start` | the first cluster |
//! | `create` | a new image |
//! | `entry` | L2 entries, standard and extended |
//! | `cache`, `cleaner` | metadata in memory |
//! | `image` | an open image; guest offset → place |
//! | `refcount` | host clusters: counted, claimed, released |
//! | `epoch` | when an unlinked cluster may be reused |
//! | `read`, `compress`, `unpacked` | reading |
//! | `write`, `packed`, `zero`, `resize` | changing |
//! | `flush` | what is written in which order |
//! | `handover` | what users that stay need when this process dies |
//! | `snapshot`, `switch` | internal snapshots; all metadata changes by one write of the header |
//! | `bitmap` | bitmaps of the image, which record writes |
//! | `guard`, `damage` | what is not overwritten, and what becomes of a damaged image |
//! | `check`, `repair` | checking and repairing |
//! | `info` | what an image says of itself |
//! | `options` | what can change while an image is open |
//! | `open`, `driver` | the image in the graph |

mod bitmap;
mod bytes;
mod cache;
pub mod check;
mod cleaner;
mod compress;
mod create;
mod damage;
mod driver;
mod entry;
mod epoch;
mod extensions;
mod flush;
mod guard;
mod handover;
mod header;
mod image;
mod info;
mod join;
mod open;
mod options;
mod packed;
mod read;
mod refcount;
mod reopen;
mod repair;
mod resize;
mod snapshot;
mod start;
mod switch;
mod unpacked;
mod write;
mod zero;

pub use create::create;
pub use image::Qcow2;
pub use open::open;
