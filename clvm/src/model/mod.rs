//! A volume group as its metadata says: physical volumes, logical volumes and their segments.
//!
//! What this crate does not know (keys, segment types) is kept and written back as it was.

mod allocate;
mod change;
mod read;
mod write;

pub use change::{ChangeError, NewPv};
pub use read::ModelError;
pub use write::Writer;

use crate::format::{Section, Uuid};

/// The longest name of a group or a volume, and the longest sum of both, in bytes (LVM2's own limit).
pub const NAME_BYTES_MAX: usize = 127;
/// The most physical volumes, logical volumes, or segments of one volume that are read.
pub const PARTS_MAX: usize = 1 << 16;

/// A volume group.
#[derive(Clone, Debug, PartialEq)]
pub struct VolumeGroup {
    /// Its name.
    pub name: String,
    /// Its identifier.
    pub id: Uuid,
    /// Grows by one with every change.
    pub seqno: u32,
    /// What can be done with it.
    pub status: Vec<String>,
    /// The size of an extent, in sectors of 512 bytes.
    pub extent_sectors: u64,
    /// What it is made of. Names (`pv0`, …) are only used within the metadata.
    pub pvs: Vec<PhysicalVolume>,
    /// Its volumes, also hidden ones.
    pub lvs: Vec<LogicalVolumeInfo>,
    /// Everything else, as found.
    pub other: Section,
}

/// A physical volume of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct PhysicalVolume {
    /// Its name within the metadata.
    pub name: String,
    /// Its identifier, as in its label.
    pub id: Uuid,
    /// `ALLOCATABLE` and the like.
    pub status: Vec<String>,
    /// Where extent 0 starts, in sectors.
    pub start_sectors: u64,
    /// How many extents it has.
    pub extents: u64,
    /// Everything else, as found.
    pub other: Section,
}

/// A logical volume of a group.
#[derive(Clone, Debug, PartialEq)]
pub struct LogicalVolumeInfo {
    /// Its name.
    pub name: String,
    /// Its identifier.
    pub id: Uuid,
    /// `READ`, `WRITE`, `VISIBLE` and the like.
    pub status: Vec<String>,
    /// Its parts, in order and without gaps.
    pub segments: Vec<Segment>,
    /// Everything else, as found.
    pub other: Section,
}

/// A part of a logical volume.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    /// Its first extent within the volume.
    pub start: u64,
    /// How many extents it has.
    pub extents: u64,
    /// How it is stored.
    pub kind: SegmentKind,
    /// Everything else, as found.
    pub other: Section,
}

/// How a segment is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum SegmentKind {
    /// On one or more physical volumes in turns; with one it is a linear segment.
    Striped {
        /// The size of a turn, in sectors; 0 for a linear segment.
        stripe_sectors: u64,
        /// Name of the physical volume and first extent on it, for each.
        stripes: Vec<(String, u64)>,
    },
    /// Something this crate can keep and not use.
    Other {
        /// LVM2's name for it.
        kind: String,
    },
}

impl VolumeGroup {
    /// The logical volume of this name.
    #[must_use]
    pub fn lv(&self, name: &str) -> Option<&LogicalVolumeInfo> {
        self.lvs.iter().find(|lv| lv.name == name)
    }

    /// The physical volume with this name in the metadata.
    #[must_use]
    pub fn pv(&self, name: &str) -> Option<&PhysicalVolume> {
        self.pvs.iter().find(|pv| pv.name == name)
    }

    /// The size of an extent in bytes.
    #[must_use]
    pub fn extent_bytes(&self) -> u64 {
        self.extent_sectors * crate::format::SECTOR_BYTES as u64
    }

    /// Extents that no volume uses, on physical volumes that may be used.
    #[must_use]
    pub fn free_extents(&self) -> u64 {
        self.pvs
            .iter()
            .filter(|pv| pv.is_allocatable())
            .map(|pv| self.free(pv).iter().map(|(_, n)| n).sum::<u64>())
            .sum()
    }
}

impl PhysicalVolume {
    /// Whether new volumes may be put on it.
    #[must_use]
    pub fn is_allocatable(&self) -> bool {
        self.status.iter().any(|s| s == "ALLOCATABLE") && !self.is_missing()
    }

    /// Whether the group remembers it as lost.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        self.status.iter().any(|s| s == "MISSING")
    }
}

impl LogicalVolumeInfo {
    /// How many extents it has.
    #[must_use]
    pub fn extents(&self) -> u64 {
        self.segments.iter().map(|s| s.extents).sum()
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.status.iter().any(|s| s == "WRITE")
    }

    /// Whether it is meant for users, not a part of another volume.
    #[must_use]
    pub fn is_visible(&self) -> bool {
        self.status.iter().any(|s| s == "VISIBLE")
    }
}
