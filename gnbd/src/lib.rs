//! Network block devices: the [`BlockDevice`] trait, an NBD server and client, and the storage server as the fence.
//!
//! It does not decide who is in the cluster (see `quorate_membership`): it believes proven records, and serves nobody
//! whom the newest installed one does not admit.
//!
//! ```text
//!  application ─▶ client::NbdDevice ─(NBD, TLS)─▶ server::Server ─▶ FileDevice ─▶ file or disk
//!                   └ client::queue::ClientQueue    └ fence::FenceServer ◀─ chains of decided records
//! ```
//!
//! The machines ([`fence::FenceServer`], [`client::queue::ClientQueue`], [`proto::Negotiation`]) have no clock, socket or
//! task; server and client are the tokio around them. **Guarantees**: see `docs/`, rules R9 to R12. **Limits**: towards a
//! plain NBD server (no hello) an old connection cannot be proven drained before the next one begins, so use cluster
//! exports where several nodes write.
//!
//! ```
//! use quorate_gnbd::{BlockDevice, Buf, MemoryDevice, WriteFlags};
//!
//! # async fn example() -> Result<(), quorate_gnbd::IoError> {
//! let device = MemoryDevice::new(1 << 20);
//! device.write(4096, Buf::copy_of(&[7; 512]), WriteFlags { fua: true }).await?;
//! let back = device.read(4096, Buf::zeroed(512)).await?;
//! assert_eq!(back[0], 7);
//! device.flush().await
//! # }
//! # futures_util::FutureExt::now_or_never(example()).expect("memory is ready at once").unwrap();
//! ```

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

#[cfg(all(test, feature = "sim"))]
#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;

pub use buf::{BUF_ALIGN_BYTES, Buf};
pub use device::{BlockDevice, Device, DynBlockDevice, Geometry, IoError, WriteFlags, ZeroFlags};
#[cfg(feature = "file")]
pub use file::{FileDevice, FileOpenError, FileOptions};
pub use memory::MemoryDevice;
