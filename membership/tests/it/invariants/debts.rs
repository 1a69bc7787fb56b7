//! No debt is lost: what a removed life used is owed, and an item goes only after its proofs (R6, R7).

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, DebtItem, Epoch, Identity, ResourceId, ResourceKind, View};

#[derive(Default)]
pub(crate) struct Debts(Epoch);

impl Invariant for Debts {
    fn name(&self) -> &'static str {
        "debts"
    }

    fn check(&mut self, _: &Cluster, history: &History, _: &[Happening]) -> Result<(), String> {
        while let (before, Some(after)) = (history.views.get(&self.0), history.views.get(&self.0.next())) {
            if let Some(before) = before {
                compare(before, after)
                    .map_err(|e| format!("record {}, made for {:?}: {e}", after.epoch, after.cause))?;
            }
            self.0 = self.0.next();
        }
        Ok(())
    }
}

fn item<'a>(view: &'a View, who: Identity, resource: &ResourceId) -> Option<&'a DebtItem> {
    view.debts.get(&who).and_then(|d| d.items.get(resource))
}

fn compare(before: &View, after: &View) -> Result<(), String> {
    // A forced record contains what its node had accepted for that epoch, since that may have been decided: at most one
    // request to detach, of an owner that may be removed by the same record.
    let mut folded = matches!(after.cause, Cause::Forced { .. });
    for a in &before.attachments {
        let stays = after.attachments.contains(a);
        let asked = matches!(after.cause, Cause::Request { by, .. } if by == a.owner);
        if folded && !stays && item(after, a.owner, &a.resource).is_none() {
            folded = false;
            continue;
        }
        if after.contains(a.owner) {
            if !stays && !asked {
                return Err(format!("{} lost {} without asking", a.owner, a.resource));
            }
        } else {
            match item(after, a.owner, &a.resource) {
                Some(i) if i.attachment == *a && !i.fenced => (),
                other => return Err(format!("{} of removed {} is not owed: {other:?}", a.resource, a.owner)),
            }
        }
    }
    for (who, debt) in &before.debts {
        for (resource, old) in &debt.items {
            match item(after, *who, resource) {
                Some(new) => {
                    let back = (old.fenced && !new.fenced) || (old.rebuilt && !new.rebuilt);
                    if back || new.attachment != old.attachment {
                        return Err(format!("{resource} of {who} went back: {old:?} to {new:?}"));
                    }
                }
                None => may_close(before, *who, resource, old)?,
            }
        }
    }
    Ok(())
}

/// One record proves one thing, so all but the last proof must have been in the record before.
fn may_close(before: &View, who: Identity, resource: &ResourceId, old: &DebtItem) -> Result<(), String> {
    let rw = before.attached(resource).any(|a| a.journal.is_some());
    let fine = match resource.kind {
        ResourceKind::Lockspace => {
            let journal = before.debts[&who].items.iter().any(|(r, i)| {
                r.kind == ResourceKind::Filesystem
                    && i.attachment.lockspace.as_deref() == Some(&resource.name)
                    && i.attachment.journal.is_some()
                    && !(i.fenced && i.rebuilt)
            });
            (old.fenced || old.rebuilt) && !journal
        }
        ResourceKind::Filesystem if old.attachment.journal.is_some() => old.fenced && old.rebuilt && rw,
        ResourceKind::Filesystem => old.fenced || old.rebuilt,
        ResourceKind::BlockDevice => true,
        ResourceKind::Service => old.fenced,
    };
    if fine { Ok(()) } else { Err(format!("{resource} of {who} closed without its proofs: {old:?}")) }
}
