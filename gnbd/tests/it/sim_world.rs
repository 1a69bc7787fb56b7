//! The fence machine and the client queues on a simulated network, server and disk, by seed.
//!
//! Nodes own blocks, as locks would have it: a node writes only what it owns, and gives a block away after a flush, with
//! a revoke. A removed node's blocks go to others once its fence is confirmed, while it may still be alive and sending.

use crate::cluster_support::{CLUSTER, decision};
use crate::invariants::{durable, late, stale, visible};
use quorate_gnbd::client::queue::{
    ClientQueue, Command, Input as QIn, OpId, Operation, Output as QOut, QueueBug, Tag,
};
use quorate_gnbd::fence::wire::{Hello, HelloRefusal, VERSION};
use quorate_gnbd::fence::{
    Bug, CallId, ConnectionId, FenceRecord, FenceServer, Input, Output, PersistToken, SyncGate, SyncTicket,
};
use quorate_gnbd::proto::{Errno, Verifier};
use quorate_gnbd::{Buf, IoError};
use quorate_membership::sim::Schedule;
use quorate_membership::{Decision, Epoch, Identity, Incarnation, Instant, NodeId, Rng, ServerId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

const BLOCKS: usize = 24;
const BLOCK: u64 = 8;
const NODES: u32 = 3;
const STEPS: u64 = 6_000;
const PATHS: usize = 2;

/// What is wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    Fence(Bug),
    Queue(QueueBug),
}

#[derive(Clone, Debug)]
enum ToServer {
    Hello(Hello),
    Request(Tag, Command),
    End,
}

#[derive(Clone, Debug)]
enum ToClient {
    Answer(Result<Verifier, HelloRefusal>),
    Reply(Tag, Result<(), Errno>, Option<Verifier>, Option<Vec<u64>>),
    End,
}

#[derive(Clone, Debug)]
enum Event {
    ToServer(ConnectionId, ToServer),
    ToClient(ConnectionId, ToClient),
    Apply(u64, ConnectionId, Tag, Command),
    SyncEnd(u64, bool),
    Persisted(u64, PersistToken, FenceRecord),
    Tick(u64),
    Crash,
    Restart,
    Break(u32),
    Connect(u32, u64),
    Work(u32),
    Remove,
    Rejoin(u32),
    Push(Epoch),
    Give,
    Heal,
}

#[derive(Debug)]
struct Link {
    node: u32,
    who: Identity,
    client_open: bool,
    /// The server's half; gone with the server's process.
    server: Option<ServerHalf>,
    last_to_server: Instant,
    last_to_client: Instant,
}

#[derive(Debug, Default)]
struct ServerHalf {
    admitted: bool,
    shut: bool,
    inside: usize,
    told: bool,
    ended: bool,
}

#[derive(Debug)]
struct Server {
    boot: u64,
    machine: FenceServer,
    gate: SyncGate,
    waiting: Vec<(SyncTicket, ConnectionId, Tag, bool)>,
    snapshot: Vec<u64>,
    dirty: BTreeSet<usize>,
}

#[derive(Debug)]
struct Node {
    who: Identity,
    queue: ClientQueue,
    generation: u64,
    /// Of the attempt or generation under way.
    links: Vec<ConnectionId>,
    admitted: usize,
    verifier: Option<Verifier>,
    up: bool,
    /// Counts attempts: a timer of an older one means nothing.
    attempt: u64,
    view: Epoch,
    ops: BTreeMap<OpId, Asked>,
    /// Newest acknowledged number per block in this life, for what a flush promises.
    mine: Vec<u64>,
    giving: Option<usize>,
}

#[derive(Debug)]
enum Asked {
    Write(usize, Vec<u64>, bool),
    Read(usize, Vec<u64>),
    Flush(Vec<u64>),
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) writes: u64,
    pub(crate) flushes: u64,
    pub(crate) fences: u64,
    pub(crate) crashes: u64,
}

pub(crate) struct World {
    rng: Rng,
    events: Schedule<Event>,
    faults: bool,
    planted: Option<Planted>,
    links: BTreeMap<ConnectionId, Link>,
    next_link: u64,
    boots: u64,
    server: Option<Server>,
    record: FenceRecord,
    current: Vec<u64>,
    durable: Vec<u64>,
    nodes: BTreeMap<u32, Node>,
    chain: Vec<Decision>,
    calls: BTreeMap<CallId, Epoch>,
    call: u64,
    owner: Vec<Option<u32>>,
    number: u64,
    ops: u64,
    acknowledged: Vec<u64>,
    flushed: Vec<u64>,
    fenced: BTreeSet<Identity>,
    read_data: BTreeMap<(u32, OpId), Vec<u64>>,
    counts: Counts,
}

