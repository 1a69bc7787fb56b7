//! What becomes of a request: a pure function of the record and the request (R6).

use super::change::{following, remove, settle, touch};
use super::config::{ATTACHMENTS_MAX, ROSTER_MAX, SERVERS_MAX, VOTERS_MAX};
use super::{change, voters};
use crate::{
    AttachRequest, Attachment, Cause, Epoch, Identity, NodeId, Proof, QuorumOptions, RESOURCE_NAME_BYTES_MAX,
    Refusal, Request, ResourceId, ResourceKind, Role, RosterEntry, Safety, ServerId, TieBreaker, View,
    VoterSet,
};
use std::collections::{BTreeMap, BTreeSet};

/// The record that `request` of `by` makes of `view`; `None` if the record says so already.
///
/// Everything that depends on more than the record (clocks, what peers have stored) is checked by the leader.
///
/// # Errors
/// The record forbids it. The same request at the same record is always refused alike.
pub fn decide(view: &View, by: Identity, number: u64, request: &Request) -> Result<Option<View>, Refusal> {
    let cause = Cause::Request { by, number };
    if !view.contains(by) {
        return Err(Refusal::Node { node: by.node, reason: format!("{by} is not a member") });
    }
    let mut next = following(view, cause.clone());
    match request {
        Request::Attach(wanted) => attach(&mut next, by, wanted)?,
        Request::Detach(resource) => detach(&mut next, by, resource),
        Request::Prove { debtor, resources, proof } => prove(&mut next, by, *debtor, resources, proof)?,
        Request::Leave { give_up_vote } => next = leave(view, by, *give_up_vote, cause)?,
        Request::SetRoster(entries) => set_roster(&mut next, entries)?,
        Request::RemoveNode(node) => remove_node(&mut next, *node)?,
        Request::SetVoters(set) => next = set_voters(view, set, cause)?,
        Request::SetQuorum(options) => set_quorum(&mut next, options)?,
        Request::Replace(node, entry) => replace(&mut next, *node, entry)?,
        Request::Renew { node, key } => renew(&mut next, *node, *key)?,
        Request::Revoke { key, .. } => next = revoke(view, *key, cause)?,
        Request::SetCas(cas) => {
            next.trust.cas = cas.clone();
            trusted(&next)?;
        }
        Request::Enrol(id, entry) => {
            limit("storage servers", next.servers.len() + 1, SERVERS_MAX)?;
            limit("a server's name in bytes", entry.name.len(), RESOURCE_NAME_BYTES_MAX)?;
            limit("a server's address in bytes", entry.address.len(), RESOURCE_NAME_BYTES_MAX)?;
            next.servers.insert(*id, entry.clone());
        }
        Request::Retire(id) => {
            next.servers.remove(id);
        }
        Request::Evict { who, .. } => {
            if view.contains(*who) {
                next = remove(view, &BTreeSet::from([*who]), cause);
            }
        }
    }
    settle(&mut next);
    let (cause, evidence) = (view.cause.clone(), view.evidence.clone());
    let same = View { epoch: view.epoch, cause, evidence, ..next.clone() } == *view;
    Ok(if same { None } else { Some(next) })
}

fn limit(what: &str, found: usize, max: usize) -> Result<(), Refusal> {
    if max < found { Err(Refusal::Limit { what: what.into(), limit: max as u64 }) } else { Ok(()) }
}

