//! A logical volume as a block device: where each byte lies, and requests cut at the borders of segments and stripes.

use crate::format::SECTOR_BYTES;
use crate::model::{LogicalVolumeInfo, SegmentKind, VolumeGroup};
use futures_util::future::try_join_all;
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, WriteFlags, ZeroFlags};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

/// Why a volume cannot be used as a device. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A segment is of a type that this crate does not map.
    #[error("logical volume {volume} has a segment of type {kind}, which is not supported")]
    Type {
        /// The volume.
        volume: String,
        /// The type.
        kind: String,
    },
    /// A physical volume is not among the devices here.
    #[error("logical volume {volume}: physical volume {pv} is missing")]
    Missing {
        /// The volume.
        volume: String,
        /// Its name in the metadata, and its identifier.
        pv: String,
    },
    /// The device is smaller than the metadata says.
    #[error("logical volume {volume}: the device of {pv} ends before the volume's extents")]
    Short {
        /// The volume.
        volume: String,
        /// The physical volume.
        pv: String,
    },
    /// The volume has no extents.
    #[error("logical volume {volume} is empty")]
    Empty {
        /// The volume.
        volume: String,
    },
}

/// A run of a volume: bytes that lie on some devices in turns of `stripe_bytes`.
#[derive(Clone, Debug)]
struct Run {
    start: u64,
    len: u64,
    stripe_bytes: u64,
    /// Device and the byte at which this run begins on it.
    places: Vec<(usize, u64)>,
}

/// Where a volume's bytes are.
#[derive(Debug)]
struct Map {
    devices: Vec<Device>,
    runs: Vec<Run>,
    geometry: Geometry,
}

/// A piece of a request: device, offset there, length.
type Piece = (usize, u64, u64);

impl Map {
    fn new(
        group: &VolumeGroup,
        lv: &LogicalVolumeInfo,
        pvs: &BTreeMap<String, Device>,
        read_only: bool,
    ) -> Result<Self, MapError> {
        let volume = || format!("{}/{}", group.name, lv.name);
        let extent = group.extent_bytes();
        let mut names: Vec<&str> = Vec::new();
        let mut devices: Vec<Device> = Vec::new();
        let mut runs = Vec::new();
        for segment in &lv.segments {
            let (stripe_sectors, stripes) = match &segment.kind {
                SegmentKind::Striped { stripe_sectors, stripes } => (*stripe_sectors, stripes),
                SegmentKind::Other { kind } => {
                    return Err(MapError::Type { volume: volume(), kind: kind.clone() });
                }
            };
            let len = segment.extents * extent;
            let each = len / (stripes.len() as u64).max(1);
            let mut places = Vec::new();
            for (name, first) in stripes {
                let known = group.pv(name).zip(pvs.get(name));
                let Some((pv, device)) = known else {
                    return Err(MapError::Missing { volume: volume(), pv: name.clone() });
                };
                let at = pv.start_sectors * SECTOR_BYTES as u64 + first * extent;
                if device.geometry().size_bytes < at + each {
                    return Err(MapError::Short { volume: volume(), pv: name.clone() });
                }
                let index = names.iter().position(|n| n == name).unwrap_or_else(|| {
                    names.push(name);
                    devices.push(device.clone());
                    devices.len() - 1
                });
                places.push((index, at));
            }
            let stripe_bytes = if stripes.len() == 1 { len } else { stripe_sectors * SECTOR_BYTES as u64 };
            runs.push(Run { start: segment.start * extent, len, stripe_bytes, places });
        }
        let size_bytes = lv.extents() * extent;
        if size_bytes == 0 {
            return Err(MapError::Empty { volume: volume() });
        }
        let all: Vec<Geometry> = devices.iter().map(BlockDevice::geometry).collect();
        let geometry = Geometry {
            size_bytes,
            block_bytes: all.iter().map(|g| g.block_bytes).max().unwrap_or(1),
            preferred_bytes: all.iter().map(|g| g.preferred_bytes).max().unwrap_or(4096),
            transfer_bytes_max: all.iter().map(|g| g.transfer_bytes_max).min().unwrap_or(u32::MAX),
            read_only: read_only || !lv.is_writable() || all.iter().any(|g| g.read_only),
            can_discard: all.iter().all(|g| g.can_discard),
        };
        Ok(Self { devices, runs, geometry })
    }

    /// The pieces of a range that is within the volume, in order.
    fn pieces(&self, offset: u64, len: u64) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut at = offset;
        let end = offset + len;
        while at < end {
            // Runs are in order and leave no gaps.
            let index = self.runs.partition_point(|r| r.start + r.len <= at);
            let Some(run) = self.runs.get(index) else { break };
            let inside = at - run.start;
            let stripe = inside / run.stripe_bytes;
            let count = run.places.len() as u64;
            let (device, base) = run.places[(stripe % count) as usize];
            let within = inside % run.stripe_bytes;
            let there = base + stripe / count * run.stripe_bytes + within;
            let take = (run.stripe_bytes - within).min(run.len - inside).min(end - at);
            match pieces.last_mut() {
                Some((d, o, l)) if *d == device && *o + *l == there => *l += take,
                _ => pieces.push((device, there, take)),
            }
            at += take;
        }
        pieces
    }
}

