//! The admin socket: how the commands talk to the node on this host.

pub mod client;
pub mod protocol;
pub mod server;
