//! No stage is fenced before the end of the debtor's lease, as the debtor's own clock has it (R8, R9).

use quorate_membership::{Identity, View};

/// The record `new` follows `old`; `acts` says whether a life acts under a valid lease at this instant.
pub(crate) fn on_record(old: &View, new: &View, acts: impl Fn(Identity) -> bool) {
    for (debtor, debt) in &old.debts {
        for (resource, _) in debt.items.iter().filter(|(_, i)| !i.fenced) {
            let after = new.debts.get(debtor).and_then(|d| d.items.get(resource));
            if after.is_none_or(|i| i.fenced) {
                assert!(
                    !acts(*debtor),
                    "lease first: {resource} of {debtor} is fenced by epoch {}, its lease holds",
                    new.epoch
                );
            }
        }
    }
}
