//! Labels and metadata areas on block devices: finding groups, and the two-phase commit.
//!
//! A change is written in three rounds, each over every area of the group and ended by a flush of every device: the text
//! into the ring, the header with the text's place in slot 1, the header with it in slot 0. One header is one sector, so
//! each area goes from the old text to the new one in one step; of several areas the highest sequence number counts, so a
//! crash between two headers leaves the change made, and the next writer brings the others up.

use crate::format::label::LABEL_SECTORS;
use crate::format::mda::AREA_BYTES_MAX;
use crate::format::{Area, Label, LabelError, Location, MdaError, MdaHeader, SECTOR_BYTES, Uuid};
use crate::model::{ModelError, VolumeGroup};
use futures_util::future::try_join_all;
use quorate_gnbd::{BlockDevice, Buf, Device, IoError, WriteFlags};
use std::collections::{BTreeMap, BTreeSet};

/// Where the first metadata area of a new physical volume is, its size, and where data starts: LVM2's defaults.
const AREA: Area = Area { offset: 4096, size: (1 << 20) - 4096 };
const DATA_BYTES: u64 = 1 << 20;
/// GFS2's superblock: at 64 KiB, this magic number.
const GFS2_OFFSET: u64 = 64 << 10;
const GFS2_MAGIC: [u8; 4] = [0x01, 0x16, 0x19, 0x70];

/// A device by the name people know it by.
#[derive(Clone, Debug)]
pub struct NamedDevice {
    /// Its name, such as that of its export.
    pub name: String,
    /// The device.
    pub device: Device,
}

/// A physical volume that was found.
#[derive(Clone, Debug)]
pub(crate) struct FoundPv {
    pub(crate) named: NamedDevice,
    pub(crate) label: Label,
    pub(crate) areas: Vec<FoundArea>,
}

/// A metadata area that was found, readable or not.
#[derive(Clone, Debug)]
pub(crate) struct FoundArea {
    area: Area,
    pub(crate) header: Result<MdaHeader, MdaError>,
    /// The committed group, if there is one.
    pub(crate) group: Option<Result<VolumeGroup, AreaError>>,
}

/// Why an area's text gives no group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AreaError {
    /// Header, place or checksum.
    #[error(transparent)]
    Area(#[from] MdaError),
    /// The text itself.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Something that is wrong on a device and was worked around.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The device.
    pub device: String,
    /// In words.
    pub what: String,
}

/// I/O with a named device failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {source}")]
pub struct StoreError {
    /// The device.
    pub device: String,
    /// Why.
    pub source: IoError,
}

