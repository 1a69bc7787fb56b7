//! How a record changes when lives come and go, and the closing of debts that follows every change (R6, R7).
//!
//! Pure: a record in, the next record out.

use crate::{Cause, Debt, DebtItem, Evidence, Identity, NodeId, ResourceId, ResourceKind, View, VoterSet};
use std::collections::{BTreeMap, BTreeSet};

/// The record after `view`, unchanged but for number and cause.
pub(crate) fn following(view: &View, cause: Cause) -> View {
    View { epoch: view.epoch.next(), cause, evidence: Evidence::default(), ..view.clone() }
}

/// The record after `view` without `lives`: their attachments become debts.
///
/// # Panics
/// If a member is in debt already: a broken record.
#[cfg_attr(not(any(test, feature = "sim")), expect(unreachable_pub, reason = "public for simulators"))]
pub fn remove(view: &View, lives: &BTreeSet<Identity>, cause: Cause) -> View {
    let mut next = following(view, cause);
    for who in lives.iter().filter(|who| view.contains(**who)) {
        next.members.remove(&who.node);
        next.nonces.remove(&who.node);
        let (mine, others): (BTreeSet<_>, BTreeSet<_>) =
            core::mem::take(&mut next.attachments).into_iter().partition(|a| a.owner == *who);
        next.attachments = others;
        let items: BTreeMap<ResourceId, DebtItem> = mine
            .into_iter()
            .map(|attachment| {
                let rebuilt = rebuilt_with(&attachment.resource, attachment.lockspace.as_deref()).is_none();
                let item = DebtItem { attachment, fenced: false, rebuilt, rebuilt_by: BTreeMap::new() };
                (item.attachment.resource.clone(), item)
            })
            .collect();
        for resource in items.keys() {
            touch(&mut next, resource);
        }
        if !items.is_empty() {
            let before = next.debts.insert(*who, Debt { removed: next.epoch, items });
            assert!(before.is_none(), "{who} was a member and in debt at once");
        }
    }
    settle(&mut next);
    next
}

/// The record after `view` with `lives` in it, each with its process nonce. None of their nodes may be a member.
///
/// # Panics
/// If one is, or the life is not a new one (R1): a mistake of the caller.
#[cfg_attr(not(any(test, feature = "sim")), expect(unreachable_pub, reason = "public for simulators"))]
pub fn join(view: &View, lives: &BTreeMap<Identity, u64>) -> View {
    let mut next = following(view, Cause::Joined(lives.keys().copied().collect()));
    for (who, nonce) in lives {
        let before = next.members.insert(who.node, who.incarnation);
        assert!(before.is_none(), "node {} joined while a life of it was a member", who.node);
        let known = next.lives.insert(who.node, who.incarnation);
        assert!(known.is_none_or(|k| k < who.incarnation), "{who} is not a new life (R1)");
        next.nonces.insert(who.node, *nonce);
    }
    next
}

/// The record after `view` with these voters.
pub(crate) fn voters(view: &View, voters: VoterSet, cause: Cause) -> View {
    View { voters, ..following(view, cause) }
}

/// Notes that the attachments of a lockspace changed: what was rebuilt for the old ones does not count any more.
pub(crate) fn touch(view: &mut View, resource: &ResourceId) {
    if resource.kind != ResourceKind::Lockspace {
        return;
    }
    view.lockspaces.insert(resource.name.clone(), view.epoch);
    for item in view.debts.values_mut().filter_map(|d| d.items.get_mut(resource)) {
        if !item.rebuilt {
            item.rebuilt_by.clear();
        }
    }
}

/// The lockspace that must be rebuilt for an item: itself, or the one it names.
fn rebuilt_with<'a>(resource: &'a ResourceId, names: Option<&'a str>) -> Option<&'a str> {
    match resource.kind {
        ResourceKind::Lockspace => Some(&resource.name),
        ResourceKind::Filesystem => names,
        ResourceKind::BlockDevice | ResourceKind::Service => None,
    }
}

/// Brings the derived parts of a record up to date: what is rebuilt, which items close, which debts are paid.
pub(crate) fn settle(view: &mut View) {
    let attached = attached_to_lockspaces(view);
    for debt in view.debts.values_mut() {
        settle_debt(debt, &attached);
    }
    view.debts.retain(|_, debt| !debt.items.is_empty());
    let used: BTreeSet<&str> = view
        .attachments
        .iter()
        .map(|a| &a.resource)
        .chain(view.debts.values().flat_map(|d| d.items.keys()))
        .filter(|r| r.kind == ResourceKind::Lockspace)
        .map(|r| r.name.as_str())
        .collect();
    view.lockspaces.retain(|name, _| used.contains(name.as_str()));
}

