//! Each rule of the record, as a request and what becomes of it.

use super::*;
use crate::machine::change::{join, remove};
use crate::{ClusterId, DebtItem, Incarnation, ServerEntry, StateId, Voter};

fn id(node: u32) -> Identity {
    Identity::new(NodeId(node), Incarnation(1))
}

fn entry(name: &str) -> RosterEntry {
    let key = core::array::from_fn(|i| name.as_bytes().get(i).copied().unwrap_or(0));
    RosterEntry { name: name.into(), key, role: Role::Voter, addresses: vec![] }
}

fn server(n: u8) -> ServerId {
    ServerId::from_bytes([n; 16])
}

/// Three members, all voters, two storage servers.
fn three() -> View {
    let mut view = View { epoch: Epoch(5), ..View::empty(ClusterId::from_bytes([1; 16])) };
    for n in 1..=3 {
        view.roster.insert(NodeId(n), entry(&format!("n{n}")));
        view.voters.voters.insert(NodeId(n), Voter { state: StateId::from_bytes([n as u8; 16]), votes: 1 });
    }
    for n in 1..=2 {
        view.servers.insert(server(n), ServerEntry { name: format!("s{n}"), address: String::new() });
    }
    join(&view, &(1..=3).map(|n| (id(n), u64::from(n))).collect())
}

fn space(name: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Lockspace, name)
}

fn plain(resource: ResourceId) -> AttachRequest {
    AttachRequest {
        resource,
        safety: Safety::Lease,
        servers: BTreeSet::new(),
        journals: None,
        lockspace: None,
        exclusive: false,
    }
}

fn filesystem() -> AttachRequest {
    AttachRequest {
        safety: Safety::Storage,
        servers: BTreeSet::from([server(1), server(2)]),
        journals: Some(3),
        lockspace: Some("f".into()),
        ..plain(ResourceId::new(ResourceKind::Filesystem, "f"))
    }
}

fn does(view: &View, by: u32, request: Request) -> View {
    decide(view, id(by), 1, &request).unwrap().unwrap_or_else(|| panic!("{request:?} changes nothing"))
}

fn refused(view: &View, by: u32, request: Request) -> Refusal {
    decide(view, id(by), 1, &request).unwrap_err()
}

fn fails(view: &View, nodes: &[u32]) -> View {
    let lives: BTreeSet<Identity> = nodes.iter().map(|n| id(*n)).collect();
    remove(view, &lives, Cause::Failed(lives.clone()))
}

fn prove(debtor: u32, proof: Proof) -> Request {
    Request::Prove { debtor: id(debtor), resources: BTreeSet::new(), proof }
}

fn fence(view: &View) -> Proof {
    Proof::StorageFence { confirmed: view.servers.keys().map(|s| (*s, view.epoch)).collect() }
}

fn item<'a>(view: &'a View, debtor: u32, resource: &ResourceId) -> &'a DebtItem {
    &view.debts[&id(debtor)].items[resource]
}

/// Nodes 1 to 3 have the lockspace and the filesystem "f".
fn mounted() -> View {
    let mut view = three();
    for n in 1..=3 {
        view = does(&view, n, Request::Attach(plain(space("f"))));
        view = does(&view, n, Request::Attach(filesystem()));
    }
    view
}

#[test]
fn attaching_is_idempotent_and_so_is_detaching() {
    let view = does(&three(), 1, Request::Attach(plain(space("a"))));
    assert_eq!(decide(&view, id(1), 2, &Request::Attach(plain(space("a")))), Ok(None));
    let view = does(&view, 1, Request::Detach(space("a")));
    assert_eq!(decide(&view, id(1), 3, &Request::Detach(space("a"))), Ok(None));
    assert!(view.lockspaces.is_empty());
}

#[test]
fn a_life_that_is_no_member_can_ask_for_nothing() {
    let view = fails(&three(), &[2]);
    assert!(matches!(refused(&view, 2, Request::Attach(plain(space("a")))), Refusal::Node { .. }));
}