fn id(n: u64) -> [u8; 16] {
    let mut bytes = [0x5a; 16];
    bytes[..8].copy_from_slice(&n.to_le_bytes());
    bytes
}

impl World {
    pub(crate) fn new(seed: u64, planted: Option<Planted>) -> Self {
        let rng = Rng::new(seed);
        let server_id = ServerId::from_bytes(id(1));
        let mut world = Self {
            rng,
            events: Schedule::new(),
            faults: true,
            planted,
            links: BTreeMap::new(),
            next_link: 0,
            boots: 0,
            server: None,
            record: FenceRecord::fresh(server_id),
            current: vec![0; BLOCKS],
            durable: vec![0; BLOCKS],
            nodes: BTreeMap::new(),
            chain: vec![decision(2, &[(1, 1), (2, 1), (3, 1)], &[server_id])],
            calls: BTreeMap::new(),
            call: 0,
            owner: (0..BLOCKS).map(|b| Some(b as u32 % NODES + 1)).collect(),
            number: 0,
            ops: 0,
            acknowledged: vec![0; BLOCKS],
            flushed: vec![0; BLOCKS],
            fenced: BTreeSet::new(),
            read_data: BTreeMap::new(),
            counts: Counts::default(),
        };
        world.restart();
        for n in 1..=NODES {
            world.start_node(n, 1);
            world.at(1_000, Event::Work(n));
        }
        world.at(0, Event::Push(Epoch(2)));
        for (event, micros) in
            [(Event::Crash, 60_000), (Event::Break(1), 20_000), (Event::Remove, 80_000), (Event::Give, 9_000)]
        {
            let wait = world.rng.below(micros);
            world.at(wait, event);
        }
        world
    }

    fn at(&mut self, micros: u64, event: Event) {
        let at = self.events.now() + Duration::from_micros(micros);
        self.events.at(at, event);
    }

    fn members(&self) -> BTreeMap<NodeId, Incarnation> {
        self.chain.last().unwrap().view.members.clone()
    }

    fn decide(&mut self, members: &BTreeMap<NodeId, Incarnation>) -> Epoch {
        let last = self.chain.last().unwrap();
        let epoch = last.view.epoch.0 + 1;
        let members: Vec<(u32, u64)> = members.iter().map(|(n, i)| (n.0, i.0)).collect();
        let servers: Vec<ServerId> = last.view.servers.keys().copied().chain([self.record.server]).collect();
        self.chain.push(decision(epoch, &members, &servers));
        Epoch(epoch)
    }

    fn start_node(&mut self, n: u32, incarnation: u64) {
        let mut queue = ClientQueue::new();
        if let Some(Planted::Queue(bug)) = self.planted {
            queue.plant(Some(bug));
        }
        let node = Node {
            who: Identity::new(NodeId(n), Incarnation(incarnation)),
            queue,
            generation: 1,
            links: Vec::new(),
            admitted: 0,
            verifier: None,
            up: false,
            attempt: 0,
            view: self.chain.last().unwrap().view.epoch,
            ops: BTreeMap::new(),
            mine: vec![0; BLOCKS],
            giving: None,
        };
        self.nodes.insert(n, node);
        self.at(100, Event::Connect(n, 0));
    }

    // --- the server ---

    fn restart(&mut self) {
        self.boots += 1;
        let spare = ServerId::from_bytes(id(1_000_000 + self.boots));
        let mut machine = FenceServer::new(self.record.clone(), spare, Some(CLUSTER));
        if let Some(Planted::Fence(bug)) = self.planted {
            machine.plant(Some(bug));
        }
        self.server = Some(Server {
            boot: self.boots,
            machine,
            // Far apart: a gate changes the low bits.
            gate: SyncGate::new(id(self.boots << 40)),
            waiting: Vec::new(),
            snapshot: Vec::new(),
            dirty: BTreeSet::new(),
        });
    }

