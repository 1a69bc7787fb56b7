//! Network block devices: the [`BlockDevice`] trait, an NBD server and client, and the storage server as the fence.

mod buf;
pub mod client;
mod device;
#[cfg(any(feature = "client", feature = "server"))]
pub mod driver;
pub mod fence;
#[cfg(feature = "file")]
mod file;
mod memory;
pub mod proto;
#[cfg(feature = "server")]
pub mod server;

pub use buf::{BUF_ALIGN_BYTES, Buf};
pub use device::{BlockDevice, Device, DynBlockDevice, Geometry, IoError, WriteFlags, ZeroFlags};
#[cfg(feature = "file")]
pub use file::{FileDevice, FileOpenError, FileOptions};
pub use memory::MemoryDevice;
