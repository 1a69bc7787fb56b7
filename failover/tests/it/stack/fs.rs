//! A small stand-in for a filesystem, which keeps GFS2's order: log, flush, acknowledge; later in place, flush, clear the
//! log, flush; and only then is the lock given up (R12, R18). A survivor replays a dead life's journal under locks that
//! pass its holds (R14). A journal is used under a lock of its own, so that nobody replays what is used again.

use super::invariants::lost_write;
use super::oracle::{BLOCKS, CELL, Write, journal_cell};
use super::world::{App, Event, Planted, World, mount_id};
use quorate_dlm::{Completion, FencingToken, Flags, LockId, LockName, LockRequest, Mode, UnlockRequest};
use quorate_gnbd::client::queue::{OpId, Operation};
use quorate_gnbd::{Buf, IoError};
use quorate_membership::{Identity, Proof, Request};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Mistakes of the filesystem that the invariants must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A lock is given up while what was written under it is in the log alone.
    UnlockDirty,
    /// A journal is said to be replayed that was not.
    SkipReplay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Asking,
    Reading,
    Thinking,
    Logging,
    LogFlush,
    /// Acknowledged, in the log alone.
    Dirty,
    InPlace,
    InPlaceFlush,
    Clearing,
    ClearFlush,
    Leaving,
}

/// A block in use.
#[derive(Debug)]
struct Slot {
    lock: LockId,
    exclusive: bool,
    token: FencingToken,
    phase: Phase,
    version: u64,
    writes_left: u32,
    is_wanted: bool,
    turn: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Locking,
    ReadingJournal,
    LockingBlocks,
    Writing,
    Flushing,
    Clearing,
    ClearFlush,
    Said,
}

/// A dead life's journal being replayed.
#[derive(Debug)]
struct Replay {
    journal: u32,
    stage: Stage,
    /// Newest versions in the journal.
    found: BTreeMap<usize, u64>,
    tokens: BTreeMap<usize, FencingToken>,
    /// Operations or grants that are awaited.
    awaited: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Slot(usize),
    Replay(Identity, Option<usize>),
    Journal,
}

/// The filesystem of one life.
#[derive(Debug, Default)]
pub(crate) struct Fs {
    /// Whether a request of the attaching is under way.
    pub(crate) is_asking: bool,
    slots: BTreeMap<usize, Slot>,
    locks: BTreeMap<LockId, For>,
    ops: BTreeMap<OpId, For>,
    replays: BTreeMap<Identity, Replay>,
    pub(crate) journal: Option<u32>,
    next_op: u64,
    turns: u64,
    asks_journal: bool,
    is_mounted: bool,
    is_broken: bool,
}

impl Fs {
    pub(crate) fn is_idle(&self) -> bool {
        self.slots.is_empty() && self.replays.is_empty() && self.ops.is_empty() && self.is_mounted
    }

    pub(crate) fn uses(&self, block: usize) -> bool {
        self.slots.contains_key(&block)
    }
}

fn block_name(block: usize) -> LockName {
    LockName::new(format!("block {block}").as_bytes()).unwrap()
}

fn journal_name(journal: u32) -> LockName {
    LockName::new(format!("journal {journal}").as_bytes()).unwrap()
}

impl World {
    // --- locks ---

    fn lock(
        &mut self,
        who: Identity,
        name: LockName,
        mode: Mode,
        flags: Flags,
        purpose: For,
    ) -> Option<LockId> {
        let now = self.cluster.local_now(who.node);
        let app = self.app(who)?;
        let (result, effects) = app.locks.request(now, LockRequest::new(name, mode).flags(flags));
        let id = result.ok()?;
        app.fs.locks.insert(id, purpose);
        self.carry_out(who, effects);
        Some(id)
    }

    fn unlock(&mut self, who: Identity, id: LockId) {
        let now = self.cluster.local_now(who.node);
        let Some(app) = self.app(who) else { return };
        let (result, effects) = app.locks.unlock(now, id, UnlockRequest::default());
        result.unwrap();
        self.carry_out(who, effects);
    }