    fn crash(&mut self) {
        let Some(server) = self.server.take() else { return };
        self.counts.crashes += 1;
        // What was not synced is kept or lost, block by block.
        for block in 0..BLOCKS {
            if server.dirty.contains(&block) && self.rng.chance_ppm(300_000) {
                self.durable[block] = self.current[block];
            }
            self.current[block] = self.durable[block];
        }
        self.calls.clear();
        let open: Vec<ConnectionId> = self.links.keys().copied().collect();
        for link in open {
            if self.links.get_mut(&link).unwrap().server.take().is_some() {
                self.tell_client(link, ToClient::End);
            }
        }
        if self.faults && self.rng.chance_ppm(100_000) {
            // The record is lost: another server, which a person enrols.
            self.record = FenceRecord::fresh(ServerId::from_bytes(id(2_000_000 + self.boots)));
            let members = self.members();
            let epoch = self.decide(&members);
            self.learn_later(epoch);
        }
        let wait = self.rng.below(20_000);
        self.at(wait, Event::Restart);
    }

    fn learn_later(&mut self, epoch: Epoch) {
        for node in self.nodes.values_mut() {
            let member = self.chain.last().unwrap().view.contains(node.who);
            if member {
                node.view = epoch;
            }
        }
        let wait = self.rng.below(3_000);
        self.at(wait, Event::Push(epoch));
    }

    fn fence(&mut self, input: Input) {
        let now = self.events.now();
        let Some(server) = &mut self.server else { return };
        let boot = server.boot;
        let mut out = Vec::new();
        server.machine.handle(now, input, &mut out);
        if let Some(at) = server.machine.next_deadline() {
            self.events.at(at, Event::Tick(boot));
        }
        for output in out {
            self.carry_out(boot, output);
        }
    }

    fn carry_out(&mut self, boot: u64, output: Output) {
        match output {
            Output::Persist { token, record } => {
                let wait = self.rng.below(4_000);
                self.at(wait, Event::Persisted(boot, token, record));
            }
            Output::Close(link) => self.shut(link),
            Output::Answer { connection, answer } => {
                let verifier = self.server.as_ref().unwrap().gate.verifier();
                if let Some(half) = self.links.get_mut(&connection).and_then(|l| l.server.as_mut()) {
                    half.admitted = answer.is_ok();
                }
                self.tell_client(connection, ToClient::Answer(answer.map(|_| verifier)));
            }
            Output::Installed { call, result } => {
                self.calls.remove(&call);
                if let Ok((_, epoch)) = result {
                    self.confirmed(epoch);
                } else {
                    self.at(5_000, Event::Push(self.chain.last().unwrap().view.epoch));
                }
            }
        }
    }

    /// Some installation was confirmed: whoever is not in it is fenced, and what it owned is given to others.
    fn confirmed(&mut self, epoch: Epoch) {
        let view = self.chain.iter().find(|d| d.view.epoch == epoch).unwrap().view.clone();
        let all: BTreeSet<Identity> = self
            .chain
            .iter()
            .filter(|d| d.view.epoch <= epoch)
            .flat_map(|d| d.view.identities().collect::<Vec<_>>())
            .collect();
        for who in all.into_iter().filter(|w| !view.contains(*w)) {
            if !self.fenced.insert(who) {
                continue;
            }
            self.counts.fences += 1;
            let heirs: Vec<u32> = view.members.keys().map(|n| n.0).collect();
            for block in 0..BLOCKS {
                let owned = self.owner[block] == Some(who.node.0)
                    && self.nodes.get(&who.node.0).is_none_or(|n| n.who == who);
                if owned {
                    // What it had not flushed may die with it; nobody was told otherwise.
                    self.acknowledged[block] = self.flushed[block];
                    self.owner[block] = self.rng.pick(&heirs).copied();
                }
            }
            let wait = self.rng.below(20_000);
            self.at(wait, Event::Rejoin(who.node.0));
        }
    }

    fn shut(&mut self, link: ConnectionId) {
        let Some(half) = self.links.get_mut(&link).and_then(|l| l.server.as_mut()) else { return };
        half.shut = true;
        self.drained(link);
        self.tell_client(link, ToClient::End);
    }

    fn drained(&mut self, link: ConnectionId) {
        let Some(half) = self.links.get_mut(&link).and_then(|l| l.server.as_mut()) else { return };
        if half.shut && half.inside == 0 && !half.told {
            half.told = true;
            self.fence(Input::Closed(link));
        }
    }

