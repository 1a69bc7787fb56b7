//! Locks for programs in other processes: a service on a Unix socket, and the client for it.
//!
//! ```text
//!   program ── Client (a LockManager) ──Unix socket──▶ LockServer ──▶ the node's lock manager
//!              completion and blocking callbacks ◀────  one thread per connection
//! ```
//! The node's program starts a [`LockServer`] over its lock manager. A program connects a [`Client`], which is itself a
//! [`LockManager`](crate::LockManager): everything that works on a [`Lockspace`](crate::Lockspace) works in another
//! process too, [`Take`](crate::Take) for a lock as a value among it. Neither end needs an asynchronous runtime.
//!
//! * The kernel tells the server who is at the other end; [`AccessRules`] say which lockspaces that user may open. The
//!   lockspaces that the system keeps for itself (filesystems, volumes, services) are opened by nobody.
//! * A lockspace is joined when the first program opens it, and left some time after the last has gone.
//! * The end of the connection is the end of the process, as far as its locks go: what it waits for is withdrawn, what
//!   it holds is unlocked, and the value block of a lock that it held with VALBLK in PW or EX becomes invalid.
//! * A client that does not read what it is told is cut off when [`OUT_BYTES_MAX`] bytes wait for it.
//!
//! If the node's life ends, every lock of a client ends with [`Completion::Stopped`](crate::Completion::Stopped), as the
//! locks of programs within the node do.
//!
//! ```no_run
//! use quorate_dlm::service::Client;
//! use quorate_dlm::*;
//!
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("/var/lib/quorate/lock.sock".as_ref())?;
//! let space = client.open("backup", None)?;
//! let taken = Take::new(&space, LockRequest::new(LockName::new(b"nightly")?, Mode::EX)).wait()?;
//! println!("alone in the cluster, with token {:?}", taken.grant().token);
//! # Ok(())
//! # }
//! ```

mod access;
mod client;
mod connection;
mod protocol;
mod server;
mod spaces;

pub use crate::ProcessInfo;
pub use access::{AccessRule, AccessRules, Peer};
pub use client::{Client, ClientError};
#[cfg(feature = "sim")]
pub use protocol::TestFrames;
pub use protocol::{FRAME_BYTES_MAX, LOCKS_MAX, OUT_BYTES_MAX, VERSION};
pub use server::{CONNECTIONS_MAX, LockServer, ServerConfig};
