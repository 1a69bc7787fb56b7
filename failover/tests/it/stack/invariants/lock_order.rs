//! No block, and no journal entry of it, is written under an older grant than the newest one of its lock (R10 to R14).

use super::super::oracle::Write;
use quorate_dlm::FencingToken;
use quorate_membership::Identity;

/// `newest` is the newest grant of the block's lock that its holder was told of.
pub(crate) fn on_apply(newest: Option<&(FencingToken, Identity)>, write: &Write) {
    let Some((token, holder)) = newest else { return };
    assert!(
        *token <= write.token,
        "lock order: {} writes block {} under {:?}, {holder} was granted it with {token:?}",
        write.by,
        write.block,
        write.token
    );
}