impl NamedDevice {
    fn fail(&self) -> impl Fn(IoError) -> StoreError + '_ {
        |source| StoreError { device: self.name.clone(), source }
    }

    /// Any range, whatever the device's blocks are.
    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, StoreError> {
        let block = u64::from(self.device.geometry().block_bytes);
        let from = offset - offset % block;
        let to = (offset + len as u64).next_multiple_of(block);
        let buf = self.device.read(from, Buf::zeroed((to - from) as usize)).await.map_err(self.fail())?;
        let skip = (offset - from) as usize;
        Ok(buf[skip..skip + len].to_vec())
    }

    /// Any range; what shares a block with it is read before and written back.
    async fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let block = u64::from(self.device.geometry().block_bytes);
        let from = offset - offset % block;
        let to = (offset + bytes.len() as u64).next_multiple_of(block);
        let mut buf = Buf::zeroed((to - from) as usize);
        if to - from != bytes.len() as u64 {
            buf = self.device.read(from, buf).await.map_err(self.fail())?;
        }
        let skip = (offset - from) as usize;
        buf[skip..skip + bytes.len()].copy_from_slice(bytes);
        self.device.write(from, buf, WriteFlags::default()).await.map_err(self.fail())?;
        Ok(())
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.device.flush().await.map_err(self.fail())
    }

    /// Looks for a label.
    pub(crate) async fn label(&self) -> Result<Result<Label, LabelError>, StoreError> {
        let len = LABEL_SECTORS * SECTOR_BYTES;
        if self.device.geometry().size_bytes < len as u64 {
            return Ok(Err(LabelError::None));
        }
        Ok(Label::find(&self.read(0, len).await?))
    }

    /// Whether a GFS2 filesystem lies directly on the device.
    pub(crate) async fn has_gfs2(&self) -> Result<bool, StoreError> {
        if self.device.geometry().size_bytes < GFS2_OFFSET + SECTOR_BYTES as u64 {
            return Ok(false);
        }
        Ok(self.read(GFS2_OFFSET, 4).await? == GFS2_MAGIC)
    }

    /// Makes it a physical volume of no group. Whatever was there is lost.
    pub(crate) async fn create_pv(&self, uuid: Uuid) -> Result<FoundPv, StoreError> {
        let label = Label {
            sector: 1,
            uuid,
            device_bytes: self.device.geometry().size_bytes,
            data: vec![Area { offset: DATA_BYTES, size: 0 }],
            metadata: vec![AREA],
            bootloader: vec![],
            is_used: false,
        };
        // The label last: without it nothing else is looked at.
        self.write(0, &[0; LABEL_SECTORS * SECTOR_BYTES]).await?;
        self.write(AREA.offset, &MdaHeader::empty(AREA.offset, AREA.size).encode()).await?;
        self.flush().await?;
        self.write(label.sector * SECTOR_BYTES as u64, &label.encode()).await?;
        self.flush().await?;
        let header = Ok(MdaHeader::empty(AREA.offset, AREA.size));
        Ok(FoundPv { named: self.clone(), label, areas: vec![FoundArea { area: AREA, header, group: None }] })
    }

    /// Reads label and areas; `None` for a device that is no physical volume.
    async fn scan(&self, problems: &mut Vec<Problem>) -> Result<Option<FoundPv>, StoreError> {
        let label = match self.label().await? {
            Ok(label) => label,
            Err(LabelError::None) => return Ok(None),
            Err(error) => {
                problems.push(Problem { device: self.name.clone(), what: error.to_string() });
                return Ok(None);
            }
        };
        let mut areas = Vec::new();
        for area in &label.metadata {
            let found = self.scan_area(*area).await?;
            let trouble = match (&found.header, &found.group) {
                (Err(error), _) => Some(error.to_string()),
                (_, Some(Err(error))) => Some(error.to_string()),
                _ => None,
            };
            problems.extend(trouble.map(|what| Problem { device: self.name.clone(), what }));
            areas.push(found);
        }
        Ok(Some(FoundPv { named: self.clone(), label, areas }))
    }

    async fn scan_area(&self, area: Area) -> Result<FoundArea, StoreError> {
        let device = self.device.geometry().size_bytes;
        let is_inside = area.offset.checked_add(area.size).is_some_and(|end| end <= device);
        if !is_inside || area.size < 4 * SECTOR_BYTES as u64 || AREA_BYTES_MAX < area.size {
            let header = Err(MdaError::Bounds { start: area.offset });
            return Ok(FoundArea { area, header, group: None });
        }
        let bytes = self.read(area.offset, SECTOR_BYTES).await?;
        let header = match MdaHeader::decode(area.offset, &bytes) {
            // The label, which the tools trust, says how large the area is.
            Ok(header) if header.size != area.size => Err(MdaError::Bounds { start: area.offset }),
            other => other,
        };
        let group = match &header {
            Ok(h) if !h.is_ignored() => match h.committed {
                Some(location) => Some(self.read_group(h, &location).await?),
                None => None,
            },
            _ => None,
        };
        Ok(FoundArea { area, header, group })
    }

    async fn read_group(
        &self,
        header: &MdaHeader,
        location: &Location,
    ) -> Result<Result<VolumeGroup, AreaError>, StoreError> {
        let pieces = match header.pieces(location) {
            Ok(pieces) => pieces,
            Err(error) => return Ok(Err(error.into())),
        };
        let mut text = Vec::new();
        for (offset, len) in pieces.into_iter().filter(|(_, len)| 0 < *len) {
            text.extend(self.read(header.start + offset, len as usize).await?);
        }
        if let Err(error) = header.check(location, &text) {
            return Ok(Err(error.into()));
        }
        Ok(VolumeGroup::parse(&text).map_err(AreaError::from))
    }
}

/// All physical volumes of some devices.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) pvs: Vec<FoundPv>,
    pub(crate) problems: Vec<Problem>,
}

impl Scan {
    /// Reads all devices.
    pub(crate) async fn read(devices: &[NamedDevice]) -> Result<Self, StoreError> {
        let mut scan = Self::default();
        for device in devices {
            if let Some(pv) = device.scan(&mut scan.problems).await? {
                scan.pvs.push(pv);
            }
        }
        let mut seen = BTreeSet::new();
        for pv in &scan.pvs {
            let devices = scan.devices_of(pv.label.uuid);
            if 1 < devices.len() && seen.insert(pv.label.uuid) {
                let what = format!("physical volume {} is on more than one device", pv.label.uuid);
                scan.problems.push(Problem { device: devices.join(", "), what });
            }
        }
        Ok(scan)
    }

