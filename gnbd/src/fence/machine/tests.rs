//! The fence, rule by rule.

use super::*;
use quorate_membership::{Accept, Ballot, Incarnation, ServerEntry, StateId, Voter, VoterSet};

const SERVER: ServerId = ServerId::from_bytes([0x51; 16]);
const SPARE: ServerId = ServerId::from_bytes([0x52; 16]);
const CLUSTER: ClusterId = ClusterId::from_bytes([1; 16]);

/// Three voters; `members` as (node, incarnation).
fn decision(epoch: u64, members: &[(u32, u64)], servers: &[ServerId]) -> Decision {
    let state = |n: u32| StateId::from_bytes([n as u8; 16]);
    let voters = VoterSet {
        voters: (1..=3).map(|n| (NodeId(n), Voter { state: state(n), votes: 1 })).collect(),
        tie_breaker: None,
        expected: 0,
    };
    let entry = ServerEntry { name: "s".into(), address: "127.0.0.1:1".into() };
    let view = View {
        epoch: Epoch(epoch),
        members: members.iter().map(|(n, i)| (NodeId(*n), Incarnation(*i))).collect(),
        voters,
        servers: servers.iter().map(|s| (*s, entry.clone())).collect(),
        ..View::empty(CLUSTER)
    };
    let accept = |n| Accept {
        state: state(n),
        ballot: Ballot { round: epoch, node: 1 },
        acknowledged_ns_ago: BTreeMap::new(),
    };
    Decision { view, accepts: (1..=2).map(|n| (NodeId(n), accept(n))).collect() }
}

struct Run {
    machine: FenceServer,
    now: Instant,
    calls: u64,
}

impl Run {
    fn fresh() -> Self {
        Self { machine: FenceServer::new(FenceRecord::fresh(SERVER), SPARE, None), now: Instant(0), calls: 0 }
    }

    /// Nodes 1#1 and 2#1 admitted in epoch 2.
    fn enrolled() -> Self {
        let mut run = Self::fresh();
        let out = run.install(&[decision(2, &[(1, 1), (2, 1)], &[SERVER])]);
        let out = run.persisted(&out);
        assert_eq!(out, [installed(1, Ok(2))]);
        run
    }

    fn give(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        self.machine.handle(self.now, input, &mut out);
        out
    }

    fn install(&mut self, chain: &[Decision]) -> Vec<Output> {
        self.calls += 1;
        self.give(Input::Install { call: CallId(self.calls), chain: chain.to_vec() })
    }

    /// The disk finishes what `out` asked for.
    fn persisted(&mut self, out: &[Output]) -> Vec<Output> {
        let token = out.iter().find_map(|o| match o {
            Output::Persist { token, .. } => Some(*token),
            _ => None,
        });
        self.give(Input::Persisted(token.expect("a record was to be made durable")))
    }

    fn hello(&mut self, connection: u64, who: (u32, u64), generation: u64) -> Vec<Output> {
        let hello = Hello {
            version: VERSION,
            cluster: CLUSTER,
            who: Identity::new(NodeId(who.0), Incarnation(who.1)),
            epoch: Epoch(2),
            generation,
            export: "disk".into(),
        };
        self.give(Input::Hello { connection: ConnectionId(connection), certified: NodeId(who.0), hello })
    }
}

fn installed(call: u64, epoch: Result<u64, InstallError>) -> Output {
    Output::Installed { call: CallId(call), result: epoch.map(|e| (SERVER, Epoch(e))) }
}

fn answer(connection: u64, answer: Result<u64, HelloRefusal>) -> Output {
    Output::Answer { connection: ConnectionId(connection), answer: answer.map(|e| (SERVER, Epoch(e))) }
}

#[test]
fn the_first_record_must_enrol_this_very_server() {
    let mut run = Run::fresh();
    let out = run.install(&[decision(2, &[(1, 1)], &[SPARE])]);
    assert_eq!(out, [installed(1, Err(InstallError::DoesNotEnrol { server: SERVER }))]);
    assert_eq!(run.hello(1, (1, 1), 1), [answer(1, Err(HelloRefusal::NotEnrolled(SERVER)))]);
}

