//! One test binary for the crate.
#![expect(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod claim;
mod decoders;
mod fs;
mod fsck;
#[cfg(feature = "fuse")]
mod fuse;
#[cfg(feature = "fuse")]
mod host;
mod mkfs;
mod replay;
mod rescue;
mod tools;
#[cfg(feature = "fuse")]
mod uml;
