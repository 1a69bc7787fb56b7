//! The NBD client: a machine that decides what is sent and kept, and around it a device that outlives its connections.

#[cfg(feature = "client")]
mod ask;
#[cfg(feature = "client")]
mod connect;
#[cfg(feature = "client")]
mod device;
#[cfg(feature = "client")]
mod fence;
#[cfg(feature = "client")]
mod link;
#[cfg(feature = "client")]
mod path;
pub mod queue;
pub mod retained;

#[cfg(feature = "client")]
pub use ask::{ExportInfo, Listed, export_info, list_exports};
#[cfg(feature = "client")]
pub use connect::{ConnectError, tune};
#[cfg(feature = "client")]
pub use device::{ChainSource, Member, NbdConfig, NbdDevice};
#[cfg(feature = "client")]
pub use fence::{FenceClient, FenceClientError};
#[cfg(feature = "client")]
pub use path::{Path, PathError};