#[test]
fn each_read_write_mount_gets_a_journal_of_its_own_until_there_is_none() {
    let view = mounted();
    let fs = filesystem().resource;
    assert_eq!(view.attached(&fs).map(|a| a.journal).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    let fewer = does(&view, 3, Request::Detach(fs.clone()));
    let wanted = AttachRequest { journals: Some(2), ..filesystem() };
    assert!(matches!(refused(&fewer, 3, Request::Attach(wanted)), Refusal::NoJournal { journals: 2, .. }));
}

#[test]
fn exclusive_use_excludes_in_both_directions_and_also_an_unfenced_dead_user() {
    let alone = AttachRequest { exclusive: true, ..plain(ResourceId::new(ResourceKind::Service, "s")) };
    let shared = AttachRequest { exclusive: false, ..alone.clone() };
    let view = does(&three(), 1, Request::Attach(alone.clone()));
    let in_use = Refusal::InUse { resource: alone.resource.clone(), owner: id(1) };
    assert_eq!(refused(&view, 2, Request::Attach(shared.clone())), in_use);
    let view = fails(&view, &[1]);
    assert_eq!(refused(&view, 2, Request::Attach(alone.clone())), in_use);
    let view = does(&view, 3, prove(1, Proof::LeaseOver));
    let view = does(&view, 2, Request::Attach(alone.clone()));
    let shared_refused = refused(&view, 3, Request::Attach(shared));
    assert_eq!(shared_refused, Refusal::InUse { resource: alone.resource, owner: id(2) });
    assert!(does(&view, 2, prove(1, Proof::Recovered)).debts.is_empty());
}

#[test]
fn the_life_of_a_failure_with_a_journal() {
    let view = fails(&mounted(), &[1]);
    let fs = filesystem().resource;
    assert!(!item(&view, 1, &fs).fenced && !item(&view, 1, &space("f")).fenced);
    let unproven =
        |view: &View, by, proof| matches!(refused(view, by, prove(1, proof)), Refusal::Unproven { .. });
    assert!(unproven(&view, 2, Proof::Replayed), "not before the fence");

    let view = does(&view, 2, prove(1, fence(&view)));
    assert!(item(&view, 1, &fs).fenced && item(&view, 1, &space("f")).fenced);
    let since = view.lockspaces["f"];
    let view = does(&view, 2, prove(1, Proof::Rebuilt { epoch: since }));
    assert!(!item(&view, 1, &space("f")).rebuilt, "node 3 has not yet");
    assert!(unproven(&view, 3, Proof::Rebuilt { epoch: Epoch(since.0 - 1) }), "for an older epoch");
    let view = does(&view, 3, prove(1, Proof::Rebuilt { epoch: view.epoch }));
    assert!(item(&view, 1, &space("f")).rebuilt && item(&view, 1, &fs).rebuilt);
    let view = does(&view, 3, prove(1, Proof::Replayed));
    assert!(view.debts.is_empty(), "the lockspace's item goes with the journal's");
}

#[test]
fn a_lockspace_without_a_journal_closes_when_fenced_and_rebuilt_in_either_order() {
    let mut view = three();
    for n in 1..=2 {
        view = does(&view, n, Request::Attach(plain(space("a"))));
    }
    let view = fails(&view, &[1]);
    let rebuilt = prove(1, Proof::Rebuilt { epoch: view.epoch });
    let one = does(&does(&view, 2, rebuilt.clone()), 3, prove(1, Proof::LeaseOver));
    let other = does(&does(&view, 3, prove(1, Proof::LeaseOver)), 2, rebuilt);
    assert!(one.debts.is_empty() && other.debts.is_empty());
}

#[test]
fn with_nobody_attached_the_rebuild_is_vacuous() {
    let view = does(&three(), 1, Request::Attach(plain(space("a"))));
    let view = fails(&view, &[1]);
    assert!(item(&view, 1, &space("a")).rebuilt);
    assert!(does(&view, 2, prove(1, Proof::LeaseOver)).debts.is_empty());
}

#[test]
fn a_second_failure_restarts_an_open_rebuild_and_forgets_no_debt() {
    let view = fails(&mounted(), &[1]);
    let view = does(&view, 2, prove(1, Proof::Rebuilt { epoch: view.epoch }));
    let view = fails(&view, &[3]);
    assert!(view.debts.contains_key(&id(1)) && view.debts.contains_key(&id(3)));
    assert!(item(&view, 1, &space("f")).rebuilt_by.is_empty());
    assert!(!item(&view, 1, &space("f")).rebuilt);
}

#[test]
fn a_storage_fence_needs_every_enrolled_server_at_an_epoch_without_the_debtor() {
    let view = fails(&mounted(), &[1]);
    let fs = BTreeSet::from([filesystem().resource]);
    let with = |confirmed: &[(u8, Epoch)]| Request::Prove {
        debtor: id(1),
        resources: fs.clone(),
        proof: Proof::StorageFence { confirmed: confirmed.iter().map(|(s, e)| (server(*s), *e)).collect() },
    };
    let e = view.epoch;
    assert!(matches!(refused(&view, 2, with(&[(1, e)])), Refusal::Unproven { .. }));
    assert!(matches!(refused(&view, 2, with(&[(1, e), (2, Epoch(e.0 - 1))])), Refusal::Unproven { .. }));
    assert!(item(&does(&view, 2, with(&[(1, e), (2, e)])), 1, &filesystem().resource).fenced);
    // A retired server serves nobody.
    let retired = does(&view, 2, Request::Retire(server(2)));
    assert!(item(&does(&retired, 2, with(&[(1, e)])), 1, &filesystem().resource).fenced);
}

#[test]
fn the_end_of_a_lease_does_not_fence_storage_nor_power() {
    let view = fails(&mounted(), &[1]);
    let named =
        |proof| Request::Prove { debtor: id(1), resources: BTreeSet::from([filesystem().resource]), proof };
    assert!(matches!(refused(&view, 2, named(Proof::LeaseOver)), Refusal::Unproven { .. }));
    let power = AttachRequest { safety: Safety::Power, ..plain(space("p")) };
    let view = fails(&does(&three(), 1, Request::Attach(power)), &[1]);
    assert!(matches!(refused(&view, 2, prove(1, fence(&view))), Refusal::Unproven { .. }));
    assert!(does(&view, 2, prove(1, Proof::PoweredOff { device: "ipmi".into() })).debts.is_empty());
}

#[test]
fn after_all_failed_the_first_opener_gets_a_dirty_journal_its_own_if_it_can_and_the_second_waits() {
    let mut view = fails(&mounted(), &[1, 2, 3]);
    let again = |n| Identity::new(NodeId(n), Incarnation(2));
    view = join(&view, &(1..=3).map(|n| (again(n), 7)).collect());
    let asks = |view: &View, n, request| decide(view, again(n), 1, &request);
    let fs = Request::Attach(filesystem());
    assert!(matches!(asks(&view, 2, fs.clone()), Err(Refusal::NoJournal { .. })), "not before the fence");
    let old = asks(&view, 2, Request::Attach(plain(space("f"))));
    assert_eq!(old, Err(Refusal::OldLife { resource: space("f"), debtor: id(2) }));
    for n in 1..=3 {
        let proof = Request::Prove { debtor: id(n), resources: BTreeSet::new(), proof: fence(&view) };
        view = asks(&view, 2, proof).unwrap().unwrap();
    }
    view = asks(&view, 2, fs.clone()).unwrap().unwrap();
    assert_eq!(view.attached(&filesystem().resource).map(|a| a.journal).collect::<Vec<_>>(), [Some(1)]);
    assert!(matches!(asks(&view, 3, fs), Err(Refusal::NoJournal { .. })));
}

/// "jids durable": who owns a journal is part of the record. A journal that a dead node left dirty is given to nobody, its
/// own next life included, before it is replayed; others that are free are.
#[test]
fn a_dead_nodes_journal_is_given_to_nobody_before_it_is_replayed() {
    let fs = filesystem().resource;
    let again = Identity::new(NodeId(1), Incarnation(2));
    let view = fails(&mounted(), &[1]);
    let view = join(&view, &[(again, 7)].into());
    let wants = |view: &View, journals| {
        decide(view, again, 1, &Request::Attach(AttachRequest { journals: Some(journals), ..filesystem() }))
    };
    let journal_of = |view: &View| view.attached(&fs).find(|a| a.owner == again).and_then(|a| a.journal);
    let waits = |view: &View| {
        let Err(Refusal::NoJournal { journals: 3, owners, .. }) = wants(view, 3) else { return false };
        // A fourth journal is nobody's.
        owners.contains(&id(1)) && journal_of(&wants(view, 4).unwrap().unwrap()) == Some(3)
    };
    assert!(waits(&view), "before the fence");
    let view = does(&view, 2, prove(1, fence(&view)));
    assert!(waits(&view), "before the locks are rebuilt");
    let since = view.lockspaces["f"];
    let view = does(&view, 2, prove(1, Proof::Rebuilt { epoch: since }));
    let view = does(&view, 3, prove(1, Proof::Rebuilt { epoch: view.epoch }));
    assert!(waits(&view), "before the replay");
    let view = does(&view, 3, prove(1, Proof::Replayed));
    assert_eq!(
        journal_of(&wants(&view, 3).unwrap().unwrap()),
        Some(0),
        "its own again: the others are owned"
    );
}

#[test]
fn a_leave_needs_empty_hands_and_a_node_that_is_a_member_is_not_struck_off() {
    let view = does(&three(), 1, Request::Attach(plain(space("a"))));
    let leave = Request::Leave { give_up_vote: true };
    assert_eq!(refused(&view, 1, leave.clone()), Refusal::StillAttached(space("a")));
    assert!(matches!(refused(&view, 2, Request::RemoveNode(NodeId(3))), Refusal::Node { .. }));
    let view = does(&view, 3, leave);
    assert!(!view.voters.voters.contains_key(&NodeId(3)) && view.debts.is_empty());
    assert!(!does(&view, 2, Request::RemoveNode(NodeId(3))).roster.contains_key(&NodeId(3)));
}

#[test]
fn the_voter_set_has_votes_known_nodes_and_a_tie_breaker_that_votes() {
    let view = three();
    let mut none = view.voters.clone();
    none.voters.values_mut().for_each(|v| v.votes = 0);
    assert!(matches!(refused(&view, 1, Request::SetVoters(none)), Refusal::Voters(_)));
    let tie = VoterSet { tie_breaker: Some(NodeId(9)), ..view.voters.clone() };
    assert!(matches!(refused(&view, 1, Request::SetVoters(tie)), Refusal::Voters(_)));
    let mut strange = view.voters.clone();
    strange.voters.insert(NodeId(9), Voter { state: StateId::from_bytes([9; 16]), votes: 1 });
    assert!(matches!(refused(&view, 1, Request::SetVoters(strange)), Refusal::Node { .. }));
}

#[test]
fn two_roster_entries_share_no_name_and_no_key() {
    let view = three();
    let twin = Request::SetRoster(BTreeMap::from([(NodeId(7), entry("n2"))]));
    assert!(matches!(refused(&view, 1, twin), Refusal::Node { node: NodeId(7), .. }));
    let moved = RosterEntry { addresses: vec!["127.0.0.1:1".into()], ..entry("n2") };
    does(&view, 1, Request::SetRoster(BTreeMap::from([(NodeId(2), moved)])));
}

#[test]
fn names_have_their_limit_and_servers_must_be_enrolled() {
    let long = "x".repeat(RESOURCE_NAME_BYTES_MAX + 1);
    assert!(matches!(refused(&three(), 1, Request::Attach(plain(space(&long)))), Refusal::Limit { .. }));
    let strange = AttachRequest { servers: BTreeSet::from([server(9)]), ..filesystem() };
    assert_eq!(refused(&three(), 1, Request::Attach(strange)), Refusal::NotEnrolled(server(9)));
}

#[test]
fn a_debt_that_is_paid_is_confirmed_and_one_that_never_was_is_refused() {
    let view = does(&three(), 1, Request::Attach(plain(space("a"))));
    let view = fails(&view, &[1]);
    let view = does(&view, 2, prove(1, Proof::LeaseOver));
    assert_eq!(decide(&view, id(2), 9, &prove(1, Proof::LeaseOver)), Ok(None));
    assert_eq!(refused(&view, 2, prove(3, Proof::LeaseOver)), Refusal::NoDebt(id(3)));
}

#[test]
fn an_evicted_member_owes_what_it_had() {
    let view = does(&mounted(), 1, Request::Evict { who: id(2), reason: "asked".into() });
    assert!(!view.contains(id(2)));
    assert_eq!(view.debts[&id(2)].items.len(), 2);
}

#[test]
fn quorum_options_are_taken_as_a_whole_or_not_at_all() {
    let view = three();
    let options = |change: fn(&mut QuorumOptions)| {
        let mut options = view.quorum.clone();
        change(&mut options);
        Request::SetQuorum(options)
    };
    let next = does(&view, 1, options(|o| o.last_man_standing_ms = Some(10_000)));
    assert_eq!(next.quorum.last_man_standing_ms, Some(10_000));
    assert_eq!(next.voters, view.voters, "the voter set follows in a record of its own");
    for (request, words) in [
        (options(|o| o.last_man_standing_ms = Some(10)), "below one second"),
        (options(|o| o.expected_votes = 6), "expected quorum"),
        (options(|o| o.tie_breaker = Some(TieBreaker::List(vec![]))), "list of tie breakers is empty"),
        (options(|o| o.votes = [(NodeId(77), 1)].into()), "not in the roster"),
        (options(|o| o.votes = (1..=3).map(|n| (NodeId(n), 0)).collect()), "nobody would have a vote"),
    ] {
        let refused = decide(&view, view.identity(NodeId(1)).unwrap(), 1, &request).unwrap_err();
        assert!(refused.to_string().contains(words), "{refused}");
    }
}

#[test]
fn a_replaced_node_has_another_key_and_its_old_directory_no_vote() {
    let view = fails(&three(), &[3]);
    let next = does(&view, 1, Request::Replace(NodeId(3), entry("other")));
    assert_eq!(next.roster[&NodeId(3)].name, "other");
    assert!(!next.voters.voters.contains_key(&NodeId(3)));
    let member = Request::Replace(NodeId(2), entry("other"));
    assert!(decide(&view, view.identity(NodeId(1)).unwrap(), 1, &member).is_err());
}

#[test]
fn a_revoked_key_takes_its_member_along_and_a_renewed_one_does_not() {
    let view = three();
    let key = view.roster[&NodeId(3)].key;
    let gone = does(&view, 1, Request::Revoke { key, reason: "stolen".into() });
    assert!(!gone.members.contains_key(&NodeId(3)));
    assert!(gone.trust.revoked.contains(&key));
    let again = Request::SetRoster(BTreeMap::from([(NodeId(3), view.roster[&NodeId(3)].clone())]));
    assert!(matches!(
        decide(&gone, gone.identity(NodeId(1)).unwrap(), 1, &again),
        Err(Refusal::Trust(_)) | Ok(None)
    ));
    let renewed = does(&view, 1, Request::Renew { node: NodeId(3), key: [9; 32] });
    let stays = does(&renewed, 1, Request::Revoke { key, reason: "renewed".into() });
    assert!(stays.members.contains_key(&NodeId(3)));
    assert_eq!(stays.roster[&NodeId(3)].key, [9; 32], "the new key took its place");
    let taken = Request::Renew { node: NodeId(2), key };
    assert!(decide(&view, view.identity(NodeId(1)).unwrap(), 1, &taken).is_err());
}

#[test]
fn a_clean_leave_takes_the_vote_along_where_that_is_wanted_but_the_last_one_keeps_it() {
    let mut view = three();
    view.quorum.allow_downscale = true;
    let leave = Request::Leave { give_up_vote: false };
    let two = does(&view, 3, leave.clone());
    assert_eq!(two.voters.voters.len(), 2);
    let one = does(&two, 2, leave.clone());
    let none = does(&one, 1, leave);
    assert_eq!(none.voters.voters.keys().copied().collect::<Vec<_>>(), [NodeId(1)]);
}
