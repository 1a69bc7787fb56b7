//! Changes of a volume group, as pure functions: what the group is afterwards, or why not.

use super::read::check_name;
use super::{LogicalVolumeInfo, NAME_BYTES_MAX, PhysicalVolume, SegmentKind, VolumeGroup};
use crate::format::{SECTOR_BYTES, Section, Uuid, Value};

/// Suffixes and prefixes of names that LVM2 keeps for parts of volumes.
const RESERVED: [&str; 18] = [
    "_mimage", "_mlog", "_rimage", "_rmeta", "_tdata", "_tmeta", "_cdata", "_cmeta", "_corig", "_cpool",
    "_cvol", "_pmspare", "_vorigin", "_wcorig", "_imeta", "_iorig", "_vdata", "_vorig",
];

/// A physical volume that a group takes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPv {
    /// As in its label.
    pub id: Uuid,
    /// What people call its device; only a hint.
    pub device: String,
    /// The device's size in bytes.
    pub device_bytes: u64,
    /// Where its data starts, in bytes.
    pub data_bytes: u64,
    /// Where its data ends, in bytes: at the device's end, or before what lies there (a second metadata area).
    pub data_end_bytes: u64,
}

/// Why a change was not made. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// A name that LVM2 does not allow.
    #[error("`{name}`: {reason}")]
    Name {
        /// The name.
        name: String,
        /// The rule.
        reason: &'static str,
    },
    /// The name is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// There is no such volume.
    #[error("volume group {group} has no logical volume {name}")]
    NoVolume {
        /// The group.
        group: String,
        /// The volume.
        name: String,
    },
    /// Too little room.
    #[error("{wanted} extents are wanted, {free} are free in volume group {group}")]
    NoSpace {
        /// The group.
        group: String,
        /// Wanted.
        wanted: u64,
        /// Free.
        free: u64,
    },
    /// An extent size or a volume size that cannot be.
    #[error("{0}")]
    Size(&'static str),
    /// The group may not be changed: it is exported, read-only, or another manager's.
    #[error("volume group {group} cannot be changed: {reason}")]
    NotOurs {
        /// The group.
        group: String,
        /// Why.
        reason: String,
    },
    /// The volume is of a type that this crate keeps and cannot change.
    #[error("logical volume {name} is of type {kind}, which cannot be changed here")]
    Type {
        /// The volume.
        name: String,
        /// Its type.
        kind: String,
    },
}

