//! Hostile control messages and disk records: every kind, as the simulation writes them, damaged; and random bytes. Each is
//! refused or read, never a panic, within the memory that `hostile` allows; and a machine that is told such a message by a
//! member goes on.

use crate::simulation::recorded;
use quorate_membership::machine::{
    Answer, ControlMsg, Durable, JoinRefusal, Peer, Record, StateError, Versions,
};
use quorate_membership::sim::{Recorded, damage, hostile};
use quorate_membership::{Ballot, Epoch, Incarnation, NodeId, Refusal, Rng};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

/// How many samples of each kind are damaged, the largest and others.
const SAMPLES: usize = 6;

/// Real ones of a few seeds.
fn real() -> &'static Recorded {
    static REAL: OnceLock<Recorded> = OnceLock::new();
    REAL.get_or_init(|| {
        let mut all = Recorded::default();
        for seed in 0..4 {
            let (_, some) = recorded(seed);
            all.messages.extend(some.messages);
            all.records.extend(some.records);
        }
        all
    })
}

/// The kind, and the number of kinds: a new one does not compile until it is counted here.
const KINDS: usize = 15;

fn kind(msg: &ControlMsg) -> usize {
    match msg {
        ControlMsg::Heartbeat(_) => 0,
        ControlMsg::HeartbeatAck(_) => 1,
        ControlMsg::Probe => 2,
        ControlMsg::ProbeAnswer => 3,
        ControlMsg::Prepare { .. } => 4,
        ControlMsg::Promise { .. } => 5,
        ControlMsg::Accept { .. } => 6,
        ControlMsg::Accepted { .. } => 7,
        ControlMsg::Preempted { .. } => 8,
        ControlMsg::Learn(_) => 9,
        ControlMsg::Fetch { .. } => 10,
        ControlMsg::Chain { .. } => 11,
        ControlMsg::Forward { .. } => 12,
        ControlMsg::Answer { .. } => 13,
        ControlMsg::Refused(_) => KINDS - 1,
    }
}

/// The largest and some others of each kind, as bytes.
fn chosen<T>(
    all: impl Iterator<Item = T>,
    kind: impl Fn(&T) -> usize,
    encode: impl Fn(&T) -> Vec<u8>,
) -> Vec<Vec<u8>> {
    let mut by_kind: BTreeMap<usize, Vec<Vec<u8>>> = BTreeMap::new();
    for it in all {
        let bytes = encode(&it);
        let some = by_kind.entry(kind(&it)).or_default();
        let is_largest = some.first().is_some_and(|largest| largest.len() < bytes.len());
        if is_largest {
            some[0] = bytes;
        } else if some.len() < SAMPLES && !some.contains(&bytes) {
            some.push(bytes);
        }
    }
    by_kind.into_values().flatten().collect()
}

/// Messages of every kind. Those that need rare events are added by hand.
fn messages() -> Vec<Vec<u8>> {
    let rare = [
        ControlMsg::Probe,
        ControlMsg::ProbeAnswer,
        ControlMsg::Preempted { promised: Ballot { round: 300, node: 2 } },
        ControlMsg::Answer { number: 7, at: Epoch(9), answer: Answer::Unchanged },
        ControlMsg::Answer {
            number: 7,
            at: Epoch(9),
            answer: Answer::Refused(Refusal::Limit { what: "x".into(), limit: 9 }),
        },
        ControlMsg::Refused(JoinRefusal::RolledBack { known: Incarnation(3) }),
        ControlMsg::Refused(JoinRefusal::Version { cluster: 1, node: Versions::CURRENT }),
    ];
    let all = real().messages.iter().chain(&rare);
    let bytes = chosen(all, |m| kind(m), |m| m.encode(Versions::FIRST));
    let kinds: std::collections::BTreeSet<usize> = bytes.iter().map(|b| kind(&read(b).unwrap())).collect();
    assert_eq!(kinds.len(), KINDS, "not every kind is there: {kinds:?}");
    bytes
}

fn read(bytes: &[u8]) -> Option<ControlMsg> {
    ControlMsg::decode(bytes, Versions::CURRENT).ok()
}

