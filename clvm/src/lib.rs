//! LVM2 volume groups shared by a cluster: metadata as the real tools write it, logical volumes as block devices,
//! changes and activations under locks.
//!
//! It makes linear volumes and uses linear and striped ones; what else is in a group is kept as it is. It has no dm
//! tables: a [`LogicalVolume`] maps requests in this process.
//!
//! ```text
//!  VolumeManager ──▶ lock of the group (value block: newest sequence number) ──▶ read ─ change ─ two-phase commit
//!       └─ activate ──▶ lock of the volume (EX or PR) ──▶ ActiveVolume::device(): a BlockDevice
//! ```
//!
//! **Guarantees**: a reader sees the group before a change or after it, whatever crashes in between; whoever asks after a
//! change was answered sees it, on every node; an exclusively active volume is active on one node; an activation ends
//! only after a flush (R12). **Assumes**: the lockspace gives a dead node's locks to others only after that node is fenced
//! from the devices.
//!
//! ```
//! use quorate_clvm::{NewPv, SystemEntropy, Uuid, VolumeGroup, Writer};
//!
//! let id = |_| Uuid::random(&SystemEntropy);
//! let pv = NewPv {
//!     id: id(1)?,
//!     device: "disk".into(),
//!     device_bytes: 64 << 20,
//!     data_bytes: 1 << 20,
//!     data_end_bytes: 64 << 20,
//! };
//! let mut group = VolumeGroup::create("vg", id(2)?, 4 << 20, &[pv])?;
//! group.create_lv("lv", id(3)?, 10, "host", 0)?;
//! assert_eq!(group.free_extents(), 5);
//! let text = group.to_text(&Writer { description: "an example", host: "host", unix_seconds: 0 });
//! assert_eq!(VolumeGroup::parse(&text)?, group);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod error;
mod format;
mod locks;
mod manager;
mod model;
mod oneshot;
mod store;
mod volume;

pub use error::VolumeError;
pub use format::{
    Area, Entropy, Label, LabelError, Location, MdaError, MdaHeader, Node, SECTOR_BYTES, Section,
    SystemEntropy, TextError, Uuid, UuidError, Value,
};
pub use locks::LockFailure;
pub use manager::{Activation, ActiveVolume, ClusterVolumes, Survey, VolumeManager, VolumesConfig};
pub use model::{
    ChangeError, LogicalVolumeInfo, ModelError, NAME_BYTES_MAX, NewPv, PARTS_MAX, PhysicalVolume, Segment,
    SegmentKind, VolumeGroup, Writer,
};
pub use store::{AreaError, NamedDevice, Problem, StoreError};
pub use volume::{LogicalVolume, MapError};
