//! The label: what makes a device a physical volume, and where its metadata areas are.
//!
//! ```text
//! sector   0        8        16    20      24        32 (contents)
//!          LABELONE sector#  crc   offset  LVM2 001  PV uuid (32) │ device bytes (8) │
//!          data areas (offset, size)*, 0,0 │ metadata areas (offset, size)*, 0,0 │ extension: version 2, flags │ 0,0
//! ```
//! Little-endian. The checksum covers bytes 20 to 511. The label is in one of the first four sectors.

use super::crc::crc;
use super::{SECTOR_BYTES, Uuid, u32_at, u64_at};

/// In how many sectors a label is looked for.
pub(crate) const LABEL_SECTORS: usize = 4;
/// The most areas of each kind that are read: a sector has room for no more.
const AREAS_MAX: usize = 24;
const CONTENTS: usize = 32;
const FLAG_USED: u32 = 1;

/// A part of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; 0 for a data area that goes to the device's end.
    pub size: u64,
}

/// A physical volume's label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// In which sector it is.
    pub sector: u64,
    /// The physical volume.
    pub uuid: Uuid,
    /// The device's size when it was made a physical volume.
    pub device_bytes: u64,
    /// Where data may be.
    pub data: Vec<Area>,
    /// Where metadata is.
    pub metadata: Vec<Area>,
    /// What is kept for a boot loader; not used here.
    pub bootloader: Vec<Area>,
    /// Whether it belongs to a volume group; only a hint.
    pub is_used: bool,
}

/// Why a sector is no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LabelError {
    /// There is no label: this is no physical volume.
    #[error("no physical volume label in the first four sectors")]
    None,
    /// The checksum does not fit: the label is damaged.
    #[error("the label in sector {sector} is damaged: checksum {found:#010x}, {computed:#010x} computed")]
    Checksum {
        /// Where.
        sector: u64,
        /// In the label.
        found: u32,
        /// Of its bytes.
        computed: u32,
    },
    /// It says that it belongs elsewhere: a copy, or a partition table that moved.
    #[error("the label in sector {sector} is of sector {says}")]
    OtherSector {
        /// Where it is.
        sector: u64,
        /// Where it says it is.
        says: u64,
    },
    /// Its contents make no sense though the checksum fits.
    #[error("the label in sector {sector} makes no sense: {reason}")]
    Contents {
        /// Where.
        sector: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

impl Label {
    /// Finds the label in the first sectors of a device.
    ///
    /// # Errors
    /// There is none, or the first one found is wrong.
    pub fn find(start: &[u8]) -> Result<Self, LabelError> {
        let mut wrong = LabelError::None;
        for (number, sector) in start.chunks_exact(SECTOR_BYTES).take(LABEL_SECTORS).enumerate() {
            if sector.starts_with(b"LABELONE") && sector.get(24..32) == Some(b"LVM2 001") {
                match Self::decode(number as u64, sector) {
                    Ok(label) => return Ok(label),
                    Err(error) => wrong = error,
                }
            }
        }
        Err(wrong)
    }

    fn decode(sector: u64, bytes: &[u8]) -> Result<Self, LabelError> {
        let contents = |reason| LabelError::Contents { sector, reason };
        let short = || contents("it is cut short");
        let found = u32_at(bytes, 16).ok_or_else(short)?;
        let computed = crc(bytes.get(20..SECTOR_BYTES).ok_or_else(short)?);
        if found != computed {
            return Err(LabelError::Checksum { sector, found, computed });
        }
        let says = u64_at(bytes, 8).ok_or_else(short)?;
        if says != sector {
            return Err(LabelError::OtherSector { sector, says });
        }
        let at = u32_at(bytes, 20).ok_or_else(short)? as usize;
        let header = bytes.get(at..).ok_or_else(short)?;
        let uuid = header.first_chunk().ok_or_else(short)?;
        let uuid = Uuid::from_bytes(*uuid).map_err(|_| contents("the physical volume's identifier"))?;
        let device_bytes = u64_at(header, 32).ok_or_else(short)?;
        let mut at = 40;
        let data = areas(header, &mut at).ok_or_else(short)?;
        let metadata = areas(header, &mut at).ok_or_else(short)?;
        // The extension may be missing in old labels.
        let version = u32_at(header, at).unwrap_or(0);
        let flags = u32_at(header, at + 4).unwrap_or(0);
        let is_used = 2 <= version && flags & FLAG_USED != 0;
        at += 8;
        let bootloader = if version == 0 { None } else { areas(header, &mut at) };
        let bootloader = bootloader.unwrap_or_default();
        Ok(Self { sector, uuid, device_bytes, data, metadata, bootloader, is_used })
    }

    /// The sector.
    ///
    /// # Panics
    /// If it has more areas than fit.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut contents = Vec::new();
        contents.extend_from_slice(self.uuid.as_bytes());
        contents.extend_from_slice(&self.device_bytes.to_le_bytes());
        for list in [&self.data, &self.metadata] {
            for area in list {
                contents.extend_from_slice(&area.offset.to_le_bytes());
                contents.extend_from_slice(&area.size.to_le_bytes());
            }
            contents.extend_from_slice(&[0; 16]);
        }
        contents.extend_from_slice(&2_u32.to_le_bytes());
        contents.extend_from_slice(&(if self.is_used { FLAG_USED } else { 0 }).to_le_bytes());
        for area in &self.bootloader {
            contents.extend_from_slice(&area.offset.to_le_bytes());
            contents.extend_from_slice(&area.size.to_le_bytes());
        }
        assert!(CONTENTS + contents.len() + 16 <= SECTOR_BYTES, "a label has room for its areas");
        let mut sector = [0; SECTOR_BYTES];
        sector[..8].copy_from_slice(b"LABELONE");
        sector[8..16].copy_from_slice(&self.sector.to_le_bytes());
        sector[20..24].copy_from_slice(&(CONTENTS as u32).to_le_bytes());
        sector[24..32].copy_from_slice(b"LVM2 001");
        sector[CONTENTS..CONTENTS + contents.len()].copy_from_slice(&contents);
        let sum = crc(&sector[20..]);
        sector[16..20].copy_from_slice(&sum.to_le_bytes());
        sector
    }
}

