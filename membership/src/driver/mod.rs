//! The network, the disk and the clock around the machines: certificates, transports, the running node.

pub mod pki;
mod runtime;

pub use runtime::{TokioRuntime, boottime};