    fn on_to_server(&mut self, link: ConnectionId, message: ToServer) {
        let Some(l) = self.links.get_mut(&link) else { return };
        let who = l.who;
        let Some(half) = &mut l.server else { return };
        if half.ended {
            return;
        }
        match message {
            ToServer::Hello(hello) => {
                self.fence(Input::Hello { connection: link, certified: who.node, hello });
            }
            ToServer::End => {
                half.ended = true;
                half.shut = true;
                self.drained(link);
            }
            ToServer::Request(tag, command) => {
                if half.shut || !half.admitted {
                    return self.tell_client(link, ToClient::Reply(tag, Err(Errno::Shutdown), None, None));
                }
                half.inside += 1;
                let slow = self.faults && self.rng.chance_ppm(20_000);
                let wait = self.rng.below(if slow { 30_000 } else { 800 });
                let boot = self.server.as_ref().unwrap().boot;
                self.at(wait, Event::Apply(boot, link, tag, command));
            }
        }
    }

    fn on_apply(&mut self, boot: u64, link: ConnectionId, tag: Tag, command: Command) {
        if self.server.as_ref().is_none_or(|s| s.boot != boot) {
            return;
        }
        let who = self.links[&link].who;
        let mut sync = false;
        let mut data = None;
        match command {
            Command::Write { offset, data, from, len, fua } => {
                for i in 0..len / BLOCK {
                    let block = (offset / BLOCK + i) as usize;
                    let at = from + (i * BLOCK) as usize;
                    let number = u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
                    late::on_apply(&self.fenced, who, block);
                    stale::on_apply(&self.acknowledged, block, number);
                    self.current[block] = number;
                    self.server.as_mut().unwrap().dirty.insert(block);
                }
                sync = fua;
            }
            Command::Read { offset, len, .. } => {
                let from = (offset / BLOCK) as usize;
                data = Some(self.current[from..from + (len / BLOCK) as usize].to_vec());
            }
            Command::Flush => {
                let server = self.server.as_mut().unwrap();
                let ticket = server.gate.request();
                server.waiting.push((ticket, link, tag, true));
                return self.begin_sync();
            }
            Command::WriteZeroes { .. } | Command::Discard { .. } => unreachable!("not asked for"),
        }
        if sync {
            let server = self.server.as_mut().unwrap();
            let ticket = server.gate.request();
            server.waiting.push((ticket, link, tag, false));
            return self.begin_sync();
        }
        self.reply(link, tag, Ok(()), None, data);
    }

    fn begin_sync(&mut self) {
        let server = self.server.as_mut().unwrap();
        if server.gate.begin() {
            server.snapshot = self.current.clone();
            // Marked clean as they are written out: a failure forgets them, as kernels do.
            let dirty = std::mem::take(&mut server.dirty);
            for (block, value) in server.snapshot.iter_mut().enumerate() {
                if !dirty.contains(&block) {
                    *value = u64::MAX;
                }
            }
            let boot = server.boot;
            let fails = self.faults && self.rng.chance_ppm(60_000);
            let wait = self.rng.below(2_000);
            self.at(wait, Event::SyncEnd(boot, !fails));
        }
    }

    fn on_sync_end(&mut self, boot: u64, ok: bool) {
        let Some(server) = self.server.as_mut().filter(|s| s.boot == boot) else { return };
        for (block, value) in server.snapshot.iter().enumerate().filter(|(_, v)| **v != u64::MAX) {
            if ok || self.rng.chance_ppm(300_000) {
                self.durable[block] = *value;
            }
        }
        let answered = server.gate.end(ok);
        let verifier = server.gate.verifier();
        let told: Vec<_> = server.waiting.extract_if(.., |w| w.0 <= answered).collect();
        let wanted = server.gate.is_wanted(answered);
        for (_, link, tag, flush) in told {
            let result = if ok { Ok(()) } else { Err(Errno::Io) };
            self.reply(link, tag, result, flush.then_some(verifier), None);
        }
        if wanted {
            self.begin_sync();
        }
    }

    fn reply(
        &mut self,
        link: ConnectionId,
        tag: Tag,
        result: Result<(), Errno>,
        v: Option<Verifier>,
        data: Option<Vec<u64>>,
    ) {
        if let Some(half) = self.links.get_mut(&link).and_then(|l| l.server.as_mut()) {
            half.inside -= 1;
            self.tell_client(link, ToClient::Reply(tag, result, v, data));
            self.drained(link);
        }
    }

