//! Directories that are not the cluster's: who is refused, with which words, and that the others go on.

use quorate_ccs::{Entry, ForeignHistory, Input, Output, Replica, RequestKey, Stored};
use quorate_membership::{ClusterId, Epoch, Identity, Incarnation, NodeId, StateId, View, Voter, VoterSet};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

fn life(node: u32) -> Identity {
    Identity::new(NodeId(node), Incarnation(1))
}

fn state(node: u32) -> StateId {
    StateId::from_bytes([node as u8; 16])
}

/// Three voters; these are members.
fn view(epoch: u64, members: &[u32]) -> Arc<View> {
    let mut view = View::empty(CLUSTER);
    view.epoch = Epoch(epoch);
    view.members = members.iter().map(|n| (NodeId(*n), Incarnation(1))).collect();
    view.voters = VoterSet::default();
    for n in 1..=3 {
        view.voters.voters.insert(NodeId(n), Voter { state: state(n), votes: 1 });
    }
    Arc::new(view)
}

/// Replicas between which everything arrives at once, on disks that write at once.
#[derive(Default)]
struct Cluster {
    replicas: BTreeMap<Identity, Replica>,
    disks: BTreeMap<Identity, Stored>,
    foreign: BTreeMap<Identity, ForeignHistory>,
    updates: u64,
}

impl Cluster {
    fn add(&mut self, node: u32, stored: Stored) {
        self.replicas.insert(life(node), Replica::new(life(node), state(node), stored));
    }

    fn handle(&mut self, at: Identity, input: Input) {
        let mut inputs = VecDeque::from([(at, input)]);
        while let Some((at, input)) = inputs.pop_front() {
            let Some(replica) = self.replicas.get_mut(&at) else { continue };
            let mut out = Vec::new();
            replica.handle(input, &mut out);
            for output in out {
                match output {
                    Output::Send { to, bytes } => inputs.push_back((to, Input::Message { from: at, bytes })),
                    Output::Persist { token, stored } => {
                        self.disks.insert(at, *stored);
                        inputs.push_back((at, Input::Persisted(token)));
                    }
                    Output::Foreign(why) => {
                        // The node stops.
                        self.foreign.insert(at, why);
                        self.replicas.remove(&at);
                    }
                    _ => {}
                }
            }
        }
    }

    fn install(&mut self, epoch: u64, members: &[u32]) {
        // The lowest last: a message may overtake a view only where the sessions hold it back.
        for node in members.iter().rev() {
            self.handle(life(*node), Input::View(view(epoch, members)));
        }
    }

    fn update(&mut self, node: u32, text: &str) {
        self.updates += 1;
        let input = Input::Update {
            number: self.updates,
            expected: None,
            author: "test".into(),
            written_at: 0,
            text: document(text),
        };
        self.handle(life(node), input);
    }

    fn newest(&self, node: u32) -> Option<(u64, &str)> {
        let entry = self.replicas.get(&life(node))?.committed()?;
        Some((entry.version, entry.text.split('"').nth(1)?))
    }
}

/// A document that is told from others by this word.
fn document(word: &str) -> String {
    format!("name = \"{word}\"\n[[node]]\nid = 1\nname = \"n\"\naddress = \"127.0.0.1:1\"\n")
}

fn texts(texts: &[&str], by: u32) -> Stored {
    let mut stored = Stored::empty(CLUSTER);
    stored.history = (1..)
        .zip(texts)
        .map(|(version, text)| Entry {
            stamp: Epoch(1),
            version,
            request: RequestKey { by: life(by), number: version },
            author: "test".into(),
            written_at: 0,
            text: document(text),
        })
        .collect();
    stored
}

/// Nodes 1 and 2 with three versions.
fn two() -> Cluster {
    let mut cluster = Cluster::default();
    cluster.add(1, Stored::empty(CLUSTER));
    cluster.add(2, Stored::empty(CLUSTER));
    cluster.install(2, &[1, 2]);
    for text in ["one", "two", "three"] {
        cluster.update(2, text);
    }
    assert_eq!((cluster.newest(1), cluster.newest(2)), (Some((3, "three")), Some((3, "three"))));
    cluster
}

#[test]
fn a_node_with_another_history_stops_and_says_so() {
    let mut cluster = two();
    cluster.add(3, texts(&["other", "words"], 3));
    cluster.install(3, &[1, 2, 3]);
    let why = &cluster.foreign[&life(3)];
    assert_eq!(
        why.to_string(),
        "version 1 of the configuration on this node is not the cluster's: its directory is of another cluster or was \
         restored from elsewhere; move it away and start again"
    );
    cluster.update(2, "four");
    assert_eq!(cluster.newest(1), Some((4, "four")));
    assert_eq!(cluster.foreign.len(), 1);
}

#[test]
fn a_node_that_knows_more_than_the_cluster_stops_and_says_so() {
    let mut cluster = two();
    let mut stored = cluster.disks[&life(2)].clone();
    let mut more = texts(&["", "", "", "four", "five"], 3).history.split_off(3);
    stored.history.append(&mut more);
    cluster.add(3, stored);
    cluster.install(3, &[1, 2, 3]);
    assert_eq!(
        cluster.foreign[&life(3)].to_string(),
        "this node has version 5 of the configuration, the cluster's newest is 3: the cluster was restored from an older \
         state; apply this node's configuration there, or move its directory away"
    );
    assert_eq!((cluster.newest(2), cluster.foreign.len()), (Some((3, "three")), 1));
}

/// The lowest voter coordinates: with a foreign directory it must not make the others' history its own's continuation.
#[test]
fn a_coordinator_with_another_history_stops_and_the_others_go_on() {
    let theirs = two().disks[&life(2)].clone();
    let mut cluster = Cluster::default();
    cluster.add(1, texts(&["other", "words", "and", "more", "of", "them"], 1));
    cluster.add(2, theirs.clone());
    cluster.add(3, theirs);
    cluster.install(9, &[1, 2, 3]);
    assert_eq!(cluster.foreign.keys().collect::<Vec<_>>(), [&life(1)]);
    assert!(cluster.foreign[&life(1)].to_string().starts_with("version 1 of the configuration on this node"));
    cluster.install(10, &[2, 3]);
    cluster.update(3, "four");
    assert_eq!((cluster.newest(2), cluster.newest(3)), (Some((4, "four")), Some((4, "four"))));
    assert_eq!(cluster.foreign.len(), 1);
}

#[test]
fn a_coordinator_goes_on_without_a_voter_with_another_history() {
    let theirs = two().disks[&life(2)].clone();
    let mut cluster = Cluster::default();
    cluster.add(1, theirs.clone());
    cluster.add(2, texts(&["other", "words", "and", "more"], 1));
    cluster.add(3, theirs);
    cluster.install(9, &[1, 2, 3]);
    assert_eq!(cluster.foreign.keys().collect::<Vec<_>>(), [&life(2)]);
    cluster.update(3, "four");
    assert_eq!((cluster.newest(1), cluster.newest(3)), (Some((4, "four")), Some((4, "four"))));
}