impl VolumeGroup {
    /// A new group with these physical volumes. `extent_bytes` is a power of two from 1 KiB to 4 GiB.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn create(name: &str, id: Uuid, extent_bytes: u64, pvs: &[NewPv]) -> Result<Self, ChangeError> {
        name_ok(name)?;
        if !extent_bytes.is_power_of_two() || !(1024..=4 << 30).contains(&extent_bytes) {
            return Err(ChangeError::Size("an extent is a power of two from 1 KiB to 4 GiB"));
        }
        let mut other = Section::default();
        other.push("format", "lvm2".into());
        other.push("flags", Value::Array(Vec::new()));
        for key in ["max_lv", "max_pv", "metadata_copies"] {
            other.push(key, Value::Int(0));
        }
        let mut group = Self {
            name: name.to_owned(),
            id,
            seqno: 0,
            status: ["RESIZEABLE", "READ", "WRITE"].map(str::to_owned).into(),
            extent_sectors: extent_bytes / SECTOR_BYTES as u64,
            pvs: Vec::new(),
            lvs: Vec::new(),
            other,
        };
        group.extend(pvs)?;
        group.seqno = 1;
        Ok(group)
    }

    /// Whether this crate may change the group.
    ///
    /// # Errors
    /// `NotOurs`.
    pub fn changeable(&self) -> Result<(), ChangeError> {
        let has = |word: &str| self.status.iter().any(|s| s == word);
        let reason = if has("EXPORTED") {
            "it is exported".to_owned()
        } else if has("CLUSTERED") {
            "it belongs to clvmd".to_owned()
        } else if !has("WRITE") || !has("RESIZEABLE") {
            "it is read-only or not resizeable".to_owned()
        } else if let Some(lock) =
            self.other.text("lock_type").filter(|t| matches!(*t, "dlm" | "sanlock" | "idm"))
        {
            format!("its locks are those of lvmlockd ({lock})")
        } else if let Some(system) = self.other.text("system_id").filter(|s| !s.is_empty()) {
            format!("it belongs to the host {system}")
        } else {
            return Ok(());
        };
        Err(ChangeError::NotOurs { group: self.name.clone(), reason })
    }

    /// Takes physical volumes in. The sequence number is raised by [`VolumeGroup::next`] alone.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn extend(&mut self, pvs: &[NewPv]) -> Result<(), ChangeError> {
        let mut added = Vec::new();
        for new in pvs {
            if self.pvs.iter().chain(&added).any(|pv: &PhysicalVolume| pv.id == new.id) {
                return Err(ChangeError::Exists(format!("physical volume {}", new.id)));
            }
            let end = new.data_end_bytes.min(new.device_bytes);
            let extents = end.saturating_sub(new.data_bytes) / self.extent_bytes();
            if extents == 0 {
                return Err(ChangeError::Size("the device has no room for one extent"));
            }
            let name = (0..)
                .map(|n| format!("pv{n}"))
                .find(|n| self.pv(n).is_none() && !added.iter().any(|pv| pv.name == *n));
            let sectors = |bytes: u64| bytes / SECTOR_BYTES as u64;
            let mut other = Section::default();
            other.push("device", new.device.as_str().into());
            other.push("flags", Value::Array(Vec::new()));
            other.push("dev_size", Value::Int(i64::try_from(sectors(new.device_bytes)).unwrap_or(i64::MAX)));
            added.push(PhysicalVolume {
                name: name.expect("there is always a next number"),
                id: new.id,
                status: vec!["ALLOCATABLE".to_owned()],
                start_sectors: sectors(new.data_bytes),
                extents,
                other,
            });
        }
        self.pvs.append(&mut added);
        Ok(())
    }

    /// Adds a linear volume of `extents`.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn create_lv(
        &mut self,
        name: &str,
        id: Uuid,
        extents: u64,
        host: &str,
        unix_seconds: u64,
    ) -> Result<(), ChangeError> {
        name_ok(name)?;
        let is_reserved = RESERVED.iter().any(|r| name.contains(r));
        if is_reserved || name.starts_with("snapshot") || name.starts_with("pvmove") {
            return Err(ChangeError::Name {
                name: name.to_owned(),
                reason: "LVM2 keeps such names for parts of volumes",
            });
        }
        if NAME_BYTES_MAX < self.name.len() + name.len() {
            return Err(ChangeError::Name {
                name: name.to_owned(),
                reason: "group and volume name are too long together",
            });
        }
        if self.lv(name).is_some() {
            return Err(ChangeError::Exists(format!("logical volume {}/{name}", self.name)));
        }
        let mut other = Section::default();
        other.push("flags", Value::Array(Vec::new()));
        other.push("creation_time", Value::Int(i64::try_from(unix_seconds).unwrap_or(i64::MAX)));
        other.push("creation_host", host.into());
        let mut lv = LogicalVolumeInfo {
            name: name.to_owned(),
            id,
            status: ["READ", "WRITE", "VISIBLE"].map(str::to_owned).into(),
            segments: Vec::new(),
            other,
        };
        lv.segments = self.room(&lv, extents)?;
        // Visible ones come before hidden ones.
        let at = self.lvs.iter().position(|l| !l.is_visible()).unwrap_or(self.lvs.len());
        self.lvs.insert(at, lv);
        Ok(())
    }

    /// Makes a volume larger by `extents`.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn extend_lv(&mut self, name: &str, extents: u64) -> Result<(), ChangeError> {
        let at = self.linear(name)?;
        let segments = self.room(&self.lvs[at], extents)?;
        self.lvs[at].segments = segments;
        Ok(())
    }

    /// Takes a volume away; its extents are free afterwards.
    ///
    /// # Errors
    /// See [`ChangeError`].
    pub fn remove_lv(&mut self, name: &str) -> Result<(), ChangeError> {
        let at = self.linear(name)?;
        let id = self.lvs[at].id.to_string();
        // A volume that others are built of, whatever their type is.
        let is_part = self.lvs.iter().filter(|l| l.name != name).any(|l| {
            let text = l.segments.iter().map(|s| s.other.to_string()).collect::<String>();
            text.contains(&format!("\"{name}\"")) || text.contains(&id)
        });
        if is_part {
            return Err(ChangeError::Type {
                name: name.to_owned(),
                kind: "a part of another volume".to_owned(),
            });
        }
        self.lvs.remove(at);
        Ok(())
    }

    /// The group with the next sequence number: what is written.
    #[must_use]
    pub fn next(mut self) -> Self {
        self.seqno += 1;
        self
    }

    fn room(&self, lv: &LogicalVolumeInfo, extents: u64) -> Result<Vec<super::Segment>, ChangeError> {
        if extents == 0 {
            return Err(ChangeError::Size("a volume has at least one extent"));
        }
        let (group, free) = (self.name.clone(), self.free_extents());
        self.grow(lv, extents).ok_or(ChangeError::NoSpace { group, wanted: extents, free })
    }

    /// The index of a volume all of whose segments are striped or linear.
    fn linear(&self, name: &str) -> Result<usize, ChangeError> {
        let found = self.lvs.iter().position(|lv| lv.name == name);
        let at =
            found.ok_or_else(|| ChangeError::NoVolume { group: self.name.clone(), name: name.to_owned() })?;
        for segment in &self.lvs[at].segments {
            if let SegmentKind::Other { kind } = &segment.kind {
                return Err(ChangeError::Type { name: name.to_owned(), kind: kind.clone() });
            }
        }
        if !self.lvs[at].is_visible() {
            return Err(ChangeError::Type { name: name.to_owned(), kind: "hidden".to_owned() });
        }
        Ok(at)
    }
}