fn attach(next: &mut View, by: Identity, wanted: &AttachRequest) -> Result<(), Refusal> {
    let resource = &wanted.resource;
    if next.attached(resource).any(|a| a.owner == by) {
        return Ok(());
    }
    limit("a resource's name in bytes", resource.name.len(), RESOURCE_NAME_BYTES_MAX)?;
    let lockspace_bytes = wanted.lockspace.as_ref().map_or(0, String::len);
    limit("a lockspace's name in bytes", lockspace_bytes, RESOURCE_NAME_BYTES_MAX)?;
    let owed: usize = next.debts.values().map(|d| d.items.len()).sum();
    limit("attachments and debts", next.attachments.len() + owed + 1, ATTACHMENTS_MAX)?;
    if let Some(server) = wanted.servers.iter().find(|s| !next.servers.contains_key(s)) {
        return Err(Refusal::NotEnrolled(*server));
    }
    if let Some(other) = next.attached(resource).find(|a| a.exclusive || wanted.exclusive) {
        return Err(Refusal::InUse { resource: resource.clone(), owner: other.owner });
    }
    // An exclusive user that failed may still act until it is fenced.
    let unfenced =
        |(_, i): &(Identity, &crate::DebtItem)| !i.fenced && (i.attachment.exclusive || wanted.exclusive);
    if let Some((owner, _)) = next.owing(resource).find(unfenced) {
        return Err(Refusal::InUse { resource: resource.clone(), owner });
    }
    let old = |(who, i): &(Identity, &crate::DebtItem)| who.node == by.node && !(i.fenced && i.rebuilt);
    if resource.kind == ResourceKind::Lockspace
        && let Some((debtor, _)) = next.owing(resource).find(old)
    {
        return Err(Refusal::OldLife { resource: resource.clone(), debtor });
    }
    let journal = match wanted.journals {
        Some(journals) => Some(free_journal(next, by, resource, journals)?),
        None => None,
    };
    next.attachments.insert(Attachment {
        owner: by,
        resource: resource.clone(),
        safety: wanted.safety,
        servers: wanted.servers.clone(),
        journal,
        lockspace: wanted.lockspace.clone(),
        exclusive: wanted.exclusive,
    });
    touch(next, resource);
    Ok(())
}

/// The lowest journal that nobody owns or owes. If all are owed and nobody is left to replay one, the opener gets a
/// fenced one and replays it first; should it fail before that, the old debt is still there (R14).
fn free_journal(view: &View, by: Identity, resource: &ResourceId, journals: u32) -> Result<u32, Refusal> {
    let owned: BTreeMap<u32, Identity> =
        view.attached(resource).filter_map(|a| a.journal.map(|j| (j, a.owner))).collect();
    let owed: Vec<_> =
        view.owing(resource).filter_map(|(who, i)| i.attachment.journal.map(|j| (j, who, i))).collect();
    // No more journals can be in use than attachments, so the search is short whatever number was asked for.
    let free = (0..journals).find(|j| !owned.contains_key(j) && owed.iter().all(|(o, _, _)| o != j));
    if let Some(journal) = free {
        return Ok(journal);
    }
    let dirty = |j: &u32| {
        !owned.contains_key(j)
            && owed.iter().filter(|(o, _, _)| o == j).all(|(_, _, i)| i.fenced && i.rebuilt)
    };
    let own = owed.iter().filter(|(_, who, _)| who.node == by.node).map(|(j, _, _)| *j);
    let any: BTreeSet<u32> = owed.iter().map(|(j, _, _)| *j).collect();
    if owned.is_empty()
        && let Some(journal) = own.chain(any).filter(|j| *j < journals).find(dirty)
    {
        return Ok(journal);
    }
    let owners = owned.into_values().chain(owed.into_iter().map(|(_, who, _)| who)).collect();
    Err(Refusal::NoJournal { resource: resource.clone(), journals, owners })
}

fn detach(next: &mut View, by: Identity, resource: &ResourceId) {
    let before = next.attachments.len();
    next.attachments.retain(|a| !(a.owner == by && a.resource == *resource));
    if next.attachments.len() < before {
        touch(next, resource);
    }
}

fn leave(view: &View, by: Identity, give_up_vote: bool, cause: Cause) -> Result<View, Refusal> {
    if let Some(a) = view.attachments.iter().find(|a| a.owner == by) {
        return Err(Refusal::StillAttached(a.resource.clone()));
    }
    let mut next = remove(view, &BTreeSet::from([by]), cause);
    let others_vote = next.voters.voters.iter().any(|(n, v)| *n != by.node && 0 < v.votes);
    // The last one to leave keeps its vote: somebody must be able to start the cluster again.
    if give_up_vote || (view.quorum.allow_downscale && others_vote) {
        let mut set = next.voters.clone();
        set.voters.remove(&by.node);
        voters::in_line(&next, &mut set);
        sane_voters(&next, &set)?;
        next.voters = set;
    }
    Ok(next)
}

