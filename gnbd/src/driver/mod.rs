//! What ties server and client to the TLS library: the only public signatures in which its types stand.

#[cfg(feature = "client")]
mod client;
#[cfg(feature = "server")]
mod server;

#[cfg(all(feature = "client", feature = "pki"))]
pub use client::ClientTlsError;
#[cfg(feature = "client")]
pub use client::{BadServerName, ClientTls};
#[cfg(feature = "server")]
pub use server::{Peer, ServerTls};