    /// Takes what the lock manager said, if the life may act (R8); else later.
    pub(crate) fn hear(&mut self, who: Identity) {
        if !self.acts(who) {
            return self.after_ms(15, Event::Hear(who));
        }
        while let Some((id, completion)) = self.app(who).and_then(|a| a.told.pop_front()) {
            let Some(purpose) = self.app(who).and_then(|a| a.fs.locks.get(&id).copied()) else { continue };
            match completion {
                Completion::Granted(grant) => self.on_grant(who, id, purpose, grant.token),
                _ => self.on_gone(who, id, purpose),
            }
        }
    }

    fn on_grant(&mut self, who: Identity, id: LockId, purpose: For, token: FencingToken) {
        self.trace(|| format!("{who} is granted {purpose:?} with {token:?}"));
        match purpose {
            For::Slot(block) => {
                self.oracle.granted(block, token, who);
                if let Some(slot) = self.app(who).and_then(|a| a.fs.slots.get_mut(&block)) {
                    slot.token = token;
                    slot.phase = Phase::Reading;
                }
                self.read(who, block, 1, purpose);
            }
            For::Journal => {
                if let Some(app) = self.app(who) {
                    app.fs.is_mounted = true;
                }
            }
            For::Replay(debtor, block) => self.on_recovery_grant(who, id, debtor, block, token),
        }
    }

    fn on_gone(&mut self, who: Identity, id: LockId, purpose: For) {
        let Some(app) = self.app(who) else { return };
        app.fs.locks.remove(&id);
        match purpose {
            For::Slot(block) => {
                app.fs.slots.remove(&block);
            }
            For::Journal => app.fs.asks_journal = false,
            // Somebody has the journal's lock: the one who replays it now, or its next owner.
            For::Replay(debtor, None)
                if app.fs.replays.get(&debtor).is_some_and(|r| r.stage == Stage::Locking) =>
            {
                app.fs.replays.remove(&debtor);
            }
            For::Replay(..) => {}
        }
    }

    pub(crate) fn on_blocking(&mut self, who: Identity, id: LockId) {
        let Some(app) = self.app(who) else { return };
        if let Some(For::Slot(block)) = app.fs.locks.get(&id).copied()
            && let Some(slot) = app.fs.slots.get_mut(&block)
        {
            slot.is_wanted = true;
        }
    }

    // --- device ---

    fn operate(&mut self, who: Identity, operation: Operation, purpose: For) {
        let Some(app) = self.app(who) else { return };
        app.fs.next_op += 1;
        let op = OpId(app.fs.next_op);
        app.fs.ops.insert(op, purpose);
        self.submit(who, op, operation);
    }

    fn read(&mut self, who: Identity, cell: usize, count: usize, purpose: For) {
        let operation = Operation::Read { offset: cell as u64 * CELL, len: count as u64 * CELL };
        self.operate(who, operation, purpose);
    }

    fn write(&mut self, who: Identity, cell: usize, write: Write, purpose: For) {
        let number = self.oracle.write(write);
        let data = Arc::new(Buf::copy_of(&number.to_le_bytes()));
        self.operate(who, Operation::Write { offset: cell as u64 * CELL, data, fua: false }, purpose);
    }

    pub(crate) fn on_io(&mut self, who: Identity, op: OpId, result: Result<(), IoError>, found: &[u64]) {
        let Some(app) = self.app(who) else { return };
        let Some(purpose) = app.fs.ops.remove(&op) else { return };
        if result.is_err() {
            if !std::mem::replace(&mut app.fs.is_broken, true) {
                self.after_ms(10, Event::Withdraw(who));
            }
            return;
        }
        match purpose {
            For::Slot(block) => self.on_block_io(who, block, found),
            For::Replay(debtor, _) => self.on_replay_io(who, debtor, found),
            For::Journal => {}
        }
    }

    // --- the users ---