fn attached_to_lockspaces(view: &View) -> BTreeMap<String, BTreeSet<Identity>> {
    let mut attached: BTreeMap<String, BTreeSet<Identity>> = BTreeMap::new();
    for a in view.attachments.iter().filter(|a| a.resource.kind == ResourceKind::Lockspace) {
        attached.entry(a.resource.name.clone()).or_default().insert(a.owner);
    }
    attached
}

fn settle_debt(debt: &mut Debt, attached: &BTreeMap<String, BTreeSet<Identity>>) {
    let mut rebuilt: BTreeSet<String> = BTreeSet::new();
    for (resource, item) in &mut debt.items {
        if resource.kind == ResourceKind::Lockspace {
            // Nobody attached: there is nothing to rebuild, and who attaches later starts with empty tables.
            let all = attached
                .get(&resource.name)
                .is_none_or(|lives| lives.iter().all(|who| item.rebuilt_by.contains_key(who)));
            item.rebuilt |= all;
            if item.rebuilt {
                rebuilt.insert(resource.name.clone());
            }
        }
    }
    let owed: BTreeSet<String> =
        debt.items.keys().filter(|r| r.kind == ResourceKind::Lockspace).map(|r| r.name.clone()).collect();
    for (resource, item) in &mut debt.items {
        if resource.kind == ResourceKind::Filesystem
            && let Some(name) = &item.attachment.lockspace
        {
            // A lockspace that the life was not attached to any more was given up properly.
            item.rebuilt |= rebuilt.contains(name) || !owed.contains(name);
        }
    }
    // A mount without a journal has nothing to replay.
    debt.items.retain(|r, item| {
        let done = item.fenced && item.rebuilt;
        match r.kind {
            ResourceKind::Filesystem => !(done && item.attachment.journal.is_none()),
            ResourceKind::BlockDevice => !item.fenced,
            ResourceKind::Lockspace | ResourceKind::Service => true,
        }
    });
    let needed: BTreeSet<String> = debt
        .items
        .iter()
        .filter(|(r, _)| r.kind == ResourceKind::Filesystem)
        .filter_map(|(_, item)| item.attachment.lockspace.clone())
        .collect();
    // Holds of the dead life protect its unreplayed journal, so the lockspace item stays as long as that (R14).
    debt.items.retain(|r, item| {
        r.kind != ResourceKind::Lockspace || needed.contains(&r.name) || !(item.fenced && item.rebuilt)
    });
}

/// What is wrong with a record in itself, if anything. Records from the network are judged by it, own ones asserted.
pub(crate) fn fault(view: &View) -> Option<&'static str> {
    let stranger = view.attachments.iter().any(|a| !view.contains(a.owner));
    let double = view.debts.keys().any(|who| view.contains(*who));
    let empty = view.debts.values().any(|d| d.items.is_empty() || view.epoch < d.removed);
    let life =
        view.members.iter().any(|(n, life)| view.lives.get(n) != Some(life) || !view.nonces.contains_key(n));
    let votes = view.voters.voters.values().all(|v| v.votes == 0);
    let options = view.quorum.fault().or_else(|| view.trust.fault());
    let limits = super::config::ROSTER_MAX < view.roster.len()
        || super::config::VOTERS_MAX < view.voters.voters.len()
        || super::config::SERVERS_MAX < view.servers.len()
        || view.evidence.is_too_long();
    [
        (stranger, "an attachment of somebody who is no member"),
        (double, "a member in debt"),
        (empty, "an empty debt, or one from the future"),
        (life, "a member without its life or nonce"),
        (votes, "nobody has a vote, so nothing could follow"),
        (limits, "a list above its limit"),
    ]
    .into_iter()
    .find(|(wrong, _)| *wrong)
    .map(|(_, what)| what)
    .or(options)
}

/// Votes of the given voters, and of all.
pub(crate) fn votes(set: &VoterSet, who: impl Iterator<Item = NodeId>) -> (u32, u32) {
    let of = |n: &NodeId| set.voters.get(n).map_or(0, |v| v.votes);
    let have = who.collect::<BTreeSet<_>>().iter().map(of).fold(0, u32::saturating_add);
    (have, set.voters.keys().map(of).fold(0, u32::saturating_add))
}