    // --- the wire: each direction of a connection is in order, and may be slow ---

    fn delay(&mut self) -> Duration {
        let slow = self.faults && self.rng.chance_ppm(15_000);
        Duration::from_micros(20 + self.rng.below(if slow { 40_000 } else { 300 }))
    }

    fn tell_server(&mut self, link: ConnectionId, message: ToServer) {
        let at = self.events.now() + self.delay();
        let l = self.links.get_mut(&link).unwrap();
        l.last_to_server = l.last_to_server.max(at);
        self.events.at(l.last_to_server, Event::ToServer(link, message));
    }

    fn tell_client(&mut self, link: ConnectionId, message: ToClient) {
        let at = self.events.now() + self.delay();
        let l = self.links.get_mut(&link).unwrap();
        l.last_to_client = l.last_to_client.max(at);
        self.events.at(l.last_to_client, Event::ToClient(link, message));
    }

    // --- the clients ---

    fn queue(&mut self, n: u32, input: QIn) {
        let mut out = Vec::new();
        let node = self.nodes.get_mut(&n).unwrap();
        node.queue.handle(input, &mut out);
        for output in out {
            match output {
                QOut::Send(tag, command) => {
                    let node = &self.nodes[&n];
                    if node.links.is_empty() {
                        continue;
                    }
                    let link = node.links[tag.0 as usize % node.links.len()];
                    self.tell_server(link, ToServer::Request(tag, command));
                }
                QOut::Complete(op, result) => self.complete(n, op, result),
                QOut::Reconnect => self.lose(n),
            }
        }
    }

    fn complete(&mut self, n: u32, op: OpId, result: Result<(), IoError>) {
        let node = self.nodes.get_mut(&n).unwrap();
        let Some(asked) = node.ops.remove(&op) else { return };
        let data = self.read_data.remove(&(n, op));
        if result.is_err() {
            return;
        }
        match asked {
            Asked::Write(first, numbers, fua) => {
                self.counts.writes += 1;
                for (i, number) in numbers.into_iter().enumerate() {
                    let block = first + i;
                    self.acknowledged[block] = self.acknowledged[block].max(number);
                    node.mine[block] = number;
                    if fua {
                        self.flushed[block] = self.flushed[block].max(number);
                    }
                }
            }
            Asked::Read(first, least) => {
                for (i, found) in data.expect("a read that succeeded has data").into_iter().enumerate() {
                    visible::on_read(first + i, least[i], found);
                }
            }
            Asked::Flush(covered) => {
                self.counts.flushes += 1;
                for (block, number) in covered.into_iter().enumerate() {
                    self.flushed[block] = self.flushed[block].max(number);
                }
                self.give_now(n);
            }
        }
    }

    /// A block changes hands after the flush that followed its last write (R12).
    fn give_now(&mut self, n: u32) {
        let node = self.nodes.get_mut(&n).unwrap();
        let Some(block) = node.giving.take() else { return };
        let busy = |a: &Asked| matches!(a, Asked::Write(f, v, _) if (*f..*f + v.len()).contains(&block));
        if self.owner[block] != Some(n)
            || node.ops.values().any(busy)
            || self.flushed[block] < node.mine[block]
        {
            return;
        }
        let members: Vec<u32> = self.members().keys().map(|m| m.0).collect();
        self.owner[block] = self.rng.pick(&members).copied();
        self.queue(n, QIn::Revoke { offset: block as u64 * BLOCK, len: BLOCK });
    }

    fn submit(&mut self, n: u32, operation: Operation, asked: Asked) {
        self.ops += 1;
        let op = OpId(self.ops);
        self.nodes.get_mut(&n).unwrap().ops.insert(op, asked);
        self.queue(n, QIn::Submit(op, operation));
    }