#[test]
fn an_installation_is_confirmed_when_it_is_durable_and_the_refused_are_drained() {
    let mut run = Run::enrolled();
    assert_eq!(run.hello(1, (1, 1), 1), [answer(1, Ok(2))]);
    assert_eq!(run.hello(2, (2, 1), 1), [answer(2, Ok(2))]);
    let out = run.install(&[decision(3, &[(1, 1)], &[SERVER])]);
    assert!(out.contains(&Output::Close(ConnectionId(2))) && out.len() == 2, "{out:?}");
    // Refused from now on, although the disk is still at work.
    let refusal = HelloRefusal::NotAdmitted { server: SERVER, epoch: Epoch(3) };
    assert_eq!(run.hello(3, (2, 1), 2), [answer(3, Err(refusal))]);
    assert_eq!(run.persisted(&out), []);
    assert_eq!(run.give(Input::Closed(ConnectionId(2))), [installed(2, Ok(3))]);
    // The same epoch is confirmed again, an older one is refused.
    assert_eq!(run.install(&[decision(3, &[(1, 1)], &[SERVER])]), [installed(3, Ok(3))]);
    let older = InstallError::Older { asked: Epoch(2), installed: Epoch(3) };
    assert_eq!(run.install(&[decision(2, &[(1, 1), (2, 1)], &[SERVER])]), [installed(4, Err(older))]);
}

#[test]
fn a_server_that_cannot_drain_does_not_confirm_until_it_has() {
    let mut run = Run::enrolled();
    run.hello(2, (2, 1), 1);
    let out = run.install(&[decision(3, &[(1, 1)], &[SERVER])]);
    run.persisted(&out);
    run.now = run.machine.next_deadline().unwrap();
    assert_eq!(run.give(Input::Tick), [installed(2, Err(InstallError::NotDrained { connections: 1 }))]);
    assert_eq!(run.install(&[decision(3, &[(1, 1)], &[SERVER])]), []);
    assert_eq!(run.give(Input::Closed(ConnectionId(2))), [installed(3, Ok(3))]);
}

#[test]
fn a_chain_with_a_gap_or_without_a_majority_changes_nothing() {
    let mut run = Run::enrolled();
    let gap = InstallError::Gap { installed: Epoch(2) };
    assert_eq!(run.install(&[decision(4, &[], &[SERVER])]), [installed(2, Err(gap))]);
    let mut weak = decision(3, &[], &[SERVER]);
    weak.accepts.pop_last();
    let out = run.install(&[weak]);
    assert!(matches!(&out[..], [Output::Installed { result: Err(InstallError::Chain(_)), .. }]), "{out:?}");
    assert_eq!(run.machine.record().epoch(), Some(Epoch(2)));
}

#[test]
fn a_record_that_does_not_reach_the_disk_is_not_confirmed() {
    let mut run = Run::enrolled();
    let out = run.install(&[decision(3, &[(1, 1)], &[SERVER])]);
    let Output::Persist { token, .. } = &out[0] else { panic!("{out:?}") };
    let failed = run.give(Input::PersistFailed { token: *token, detail: "full".into() });
    assert_eq!(failed, [installed(2, Err(InstallError::NotDurable("full".into())))]);
    let out = run.install(&[decision(3, &[(1, 1)], &[SERVER])]);
    assert_eq!(run.persisted(&out), [installed(3, Ok(3))]);
}

#[test]
fn chains_that_come_while_the_disk_is_busy_wait_for_it() {
    let mut run = Run::enrolled();
    let (three, four) = (decision(3, &[(1, 1)], &[SERVER]), decision(4, &[(1, 1), (2, 2)], &[SERVER]));
    let first = run.install(std::slice::from_ref(&three));
    assert_eq!(run.install(&[three, four]), []);
    let second = run.persisted(&first);
    assert_eq!(second[0], installed(2, Ok(3)));
    assert_eq!(run.hello(1, (2, 2), 1), [], "admitted by what is not durable yet");
    assert_eq!(run.persisted(&second), [answer(1, Ok(4)), installed(3, Ok(4))]);
}