/// A logical volume. Made by [`VolumeManager::activate`](crate::VolumeManager::activate), or alone for a single user.
#[derive(Debug)]
pub struct LogicalVolume {
    map: RwLock<Arc<Map>>,
    /// Held for reading by every request; for writing while the volume is closed. True once it is closed.
    closed: async_lock::RwLock<bool>,
}

impl LogicalVolume {
    /// The volume `lv` of `group` over its physical volumes, by their names in the metadata. Without any lock: for a tool
    /// that has the devices to itself.
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn new(
        group: &VolumeGroup,
        lv: &LogicalVolumeInfo,
        pvs: &BTreeMap<String, Device>,
        read_only: bool,
    ) -> Result<Self, MapError> {
        let map = Arc::new(Map::new(group, lv, pvs, read_only)?);
        Ok(Self { map: RwLock::new(map), closed: async_lock::RwLock::new(false) })
    }

    /// Takes over the metadata of a grown volume: requests from now on see the new size.
    pub(crate) fn remap(
        &self,
        group: &VolumeGroup,
        lv: &LogicalVolumeInfo,
        pvs: &BTreeMap<String, Device>,
        read_only: bool,
    ) -> Result<(), MapError> {
        let map = Arc::new(Map::new(group, lv, pvs, read_only)?);
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = map;
        Ok(())
    }

    /// Waits for requests under way, makes everything durable, and refuses requests from then on. If the flush fails the
    /// volume stays open (R12: nothing written under a lock may be left behind when the lock goes).
    pub(crate) async fn close(&self) -> Result<(), IoError> {
        let mut closed = self.closed.write().await;
        if !*closed {
            let map = self.map();
            if !map.geometry.read_only {
                try_join_all(map.devices.iter().map(BlockDevice::flush)).await?;
            }
            *closed = true;
        }
        Ok(())
    }

    fn map(&self) -> Arc<Map> {
        Arc::clone(&self.map.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The map, and a guard to hold until the request is answered.
    async fn enter(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<(Arc<Map>, async_lock::RwLockReadGuard<'_, bool>), IoError> {
        let guard = self.closed.read().await;
        if *guard {
            return Err(IoError::Stopped);
        }
        let map = self.map();
        map.geometry.check(offset, len)?;
        Ok((map, guard))
    }

    async fn enter_write(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<(Arc<Map>, async_lock::RwLockReadGuard<'_, bool>), IoError> {
        let entered = self.enter(offset, len).await?;
        if entered.0.geometry.read_only { Err(IoError::ReadOnly) } else { Ok(entered) }
    }
}

impl BlockDevice for LogicalVolume {
    fn geometry(&self) -> Geometry {
        self.map().geometry
    }

    async fn read(&self, offset: u64, mut buf: Buf) -> Result<Buf, IoError> {
        let (map, _guard) = self.enter(offset, buf.len() as u64).await?;
        let pieces = map.pieces(offset, buf.len() as u64);
        if let [(device, there, _)] = pieces[..] {
            return map.devices[device].read(there, buf).await;
        }
        let reads = pieces.iter().map(|(device, there, len)| {
            // A piece is no longer than the buffer.
            map.devices[*device].read(*there, Buf::zeroed(*len as usize))
        });
        let mut at = 0;
        for piece in try_join_all(reads).await? {
            buf[at..at + piece.len()].copy_from_slice(&piece);
            at += piece.len();
        }
        Ok(buf)
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        let (map, _guard) = self.enter_write(offset, buf.len() as u64).await?;
        let pieces = map.pieces(offset, buf.len() as u64);
        if let [(device, there, _)] = pieces[..] {
            return map.devices[device].write(there, buf, flags).await;
        }
        let mut at = 0;
        let mut writes = Vec::new();
        for (device, there, len) in pieces {
            let part = Buf::copy_of(&buf[at..at + len as usize]);
            at += len as usize;
            writes.push(map.devices[device].write(there, part, flags));
        }
        try_join_all(writes).await?;
        Ok(buf)
    }

    async fn flush(&self) -> Result<(), IoError> {
        let (map, _guard) = self.enter(0, 0).await?;
        try_join_all(map.devices.iter().map(BlockDevice::flush)).await?;
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let (map, _guard) = self.enter_write(offset, len).await?;
        let pieces = map.pieces(offset, len);
        try_join_all(pieces.iter().map(|(d, there, len)| map.devices[*d].discard(*there, *len))).await?;
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        let (map, _guard) = self.enter_write(offset, len).await?;
        let pieces = map.pieces(offset, len);
        let zeroes = pieces.iter().map(|(d, there, len)| map.devices[*d].write_zeroes(*there, *len, flags));
        try_join_all(zeroes).await?;
        Ok(())
    }
}
