//! A metadata area: its header with the places of the committed and the precommitted text, and the ring of texts.
//!
//! ```text
//! header   0    4                20       24     32    40 (slot 0)                 64 (slot 1)
//!          crc  magic (16 bytes) version  start  size  offset size crc flags (24)  the same
//! ```
//! Little-endian, 512 bytes, the checksum covers bytes 4 to 511. Slot 0 is what counts; slot 1 is written before a change
//! is committed. Offsets count from the header's start. Texts lie in the bytes from 512 to the area's end, as in a ring.

use super::crc::crc;
use super::{SECTOR_BYTES, u32_at, u64_at};

const MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";
const VERSION: u32 = 1;
const SLOTS: [usize; 2] = [40, 64];
const FLAG_IGNORED: u32 = 1;
/// Where the ring begins.
const RING: u64 = SECTOR_BYTES as u64;
/// The largest area that is read, in bytes.
pub(crate) const AREA_BYTES_MAX: u64 = 256 << 20;

/// Where a text is, and its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// From the header's start.
    pub offset: u64,
    /// With the NUL at its end.
    pub size: u64,
    /// Of these bytes.
    pub crc: u32,
    /// As found; bit 0 says that no metadata is kept here.
    pub flags: u32,
}

/// The header of a metadata area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MdaHeader {
    /// Where it is on the device, in bytes.
    pub start: u64,
    /// The area's size with the header, in bytes.
    pub size: u64,
    /// The text that counts; `None` in a physical volume without a group.
    pub committed: Option<Location>,
    /// The text of a change that is being made.
    pub precommitted: Option<Location>,
}

/// Why an area cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MdaError {
    /// The header is damaged or none.
    #[error("the header of the metadata area at {start} is damaged: {reason}")]
    Header {
        /// Where.
        start: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The text's place is not within the area.
    #[error("the text of the metadata area at {start} is out of bounds")]
    Bounds {
        /// The area.
        start: u64,
    },
    /// The text does not fit its checksum.
    #[error(
        "the text of the metadata area at {start} is damaged: checksum {found:#010x}, {computed:#010x} computed"
    )]
    Checksum {
        /// The area.
        start: u64,
        /// In the header.
        found: u32,
        /// Of the text.
        computed: u32,
    },
    /// The text has no room.
    #[error("metadata of {size} bytes does not fit the area, which takes {max}")]
    Full {
        /// The text's size.
        size: u64,
        /// What fits.
        max: u64,
    },
}

/// One or two pieces of a text in the ring, from the header's start: offset and length.
pub(crate) type Pieces = [(u64, u64); 2];

impl MdaHeader {
    /// An area without a text.
    #[must_use]
    pub fn empty(start: u64, size: u64) -> Self {
        Self { start, size, committed: None, precommitted: None }
    }

    /// Reads the header that is expected at `start`.
    ///
    /// # Errors
    /// It is damaged.
    pub fn decode(start: u64, bytes: &[u8]) -> Result<Self, MdaError> {
        let bad = |reason| MdaError::Header { start, reason };
        let short = || bad("it is cut short");
        let body = bytes.get(4..SECTOR_BYTES).ok_or_else(short)?;
        if u32_at(bytes, 0) != Some(crc(body)) {
            return Err(bad("its checksum does not fit"));
        }
        if bytes.get(4..20) != Some(&MAGIC[..]) || u32_at(bytes, 20) != Some(VERSION) {
            return Err(bad("no magic number, or another version"));
        }
        if u64_at(bytes, 24) != Some(start) {
            return Err(bad("it belongs elsewhere"));
        }
        let size = u64_at(bytes, 32).ok_or_else(short)?;
        if !(4 * RING..=AREA_BYTES_MAX).contains(&size) {
            return Err(bad("its size makes no sense"));
        }
        let [committed, precommitted] = SLOTS.map(|at| {
            let location = Location {
                offset: u64_at(bytes, at)?,
                size: u64_at(bytes, at + 8)?,
                crc: u32_at(bytes, at + 16)?,
                flags: u32_at(bytes, at + 20)?,
            };
            (location.offset != 0).then_some(location)
        });
        Ok(Self { start, size, committed, precommitted })
    }

