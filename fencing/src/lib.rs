//! I/O and power fencing: makes sure that a removed life of a node can do no harm, and proves it.

mod storage;

pub use storage::{StorageFence, StorageFenceError};
