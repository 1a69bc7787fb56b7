//! The child process `peer`: a node that sends messages, which its parent tells it in lines.
//!
//! | order | what it does |
//! |---|---|
//! | `join N` | waits for N members and a lease; when that was |
//! | `meet` | a message to every other member and back |
//! | `ping N` | N messages to node 1 and back, one at a time: p50, p99 |
//! | `many FLIGHT MS` | the same with so many under way: messages and answers a second |
//! | `bulk MS` | messages of 64 KiB to node 1, as fast as it takes them: bytes a second |
//! | `beside MS` | the same with a small message and its answer beside it: bytes a second, p99, the least that was left of the lease |
//! | `group N` | joins the group and waits until N processes are in it |
//! | `cast N` | N ordered messages, one at a time, each until it comes back: p50, p99 |
//! | `flood FLIGHT MS` | ordered messages with so many under way: messages a second |
//! | `loss N` | waits until N members are left; when that was |

use crate::child::{pin, say};
use crate::echo::MESSAGE_BYTES;
use crate::node::credentials;
use crate::sample::percentile;
use quorate_membership::driver::transport::TransportKind;
use quorate_membership::driver::{Node, NodeConfig, NodeGroups, boottime};
use quorate_membership::group::{Event, GroupError, ProcessId};
use quorate_membership::{
    Epoch, GroupHandler, GroupMember, Groups, Identity, Instant, Membership, NodeId, SendError, ServiceId,
    SessionHandler, Sessions, View, ViewListener,
};
use std::error::Error;
use std::io::BufRead;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Small messages, which come back.
const ECHO: ServiceId = ServiceId(200);
/// Large ones; the last of them is a question.
const BULK: ServiceId = ServiceId(201);
/// The first byte of a message that is answered, and of the answer.
const QUESTION: u8 = 7;
const ANSWER: u8 = 8;
const BULK_BYTES: usize = 64 << 10;
const GROUP: &str = "bench";

/// What the threads of the node tell the thread that measures.
#[derive(Default)]
struct Told {
    answers: u64,
    bulk_ends: u64,
    ready: u64,
    /// Own ordered messages that came back.
    ordered: u64,
    members: usize,
    me: Option<ProcessId>,
    view: (usize, u64),
}

#[derive(Default)]
struct Board {
    told: Mutex<Told>,
    wake: Condvar,
}