#[test]
fn hostile_control_messages_are_refused_or_read_and_take_no_memory() {
    let verdicts = hostile(&messages(), 400, |bytes| match read(bytes) {
        Some(msg) => {
            // What was read can be sent on and is the same: nothing in it is beyond a limit of the encoding.
            assert_eq!(read(&msg.encode(Versions::FIRST)), Some(msg));
            true
        }
        None => false,
    });
    assert!(1_000 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
}

#[test]
fn a_machine_goes_on_whatever_a_member_tells_it() {
    let mut rng = Rng::new(11);
    let samples = messages();
    for seed in 0..4 {
        let (mut world, _) = recorded(100 + seed);
        let nodes: Vec<NodeId> = world.cluster.nodes().map(|(n, _)| n).collect();
        let mut told = 0;
        for _ in 0..8_000 {
            let mut bytes = rng.pick(&samples).unwrap().clone();
            damage(&mut bytes, &mut rng);
            let Some(msg) = read(&bytes) else { continue };
            let (to, from) = (*rng.pick(&nodes).unwrap(), *rng.pick(&nodes).unwrap());
            let Some(me) = world.cluster.member(from).map(|m| m.me()).filter(|_| from != to) else {
                continue;
            };
            let nonce = world.history.newest().and_then(|v| v.nonces.get(&from).copied()).unwrap_or(1);
            let peer = Peer { node: from, incarnation: me.incarnation, nonce };
            let words = format!("seed {seed}: {msg:?}");
            let fed = catch_unwind(AssertUnwindSafe(|| {
                world.cluster.inject(to, peer, msg);
                // Some of what it starts.
                for _ in 0..3 {
                    world.cluster.step();
                }
            }));
            assert!(fed.is_ok(), "{words}");
            told += 1;
        }
        assert!(500 < told, "{told}");
    }
}

#[test]
fn hostile_log_entries_are_refused_or_read_and_may_be_applied() {
    let kind = |record: &&Record| match record {
        Record::Promised(_) => 0,
        Record::Accepted(_) => 1,
        Record::Decided(_) => 2,
        Record::Step(_) => 3,
    };
    let samples = chosen(real().records.iter(), kind, |r| r.encode());
    let kinds: std::collections::BTreeSet<usize> =
        samples.iter().map(|b| kind(&&Record::decode(b).unwrap())).collect();
    assert_eq!(kinds.len(), 4, "{kinds:?}");
    let (world, _) = recorded(0);
    let before = world.cluster.nodes().next().unwrap().1.disk.clone();
    let mut on = before.clone();
    let verdicts = hostile(&samples, 400, |bytes| match Record::decode(bytes) {
        Ok(record) => {
            assert_eq!(Record::decode(&record.encode()).as_ref(), Ok(&record));
            true
        }
        Err(StateError::Damaged(_) | StateError::Version { .. }) => false,
        Err(other) => panic!("{other}"),
    });
    assert!(400 < verdicts.taken && 400 < verdicts.refused, "{verdicts:?}");
    // Applied to a real state, one after the other: the state stays one that is read back.
    let mut rng = Rng::new(12);
    for round in 0..500 {
        let mut bytes = rng.pick(&samples).unwrap().clone();
        damage(&mut bytes, &mut rng);
        if let Ok(record) = Record::decode(&bytes) {
            on.apply(record);
            let _ = (on.tip(), on.chain.since(Epoch(0)).len());
            assert_eq!(Durable::decode(&on.encode()).map(drop), on.check());
        }
        if round % 100 == 0 {
            on = before.clone();
        }
    }
}

#[test]
fn hostile_snapshots_are_refused_or_read_and_the_next_life_begins() {
    let mut samples = Vec::new();
    for seed in 0..3 {
        let (world, _) = recorded(seed);
        samples.extend(world.cluster.nodes().map(|(_, node)| node.disk.encode()));
    }
    let verdicts = hostile(&samples, 400, |bytes| match Durable::decode(bytes) {
        Ok(mut durable) => {
            assert_eq!(Durable::decode(&durable.encode()).as_ref(), Ok(&durable));
            let before = durable.life;
            assert!(before < durable.next_life());
            true
        }
        Err(StateError::Damaged(_) | StateError::Version { .. }) => false,
        Err(other) => panic!("{other}"),
    });
    assert!(100 < verdicts.taken && 400 < verdicts.refused, "{verdicts:?}");
}
