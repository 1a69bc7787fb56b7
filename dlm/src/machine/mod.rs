//! The lock manager as state machines: one resource with its queues, and (above it) who masters which resource.
//!
//! Nothing here reads a clock, sends a message or calls back: time and messages come in, effects go out.

pub(crate) mod deadlock;
mod flags;
mod hold;
mod lock;
pub(crate) mod map;
mod moved;
mod operations;
pub(crate) mod posix;
pub(crate) mod rare;
mod rebuild;
mod resource;
pub(crate) mod shard;
pub(crate) mod value;

pub(crate) use flags::{check_convert, check_request, check_unlock, is_down};
pub(crate) use hold::Assumed;
pub(crate) use lock::{Lock, LockKey, Pending};
pub(crate) use moved::MovedResource;
pub(crate) use resource::{Context, Event, Resource};
pub(crate) use value::Value;