    fn on_work(&mut self, n: u32) {
        let wait = 100 + self.rng.below(1_500);
        self.at(wait, Event::Work(n));
        if 12 < self.nodes[&n].ops.len()
            || self.fenced.contains(&self.nodes[&n].who) && self.rng.chance_ppm(900_000)
        {
            return;
        }
        let first = self.rng.below(BLOCKS as u64) as usize;
        let giving = self.nodes[&n].giving;
        let mine = |w: &Self, b: usize| b < BLOCKS && w.owner[b] == Some(n) && giving != Some(b);
        // A removed node that does not know it goes on with what it believes to own: its locks are gone with its view,
        // which is why only the fence stands between it and the disk.
        match self.rng.below(10) {
            0 | 1 => self.flush(n),
            2..=4 => {
                let least = vec![self.acknowledged[first]];
                if self.owner[first] == Some(n) {
                    let operation = Operation::Read { offset: first as u64 * BLOCK, len: BLOCK };
                    self.submit(n, operation, Asked::Read(first, least));
                }
            }
            _ => {
                let len = (0..1 + self.rng.below(3) as usize).take_while(|i| mine(self, first + i)).count();
                if len == 0 {
                    return;
                }
                let numbers: Vec<u64> = (0..len)
                    .map(|_| {
                        self.number += 1;
                        self.number
                    })
                    .collect();
                let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
                let fua = self.rng.chance_ppm(150_000);
                let data = Arc::new(Buf::copy_of(&bytes));
                let operation = Operation::Write { offset: first as u64 * BLOCK, data, fua };
                self.submit(n, operation, Asked::Write(first, numbers, fua));
            }
        }
    }

    fn flush(&mut self, n: u32) {
        let covered = self.nodes[&n].mine.clone();
        self.submit(n, Operation::Flush, Asked::Flush(covered));
    }

    fn lose(&mut self, n: u32) {
        let node = self.nodes.get_mut(&n).unwrap();
        node.up = false;
        node.generation += 1;
        node.attempt += 1;
        let attempt = node.attempt;
        let links = std::mem::take(&mut node.links);
        for link in links {
            let l = self.links.get_mut(&link).unwrap();
            if std::mem::take(&mut l.client_open) {
                self.tell_server(link, ToServer::End);
            }
        }
        self.queue(n, QIn::Lost);
        let wait = 200 + self.rng.below(2_000);
        self.at(wait, Event::Connect(n, attempt));
    }

    fn on_connect(&mut self, n: u32, attempt: u64) {
        let now = self.events.now();
        let node = &self.nodes[&n];
        if node.attempt != attempt || node.up || node.queue.ended().is_some() {
            return;
        }
        let hello = Hello {
            version: VERSION,
            cluster: CLUSTER,
            who: node.who,
            epoch: node.view,
            generation: node.generation,
            export: "d".into(),
        };
        let mut links = Vec::new();
        for _ in 0..PATHS {
            self.next_link += 1;
            let link = ConnectionId(self.next_link);
            let server = self.server.as_ref().map(|_| ServerHalf::default());
            let who = hello.who;
            let alive = server.is_some();
            let l =
                Link { node: n, who, client_open: true, server, last_to_server: now, last_to_client: now };
            self.links.insert(link, l);
            if alive {
                self.tell_server(link, ToServer::Hello(hello.clone()))
            } else {
                self.tell_client(link, ToClient::End)
            }
            links.push(link);
        }
        let node = self.nodes.get_mut(&n).unwrap();
        (node.links, node.admitted, node.verifier) = (links, 0, None);
    }

    fn on_to_client(&mut self, link: ConnectionId, message: ToClient) {
        let Some(l) = self.links.get(&link) else { return };
        let n = l.node;
        if !l.client_open || self.nodes[&n].who != l.who {
            return;
        }
        match message {
            ToClient::End => self.lose(n),
            ToClient::Reply(tag, result, verifier, data) => {
                if let Some(data) = data {
                    // The tag is the queue's; the op is found when it completes.
                    self.hold_data(n, tag, data, result, verifier);
                } else {
                    self.queue(n, QIn::Reply { tag, result, verifier });
                }
            }
            ToClient::Answer(Ok(verifier)) => {
                let node = self.nodes.get_mut(&n).unwrap();
                if node.verifier.is_some_and(|v| v != verifier) {
                    return self.lose(n);
                }
                node.verifier = Some(verifier);
                node.admitted += 1;
                if node.admitted == PATHS {
                    node.up = true;
                    self.queue(n, QIn::Connected { verifier: Some(verifier) });
                }
            }
            ToClient::Answer(Err(refusal)) => self.on_refused(n, refusal),
        }
    }

