//! Process groups on running nodes: everybody sees the same order, also when the node that gives it dies.

use super::cluster::{CEILING, TestCluster, block_on};
use quorate_membership::driver::transport::TransportKind::{Quic, Tcp};
use quorate_membership::driver::{Node, NodeGroups, boottime};
use quorate_membership::group::{Event, GroupError, ProcessId, Reason};
use quorate_membership::{GroupHandler, GroupMember, Groups, Membership};
use std::sync::{Arc, Condvar, Mutex};

#[derive(Default)]
struct Journal {
    events: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl GroupHandler for Journal {
    fn on_event(&self, event: &Event) {
        self.events.lock().unwrap().push(event.clone());
        self.changed.notify_all();
    }
}

impl Journal {
    fn wait<T>(&self, what: &str, wanted: impl Fn(&[Event]) -> Option<T>) -> T {
        let events = self.events.lock().unwrap();
        let (events, timeout) =
            self.changed.wait_timeout_while(events, CEILING, |e| wanted(e).is_none()).unwrap();
        assert!(!timeout.timed_out(), "{what}: {} events, last {:?}", events.len(), events.last());
        wanted(&events).unwrap()
    }

    fn wait_members(&self, members: &[ProcessId]) {
        let fits = |e: &Event| matches!(e, Event::Configuration { members: m, .. } if m == members);
        self.wait("the members", |events| {
            events.iter().rfind(|e| !matches!(e, Event::Message { .. })).filter(|e| fits(e)).map(drop)
        });
    }
}

struct Member {
    node: Arc<Node>,
    journal: Arc<Journal>,
    process: Box<dyn GroupMember>,
}

fn start(cluster: &mut TestCluster, number: u32) -> (Arc<Node>, NodeGroups) {
    let config = cluster.config(number);
    let node = Node::start(config).unwrap();
    let groups = NodeGroups::start(&*node, node.clone());
    node.join();
    cluster.runs_at(number, node.local_address());
    (node, groups)
}

fn join((node, groups): (Arc<Node>, NodeGroups)) -> Member {
    let journal = Arc::new(Journal::default());
    let started = boottime();
    let process = loop {
        match groups.join("board", journal.clone()) {
            Ok(process) => break process,
            Err(error) => assert_eq!(error, GroupError::NotMember),
        }
        assert!(boottime().since(started) < CEILING, "{} is not let in", node.me());
        std::thread::yield_now();
    };
    Member { node, journal, process }
}

/// Sends until it has its own word for it: what a view's end drops is sent again.
fn send_all(member: &Member, count: u32) {
    let mut open: Vec<(u64, u32)> = Vec::new();
    let mut seen = 0;
    let started = boottime();
    let mut left: Vec<u32> = (0..count).rev().collect();
    let me = member.process.id();
    while !left.is_empty() || !open.is_empty() {
        assert!(boottime().since(started) < CEILING, "{me}: {} to send, {} open", left.len(), open.len());
        if let Some(word) = left.last().copied()
            && let Ok(number) = member.process.multicast(word.to_le_bytes().to_vec())
        {
            left.pop();
            open.push((number, word));
        }
        let events = member.journal.events.lock().unwrap();
        for event in events.iter().skip(seen) {
            match event {
                Event::Message { from, number, .. } if *from == me => open.retain(|(n, _)| n != number),
                Event::Dropped { first, last } => {
                    left.extend(open.iter().filter(|(n, _)| first <= n && n <= last).map(|(_, w)| *w));
                    open.retain(|(n, _)| n < first || last < n);
                }
                _ => {}
            }
        }
        seen = events.len();
        drop(events);
        std::thread::yield_now();
    }
}

#[test]
fn processes_of_three_nodes_see_one_order_also_when_one_node_dies() {
    let mut cluster = TestCluster::new(3, Quic, Tcp);
    let members: Vec<Member> =
        (1..=3).map(|n| start(&mut cluster, n)).collect::<Vec<_>>().into_iter().map(join).collect();
    let ids: Vec<ProcessId> = members.iter().map(|m| m.process.id()).collect();
    members.iter().for_each(|m| m.journal.wait_members(&ids));
    let [one, two, three] = <[Member; 3]>::try_from(members).ok().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| send_all(&one, 300));
        scope.spawn(|| send_all(&two, 300));
        scope.spawn(|| {
            // Dies in the middle of its own words.
            for word in 0..100_u32 {
                let _ = three.process.multicast(word.to_le_bytes().to_vec());
            }
            three.node.abort();
            block_on(three.node.ended());
        });
    });
    for member in [&one, &two] {
        member.journal.wait_members(&ids[..2]);
    }
    let dead =
        |e: &Event| matches!(e, Event::Configuration { left, .. } if left == &[(ids[2], Reason::NodeGone)]);
    let seen = |m: &Member| -> Vec<Event> {
        let events = m.journal.events.lock().unwrap();
        let both =
            events.iter().position(|e| matches!(e, Event::Configuration { members, .. } if *members == ids));
        events.iter().skip(both.unwrap()).filter(|e| !matches!(e, Event::Dropped { .. })).cloned().collect()
    };
    for from in &ids[..2] {
        let all = |events: &[Event]| {
            let words = events.iter().filter(|e| matches!(e, Event::Message { from: f, .. } if f == from));
            (300 == words.count()).then_some(())
        };
        one.journal.wait("all words at the first", all);
        two.journal.wait("all words at the second", all);
    }
    assert!(seen(&one).iter().any(dead));
    assert_eq!(seen(&one), seen(&two));

    // A process that leaves, and one that ends without a word.
    two.process.leave();
    two.journal.wait("the end", |e| (e.last() == Some(&Event::Left)).then_some(()));
    one.journal.wait_members(&ids[..1]);
    let left =
        |e: &Event| matches!(e, Event::Configuration { left, .. } if left == &[(ids[1], Reason::Left)]);
    assert!(one.journal.events.lock().unwrap().iter().any(left));
}