    /// The devices that say they are the physical volume `id`.
    pub(crate) fn devices_of(&self, id: Uuid) -> Vec<String> {
        self.pvs.iter().filter(|pv| pv.label.uuid == id).map(|pv| pv.named.name.clone()).collect()
    }

    /// The newest text of every group, by identifier. A physical volume that its group's newest text does not know was
    /// taken out of it, and what it says is old.
    pub(crate) fn groups(&self) -> BTreeMap<Uuid, VolumeGroup> {
        let mut groups: BTreeMap<Uuid, VolumeGroup> = BTreeMap::new();
        let all = self.pvs.iter().flat_map(|pv| &pv.areas).filter_map(|a| a.group.as_ref()?.as_ref().ok());
        for group in all {
            let is_newer = groups.get(&group.id).is_none_or(|known| known.seqno < group.seqno);
            if is_newer {
                groups.insert(group.id, group.clone());
            }
        }
        groups
    }

    pub(crate) fn pv(&self, id: Uuid) -> Option<&FoundPv> {
        self.pvs.iter().find(|pv| pv.label.uuid == id)
    }
}

/// How a commit failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CommitError {
    /// Nothing counts of it: readers see the old group.
    #[error("not committed: {0}")]
    NotCommitted(StoreError),
    /// The text has no room.
    #[error(transparent)]
    Full(#[from] MdaError),
    /// There is no area to write it to.
    #[error("no metadata area is in use")]
    NoArea,
    /// Some areas may have it. Whoever reads next sees the old group or the new one, and a reader who saw the new one
    /// makes everybody see it with the next change.
    #[error("outcome unknown: {0}")]
    Unknown(StoreError),
}

/// One area while it is being written.
struct Target<'a> {
    named: &'a NamedDevice,
    area: Area,
    header: MdaHeader,
    new: Location,
}

/// Writes `text` as the group's newest metadata to every area of `pvs`.
pub(crate) async fn commit(pvs: &[&FoundPv], text: &[u8]) -> Result<(), CommitError> {
    let mut targets = Vec::new();
    for pv in pvs {
        for area in &pv.areas {
            // A damaged header is written anew: the label says that the area is there.
            let header =
                area.header.clone().unwrap_or_else(|_| MdaHeader::empty(area.area.offset, area.area.size));
            if header.is_ignored() {
                continue;
            }
            let new = header.place(text)?;
            targets.push(Target { named: &pv.named, area: area.area, header, new });
        }
    }
    if targets.is_empty() {
        return Err(CommitError::NoArea);
    }
    let before = CommitError::NotCommitted;
    try_join_all(targets.iter().map(|t| t.write_text(text))).await.map_err(before)?;
    flush(pvs).await.map_err(before)?;
    for target in &mut targets {
        target.header.precommitted = Some(target.new);
    }
    try_join_all(targets.iter().map(Target::write_header)).await.map_err(before)?;
    flush(pvs).await.map_err(before)?;
    for target in &mut targets {
        target.header.committed = Some(target.new);
        target.header.precommitted = None;
    }
    try_join_all(targets.iter().map(Target::write_header)).await.map_err(CommitError::Unknown)?;
    flush(pvs).await.map_err(CommitError::Unknown)
}

async fn flush(pvs: &[&FoundPv]) -> Result<(), StoreError> {
    try_join_all(pvs.iter().map(|pv| pv.named.flush())).await.map(|_| ())
}

impl Target<'_> {
    async fn write_text(&self, text: &[u8]) -> Result<(), StoreError> {
        // Places were computed by the header itself, so they are within the area.
        let pieces = self.header.pieces(&self.new).unwrap_or([(0, 0), (0, 0)]);
        let mut rest = text;
        for (offset, len) in pieces.into_iter().filter(|(_, len)| 0 < *len) {
            let (piece, tail) = rest.split_at(len as usize);
            rest = tail;
            let mut padded = piece.to_vec();
            padded.resize(piece.len().next_multiple_of(SECTOR_BYTES), 0);
            self.named.write(self.area.offset + offset, &padded).await?;
        }
        Ok(())
    }

    async fn write_header(&self) -> Result<(), StoreError> {
        self.named.write(self.area.offset, &self.header.encode()).await
    }
}

/// Marks physical volumes as used by a group. Only a hint for people's tools, so it comes after the commit.
pub(crate) async fn mark_used(pvs: &[&FoundPv]) -> Result<(), StoreError> {
    for pv in pvs.iter().filter(|pv| !pv.label.is_used) {
        let label = Label { is_used: true, ..pv.label.clone() };
        pv.named.write(label.sector * SECTOR_BYTES as u64, &label.encode()).await?;
        pv.named.flush().await?;
    }
    Ok(())
}