    fn hold_data(
        &mut self,
        n: u32,
        tag: Tag,
        data: Vec<u64>,
        result: Result<(), Errno>,
        verifier: Option<Verifier>,
    ) {
        let node = self.nodes.get_mut(&n).unwrap();
        let mut out = Vec::new();
        node.queue.handle(QIn::Reply { tag, result, verifier }, &mut out);
        for output in out {
            match output {
                QOut::Complete(op, result) => {
                    self.read_data.insert((n, op), data.clone());
                    self.complete(n, op, result);
                }
                QOut::Send(tag, command) => {
                    let links = &self.nodes[&n].links;
                    let link = links[tag.0 as usize % links.len()];
                    self.tell_server(link, ToServer::Request(tag, command));
                }
                QOut::Reconnect => self.lose(n),
            }
        }
    }

    fn on_refused(&mut self, n: u32, refusal: HelloRefusal) {
        let node = self.nodes.get_mut(&n).unwrap();
        match refusal {
            HelloRefusal::NotAdmitted { epoch, .. } if node.view <= epoch => {
                let detail = format!("epoch {epoch}");
                self.queue(n, QIn::End(IoError::Fenced { detail }));
                self.lose(n);
            }
            HelloRefusal::Stale(newer) => {
                node.generation = newer;
                self.lose(n);
            }
            _ => {
                let view = node.view;
                self.lose(n);
                self.push(view);
            }
        }
    }

    fn push(&mut self, epoch: Epoch) {
        let chain: Vec<Decision> = self.chain.iter().filter(|d| d.view.epoch <= epoch).cloned().collect();
        let newest = self.server.as_ref().and_then(|s| s.machine.record().epoch());
        let from = newest.map_or(epoch, |e| e.next());
        let chain: Vec<Decision> =
            chain.into_iter().filter(|d| from <= d.view.epoch || d.view.epoch == epoch).collect();
        self.call += 1;
        let call = CallId(self.call);
        self.calls.insert(call, epoch);
        self.fence(Input::Install { call, chain });
    }

    // --- the cluster ---

    fn on_remove(&mut self) {
        let wait = 20_000 + self.rng.below(120_000);
        if self.faults {
            self.at(wait, Event::Remove);
        }
        let mut members = self.members();
        if members.len() < 2 || !self.faults {
            return;
        }
        let victims: Vec<NodeId> = members.keys().copied().collect();
        let victim = *self.rng.pick(&victims).unwrap();
        members.remove(&victim);
        let epoch = self.decide(&members);
        self.learn_later(epoch);
    }

    fn on_rejoin(&mut self, n: u32) {
        let mut members = self.members();
        if members.contains_key(&NodeId(n)) {
            return;
        }
        let next = self.nodes[&n].who.incarnation.0 + 1;
        // The old process is gone, or believed to be: what it sent may still arrive.
        let links = std::mem::take(&mut self.nodes.get_mut(&n).unwrap().links);
        for link in links {
            if std::mem::take(&mut self.links.get_mut(&link).unwrap().client_open) {
                self.tell_server(link, ToServer::End);
            }
        }
        self.ghost(n);
        members.insert(NodeId(n), Incarnation(next));
        self.read_data.retain(|(m, _), _| *m != n);
        let epoch = self.decide(&members);
        self.start_node(n, next);
        self.learn_later(epoch);
    }

    /// The old process was only believed to be gone: it comes again while the new life comes in.
    fn ghost(&mut self, n: u32) {
        if self.server.is_none() {
            return;
        }
        let now = self.events.now();
        let (who, generation) = (self.nodes[&n].who, self.nodes[&n].generation + 1);
        self.next_link += 1;
        let link = ConnectionId(self.next_link);
        let server = Some(ServerHalf::default());
        let last = now + Duration::from_millis(self.rng.below(8));
        let l = Link { node: n, who, client_open: false, server, last_to_server: last, last_to_client: now };
        self.links.insert(link, l);
        let epoch = self.nodes[&n].view;
        let hello = Hello { version: VERSION, cluster: CLUSTER, who, epoch, generation, export: "d".into() };
        self.tell_server(link, ToServer::Hello(hello));
        self.number += 1;
        let data = Arc::new(Buf::copy_of(&self.number.to_le_bytes()));
        let offset = self.rng.below(BLOCKS as u64) * BLOCK;
        let write = Command::Write { offset, data, from: 0, len: BLOCK, fua: false };
        self.tell_server(link, ToServer::Request(Tag(0), write));
        self.tell_server(link, ToServer::End);
    }

