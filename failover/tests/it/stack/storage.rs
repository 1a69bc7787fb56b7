//! The storage server with the production fence and sync gate on a disk that forgets, and the members' production queues.

use super::invariants::{late, lock_order};
use super::oracle::{CELL, CELLS};
use super::world::{Event, Planted, World};
use quorate_fencing::StorageFenceError;
use quorate_fencing::machine::Attempt;
use quorate_gnbd::IoError;
use quorate_gnbd::client::queue::{ClientQueue, Command, Input as QIn, OpId, Operation, Output as QOut, Tag};
use quorate_gnbd::fence::wire::{Hello, HelloRefusal, InstallError, VERSION};
use quorate_gnbd::fence::{
    CallId, ConnectionId, FenceRecord, FenceServer, Input, Output, PersistToken, SyncGate, SyncTicket,
};
use quorate_gnbd::proto::{Errno, Verifier};
use quorate_membership::{Decision, Epoch, Identity, Instant, NodeId, ServerId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Connections of one generation.
const PATHS: usize = 2;
/// The only server.
pub(crate) const SERVER: ServerId = ServerId::from_bytes([0x5e; 16]);

#[derive(Clone, Debug)]
pub(crate) enum ToServer {
    Hello(Hello),
    Request(Tag, Command),
    End,
}

#[derive(Clone, Debug)]
pub(crate) enum ToClient {
    Answer(Result<Verifier, HelloRefusal>),
    Reply(Tag, Result<(), Errno>, Option<Verifier>, Vec<u64>),
    End,
}

/// A connection; the server's half is gone with the server's process.
#[derive(Debug)]
struct Link {
    who: Identity,
    client_open: bool,
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
struct Process {
    boot: u64,
    machine: FenceServer,
    gate: SyncGate,
    waiting: Vec<(SyncTicket, ConnectionId, Tag, bool)>,
    /// What the running sync writes out.
    snapshot: BTreeMap<usize, u64>,
    dirty: BTreeSet<usize>,
}

/// The server with its disk, and the wires to it.
#[derive(Debug)]
pub(crate) struct Storage {
    process: Option<Process>,
    record: FenceRecord,
    boots: u64,
    links: BTreeMap<ConnectionId, Link>,
    next_link: u64,
    calls: BTreeMap<CallId, Option<(Identity, Attempt)>>,
    next_call: u64,
    /// As the server's process has it.
    pub(crate) current: Vec<u64>,
    /// As a crash of the server leaves it at least.
    pub(crate) durable: Vec<u64>,
}

/// A member's side of the device.
#[derive(Debug, Default)]
pub(crate) struct Device {
    queue: ClientQueue,
    generation: u64,
    links: Vec<ConnectionId>,
    admitted: usize,
    verifier: Option<Verifier>,
    up: bool,
    /// Counts attempts: a timer of an older one means nothing.
    attempt: u64,
    started: bool,
}

impl Device {
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.pending() == 0 && self.queue.is_clean() && self.up
    }
}

impl Storage {
    pub(crate) fn new() -> Self {
        Self {
            process: None,
            record: FenceRecord::fresh(SERVER),
            boots: 0,
            links: BTreeMap::new(),
            next_link: 0,
            calls: BTreeMap::new(),
            next_call: 0,
            current: vec![0; CELLS],
            durable: vec![0; CELLS],
        }
    }
}

impl World {
    // --- the server's process ---

    pub(crate) fn start_server(&mut self) {
        if self.storage.process.is_some() {
            return;
        }
        self.storage.boots += 1;
        let boot = self.storage.boots;
        let mut spare = [0x77; 16];
        spare[..8].copy_from_slice(&boot.to_le_bytes());
        let mut machine = FenceServer::new(self.storage.record.clone(), ServerId::from_bytes(spare), None);
        if let Some(Planted::Fence(bug)) = self.planted {
            machine.plant(Some(bug));
        }
        let mut seed = [0x11; 16];
        // Far apart: a gate changes the low bits.
        seed[8..].copy_from_slice(&boot.to_le_bytes());
        self.storage.process = Some(Process {
            boot,
            machine,
            gate: SyncGate::new(seed),
            waiting: Vec::new(),
            snapshot: BTreeMap::new(),
            dirty: BTreeSet::new(),
        });
    }

    pub(crate) fn crash_server(&mut self) {
        let Some(process) = self.storage.process.take() else { return };
        self.summary.server_crashes += 1;
        self.trace(|| "the server crashes".into());
        // What was not synced is kept or lost, cell by cell.
        for cell in 0..CELLS {
            if (process.dirty.contains(&cell) || process.snapshot.contains_key(&cell))
                && self.rng.chance_ppm(300_000)
            {
                self.storage.durable[cell] = self.storage.current[cell];
            }
            self.storage.current[cell] = self.storage.durable[cell];
        }
        for (_, asked) in std::mem::take(&mut self.storage.calls) {
            self.answer_install(asked, Err(unreachable("it crashed")));
        }
        let open: Vec<ConnectionId> = self.storage.links.keys().copied().collect();
        for link in open {
            if self.storage.links.get_mut(&link).unwrap().server.take().is_some() {
                self.tell_client(link, ToClient::End);
            }
        }
        let ms = 5 + self.rng.below(400);
        self.after_ms(ms, Event::StartServer);
    }

    /// A chain arrives at the fence service.
    pub(crate) fn install_at_server(&mut self, asked: Option<(Identity, Attempt)>, mut chain: Vec<Decision>) {
        let Some(process) = &self.storage.process else {
            return self.answer_install(asked, Err(unreachable("it is down")));
        };
        if self.faulty && self.rng.chance_ppm(20_000) {
            return self.answer_install(asked, Err(unreachable("lost on the way")));
        }
        // As its client does: what the server has is not sent, but for the last one, which asks for confirmation.
        if let Some(installed) = process.machine.record().epoch() {
            let last = chain.last().map(|d| d.view.epoch);
            chain.retain(|d| installed < d.view.epoch || Some(d.view.epoch) == last);
        }
        self.storage.next_call += 1;
        let call = CallId(self.storage.next_call);
        self.storage.calls.insert(call, asked);
        self.fence(Input::Install { call, chain });
    }

    fn answer_install(
        &mut self,
        asked: Option<(Identity, Attempt)>,
        result: Result<Epoch, StorageFenceError>,
    ) {
        if let Some((who, attempt)) = asked {
            let wait = self.wire_delay();
            self.after(wait, Event::InstallEnd { who, attempt, result });
        }
    }

    fn fence(&mut self, input: Input) {
        let now = self.now();
        let Some(process) = &mut self.storage.process else { return };
        let boot = process.boot;
        let mut out = Vec::new();
        process.machine.handle(now, input, &mut out);
        if let Some(at) = process.machine.next_deadline() {
            self.events.at(at, Event::ServerTick(boot));
        }
        for output in out {
            self.carry_out_fence(boot, output);
        }
    }

    fn carry_out_fence(&mut self, boot: u64, output: Output) {
        match output {
            Output::Persist { token, record } => {
                let wait = Duration::from_micros(self.rng.below(4_000));
                self.after(wait, Event::RecordDurable(boot, token, Box::new(record)));
            }
            Output::Close(link) => self.shut(link),
            Output::Answer { connection, answer } => {
                let verifier = self.storage.process.as_ref().unwrap().gate.verifier();
                let half = self.storage.links.get_mut(&connection).and_then(|l| l.server.as_mut());
                if let Some(half) = half {
                    half.admitted = answer.is_ok();
                }
                self.tell_client(connection, ToClient::Answer(answer.map(|_| verifier)));
            }
            Output::Installed { call, result } => {
                let asked = self.storage.calls.remove(&call).flatten();
                if let Ok((_, epoch)) = result {
                    self.confirmed(epoch);
                }
                self.answer_install(asked, result.map(|(_, epoch)| epoch).map_err(translate));
            }
        }
    }

    /// An installation is confirmed: whoever was in before and is not in it is fenced.
    fn confirmed(&mut self, epoch: Epoch) {
        let Some(view) = self.chain.get(&epoch).cloned() else { return };
        let before = self.chain.range(..epoch).flat_map(|(_, v)| v.identities().collect::<Vec<_>>());
        let out: Vec<Identity> = before.filter(|w| !view.contains(*w)).collect();
        for who in out {
            self.summary.fences += u64::from(self.oracle.fenced.insert(who));
        }
    }

    fn shut(&mut self, link: ConnectionId) {
        let Some(half) = self.storage.links.get_mut(&link).and_then(|l| l.server.as_mut()) else { return };
        half.shut = true;
        self.drained(link);
        self.tell_client(link, ToClient::End);
    }

    fn drained(&mut self, link: ConnectionId) {
        let Some(half) = self.storage.links.get_mut(&link).and_then(|l| l.server.as_mut()) else { return };
        if half.shut && half.inside == 0 && !half.told {
            half.told = true;
            self.fence(Input::Closed(link));
        }
    }

    fn on_to_server(&mut self, link: ConnectionId, message: ToServer) {
        let Some(l) = self.storage.links.get_mut(&link) else { return };
        let who = l.who;
        let Some(half) = l.server.as_mut().filter(|h| !h.ended) else { return };
        match message {
            ToServer::Hello(hello) => {
                self.fence(Input::Hello { connection: link, certified: who.node, hello });
            }
            ToServer::End => {
                half.ended = true;
                half.shut = true;
                self.drained(link);
            }
            ToServer::Request(tag, _) if half.shut || !half.admitted => {
                self.tell_client(link, ToClient::Reply(tag, Err(Errno::Shutdown), None, Vec::new()));
            }
            ToServer::Request(tag, command) => {
                half.inside += 1;
                let slow = self.faulty && self.rng.chance_ppm(self.slow_ppm);
                let wait = Duration::from_micros(self.rng.below(if slow { 400_000 } else { 800 }));
                let boot = self.storage.boots;
                self.after(wait, Event::Apply(boot, link, tag, command));
            }
        }
    }

    fn on_apply(&mut self, boot: u64, link: ConnectionId, tag: Tag, command: Command) {
        if self.storage.process.as_ref().is_none_or(|p| p.boot != boot) {
            return;
        }
        let who = self.storage.links[&link].who;
        let mut found = Vec::new();
        match command {
            Command::Write { offset, data, from, len, .. } => {
                for i in 0..len / CELL {
                    let (cell, at) = ((offset / CELL + i) as usize, from + (i * CELL) as usize);
                    let number = u64::from_le_bytes(data[at..at + 8].try_into().unwrap());
                    let write = self.oracle.get(number).expect("only known writes are made");
                    self.trace(|| format!("{who} writes cell {cell}: {write:?}"));
                    late::on_apply(&self.oracle.fenced, who, cell);
                    lock_order::on_apply(self.oracle.granted.get(&write.block), write);
                    self.storage.current[cell] = number;
                    self.storage.process.as_mut().unwrap().dirty.insert(cell);
                }
            }
            Command::Read { offset, len, .. } => {
                let from = (offset / CELL) as usize;
                found = self.storage.current[from..from + (len / CELL) as usize].to_vec();
            }
            Command::Flush => {
                let process = self.storage.process.as_mut().unwrap();
                let ticket = process.gate.request();
                process.waiting.push((ticket, link, tag, true));
                return self.begin_sync();
            }
            Command::WriteZeroes { .. } | Command::Discard { .. } => unreachable!("not asked for"),
        }
        self.reply(link, tag, Ok(()), None, found);
    }

    fn begin_sync(&mut self) {
        let process = self.storage.process.as_mut().unwrap();
        if process.gate.begin() {
            // Marked clean as they are written out: a failure forgets them, as kernels do.
            let dirty = std::mem::take(&mut process.dirty);
            process.snapshot = dirty.into_iter().map(|c| (c, self.storage.current[c])).collect();
            let boot = process.boot;
            let fails = self.faulty && self.rng.chance_ppm(4_000);
            let wait = Duration::from_micros(self.rng.below(2_000));
            self.after(wait, Event::SyncEnd(boot, !fails));
        }
    }

    fn on_sync_end(&mut self, boot: u64, ok: bool) {
        let Some(process) = self.storage.process.as_mut().filter(|p| p.boot == boot) else { return };
        let snapshot = std::mem::take(&mut process.snapshot);
        for (cell, value) in snapshot {
            if ok || self.rng.chance_ppm(300_000) {
                self.storage.durable[cell] = value;
            }
        }
        let answered = process.gate.end(ok);
        let verifier = process.gate.verifier();
        let told: Vec<_> = process.waiting.extract_if(.., |w| w.0 <= answered).collect();
        let wanted = process.gate.is_wanted(answered);
        self.trace(|| format!("a sync of {} answers ends: {ok}", told.len()));
        for (_, link, tag, _) in told {
            let result = if ok { Ok(()) } else { Err(Errno::Io) };
            self.reply(link, tag, result, Some(verifier), Vec::new());
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
        found: Vec<u64>,
    ) {
        if let Some(half) = self.storage.links.get_mut(&link).and_then(|l| l.server.as_mut()) {
            half.inside -= 1;
            self.tell_client(link, ToClient::Reply(tag, result, v, found));
            self.drained(link);
        }
    }

    // --- the wire: each direction of a connection is in order, and may be slow ---

    pub(crate) fn wire_delay(&mut self) -> Duration {
        let slow = self.faulty && self.rng.chance_ppm(15_000);
        Duration::from_micros(20 + self.rng.below(if slow { 60_000 } else { 300 }))
    }

    fn tell_server(&mut self, link: ConnectionId, message: ToServer) {
        let at = self.now() + self.wire_delay();
        let l = self.storage.links.get_mut(&link).unwrap();
        l.last_to_server = l.last_to_server.max(at);
        self.events.at(l.last_to_server, Event::ToServer(link, message));
    }

    fn tell_client(&mut self, link: ConnectionId, message: ToClient) {
        let at = self.now() + self.wire_delay();
        let l = self.storage.links.get_mut(&link).unwrap();
        l.last_to_client = l.last_to_client.max(at);
        let (at, who) = (l.last_to_client, l.who);
        self.events.at(at, Event::ToClient { who, link, message });
    }

    // --- the members ---

    /// Opens the device, once it is attached.
    pub(crate) fn open_device(&mut self, who: Identity) {
        let planted = self.planted;
        let Some(app) = self.app(who).filter(|a| !a.device.started) else { return };
        app.device.started = true;
        app.device.generation = 1;
        if let Some(Planted::Queue(bug)) = planted {
            app.device.queue.plant(Some(bug));
        }
        self.connect(who, 0);
    }

    pub(crate) fn submit(&mut self, who: Identity, op: OpId, operation: Operation) {
        self.queue(who, QIn::Submit(op, operation), &[]);
    }

    pub(crate) fn revoke(&mut self, who: Identity, cell: usize) {
        self.queue(who, QIn::Revoke { offset: cell as u64 * CELL, len: CELL }, &[]);
    }

    fn queue(&mut self, who: Identity, input: QIn, found: &[u64]) {
        let Some(app) = self.app(who) else { return };
        let mut out = Vec::new();
        app.device.queue.handle(input, &mut out);
        for output in out {
            match output {
                QOut::Send(tag, command) => {
                    let Some(app) = self.app(who).filter(|a| !a.device.links.is_empty()) else { continue };
                    let link = app.device.links[tag.0 as usize % app.device.links.len()];
                    self.tell_server(link, ToServer::Request(tag, command));
                }
                QOut::Complete(op, result) => self.on_io(who, op, result, found),
                QOut::Reconnect => self.disconnect(who),
            }
        }
    }

    /// The life's process is over: its sockets are closed, what they had taken is sent.
    pub(crate) fn close_links(&mut self, links: &[ConnectionId]) {
        for link in links {
            let l = self.storage.links.get_mut(link).unwrap();
            if std::mem::take(&mut l.client_open) {
                self.tell_server(*link, ToServer::End);
            }
        }
    }

    pub(crate) fn links_of(&self, who: Identity) -> Vec<ConnectionId> {
        self.apps.get(&who.node).filter(|a| a.who == who).map_or_else(Vec::new, |a| a.device.links.clone())
    }

    /// The generation is over.
    pub(crate) fn disconnect(&mut self, who: Identity) {
        let Some(app) = self.app(who).filter(|a| a.device.started) else { return };
        app.device.up = false;
        app.device.generation += 1;
        app.device.attempt += 1;
        let attempt = app.device.attempt;
        let links = std::mem::take(&mut app.device.links);
        self.close_links(&links);
        self.queue(who, QIn::Lost, &[]);
        let wait = Duration::from_micros(200 + self.rng.below(20_000));
        self.after(wait, Event::Connect { who, attempt });
    }

    fn connect(&mut self, who: Identity, attempt: u64) {
        let now = self.now();
        let is_there = self.storage.process.is_some();
        let Some(app) = self.app(who) else { return };
        if app.device.attempt != attempt || app.device.up || app.device.queue.ended().is_some() {
            return;
        }
        let hello = Hello {
            version: VERSION,
            cluster: app.view.cluster,
            who,
            epoch: app.view.epoch,
            generation: app.device.generation,
            export: "shared".into(),
        };
        let mut links = Vec::new();
        for _ in 0..PATHS {
            self.storage.next_link += 1;
            let link = ConnectionId(self.storage.next_link);
            let server = is_there.then(ServerHalf::default);
            let half = Link { who, client_open: true, server, last_to_server: now, last_to_client: now };
            self.storage.links.insert(link, half);
            if is_there {
                self.tell_server(link, ToServer::Hello(hello.clone()));
            } else {
                self.tell_client(link, ToClient::End);
            }
            links.push(link);
        }
        if let Some(app) = self.app(who) {
            (app.device.links, app.device.admitted, app.device.verifier) = (links, 0, None);
        }
    }

    fn on_to_client(&mut self, who: Identity, link: ConnectionId, message: ToClient) {
        if !self.storage.links.get(&link).is_some_and(|l| l.client_open) {
            return;
        }
        match message {
            ToClient::End => self.disconnect(who),
            ToClient::Reply(tag, result, verifier, found) => {
                self.queue(who, QIn::Reply { tag, result, verifier }, &found);
            }
            ToClient::Answer(Ok(verifier)) => {
                let Some(app) = self.app(who) else { return };
                if app.device.verifier.is_some_and(|v| v != verifier) {
                    return self.disconnect(who);
                }
                app.device.verifier = Some(verifier);
                app.device.admitted += 1;
                if app.device.admitted == PATHS {
                    app.device.up = true;
                    self.queue(who, QIn::Connected { verifier: Some(verifier) }, &[]);
                }
            }
            ToClient::Answer(Err(refusal)) => self.on_refused(who, refusal),
        }
    }

    fn on_refused(&mut self, who: Identity, refusal: HelloRefusal) {
        let Some(app) = self.app(who) else { return };
        match refusal {
            HelloRefusal::NotAdmitted { epoch, .. } if app.view.epoch <= epoch => {
                let detail = format!("epoch {epoch}");
                self.queue(who, QIn::End(IoError::Fenced { detail }), &[]);
            }
            HelloRefusal::Stale(newer) => {
                app.device.generation = newer;
                self.disconnect(who);
            }
            _ => {
                // The server does not know the newest record: it is told.
                let chain = self.cluster.member(who.node).filter(|m| m.me() == who);
                let chain = chain.map(|m| m.decisions_since(Epoch(0))).unwrap_or_default();
                self.disconnect(who);
                let wait = self.wire_delay();
                self.after(wait, Event::Install { asked: None, chain });
            }
        }
    }

    pub(crate) fn on_storage_event(&mut self, event: Event) {
        let boot = self.storage.process.as_ref().map_or(0, |p| p.boot);
        match event {
            Event::ToServer(link, message) => self.on_to_server(link, message),
            Event::ToClient { who, link, message } => self.on_to_client(who, link, message),
            Event::Apply(boot, link, tag, command) => self.on_apply(boot, link, tag, command),
            Event::SyncEnd(boot, ok) => self.on_sync_end(boot, ok),
            Event::RecordDurable(b, token, record) if b == boot => self.on_durable(token, *record),
            Event::ServerTick(b) if b == boot => self.fence(Input::Tick),
            Event::Connect { who, attempt } => self.connect(who, attempt),
            Event::StartServer => self.start_server(),
            Event::Install { asked, chain } => self.install_at_server(asked, chain),
            _ => {}
        }
    }

    fn on_durable(&mut self, token: PersistToken, record: FenceRecord) {
        self.storage.record = record;
        self.fence(Input::Persisted(token));
    }

    /// The server's own word on whom it serves.
    pub(crate) fn server_admits(&self, node: NodeId) -> bool {
        let who = self.apps.get(&node).map(|a| a.who);
        who.is_some_and(|w| self.storage.record.admits(w))
    }
}

fn unreachable(detail: &str) -> StorageFenceError {
    StorageFenceError::Unreachable { address: "server".into(), detail: detail.into() }
}

fn translate(e: InstallError) -> StorageFenceError {
    match e {
        InstallError::Older { installed, .. } => StorageFenceError::Newer { installed },
        InstallError::NotDrained { connections } => StorageFenceError::Undrained { connections },
        InstallError::DoesNotEnrol { server } | InstallError::Retired { server } if server != SERVER => {
            StorageFenceError::OtherServer { found: server, expected: SERVER }
        }
        other => StorageFenceError::Failed(other.to_string()),
    }
}
