//! What must hold at every moment of the whole stack.
//!
//! | file | statement | source |
//! |---|---|---|
//! | `exclusion.rs` | no two incompatible grants are usable at one instant | R8, R13 |
//! | `lease_first.rs` | no stage is fenced before the end of the debtor's lease | R8, R9 |
//! | `late.rs` | no write of a life is applied after its fence was confirmed | R9 |
//! | `lock_order.rs` | no block is written under an older grant than the newest one | R10 to R14 |
//! | `lost_write.rs` | what was acknowledged and flushed is read by every later holder of the lock | R12, R14, R18 |
//! | `debts.rs` | what a removed life had is owed until it is really cleaned up | R6, R7 |

pub(crate) mod debts;
pub(crate) mod exclusion;
pub(crate) mod late;
pub(crate) mod lease_first;
pub(crate) mod lock_order;
pub(crate) mod lost_write;