    fn on_event(&mut self, event: Event) {
        let boot = self.server.as_ref().map_or(0, |s| s.boot);
        match event {
            Event::ToServer(link, message) => self.on_to_server(link, message),
            Event::ToClient(link, message) => self.on_to_client(link, message),
            Event::Apply(b, link, tag, command) => self.on_apply(b, link, tag, command),
            Event::SyncEnd(b, ok) => self.on_sync_end(b, ok),
            Event::Persisted(b, token, record) => {
                // A crash meanwhile: the disk has the one or the other.
                if b == boot {
                    self.record = record;
                    self.fence(Input::Persisted(token));
                }
            }
            Event::Tick(b) if b == boot => self.fence(Input::Tick),
            Event::Tick(_) => {}
            Event::Crash => {
                if self.faults {
                    self.crash();
                    let wait = 10_000 + self.rng.below(150_000);
                    self.at(wait, Event::Crash);
                }
            }
            Event::Restart if self.server.is_none() => self.restart(),
            Event::Restart => {}
            Event::Break(n) => {
                if self.faults {
                    if self.nodes[&n].up {
                        self.lose(n);
                    }
                    let wait = self.rng.below(30_000);
                    let next = 1 + self.rng.below(u64::from(NODES)) as u32;
                    self.at(wait, Event::Break(next));
                }
            }
            Event::Connect(n, attempt) => self.on_connect(n, attempt),
            Event::Work(n) => {
                if self.faults {
                    self.on_work(n);
                }
            }
            Event::Remove => self.on_remove(),
            Event::Rejoin(n) => self.on_rejoin(n),
            Event::Push(epoch) => {
                if self.server.is_none() || self.server.as_ref().unwrap().machine.record().enrolment.is_none()
                {
                    self.at(3_000, Event::Push(epoch));
                }
                // The newest: it is what a coordinator has.
                let newest = self.chain.last().unwrap().view.epoch;
                self.push(newest);
            }
            Event::Give => {
                if self.faults {
                    let n = 1 + self.rng.below(u64::from(NODES)) as u32;
                    let block = self.rng.below(BLOCKS as u64) as usize;
                    if self.owner[block] == Some(n) && self.nodes[&n].giving.is_none() {
                        self.nodes.get_mut(&n).unwrap().giving = Some(block);
                        self.flush(n);
                    }
                    let wait = self.rng.below(6_000);
                    self.at(wait, Event::Give);
                }
            }
            Event::Heal => {
                self.faults = false;
                if self.server.is_none() {
                    self.restart();
                }
            }
        }
        durable::after_step(&self.durable, &self.flushed);
    }

    pub(crate) fn run(mut self) -> Counts {
        let mut steps = 0;
        while steps < STEPS {
            let Some((_, event)) = self.events.pop() else { break };
            steps += 1;
            self.on_event(event);
        }
        // Phase 2: faults stop, everybody who is in gets everything done.
        self.on_event(Event::Heal);
        self.at(0, Event::Push(Epoch(0)));
        let members: Vec<u32> = self.members().keys().map(|n| n.0).collect();
        for n in &members {
            self.flush(*n);
        }
        for _ in 0..200_000 {
            let done = members.iter().all(|n| {
                let node = &self.nodes[n];
                node.ops.is_empty() && node.queue.is_clean() && node.up
            });
            if done {
                break;
            }
            let Some((at, event)) = self.events.pop() else { break };
            self.on_event(event);
            // Operations that came after the last flush want one of their own.
            if at.0 % 7 == 0 {
                for n in &members {
                    if self.nodes[n].ops.is_empty() && !self.nodes[n].queue.is_clean() {
                        self.flush(*n);
                    }
                }
            }
        }
        for n in &members {
            let node = &self.nodes[n];
            assert!(self.chain.last().unwrap().view.contains(node.who), "members are as decided");
            assert!(node.queue.ended().is_none(), "LIVENESS: member {n} ended: {:?}", node.queue.ended());
            assert!(
                node.up && node.ops.is_empty(),
                "LIVENESS: member {n} {} waits at {:?}: {:?}; server {:?}",
                node.who,
                self.events.now(),
                node,
                self.server.as_ref().map(|s| &s.machine)
            );
            for block in (0..BLOCKS).filter(|b| self.owner[*b] == Some(*n)) {
                assert!(
                    node.mine[block] <= self.current[block],
                    "LIVENESS: block {block} of member {n} is lost"
                );
            }
        }
        self.counts
    }
}