fn name_ok(name: &str) -> Result<(), ChangeError> {
    check_name(name).map_err(|reason| ChangeError::Name { name: name.to_owned(), reason })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::write::Writer;

    fn uuid(c: u8) -> Uuid {
        Uuid::from_bytes([c; 32]).unwrap()
    }

    fn pv(c: u8, mib: u64) -> NewPv {
        NewPv {
            id: uuid(c),
            device: format!("/dev/{}", c as char),
            device_bytes: mib << 20,
            data_bytes: 1 << 20,
            data_end_bytes: mib << 20,
        }
    }

    fn group() -> VolumeGroup {
        VolumeGroup::create("vg", uuid(b'v'), 4 << 20, &[pv(b'a', 64), pv(b'b', 33)]).unwrap()
    }

    fn round_trip(group: &VolumeGroup) {
        let text = group.to_text(&Writer { description: "test", host: "h", unix_seconds: 1 });
        assert_eq!(VolumeGroup::parse(&text).as_ref(), Ok(group));
    }

    #[test]
    fn a_64_mib_device_has_15_extents_of_4_mib() {
        let group = group();
        assert_eq!((group.pvs[0].extents, group.pvs[1].extents, group.free_extents()), (15, 8, 23));
        round_trip(&group);
    }

    #[test]
    fn volumes_are_made_grown_and_removed() {
        let mut group = group();
        group.create_lv("one", uuid(b'1'), 10, "h", 1).unwrap();
        group.create_lv("two", uuid(b'2'), 8, "h", 1).unwrap();
        assert_eq!(group.lv("one").unwrap().segments.len(), 1);
        group.extend_lv("one", 3).unwrap();
        let one = group.lv("one").unwrap();
        assert_eq!((one.extents(), one.segments.len()), (13, 1), "it grows in place");
        assert_eq!(
            group.extend_lv("one", 3),
            Err(ChangeError::NoSpace { group: "vg".to_owned(), wanted: 3, free: 2 })
        );
        group.remove_lv("two").unwrap();
        group.extend_lv("one", 10).unwrap();
        assert_eq!(group.lv("one").unwrap().segments.len(), 2);
        assert_eq!(group.free_extents(), 0);
        group.check().unwrap();
        round_trip(&group);
    }

    #[test]
    fn what_lvm_would_refuse_is_refused() {
        let mut group = group();
        for bad in ["", "a b", "-x", "..", "x_rimage_0", "snapshot0", &"x".repeat(128)] {
            assert!(group.create_lv(bad, uuid(b'1'), 1, "h", 1).is_err(), "{bad}");
        }
        group.create_lv("one", uuid(b'1'), 1, "h", 1).unwrap();
        assert!(matches!(group.create_lv("one", uuid(b'2'), 1, "h", 1), Err(ChangeError::Exists(_))));
        assert!(matches!(group.extend(&[pv(b'a', 64)]), Err(ChangeError::Exists(_))));
        assert!(group.extend(&[pv(b'c', 2)]).is_err());
        assert!(VolumeGroup::create("vg", uuid(b'v'), 3 << 20, &[]).is_err());
        group.other.push("lock_type", "dlm".into());
        assert!(matches!(group.changeable(), Err(ChangeError::NotOurs { .. })));
    }

    #[test]
    fn unknown_keys_and_types_are_kept_and_their_extents_not_given_away() {
        let mut group = group();
        let text = group.to_text(&Writer { description: "d", host: "h", unix_seconds: 1 });
        let text = String::from_utf8(text).unwrap();
        let lv = "logical_volumes {\nm {\nid = \"333333-3333-3333-3333-3333-3333-333333\"\nstatus = [\"READ\", \
                  \"VISIBLE\"]\nnovel = 7\nsegment_count = 1\nsegment1 {\nstart_extent = 0\nextent_count = 5\n\
                  type = \"wonder\"\nparts = [\"pv0\", 2, \"pv1\", 0]\n}\n}\n}\n}\ncontents";
        let text = text.replace("}\ncontents", lv);
        group = VolumeGroup::parse(text.as_bytes()).unwrap();
        assert_eq!(group.free_extents(), 23 - 10);
        assert!(matches!(group.remove_lv("m"), Err(ChangeError::Type { .. })));
        let again =
            String::from_utf8(group.to_text(&Writer { description: "d", host: "h", unix_seconds: 1 }))
                .unwrap();
        assert!(again.contains("novel = 7") && again.contains("parts = [\"pv0\", 2, \"pv1\", 0]"));
        round_trip(&group);
    }

    #[test]
    fn broken_groups_are_refused_with_the_place() {
        let mut group = group();
        group.create_lv("one", uuid(b'1'), 10, "h", 1).unwrap();
        let good = String::from_utf8(group.to_text(&Writer { description: "d", host: "h", unix_seconds: 1 }))
            .unwrap();
        for (from, to) in [
            ("seqno = 1", "seqno = -1"),
            ("extent_size = 8192", "extent_size = 0"),
            ("extent_count = 10", "extent_count = 99"),
            ("start_extent = 0", "start_extent = 1"),
            ("segment_count = 1", "segment_count = 2"),
            ("stripes = [\"pv0\"", "stripes = [\"pv9\""),
            ("pe_count = 15", "pe_count = 99999999999999999"),
            ("version = 1", "version = 2"),
            ("type = \"striped\"\n", ""),
            ("status = [\"ALLOCATABLE\"]", "status = 7"),
        ] {
            assert!(good.contains(from), "{from}");
            assert!(VolumeGroup::parse(good.replace(from, to).as_bytes()).is_err(), "{from} -> {to}");
        }
    }
}