impl Board {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut Told)) {
        change(&mut self.told());
        self.wake.notify_all();
    }

    fn wait<T>(&self, mut what: impl FnMut(&Told) -> Option<T>) -> T {
        let mut told = self.told();
        loop {
            if let Some(found) = what(&told) {
                return found;
            }
            told = self.wake.wait(told).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Answers on node 1, notes the answers elsewhere.
struct Service {
    board: Arc<Board>,
    node: Arc<Node>,
    service: ServiceId,
}

impl SessionHandler for Service {
    fn deliver(&self, from: Identity, _: Epoch, payload: &[u8]) {
        match (self.service, payload.first()) {
            // Nobody has more under way than a session takes, so there is room for the answer.
            (ECHO, Some(&QUESTION)) => must(self.node.send(from, ECHO, [ANSWER; MESSAGE_BYTES].to_vec())),
            (ECHO, _) => self.board.tell(|t| t.answers += 1),
            (BULK, Some(&QUESTION)) => must(self.node.send(from, BULK, vec![ANSWER])),
            (BULK, Some(&ANSWER)) => self.board.tell(|t| t.bulk_ends += 1),
            _ => {}
        }
    }

    fn on_ready(&self, _: Identity) {
        self.board.tell(|t| t.ready += 1);
    }
}

fn must<T, E: core::fmt::Display>(result: Result<T, E>) -> T {
    result.unwrap_or_else(|e| panic!("{e}"))
}

struct Views(Arc<Board>);

impl ViewListener for Views {
    fn on_view(&self, view: &Arc<View>) {
        let now = boottime().0;
        self.0.tell(|t| t.view = (view.members.len(), now));
    }
}

struct InGroup(Arc<Board>);

impl GroupHandler for InGroup {
    fn on_event(&self, event: &Event) {
        self.0.tell(|told| match event {
            Event::Configuration { members, .. } => told.members = members.len(),
            Event::Message { from, .. } if told.me == Some(*from) => told.ordered += 1,
            Event::Dropped { first, last } => panic!("messages {first} to {last} have no place"),
            _ => {}
        });
    }
}

struct Peer {
    node: Arc<Node>,
    board: Arc<Board>,
    groups: NodeGroups,
    group: Option<Box<dyn GroupMember>>,
}

/// `DIR ID CPU [OTHER@ADDRESS]...`
pub(crate) fn run(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [dir, id, cpu, contacts @ ..] = args else { return Err("peer: arguments".into()) };
    pin(cpu)?;
    let (dir, id): (&Path, u32) = (Path::new(dir), id.parse()?);
    let listen = "127.0.0.1:0".parse()?;
    let mut config = NodeConfig::lan(dir.join(format!("state{id}")), credentials(dir, id)?, listen);
    config.sessions = TransportKind::Tcp;
    for (other, address) in contacts.iter().filter_map(|c| c.split_once('@')) {
        config.peers.insert(NodeId(other.parse()?), vec![address.parse::<SocketAddr>()?]);
    }
    let node = Node::start(config)?;
    let board: Arc<Board> = Arc::default();
    for service in [ECHO, BULK] {
        node.register(service, Arc::new(Service { board: board.clone(), node: node.clone(), service }));
    }
    node.subscribe(Arc::new(Views(board.clone())));
    let groups = NodeGroups::start(&*node, node.clone());
    node.join();
    say(&format!("ready {}", node.local_address()));
    let mut peer = Peer { node, board, groups, group: None };
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        say(&format!("ok {}", peer.obey(&line.split_whitespace().collect::<Vec<_>>())?));
    }
    Ok(())
}

impl Peer {
    fn obey(&mut self, words: &[&str]) -> Result<String, Box<dyn Error>> {
        let number = |at: usize| -> Result<u64, Box<dyn Error>> {
            Ok(words.get(at).ok_or("an order without its numbers")?.parse()?)
        };
        let time = |at| number(at).map(Duration::from_millis);
        Ok(match words.first().copied().unwrap_or_default() {
            "join" => self.join(usize::try_from(number(1)?)?),
            "meet" => {
                let others = self.node.view().members.len() - 1;
                let before = self.board.told().answers;
                let me = self.node.me();
                for who in self.node.view().identities().filter(|w| *w != me) {
                    self.send(who, ECHO, &[QUESTION; MESSAGE_BYTES]);
                }
                self.board.wait(|t| (t.answers - before == others as u64).then_some(()));
                String::new()
            }
            "ping" => self.ping(number(1)?),
            "many" => self.many(number(1)?, time(2)?),
            "bulk" => format!("{}", self.bulk(time(1)?)),
            "beside" => self.beside(time(1)?),
            "group" => {
                let member = self.groups.join(GROUP, Arc::new(InGroup(self.board.clone())))?;
                self.board.tell(|t| t.me = Some(member.id()));
                self.group = Some(member);
                let count = usize::try_from(number(1)?)?;
                self.board.wait(|t| (t.members == count).then_some(()));
                String::new()
            }
            "cast" => self.cast(number(1)?),
            "flood" => self.flood(number(1)?, time(2)?),
            "loss" => {
                let count = usize::try_from(number(1)?)?;
                format!("{}", self.board.wait(|t| (t.view.0 == count).then_some(t.view.1)))
            }
            other => return Err(format!("no such order: {other}").into()),
        })
    }

    fn first(&self) -> Identity {
        must(self.node.view().identity(NodeId(1)).ok_or("node 1 is no member"))
    }

    /// The lease comes a moment after the view, and nobody is told of it but by its clock.
    fn join(&self, count: usize) -> String {
        self.board.wait(|t| (t.view.0 == count).then_some(()));
        while !self.node.is_quorate() {
            std::thread::yield_now();
        }
        format!("{}", boottime().0)
    }

    /// Waits for room as long as it takes.
    fn send(&self, to: Identity, service: ServiceId, payload: &[u8]) {
        loop {
            let ready = self.board.told().ready;
            match self.node.send(to, service, payload.to_vec()) {
                Ok(()) => return,
                Err(SendError::Full(_)) => self.board.wait(|t| (t.ready != ready).then_some(())),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn round_trip(&self, to: Identity) -> f64 {
        let (since, before) = (boottime(), self.board.told().answers);
        self.send(to, ECHO, &[QUESTION; MESSAGE_BYTES]);
        self.board.wait(|t| (t.answers != before).then_some(()));
        boottime().since(since).as_nanos() as f64
    }

    fn ping(&self, count: u64) -> String {
        let to = self.first();
        let mut spent: Vec<f64> = (0..count).map(|_| self.round_trip(to)).collect();
        format!("{} {}", percentile(&mut spent, 50.0), percentile(&mut spent, 99.0))
    }

    fn many(&self, flight: u64, time: Duration) -> String {
        let (to, start, before) = (self.first(), boottime(), self.board.told().answers);
        let mut sent = 0;
        while boottime().since(start) < time {
            let answered = self.board.wait(|t| (sent < flight + t.answers - before).then_some(t.answers));
            while sent < flight + answered - before {
                self.send(to, ECHO, &[QUESTION; MESSAGE_BYTES]);
                sent += 1;
            }
        }
        self.board.wait(|t| (t.answers - before == sent).then_some(()));
        format!("{}", sent as f64 / boottime().since(start).as_secs_f64())
    }

    fn bulk(&self, time: Duration) -> f64 {
        let (to, start, ends) = (self.first(), boottime(), self.board.told().bulk_ends);
        let payload = vec![1; BULK_BYTES];
        let mut sent = 0;
        while boottime().since(start) < time {
            self.send(to, BULK, &payload);
            sent += BULK_BYTES;
        }
        self.send(to, BULK, &[QUESTION]);
        self.board.wait(|t| (t.bulk_ends != ends).then_some(()));
        sent as f64 / boottime().since(start).as_secs_f64()
    }

    fn beside(&self, time: Duration) -> String {
        std::thread::scope(|scope| {
            let bulk = scope.spawn(|| self.bulk(time));
            let (mut spent, mut left) = (Vec::new(), f64::INFINITY);
            let to = self.first();
            while !bulk.is_finished() {
                spent.push(self.round_trip(to));
                left = left.min(self.lease_left());
            }
            let rate = bulk.join().unwrap_or_else(|_| panic!("the bulk's thread ended"));
            format!("{rate} {} {left}", percentile(&mut spent, 99.0))
        })
    }

    fn lease_left(&self) -> f64 {
        let until: Instant = self.node.lease().until();
        until.since(boottime()).as_nanos() as f64
    }

    fn cast_one(&self) -> Result<(), GroupError> {
        let Some(group) = &self.group else { panic!("not in the group yet") };
        group.multicast(vec![7; MESSAGE_BYTES]).map(|_| ())
    }

    fn cast(&self, count: u64) -> String {
        let mut spent = Vec::new();
        for _ in 0..count {
            let (since, before) = (boottime(), self.board.told().ordered);
            must(self.cast_one());
            self.board.wait(|t| (t.ordered != before).then_some(()));
            spent.push(boottime().since(since).as_nanos() as f64);
        }
        format!("{} {}", percentile(&mut spent, 50.0), percentile(&mut spent, 99.0))
    }

    fn flood(&self, flight: u64, time: Duration) -> String {
        let (start, before) = (boottime(), self.board.told().ordered);
        let mut sent = 0;
        while boottime().since(start) < time {
            let done = self.board.wait(|t| (sent < flight + t.ordered - before).then_some(t.ordered));
            while sent < flight + done - before {
                must(self.cast_one());
                sent += 1;
            }
        }
        self.board.wait(|t| (t.ordered - before == sent).then_some(()));
        format!("{}", sent as f64 / boottime().since(start).as_secs_f64())
    }
}
