//! The versioned cluster configuration: one typed document, replicated on the cluster's views.
//!
//! It does not decide who is in the cluster or who votes: the view record does (see `quorate-membership`), and the
//! document mirrors it.
//!
//! ```text
//!  update(expected version, text) ─▶ coordinator ─▶ majority of votes has it on disk ─▶ committed ─▶ watchers
//! ```
//!
//! Start at [`parse`] for the document, at [`Replica::handle`] for the protocol (R17: primary-backup on views), and at
//! `driver::Ccs` for a running store. **Guarantees**: a committed version is never lost while a majority of the voters'
//! state directories lives, and never un-committed; versions rise by one; an update applies once, however often it is
//! asked for. **Limits**: [`DOCUMENT_BYTES_MAX`] bytes, [`HISTORY_MAX`] versions of history.
//!
//! ```
//! let document = quorate_ccs::parse(
//!     "name = \"demo\"\n[[node]]\nid = 1\nname = \"a\"\naddress = \"10.0.0.1:7411\"\n",
//! )?;
//! assert_eq!(document.nodes.len(), 1);
//! let error = quorate_ccs::parse("name = \"demo\"\nnodes = 3\n").unwrap_err();
//! assert_eq!((error.line, error.column), (2, 1));
//! # Ok::<(), quorate_ccs::DocumentError>(())
//! ```

mod check;
mod diff;
#[cfg(feature = "driver")]
pub mod driver;
mod entry;
mod face;
pub mod fields;
mod machine;
pub mod schema;
mod wire;

#[cfg(all(test, feature = "sim"))]
#[global_allocator]
static ALLOCATOR: quorate_membership::sim::CountingAllocator = quorate_membership::sim::CountingAllocator;

pub use check::{DocumentError, parse};
pub use diff::diff;
pub use entry::{Entry, HISTORY_MAX, RequestKey, Stored};
pub use face::{ConfigStore, StoreError};
#[cfg(any(test, feature = "sim"))]
pub use machine::Bug;
pub use machine::{ForeignHistory, Input, Output, Replica, Token, UPDATES_MAX, UpdateError};
pub use schema::{DOCUMENT_BYTES_MAX, Document};
