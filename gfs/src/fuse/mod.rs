//! A filesystem as a FUSE mount: the kernel's protocol, spoken here without a library.
//!
//! ```text
//!  /dev/fuse ─▶ codec ─▶ session ─▶ serve ─▶ Filesystem        (first poll on the reading thread,
//!      ▲                    │                                    later ones as a task of the Runtime)
//!      └──── reply ◀────────┴── request: interrupts, undo
//!      └──── notify ◀── Invalidation (threads of its own)
//! ```
//!
//! Three things decide its shape. A process that waits, for a file lock or for I/O, can be killed: interrupts are
//! answered. flock and fcntl locks are told apart. And dropping what the kernel has cached can wait in the kernel for a
//! read that waits for us, so it never happens on a thread that anything else needs.

pub mod codec;
mod device;
mod done;
mod mount;
mod notify;
mod request;
mod serve;
mod session;

pub use codec::ReaddirPlus;
pub use mount::{ConnectionId, MountError, MountOptions, UnmountError, UnmountMode, unmount};
pub use session::{End, Session, SessionOptions, THREADS_MAX};