    /// A user of this node wants a block.
    pub(crate) fn act(&mut self, who: Identity) {
        let ms = 2 + self.rng.below(40);
        self.after_ms(ms, Event::Act(who));
        if !self.acts(who) {
            return;
        }
        let faulty = self.faulty;
        let Some(app) = self.app(who).filter(|a| !a.fs.is_broken) else { return };
        if !app.fs.is_mounted {
            if let Some(journal) = app.journal()
                && !std::mem::replace(&mut app.fs.asks_journal, true)
            {
                self.lock(who, journal_name(journal), Mode::EX, Flags::NONE, For::Journal);
            }
            return self.look_for_replays(who);
        }
        self.look_for_replays(who);
        if faulty {
            let block = self.rng.below(BLOCKS as u64) as usize;
            let writes = self.rng.below(4) as u32;
            let exclusive = 0 < writes || self.rng.chance_ppm(300_000);
            self.open(who, block, exclusive, writes);
        }
    }

    pub(crate) fn open(&mut self, who: Identity, block: usize, exclusive: bool, writes_left: u32) {
        if self.app(who).is_none_or(|a| a.fs.uses(block) || !a.fs.is_mounted) {
            return;
        }
        let mode = if exclusive { Mode::EX } else { Mode::PR };
        let Some(lock) = self.lock(who, block_name(block), mode, Flags::NONE, For::Slot(block)) else {
            return;
        };
        let slot = Slot {
            lock,
            exclusive,
            token: FencingToken::default(),
            phase: Phase::Asking,
            version: 0,
            writes_left,
            is_wanted: false,
            turn: 0,
        };
        if let Some(app) = self.app(who) {
            app.fs.slots.insert(block, slot);
        }
    }

    fn wait(&mut self, who: Identity, block: usize, phase: Phase) {
        let most = if self.rng.chance_ppm(300_000) { 150_000 } else { 8_000 };
        let wait = Duration::from_micros(self.rng.below(most));
        let Some(app) = self.app(who) else { return };
        app.fs.turns += 1;
        let turn = app.fs.turns;
        let Some(slot) = app.fs.slots.get_mut(&block) else { return };
        (slot.phase, slot.turn) = (phase, turn);
        self.after(wait, Event::Go { who, block, turn });
    }

    /// A user has thought long enough.
    pub(crate) fn go_on(&mut self, who: Identity, block: usize, turn: u64) {
        let again = self.rng.chance_ppm(500_000);
        let planted = self.planted;
        let Some(slot) = self.app(who).and_then(|a| a.fs.slots.get_mut(&block)) else { return };
        if slot.turn != turn {
            return;
        }
        let wants = 0 < slot.writes_left;
        match slot.phase {
            Phase::Thinking if slot.exclusive && wants => self.log(who, block),
            Phase::Dirty if wants && again && !slot.is_wanted => self.log(who, block),
            Phase::Dirty if planted != Some(Planted::Filesystem(Bug::UnlockDirty)) => {
                slot.phase = Phase::InPlace;
                let version = slot.version;
                self.write_block(who, block, version, None);
            }
            Phase::Thinking | Phase::Dirty => self.leave(who, block),
            _ => {}
        }
    }

    fn log(&mut self, who: Identity, block: usize) {
        let version = self.oracle.version();
        let Some(app) = self.app(who) else { return };
        let journal = app.journal();
        let Some(slot) = app.fs.slots.get_mut(&block) else { return };
        slot.phase = Phase::Logging;
        slot.version = version;
        slot.writes_left -= 1;
        self.write_block(who, block, version, journal);
    }

    /// Writes a version to its place, or to the journal.
    fn write_block(&mut self, who: Identity, block: usize, version: u64, journal: Option<u32>) {
        let Some(token) = self.app(who).and_then(|a| a.fs.slots.get(&block)).map(|s| s.token) else { return };
        let cell = journal.map_or(block, |j| journal_cell(j, block));
        self.write(who, cell, Write { block, version, by: who, token }, For::Slot(block));
    }

    fn leave(&mut self, who: Identity, block: usize) {
        let Some(app) = self.app(who) else { return };
        let journal = app.journal();
        let Some(slot) = app.fs.slots.get_mut(&block) else { return };
        slot.phase = Phase::Leaving;
        let lock = slot.lock;
        // Nothing of it is ever sent again (R12).
        self.revoke(who, block);
        if let Some(journal) = journal {
            self.revoke(who, journal_cell(journal, block));
        }
        self.unlock(who, lock);
    }