#[test]
fn a_generation_begins_when_every_older_path_is_drained() {
    let mut run = Run::enrolled();
    run.hello(1, (1, 1), 1);
    assert_eq!(run.hello(2, (1, 1), 1), [answer(2, Ok(2))], "a second path of one generation");
    assert_eq!(run.hello(3, (1, 1), 2), [Output::Close(ConnectionId(1)), Output::Close(ConnectionId(2))]);
    assert_eq!(run.hello(4, (1, 1), 1), [answer(4, Err(HelloRefusal::Stale(2)))]);
    assert_eq!(run.give(Input::Closed(ConnectionId(1))), []);
    assert_eq!(run.give(Input::Closed(ConnectionId(2))), [answer(3, Ok(2))]);
}

#[test]
fn another_life_node_or_cluster_is_refused() {
    let mut run = Run::enrolled();
    let refusal = HelloRefusal::NotAdmitted { server: SERVER, epoch: Epoch(2) };
    assert_eq!(run.hello(1, (1, 2), 1), [answer(1, Err(refusal))]);
    let mut hello = Hello {
        version: VERSION,
        cluster: CLUSTER,
        who: Identity::new(NodeId(1), Incarnation(1)),
        epoch: Epoch(2),
        generation: 1,
        export: "disk".into(),
    };
    let wrong = Input::Hello { connection: ConnectionId(2), certified: NodeId(2), hello: hello.clone() };
    assert_eq!(run.give(wrong), [answer(2, Err(HelloRefusal::OtherNode(NodeId(2))))]);
    hello.cluster = ClusterId::from_bytes([9; 16]);
    let wrong = Input::Hello { connection: ConnectionId(3), certified: NodeId(1), hello };
    assert_eq!(run.give(wrong), [answer(3, Err(HelloRefusal::OtherCluster(CLUSTER)))]);
}

#[test]
fn a_retired_server_is_another_one_and_serves_nobody_until_it_is_enrolled() {
    let mut run = Run::enrolled();
    run.hello(1, (1, 1), 1);
    let out = run.install(&[decision(3, &[(1, 1)], &[])]);
    assert!(out.contains(&Output::Close(ConnectionId(1))));
    run.persisted(&out);
    let out = run.give(Input::Closed(ConnectionId(1)));
    let retired = Output::Installed { call: CallId(2), result: Err(InstallError::Retired { server: SPARE }) };
    assert_eq!(out, [retired]);
    assert_eq!(run.machine.record(), &FenceRecord::fresh(SPARE));
    let again = run.install(&[decision(3, &[(1, 1)], &[SERVER])]);
    assert!(matches!(again[..], [Output::Installed { result: Err(InstallError::DoesNotEnrol { .. }), .. }]));
}

/// Retired twice in one run: if it took its old name again, a chain from before the second retirement would be a proof
/// once more, and let in whom it admits (R9).
#[test]
fn a_server_that_is_retired_again_takes_yet_another_id() {
    let mut run = Run::enrolled();
    let out = run.install(&[decision(3, &[(1, 1)], &[])]);
    run.persisted(&out);
    let enrols_spare = decision(4, &[(1, 1), (2, 2)], &[SPARE]);
    let out = run.install(std::slice::from_ref(&enrols_spare));
    let confirmed = Output::Installed { call: CallId(3), result: Ok((SPARE, Epoch(4))) };
    assert_eq!(run.persisted(&out), [confirmed]);
    let out = run.install(&[decision(5, &[(1, 1)], &[])]);
    run.persisted(&out);
    let now = run.machine.record().server;
    assert!(now != SPARE && now != SERVER, "{now}");
    let out = run.install(&[enrols_spare]);
    let refused = Err(InstallError::DoesNotEnrol { server: now });
    assert_eq!(out, [Output::Installed { call: CallId(5), result: refused }]);
    assert!(!run.machine.record().admits(Identity::new(NodeId(2), Incarnation(2))));
}