fn set_quorum(next: &mut View, options: &QuorumOptions) -> Result<(), Refusal> {
    let bad = |why: &str| Err(Refusal::Quorum(why.into()));
    if let Some(fault) = options.fault() {
        return bad(fault);
    }
    let listed: Vec<NodeId> = match &options.tie_breaker {
        Some(TieBreaker::List(nodes)) => nodes.clone(),
        _ => Vec::new(),
    };
    if let Some(node) = options.votes.keys().chain(&listed).find(|n| !next.roster.contains_key(n)) {
        return Err(Refusal::Node { node: *node, reason: "it is not in the roster".into() });
    }
    if options.tie_breaker.is_none() && next.quorum.tie_breaker.is_some() {
        next.voters.tie_breaker = None;
    }
    next.quorum = options.clone();
    let mut set = next.voters.clone();
    voters::in_line(next, &mut set);
    if set.voters.values().all(|v| v.votes == 0) {
        return bad("nobody would have a vote");
    }
    let sum = set.voters.values().fold(0_u32, |sum, v| sum.saturating_add(v.votes));
    if 2 * u64::from(sum) <= u64::from(set.expected) {
        return bad("the voters together would not have the expected quorum");
    }
    Ok(())
}

/// Another machine under the same id. What the lost directory promised is gone with it, so it must never vote again.
fn replace(next: &mut View, node: NodeId, entry: &RosterEntry) -> Result<(), Refusal> {
    if let Some(life) = next.identity(node) {
        return Err(Refusal::Node {
            node,
            reason: format!("{life} is a member and must leave or fail first"),
        });
    }
    if !next.roster.contains_key(&node) {
        return Err(Refusal::Node { node, reason: "it is not in the roster: add it".into() });
    }
    set_roster(next, &BTreeMap::from([(node, entry.clone())]))?;
    next.trust.renewals.remove(&node);
    let mut set = next.voters.clone();
    set.voters.remove(&node);
    voters::in_line(next, &mut set);
    sane_voters(next, &set)?;
    next.voters = set;
    Ok(())
}

fn renew(next: &mut View, node: NodeId, key: [u8; 32]) -> Result<(), Refusal> {
    let Some(entry) = next.roster.get(&node) else {
        return Err(Refusal::Node { node, reason: "it is not in the roster".into() });
    };
    if entry.key == key {
        next.trust.renewals.remove(&node);
        return Ok(());
    }
    next.trust.renewals.insert(node, key);
    trusted(next)
}

fn revoke(view: &View, key: [u8; 32], cause: Cause) -> Result<View, Refusal> {
    let node = view.roster.iter().find(|(_, e)| e.key == key).map(|(n, _)| *n);
    let member = node.and_then(|n| view.identity(n));
    // A member whose second key is good already goes on with that one.
    let stays = node.is_some_and(|n| view.trust.renewals.contains_key(&n));
    let out: BTreeSet<Identity> = member.into_iter().filter(|_| !stays).collect();
    let mut next = remove(view, &out, cause);
    if let Some(node) = node
        && let Some(renewed) = next.trust.renewals.remove(&node)
        && let Some(entry) = next.roster.get_mut(&node)
    {
        entry.key = renewed;
    }
    next.trust.renewals.retain(|_, k| *k != key);
    next.trust.revoked.insert(key);
    trusted(&next)?;
    Ok(next)
}

/// Whether the keys and CAs of a record go together.
fn trusted(view: &View) -> Result<(), Refusal> {
    if let Some(fault) = view.trust.fault() {
        return Err(Refusal::Trust(fault.into()));
    }
    let taken = |node: &NodeId, key: &[u8; 32]| {
        view.roster.iter().any(|(n, e)| n != node && e.key == *key)
            || view.trust.renewals.iter().any(|(n, k)| n != node && k == key)
    };
    if let Some((node, _)) = view.trust.renewals.iter().find(|(n, k)| taken(n, k)) {
        return Err(Refusal::Trust(format!("the new key of node {node} is another node's")));
    }
    match view.trust.renewals.iter().find(|(_, k)| view.trust.revoked.contains(*k)) {
        Some((node, _)) => Err(Refusal::Trust(format!("the new key of node {node} is revoked"))),
        None => Ok(()),
    }
}

