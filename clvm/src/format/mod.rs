//! LVM2's format on disk and as text, without any I/O.

pub(crate) mod crc;
pub(crate) mod label;
pub(crate) mod mda;
mod text;
mod uuid;

pub use label::{Area, Label, LabelError};
pub use mda::{Location, MdaError, MdaHeader};
pub use text::{Node, Section, TextError, Value};
pub use uuid::{Entropy, SystemEntropy, Uuid, UuidError};

/// LVM2 counts in sectors of this many bytes, whatever the device's own are.
pub const SECTOR_BYTES: usize = 512;

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
