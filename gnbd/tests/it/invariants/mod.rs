//! What must hold after every step of the simulation.
//!
//! | file | statement | source |
//! |---|---|---|
//! | `late.rs` | no write of a removed life is applied after its fence was confirmed | R9 |
//! | `stale.rs` | no write is applied over a newer acknowledged one | R11, R12 |
//! | `durable.rs` | what was acknowledged and flushed is never lost | R12 |
//! | `visible.rs` | a read sees every write that was acknowledged before it was issued | `BlockDevice` |

pub(crate) mod durable;
pub(crate) mod late;
pub(crate) mod stale;
pub(crate) mod visible;