    fn on_block_io(&mut self, who: Identity, block: usize, found: &[u64]) {
        let acts = self.acts(who);
        let Some(app) = self.app(who) else { return };
        let journal = app.journal();
        let Some(slot) = app.fs.slots.get_mut(&block) else { return };
        let version = slot.version;
        let purpose = For::Slot(block);
        let next = match slot.phase {
            Phase::Reading => {
                // Looked at after reading and before answering (R8).
                if acts {
                    let found = self.oracle.version_of(found[0]);
                    lost_write::on_read(who, block, found, self.oracle.committed[block]);
                    self.summary.reads += 1;
                }
                return self.wait(who, block, Phase::Thinking);
            }
            Phase::Logging => Phase::LogFlush,
            Phase::LogFlush => {
                self.oracle.committed[block] = self.oracle.committed[block].max(version);
                self.summary.commits += 1;
                self.trace(|| format!("{who} has committed version {version} of block {block}"));
                return self.wait(who, block, Phase::Dirty);
            }
            Phase::InPlace => Phase::InPlaceFlush,
            Phase::InPlaceFlush => Phase::Clearing,
            Phase::Clearing => Phase::ClearFlush,
            Phase::ClearFlush => return self.wait(who, block, Phase::Thinking),
            Phase::Asking | Phase::Thinking | Phase::Dirty | Phase::Leaving => {
                unreachable!("no operation is under way")
            }
        };
        if let Some(slot) = self.app(who).and_then(|a| a.fs.slots.get_mut(&block)) {
            slot.phase = next;
        }
        if next == Phase::Clearing {
            self.write_block(who, block, 0, journal);
        } else {
            self.operate(who, Operation::Flush, purpose);
        }
    }

    // --- recovery ---

    /// The lowest life that has it mounted replays what is fenced and rebuilt.
    pub(crate) fn look_for_replays(&mut self, who: Identity) {
        let Some(app) = self.app(who) else { return };
        let view = app.view.clone();
        let mount = mount_id();
        app.fs.replays.retain(|debtor, r| {
            r.stage != Stage::Said || view.debts.get(debtor).is_some_and(|d| d.items.contains_key(&mount))
        });
        if !self.acts(who) || view.attached(&mount).map(|a| a.owner).min() != Some(who) {
            return;
        }
        let skips = self.planted == Some(Planted::Filesystem(Bug::SkipReplay));
        for (debtor, item) in view.owing(&mount) {
            let Some(journal) = item.attachment.journal.filter(|_| item.fenced && item.rebuilt) else {
                continue;
            };
            let Some(app) = self.app(who).filter(|a| !a.fs.replays.contains_key(&debtor)) else { continue };
            if skips {
                self.say_replayed(who, debtor);
                continue;
            }
            let (found, tokens) = Default::default();
            let replay = Replay { journal, stage: Stage::Locking, found, tokens, awaited: 0 };
            let before = app.fs.replays.insert(debtor, replay);
            assert!(before.is_none());
            let flags = Flags::RECOVERY | Flags::NOQUEUE;
            self.lock(who, journal_name(journal), Mode::EX, flags, For::Replay(debtor, None));
        }
    }

    fn on_recovery_grant(
        &mut self,
        who: Identity,
        id: LockId,
        debtor: Identity,
        block: Option<usize>,
        token: FencingToken,
    ) {
        let Some(app) = self.app(who) else { return };
        let is_open = app.view.debts.get(&debtor).is_some_and(|d| d.items.contains_key(&mount_id()));
        let Some(replay) = app.fs.replays.get_mut(&debtor) else { return self.unlock(who, id) };
        let Some(block) = block else {
            // Somebody else may have been first.
            if !is_open {
                app.fs.replays.remove(&debtor);
                return self.unlock(who, id);
            }
            replay.stage = Stage::ReadingJournal;
            let cell = journal_cell(replay.journal, 0);
            return self.read(who, cell, BLOCKS, For::Replay(debtor, None));
        };
        replay.tokens.insert(block, token);
        replay.awaited -= 1;
        let is_last = replay.awaited == 0;
        self.oracle.granted(block, token, who);
        if is_last {
            self.replay_stage(who, debtor, Stage::Writing);
        }
    }

