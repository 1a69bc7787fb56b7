//! Network block devices: the [`BlockDevice`] trait, an NBD server and client, and the storage server as the fence.

mod buf;
mod device;
mod memory;

pub use buf::{BUF_ALIGN_BYTES, Buf};
pub use device::{BlockDevice, Device, DynBlockDevice, Geometry, IoError, WriteFlags, ZeroFlags};
pub use memory::MemoryDevice;
