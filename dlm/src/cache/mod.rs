//! The lock cache: locks stay with the node between uses and are given up when another node asks.

mod api;

pub use api::{AcquireError, AcquireFlags, CacheClient, CacheMode};
