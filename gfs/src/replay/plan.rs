//! What a replay would write: the last copy of every block between tail and head that is not revoked after it.

use super::{Journal, ReplayError};
use crate::format::{
    BlockNo, LOG_DESCRIPTOR_BYTES, LogDescriptor, LogHeader, LogKind, META_HEADER_BYTES, MetaHeader,
    MetaType, has_magic, jdata_entries, log_blocks,
};
use crate::reader::{JournalCopy, Reader};
use quorate_gnbd::BlockDevice;
use std::collections::BTreeMap;

/// Blocks read at once while walking the ring.
const WALK_BLOCKS: u32 = 128;

/// What a journal's replay writes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplayPlan {
    /// Block, and where its newest copy is. Empty if the journal is clean.
    pub copies: BTreeMap<BlockNo, JournalCopy>,
    /// Copies found, revoked and superseded ones included.
    pub found: usize,
    /// Blocks that are revoked somewhere.
    pub revoked: usize,
}

/// Reads everything between tail and head.
///
/// # Errors
/// The device fails, or something stands there that no flush has written.
pub async fn plan<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    head: &LogHeader,
) -> Result<ReplayPlan, ReplayError> {
    if head.flags.is_clean() {
        return Ok(ReplayPlan::default());
    }
    let jid = journal.jid();
    if journal.blocks() <= head.tail || journal.blocks() <= head.index {
        return Err(ReplayError::Ring { jid, index: head.index, what: "its tail is not in the ring" });
    }
    let mut walk = Walk {
        reader,
        jid,
        state: State::Between,
        position: 0,
        copies: Vec::new(),
        revokes: BTreeMap::new(),
    };
    let length = journal.distance(head.tail, head.index);
    let mut index = head.tail;
    while walk.position < length {
        let count = WALK_BLOCKS.min(length - walk.position).min(journal.blocks() - index);
        let bytes = journal.read(reader, index, count).await.map_err(ReplayError::Read)?;
        for block in bytes.chunks_exact(reader.size().usize()) {
            walk.block(index, block).map_err(|what| ReplayError::Ring { jid, index, what })?;
            index = journal.after(index);
            walk.position += 1;
        }
    }
    if !matches!(walk.state, State::Between) {
        let what = "a descriptor reaches beyond the head";
        return Err(ReplayError::Ring { jid, index: head.index, what });
    }
    let mut plan =
        ReplayPlan { copies: BTreeMap::new(), found: walk.copies.len(), revoked: walk.revokes.len() };
    for copy in walk.copies {
        // The copy right at the tail is never revoked: a revoke of it belongs to a flush before the tail.
        let revoked =
            walk.revokes.get(&copy.block).is_some_and(|&at| 0 < copy.position && copy.position < at);
        if revoked {
            continue;
        }
        if !copy.sound {
            let what = "a copy of metadata without magic number";
            return Err(ReplayError::Ring { jid, index: copy.index, what });
        }
        if !reader.holds(copy.block) {
            return Err(ReplayError::Ring {
                jid,
                index: copy.index,
                what: "a copy of a block outside the device",
            });
        }
        let at = JournalCopy { at: journal.block(copy.index), escaped: copy.escaped };
        plan.copies.insert(copy.block, at);
    }
    Ok(plan)
}

struct Walk<'a, D> {
    reader: &'a Reader<D>,
    jid: u32,
    state: State,
    /// Ring blocks behind the tail.
    position: u32,
    copies: Vec<Copied>,
    /// Block, and the position of its latest revoke.
    revokes: BTreeMap<BlockNo, u32>,
}

struct Copied {
    block: BlockNo,
    position: u32,
    index: u32,
    escaped: bool,
    sound: bool,
}

enum State {
    /// A header or a descriptor comes.
    Between,
    /// Copies of these come, last first.
    Copies { kind: LogKind, targets: Vec<(BlockNo, bool)> },
    /// So many blocks with so many revokes come.
    Revokes { blocks: u32, entries: u32 },
}

impl<D: BlockDevice> Walk<'_, D> {
    fn block(&mut self, index: u32, block: &[u8]) -> Result<(), &'static str> {
        match &mut self.state {
            State::Between => self.between(block),
            State::Copies { kind, targets } => {
                let (target, escaped) = targets.pop().ok_or("a descriptor without entries")?;
                let sound = *kind == LogKind::Jdata || has_magic(block);
                self.copies.push(Copied { block: target, position: self.position, index, escaped, sound });
                if targets.is_empty() {
                    self.state = State::Between;
                }
                Ok(())
            }
            State::Revokes { blocks, entries } => {
                MetaHeader::expect(block, MetaType::LogBlock).map_err(|_| "no continuation of revokes")?;
                let (blocks, entries) = (*blocks, *entries);
                self.revoke(block, META_HEADER_BYTES, blocks, entries);
                Ok(())
            }
        }
    }

    fn between(&mut self, block: &[u8]) -> Result<(), &'static str> {
        match MetaHeader::decode(block).map(|header| header.kind) {
            Ok(MetaType::LogHeader) => {
                LogHeader::decode(block).map_err(|_| "a broken log header")?;
                Ok(())
            }
            Ok(MetaType::LogDescriptor) => {
                let descriptor = LogDescriptor::decode(block, self.reader.size());
                let descriptor = descriptor.map_err(|_| "a broken log descriptor")?;
                let count = descriptor.count as usize;
                let mut targets: Vec<(BlockNo, bool)> = match descriptor.kind {
                    LogKind::Revoke => {
                        self.revoke(block, LOG_DESCRIPTOR_BYTES, descriptor.length, descriptor.count);
                        return Ok(());
                    }
                    LogKind::Metadata => {
                        log_blocks(block, LOG_DESCRIPTOR_BYTES).take(count).map(|at| (at, false)).collect()
                    }
                    LogKind::Jdata => jdata_entries(block).take(count).collect(),
                };
                targets.reverse();
                if !targets.is_empty() {
                    self.state = State::Copies { kind: descriptor.kind, targets };
                }
                Ok(())
            }
            Ok(_) => Err("metadata where a header or descriptor is expected"),
            Err(_) => {
                tracing::debug!(jid = self.jid, position = self.position, "no log structure");
                Err("no log structure where a header or descriptor is expected")
            }
        }
    }

    /// Takes the revokes of one block; `blocks` counts it too.
    fn revoke(&mut self, block: &[u8], from: usize, blocks: u32, entries: u32) {
        let here = entries.min(((block.len() - from) / 8) as u32);
        for at in log_blocks(block, from).take(here as usize) {
            self.revokes.insert(at, self.position);
        }
        self.state = match blocks {
            0 | 1 => State::Between,
            _ => State::Revokes { blocks: blocks - 1, entries: entries - here },
        };
    }
}