fn set_roster(next: &mut View, entries: &BTreeMap<NodeId, RosterEntry>) -> Result<(), Refusal> {
    for (node, entry) in entries {
        let twin = next.roster.iter().chain(entries).find(|(other, e)| {
            *other != node
                && (e.name == entry.name || e.key == entry.key)
                && entries.get(other).is_none_or(|new| new == *e)
        });
        if let Some((other, _)) = twin {
            return Err(Refusal::Node {
                node: *node,
                reason: format!("name or key is that of node {other}"),
            });
        }
        limit("a node's name in bytes", entry.name.len(), RESOURCE_NAME_BYTES_MAX)?;
        let longest = entry.addresses.iter().map(String::len).max().unwrap_or(0);
        limit("a node's address in bytes", longest, RESOURCE_NAME_BYTES_MAX)?;
        limit("a node's addresses", entry.addresses.len(), 8)?;
    }
    for (node, entry) in entries {
        let was = next.roster.get(node).map(|e| e.role);
        let turns = was.is_some_and(|r| (r == Role::Witness) != (entry.role == Role::Witness));
        if turns && next.lives.contains_key(node) {
            let reason =
                "a node that ran cannot become a witness, nor a witness a node: remove it and add another id";
            return Err(Refusal::Node { node: *node, reason: reason.into() });
        }
        if next.trust.revoked.contains(&entry.key) {
            return Err(Refusal::Trust(format!("the key of node {node} is revoked")));
        }
        if next.trust.renewals.get(node) == Some(&entry.key) {
            next.trust.renewals.remove(node);
        }
    }
    next.roster.extend(entries.iter().map(|(n, e)| (*n, e.clone())));
    limit("nodes in the roster", next.roster.len(), ROSTER_MAX)
}

fn remove_node(next: &mut View, node: NodeId) -> Result<(), Refusal> {
    if let Some(life) = next.identity(node) {
        return Err(Refusal::Node { node, reason: format!("{life} is a member and must leave first") });
    }
    next.roster.remove(&node);
    next.nonces.remove(&node);
    next.trust.renewals.remove(&node);
    next.quorum.votes.remove(&node);
    if let Some(TieBreaker::List(nodes)) = &mut next.quorum.tie_breaker {
        nodes.retain(|n| *n != node);
        if nodes.is_empty() {
            next.quorum.tie_breaker = None;
        }
    }
    let mut set = next.voters.clone();
    set.voters.remove(&node);
    voters::in_line(next, &mut set);
    sane_voters(next, &set)?;
    next.voters = set;
    Ok(())
}

fn set_voters(view: &View, set: &VoterSet, cause: Cause) -> Result<View, Refusal> {
    for (node, voter) in &set.voters {
        let stays = view.voters.voters.get(node).is_some_and(|v| v.state == voter.state);
        let is_witness = view.roster.get(node).is_some_and(|e| e.role == Role::Witness);
        if !stays && !is_witness && !view.members.contains_key(node) {
            return Err(Refusal::Node { node: *node, reason: "a new voter must be a member".into() });
        }
    }
    sane_voters(view, set)?;
    Ok(change::voters(view, set.clone(), cause))
}

fn sane_voters(view: &View, set: &VoterSet) -> Result<(), Refusal> {
    limit("voters", set.voters.len(), VOTERS_MAX)?;
    if let Some(node) = set.voters.keys().find(|n| !view.roster.contains_key(n)) {
        return Err(Refusal::Node { node: *node, reason: "a voter must be in the roster".into() });
    }
    if set.voters.values().all(|v| v.votes == 0) {
        return Err(Refusal::Voters("nobody has a vote".into()));
    }
    if set.voters.values().any(|v| 1_000 < v.votes) {
        return Err(Refusal::Voters("more than 1000 votes for one node".into()));
    }
    match set.tie_breaker {
        Some(node) if !set.voters.contains_key(&node) => {
            Err(Refusal::Voters(format!("the tie breaker, node {node}, is no voter")))
        }
        _ => Ok(()),
    }
}