/// Reads areas up to the pair of zeros that ends them.
fn areas(header: &[u8], at: &mut usize) -> Option<Vec<Area>> {
    let mut areas = Vec::new();
    while areas.len() <= AREAS_MAX {
        let area = Area { offset: u64_at(header, *at)?, size: u64_at(header, *at + 8)? };
        *at += 16;
        if area == (Area { offset: 0, size: 0 }) {
            return Some(areas);
        }
        areas.push(area);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> Label {
        Label {
            sector: 1,
            uuid: Uuid::from_bytes([b'a'; 32]).unwrap(),
            device_bytes: 64 << 20,
            data: vec![Area { offset: 1 << 20, size: 0 }],
            metadata: vec![Area { offset: 4096, size: 1_044_480 }],
            bootloader: vec![],
            is_used: true,
        }
    }

    #[test]
    fn the_offsets_are_those_of_the_fact_sheet() {
        let bytes = label().encode();
        assert_eq!(&bytes[..8], b"LABELONE");
        assert_eq!(u64_at(&bytes, 8), Some(1));
        assert_eq!(u32_at(&bytes, 20), Some(32));
        assert_eq!(&bytes[32..64], &[b'a'; 32]);
        assert_eq!(u64_at(&bytes, 64), Some(64 << 20));
        assert_eq!((u64_at(&bytes, 72), u64_at(&bytes, 80)), (Some(1 << 20), Some(0)));
        assert_eq!((u64_at(&bytes, 104), u64_at(&bytes, 112)), (Some(4096), Some(1_044_480)));
        // The extension of a volume with one metadata area is at byte 136 of the sector.
        assert_eq!((u32_at(&bytes, 136), u32_at(&bytes, 140)), (Some(2), Some(1)));
    }

    #[test]
    fn it_is_found_where_it_belongs_and_nowhere_else() {
        let mut start = vec![0; 4 * SECTOR_BYTES];
        assert_eq!(Label::find(&start), Err(LabelError::None));
        start[SECTOR_BYTES..2 * SECTOR_BYTES].copy_from_slice(&label().encode());
        assert_eq!(Label::find(&start), Ok(label()));
        let booted = Label { bootloader: vec![Area { offset: 2 << 20, size: 1 << 20 }], ..label() };
        start[SECTOR_BYTES..2 * SECTOR_BYTES].copy_from_slice(&booted.encode());
        assert_eq!(Label::find(&start), Ok(booted), "what is kept for a boot loader is not lost");
        start[SECTOR_BYTES..2 * SECTOR_BYTES].copy_from_slice(&label().encode());
        start.rotate_left(SECTOR_BYTES);
        assert_eq!(Label::find(&start), Err(LabelError::OtherSector { sector: 0, says: 1 }));
    }

    #[test]
    fn every_damaged_byte_is_seen() {
        for at in 8..SECTOR_BYTES {
            let mut start = vec![0; SECTOR_BYTES];
            start.extend_from_slice(&label().encode());
            start[SECTOR_BYTES + at] ^= 0x55;
            assert!(Label::find(&start).is_err(), "byte {at}");
        }
    }
}
