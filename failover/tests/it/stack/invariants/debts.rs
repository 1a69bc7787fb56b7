//! What a removed life had is owed until it is really cleaned up (R6, R7).

use quorate_membership::{Cause, Identity, ResourceId, ResourceKind, View};

/// What the surroundings know of a debt.
pub(crate) trait Facts {
    /// Whether the storage server has confirmed an epoch without this life.
    fn is_fenced(&self, who: Identity) -> bool;
    /// The block whose newest logged version in this journal is not in its place, if there is one.
    fn unreplayed(&self, journal: u32) -> Option<usize>;
}

/// The record `new` follows `old`.
pub(crate) fn on_record(old: &View, new: &View, facts: &impl Facts) {
    for attachment in old.attachments.iter().filter(|a| !new.contains(a.owner)) {
        let item = new.debts.get(&attachment.owner).and_then(|d| d.items.get(&attachment.resource));
        assert!(
            item.is_some(),
            "debts: {} had {}, is out by epoch {} and owes nothing for it",
            attachment.owner,
            attachment.resource,
            new.epoch
        );
    }
    for (debtor, debt) in &old.debts {
        for (resource, item) in &debt.items {
            let Some(after) = new.debts.get(debtor).and_then(|d| d.items.get(resource)) else {
                closes(new, *debtor, resource, item.attachment.journal, facts);
                continue;
            };
            assert!(
                item.fenced <= after.fenced && item.rebuilt <= after.rebuilt,
                "debts: {resource} of {debtor} goes back by epoch {}",
                new.epoch
            );
            if !item.fenced && after.fenced {
                assert!(facts.is_fenced(*debtor), "debts: {debtor} counts as fenced, no server said so");
            }
        }
    }
    assert!(
        !matches!(new.cause, Cause::Created) || new.debts.is_empty(),
        "debts: the first record has debts"
    );
}

fn closes(new: &View, debtor: Identity, resource: &ResourceId, journal: Option<u32>, facts: &impl Facts) {
    assert!(facts.is_fenced(debtor), "debts: {resource} of {debtor} is closed, no server has fenced it");
    if let (ResourceKind::Filesystem, Some(journal)) = (resource.kind, journal) {
        let block = facts.unreplayed(journal);
        assert!(
            block.is_none(),
            "debts: {resource} of {debtor} is closed by epoch {}, journal {journal} has block {block:?} still",
            new.epoch
        );
    }
}
