//! Why operations on volumes fail.

use crate::format::{LabelError, Uuid};
use crate::locks::LockFailure;
use crate::model::ChangeError;
use crate::store::StoreError;
use crate::volume::MapError;
use quorate_gnbd::IoError;

/// Why an operation on volumes failed. Unless the variant says otherwise nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VolumeError {
    /// There is no device of this name here.
    #[error("there is no device {0}")]
    NoDevice(String),
    /// The device is no physical volume.
    #[error("{device}: {source}")]
    NotPv {
        /// The device.
        device: String,
        /// What was found.
        source: LabelError,
    },
    /// The device has something on it that would be lost.
    #[error("{device} holds {what} already")]
    Occupied {
        /// The device.
        device: String,
        /// What.
        what: String,
    },
    /// Its label says that a group uses it, and no metadata here names it: taking it would take it from that group.
    #[error("{device} is a physical volume in use by a volume group that is not found here")]
    Used {
        /// The device.
        device: String,
    },
    /// Two devices say that they are the same physical volume: an image and its copy, most likely.
    #[error("physical volume {pv} is on more than one device: {}", devices.join(", "))]
    Duplicate {
        /// The identifier.
        pv: Uuid,
        /// The devices.
        devices: Vec<String>,
    },
    /// The device is too small.
    #[error("{device} has {bytes} bytes, a physical volume needs more than {min}")]
    TooSmall {
        /// The device.
        device: String,
        /// Its size.
        bytes: u64,
        /// What is needed.
        min: u64,
    },
    /// There is no group of this name on the devices here.
    #[error("there is no volume group {0}")]
    NoGroup(String),
    /// The name is taken.
    #[error("volume group {0} exists already")]
    GroupExists(String),
    /// Two groups of one name are on the devices here.
    #[error("two volume groups are called {name}: {ids:?}")]
    Ambiguous {
        /// The name.
        name: String,
        /// Their identifiers.
        ids: Vec<Uuid>,
    },
    /// A physical volume of the group is not here, so the group cannot be changed.
    #[error("volume group {group}: physical volume {pv} is missing")]
    Missing {
        /// The group.
        group: String,
        /// The identifier.
        pv: Uuid,
    },
    /// The change itself is impossible.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// The volume cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Another node (or another user here) has the volume active in a way that forbids this.
    #[error("logical volume {0} is active elsewhere")]
    Active(String),
    /// Reading or writing failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The metadata is too long for its area.
    #[error("volume group {group}: {detail}")]
    Full {
        /// The group.
        group: String,
        /// Sizes.
        detail: String,
    },
    /// No physical volume of the group has a metadata area in use.
    #[error("volume group {group}: no physical volume of it has room for metadata")]
    NoArea {
        /// The group.
        group: String,
    },
    /// A device failed in the last step of a change: it may have been made or not. Look before trying again.
    #[error("volume group {group}: whether the change was made is unknown: {detail}")]
    Unknown {
        /// The group.
        group: String,
        /// What failed.
        detail: String,
    },
    /// A lock was not got.
    #[error("the lock of {what}: {source}")]
    Lock {
        /// Of what.
        what: String,
        /// Why.
        source: LockFailure,
    },
    /// No random numbers for a new identifier.
    #[error("no random numbers: {0}")]
    Entropy(String),
    /// The last requests of the volume could not be made durable, so it stays active (R12).
    #[error("logical volume {volume} stays active: {source}")]
    Flush {
        /// The volume.
        volume: String,
        /// Why.
        source: IoError,
    },
    /// The work was given up: the node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

pub(crate) fn lock_error(what: impl Into<String>) -> impl FnOnce(LockFailure) -> VolumeError {
    let what = what.into();
    |source| VolumeError::Lock { what, source }
}