    fn on_replay_io(&mut self, who: Identity, debtor: Identity, found: &[u64]) {
        let versions: Vec<u64> = found.iter().map(|n| self.oracle.version_of(*n)).collect();
        let Some(replay) = self.app(who).and_then(|a| a.fs.replays.get_mut(&debtor)) else { return };
        if replay.stage == Stage::ReadingJournal {
            replay.found = versions.into_iter().enumerate().filter(|(_, v)| *v != 0).collect();
            return self.replay_stage(who, debtor, Stage::LockingBlocks);
        }
        replay.awaited -= 1;
        if replay.awaited == 0 {
            let next = match replay.stage {
                Stage::Writing => Stage::Flushing,
                Stage::Flushing => Stage::Clearing,
                Stage::Clearing => Stage::ClearFlush,
                _ => Stage::Said,
            };
            self.replay_stage(who, debtor, next);
        }
    }

    fn replay_stage(&mut self, who: Identity, debtor: Identity, stage: Stage) {
        self.trace(|| format!("{who} replays {debtor}: {stage:?}"));
        let Some(replay) = self.app(who).and_then(|a| a.fs.replays.get_mut(&debtor)) else { return };
        replay.stage = stage;
        let (journal, found, tokens) = (replay.journal, replay.found.clone(), replay.tokens.clone());
        replay.awaited = if matches!(stage, Stage::Flushing | Stage::ClearFlush) { 1 } else { found.len() };
        if found.is_empty() && stage != Stage::Said {
            return self.replay_stage(who, debtor, Stage::Said);
        }
        let purpose = For::Replay(debtor, None);
        match stage {
            Stage::LockingBlocks => {
                for block in found.into_keys() {
                    let purpose = For::Replay(debtor, Some(block));
                    self.lock(who, block_name(block), Mode::EX, Flags::RECOVERY, purpose);
                }
            }
            Stage::Writing | Stage::Clearing => {
                let clears = stage == Stage::Clearing;
                for (block, version) in found {
                    let cell = if clears { journal_cell(journal, block) } else { block };
                    let version = if clears { 0 } else { version };
                    self.write(who, cell, Write { block, version, by: who, token: tokens[&block] }, purpose);
                }
            }
            Stage::Flushing | Stage::ClearFlush => self.operate(who, Operation::Flush, purpose),
            Stage::Said => {
                self.summary.replays += 1;
                self.summary.replayed_blocks += found.len() as u64;
                for cell in found.keys().flat_map(|b| [*b, journal_cell(journal, *b)]) {
                    self.revoke(who, cell);
                }
                self.give_up_recovery(who, debtor);
                self.say_replayed(who, debtor);
            }
            Stage::Locking | Stage::ReadingJournal => unreachable!("these have beginnings of their own"),
        }
    }

    fn give_up_recovery(&mut self, who: Identity, debtor: Identity) {
        let Some(app) = self.app(who) else { return };
        let is_of = |p: &For| matches!(p, For::Replay(d, _) if *d == debtor);
        let ids: Vec<LockId> = app.fs.locks.iter().filter(|(_, p)| is_of(p)).map(|(id, _)| *id).collect();
        for id in ids {
            self.unlock(who, id);
        }
    }

    fn say_replayed(&mut self, who: Identity, debtor: Identity) {
        let request = Request::Prove { debtor, resources: [mount_id()].into(), proof: Proof::Replayed };
        self.after(Duration::ZERO, Event::Propose(who, request));
    }

    /// Whether a block is in use by this life.
    pub(crate) fn uses(&self, who: Identity, block: usize) -> bool {
        self.apps.get(&who.node).is_some_and(|a: &App| a.who == who && a.fs.uses(block))
    }
}
