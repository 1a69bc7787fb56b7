//! The face of every block device of the workspace, and its twin that can be a trait object.

use crate::Buf;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// What a device is like. Fixed while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Offsets and lengths must be multiples of this: a power of two from 1 to 65536.
    pub block_bytes: u32,
    /// Requests of this size and alignment are served best.
    pub preferred_bytes: u32,
    /// No read or write may be longer.
    pub transfer_bytes_max: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// `discard` does something.
    pub can_discard: bool,
}

/// How a write is to be carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Answer only when these bytes are durable.
    pub fua: bool,
}

/// How zeros are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Answer only when the zeros are durable.
    pub fua: bool,
    /// Leave the range allocated.
    pub no_hole: bool,
}

/// Why an operation of a block device failed.
///
/// Reads changed nothing. A failed write, discard or write of zeros may have happened in part, unless the variant says
/// otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoError {
    /// The range is not in the device. Nothing was done.
    #[error("{len} bytes at {offset} are not within the device's {size} bytes")]
    OutOfRange {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// The device's size.
        size: u64,
    },
    /// The range is not in whole blocks. Nothing was done.
    #[error("{len} bytes at {offset} are not whole blocks of {block} bytes")]
    Misaligned {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// The block size.
        block: u32,
    },
    /// The device is read-only. Nothing was done.
    #[error("the device is read-only")]
    ReadOnly,
    /// The backing has no room.
    #[error("no space left on the device")]
    NoSpace,
    /// The device failed.
    #[error("I/O error at {offset} ({detail})")]
    Failed {
        /// Where.
        offset: u64,
        /// What the layer below said.
        detail: String,
    },
    /// This life of the node may not use the device any more, and never will again (R9, R10).
    #[error("this node is fenced from the device: {detail}")]
    Fenced {
        /// Who said so.
        detail: String,
    },
    /// The device was shut down here, with the operation not carried out or its outcome unknown.
    #[error("the device is shut down")]
    Stopped,
}

/// A block device.
///
/// Reads see every write that was answered before they were issued; nothing orders operations that overlap in time.
/// A write is durable after a `flush` that was issued after its answer has succeeded, or if it had `fua`. Dropping a
/// future gives up the answer: the operation may still be carried out, and its buffer is kept alive until it has been.
pub trait BlockDevice: Send + Sync {
    /// What it is like.
    fn geometry(&self) -> Geometry;
    /// Fills `buf` with the bytes at `offset`.
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf, IoError>> + Send;
    /// Writes `buf` at `offset` and gives it back.
    fn write(
        &self,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<Buf, IoError>> + Send;
    /// Makes every write answered so far durable.
    fn flush(&self) -> impl Future<Output = Result<(), IoError>> + Send;
    /// Forgets the range; its contents are undefined afterwards. Does nothing where the device cannot.
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send;
    /// Makes the range read as zeros.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = Result<(), IoError>> + Send;
}

impl<T: BlockDevice + ?Sized> BlockDevice for &T {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf, IoError>> + Send {
        (**self).read(offset, buf)
    }
    fn write(
        &self,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<Buf, IoError>> + Send {
        (**self).write(offset, buf, flags)
    }
    fn flush(&self) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).flush()
    }
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).discard(offset, len)
    }
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).write_zeroes(offset, len, flags)
    }
}

impl<T: BlockDevice + ?Sized> BlockDevice for Arc<T> {
    fn geometry(&self) -> Geometry {
        (**self).geometry()
    }
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf, IoError>> + Send {
        (**self).read(offset, buf)
    }
    fn write(
        &self,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<Buf, IoError>> + Send {
        (**self).write(offset, buf, flags)
    }
    fn flush(&self) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).flush()
    }
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).discard(offset, len)
    }
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = Result<(), IoError>> + Send {
        (**self).write_zeroes(offset, len, flags)
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, IoError>> + Send + 'a>>;

/// [`BlockDevice`] as a trait object, for devices that are stacked at run time. Every `BlockDevice` is one.
pub trait DynBlockDevice: Send + Sync {
    /// See [`BlockDevice::geometry`].
    fn geometry_dyn(&self) -> Geometry;
    /// See [`BlockDevice::read`].
    fn read_dyn(&self, offset: u64, buf: Buf) -> Boxed<'_, Buf>;
    /// See [`BlockDevice::write`].
    fn write_dyn(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Boxed<'_, Buf>;
    /// See [`BlockDevice::flush`].
    fn flush_dyn(&self) -> Boxed<'_, ()>;
    /// See [`BlockDevice::discard`].
    fn discard_dyn(&self, offset: u64, len: u64) -> Boxed<'_, ()>;
    /// See [`BlockDevice::write_zeroes`].
    fn write_zeroes_dyn(&self, offset: u64, len: u64, flags: ZeroFlags) -> Boxed<'_, ()>;
}

impl<T: BlockDevice> DynBlockDevice for T {
    fn geometry_dyn(&self) -> Geometry {
        self.geometry()
    }
    fn read_dyn(&self, offset: u64, buf: Buf) -> Boxed<'_, Buf> {
        Box::pin(self.read(offset, buf))
    }
    fn write_dyn(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Boxed<'_, Buf> {
        Box::pin(self.write(offset, buf, flags))
    }
    fn flush_dyn(&self) -> Boxed<'_, ()> {
        Box::pin(self.flush())
    }
    fn discard_dyn(&self, offset: u64, len: u64) -> Boxed<'_, ()> {
        Box::pin(self.discard(offset, len))
    }
    fn write_zeroes_dyn(&self, offset: u64, len: u64, flags: ZeroFlags) -> Boxed<'_, ()> {
        Box::pin(self.write_zeroes(offset, len, flags))
    }
}

/// Some block device, shared. What clvm hands out and gfs mounts.
#[derive(Clone)]
pub struct Device(Arc<dyn DynBlockDevice>);

impl Device {
    /// Wraps a device.
    #[must_use]
    pub fn new(device: impl BlockDevice + 'static) -> Self {
        Self(Arc::new(device))
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Device").field(&self.0.geometry_dyn()).finish()
    }
}

impl BlockDevice for Device {
    fn geometry(&self) -> Geometry {
        self.0.geometry_dyn()
    }
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf, IoError>> + Send {
        self.0.read_dyn(offset, buf)
    }
    fn write(
        &self,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> impl Future<Output = Result<Buf, IoError>> + Send {
        self.0.write_dyn(offset, buf, flags)
    }
    fn flush(&self) -> impl Future<Output = Result<(), IoError>> + Send {
        self.0.flush_dyn()
    }
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send {
        self.0.discard_dyn(offset, len)
    }
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = Result<(), IoError>> + Send {
        self.0.write_zeroes_dyn(offset, len, flags)
    }
}

impl Geometry {
    /// Checks a range against size and block size.
    ///
    /// # Errors
    /// `OutOfRange` or `Misaligned`.
    pub fn check(&self, offset: u64, len: u64) -> Result<(), IoError> {
        if offset.checked_add(len).is_none_or(|end| self.size_bytes < end) {
            return Err(IoError::OutOfRange { offset, len, size: self.size_bytes });
        }
        let block = u64::from(self.block_bytes);
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return Err(IoError::Misaligned { offset, len, block: self.block_bytes });
        }
        Ok(())
    }
}