    /// The 512 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[4..20].copy_from_slice(MAGIC);
        bytes[20..24].copy_from_slice(&VERSION.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.start.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.size.to_le_bytes());
        for (at, slot) in SLOTS.into_iter().zip([self.committed, self.precommitted]) {
            if let Some(l) = slot {
                bytes[at..at + 8].copy_from_slice(&l.offset.to_le_bytes());
                bytes[at + 8..at + 16].copy_from_slice(&l.size.to_le_bytes());
                bytes[at + 16..at + 20].copy_from_slice(&l.crc.to_le_bytes());
                bytes[at + 20..at + 24].copy_from_slice(&l.flags.to_le_bytes());
            }
        }
        let sum = crc(&bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Whether the area is kept without metadata.
    #[must_use]
    pub fn is_ignored(&self) -> bool {
        self.committed.is_some_and(|l| l.flags & FLAG_IGNORED != 0)
    }

    /// The longest text this area takes, so that the next one fits beside it.
    #[must_use]
    pub fn text_bytes_max(&self) -> u64 {
        ((self.size - RING) / 2).saturating_sub(RING)
    }

    /// Where a text lies, cut where the ring begins anew.
    ///
    /// # Errors
    /// It is not within the area.
    pub(crate) fn pieces(&self, location: &Location) -> Result<Pieces, MdaError> {
        let ring = self.size - RING;
        let bad = MdaError::Bounds { start: self.start };
        if location.offset < RING
            || self.size <= location.offset
            || location.size == 0
            || ring < location.size
        {
            return Err(bad);
        }
        let first = location.size.min(self.size - location.offset);
        Ok([(location.offset, first), (RING, location.size - first)])
    }

    /// Where a new text of these bytes goes: behind the committed one, at a multiple of 512, in the ring.
    ///
    /// # Errors
    /// It is too long.
    pub fn place(&self, text: &[u8]) -> Result<Location, MdaError> {
        let size = text.len() as u64;
        let max = self.text_bytes_max();
        if max < size {
            return Err(MdaError::Full { size, max });
        }
        let offset = match self.committed.map(|l| (l, self.pieces(&l))) {
            // A place that makes no sense protects nothing.
            None | Some((_, Err(_))) => RING,
            Some((l, Ok(pieces))) => {
                let end = if 0 < pieces[1].1 { RING + pieces[1].1 } else { l.offset + l.size };
                let next = end.next_multiple_of(RING);
                if self.size - RING < next { RING } else { next }
            }
        };
        Ok(Location { offset, size, crc: crc(text), flags: 0 })
    }

    /// Checks a text against its location.
    ///
    /// # Errors
    /// The checksum does not fit.
    pub fn check(&self, location: &Location, text: &[u8]) -> Result<(), MdaError> {
        let computed = crc(text);
        if computed == location.crc {
            Ok(())
        } else {
            Err(MdaError::Checksum { start: self.start, found: location.crc, computed })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_back_and_every_damaged_byte_is_seen() {
        let mut header = MdaHeader::empty(4096, 1_044_480);
        header.committed = Some(Location { offset: 512, size: 900, crc: 7, flags: 0 });
        header.precommitted = Some(Location { offset: 1536, size: 950, crc: 8, flags: 0 });
        let bytes = header.encode();
        assert_eq!(MdaHeader::decode(4096, &bytes), Ok(header));
        assert!(MdaHeader::decode(8192, &bytes).is_err());
        for at in 0..SECTOR_BYTES {
            let mut bad = bytes;
            bad[at] ^= 1;
            assert!(MdaHeader::decode(4096, &bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn texts_go_round_the_ring_and_never_over_the_committed_one() {
        let mut header = MdaHeader::empty(4096, 16 * 512);
        let mut offsets = Vec::new();
        for round in 0..200_usize {
            let text = vec![b'x'; 1 + (round * 397) % header.text_bytes_max() as usize];
            let new = header.place(&text).unwrap();
            let range = |l: &Location| {
                let pieces = header.pieces(l).unwrap();
                pieces.into_iter().flat_map(|(o, len)| o..o + len).collect::<std::collections::BTreeSet<_>>()
            };
            if let Some(old) = &header.committed {
                assert!(range(old).is_disjoint(&range(&new)), "round {round}");
            }
            assert!(
                new.offset.is_multiple_of(512) && range(&new).iter().all(|b| (512..16 * 512).contains(b))
            );
            offsets.push(new.offset);
            header.committed = Some(new);
        }
        assert!(offsets.windows(2).any(|w| w[1] < w[0]), "it went round");
        assert!(matches!(header.place(&vec![0; 4000]), Err(MdaError::Full { max: 3328, .. })));
    }
}