fn prove(
    next: &mut View,
    by: Identity,
    debtor: Identity,
    resources: &BTreeSet<ResourceId>,
    proof: &Proof,
) -> Result<(), Refusal> {
    let Some(debt) = next.debts.get(&debtor) else {
        // What is proven already is confirmed; a life that never owed anything is in no record either.
        let known = next.lives.get(&debtor.node).is_some_and(|l| debtor.incarnation <= *l);
        let gone = known && !next.contains(debtor);
        return if gone { Ok(()) } else { Err(Refusal::NoDebt(debtor)) };
    };
    let named = !resources.is_empty();
    let targets: Vec<ResourceId> =
        debt.items.keys().filter(|r| !named || resources.contains(r)).cloned().collect();
    let mut failures = Vec::new();
    let mut proven = 0_usize;
    for resource in targets {
        match prove_item(next, by, debtor, &resource, proof) {
            Ok(()) => proven += 1,
            Err(reason) => failures.push((resource, reason)),
        }
    }
    // Without names the proof is for whatever it covers; with names it must hold for each.
    match failures.into_iter().next() {
        Some((resource, reason)) if named || proven == 0 => Err(Refusal::Unproven { resource, reason }),
        _ => Ok(()),
    }
}

fn prove_item(
    next: &mut View,
    by: Identity,
    debtor: Identity,
    resource: &ResourceId,
    proof: &Proof,
) -> Result<(), String> {
    let since = next.lockspaces.get(&resource.name).copied().unwrap_or(Epoch(0));
    let enrolled: BTreeSet<ServerId> = next.servers.keys().copied().collect();
    let attached = next.attached(resource).find(|a| a.owner == by).cloned();
    let Some(debt) = next.debts.get_mut(&debtor) else { return Ok(()) };
    let removed = debt.removed;
    let Some(item) = debt.items.get_mut(resource) else { return Ok(()) };
    match proof {
        Proof::PoweredOff { .. } | Proof::Confirmed { .. } => item.fenced = true,
        Proof::LeaseOver => {
            let enough = item.attachment.safety == Safety::Lease
                // With no server there is no storage to fence: the end of the lease decides (R9).
                || (item.attachment.safety == Safety::Storage && item.attachment.servers.is_empty());
            if !enough {
                return Err(format!("it needs {:?}, not the end of a lease", item.attachment.safety));
            }
            item.fenced = true;
        }
        Proof::StorageFence { confirmed } => {
            if item.attachment.safety == Safety::Power {
                return Err("it needs a verified power-off".into());
            }
            // A retired server serves nobody any more (R9).
            let needed = item.attachment.servers.intersection(&enrolled);
            let missing = needed.into_iter().find(|s| confirmed.get(s).is_none_or(|epoch| *epoch < removed));
            if let Some(server) = missing {
                return Err(format!("storage server {server} has not confirmed epoch {removed} or later"));
            }
            item.fenced = true;
        }
        Proof::Rebuilt { epoch } => {
            if resource.kind != ResourceKind::Lockspace {
                return Err("only a lockspace is rebuilt".into());
            }
            if attached.is_none() {
                return Err(format!("{by} is not attached to it"));
            }
            if *epoch < since {
                return Err(format!("rebuilt in epoch {epoch}, its attachments changed in epoch {since}"));
            }
            if !item.rebuilt {
                item.rebuilt_by.insert(by, *epoch);
            }
        }
        Proof::Replayed => {
            if resource.kind != ResourceKind::Filesystem {
                return Err("only a filesystem has a journal".into());
            }
            if attached.is_none_or(|a| a.journal.is_none()) {
                return Err(format!("{by} has it not mounted read-write"));
            }
            if !(item.fenced && item.rebuilt) {
                return Err("a journal is replayed after the fence and the rebuilding of the locks".into());
            }
            debt.items.remove(resource);
        }
        Proof::Recovered => {
            if resource.kind != ResourceKind::Service {
                return Err("only a service is recovered".into());
            }
            if !item.fenced {
                return Err("a service is recovered after the fence".into());
            }
            debt.items.remove(resource);
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
