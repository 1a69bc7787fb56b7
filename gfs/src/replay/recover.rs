//! Replaying in place, the counters, and the clean header that ends it.

use super::{Journal, ReplayError, ReplayPlan, find_head, plan};
use crate::format::{
    BlockNo, DINODE_BYTES, LogFlags, LogHeader, LogHeaderV2, MAGIC, STATFS_BYTES, StatfsChange,
    StatfsCounted, Timestamp,
};
use crate::reader::{Inode, JournalCopy, ReadError, Reader};
use futures_util::future::try_join_all;
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};

/// What a recovery found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The journal's head before.
    pub head: LogHeader,
    /// The head now: the same if the journal was clean.
    pub clean: LogHeader,
    /// Copies found.
    pub found: usize,
    /// Blocks written in place.
    pub written: usize,
    /// Blocks that are revoked somewhere.
    pub revoked: usize,
    /// What was added to the filesystem's counters.
    pub statfs: StatfsChange,
}

/// Recovers a journal in place: replays it, adds its node's pending statfs, writes a clean header. Does nothing to a
/// clean one. It may be interrupted anywhere and done again, by anybody.
///
/// # Errors
/// The device fails or the journal is broken; it is not clean then, and may be recovered again.
pub async fn recover<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    now: Timestamp,
) -> Result<Recovered, ReplayError> {
    let head = find_head(reader, journal).await?;
    let mut done =
        Recovered { head, clean: head, found: 0, written: 0, revoked: 0, statfs: StatfsChange::default() };
    if head.flags.is_clean() {
        return Ok(done);
    }
    let plan = plan(reader, journal, &head).await?;
    apply(reader, &plan).await?;
    done.statfs = add_statfs(reader, journal, &head).await?;
    done.clean = write_clean_header(reader, journal, &head, now).await?;
    (done.found, done.written, done.revoked) = (plan.found, plan.copies.len(), plan.revoked);
    tracing::info!(
        jid = journal.jid(),
        found = done.found,
        written = done.written,
        revoked = done.revoked,
        "journal replayed"
    );
    Ok(done)
}

/// Writes every copy to its place and makes it durable.
///
/// # Errors
/// The device fails.
pub async fn apply<D: BlockDevice>(reader: &Reader<D>, plan: &ReplayPlan) -> Result<(), ReplayError> {
    let copies: Vec<(BlockNo, JournalCopy)> =
        plan.copies.iter().map(|(block, copy)| (*block, *copy)).collect();
    for some in copies.chunks(APPLY_AT_ONCE) {
        try_join_all(some.iter().map(|(block, copy)| put_copy(reader, *block, *copy))).await?;
    }
    reader.device().flush().await?;
    reader.forget();
    Ok(())
}

/// Adds the local numbers of the head to the filesystem's, unless a replay that was interrupted has already done so, and
/// clears the node's file of them. The caller holds the locks of both files, where others may be mounted. Says what was
/// added.
///
/// # Errors
/// The device fails, or a system file is broken.
pub async fn add_statfs<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    head: &LogHeader,
) -> Result<StatfsChange, ReplayError> {
    reader.forget();
    let mut added = StatfsChange::default();
    let master = reader.inode(reader.superblock().master.addr).await?;
    let statfs = reader.system(&master, "statfs").await?;
    let pending = pending_statfs(head, journal.jid(), &statfs);
    if !pending.is_zero() {
        let mut bytes = Buf::copy_of(&statfs.block);
        let numbers = &mut bytes[DINODE_BYTES..];
        statfs_of(&statfs)?.plus(&pending).encode(numbers);
        counted(head, journal.jid()).encode(numbers);
        write(reader, statfs.addr(), bytes, WriteFlags::default()).await?;
        added = pending;
    }
    let per_node = reader.system(&master, "per_node").await?;
    let change = reader.system(&per_node, &format!("statfs_change{}", journal.jid())).await?;
    if !statfs_of(&change)?.is_zero() {
        let mut bytes = Buf::copy_of(&change.block);
        StatfsChange::default().encode(&mut bytes[DINODE_BYTES..]);
        write(reader, change.addr(), bytes, WriteFlags::default()).await?;
    }
    reader.device().flush().await?;
    reader.forget();
    Ok(added)
}

/// What is not yet in the filesystem's numbers of the changes of a journal's node.
pub(crate) fn pending_statfs(head: &LogHeader, jid: u32, statfs: &Inode) -> StatfsChange {
    match head.v2 {
        Some(v2) if !head.flags.is_clean() && !counted(head, jid).is_in(statfs.payload()) => v2.local,
        _ => StatfsChange::default(),
    }
}

fn counted(head: &LogHeader, jid: u32) -> StatfsCounted {
    StatfsCounted { jid, fingerprint: head.fingerprint(), sequence: head.sequence }
}

/// The three numbers in a statfs file, which is always stuffed.
pub(crate) fn statfs_of(inode: &Inode) -> Result<StatfsChange, ReadError> {
    let wrong = ReadError::Structure { inode: inode.addr(), what: "not a statfs file" };
    if inode.dinode.height != 0 || inode.dinode.size_bytes < STATFS_BYTES as u64 {
        return Err(wrong);
    }
    StatfsChange::decode(inode.payload()).map_err(|_| wrong)
}

/// Writes the header that makes the journal clean, right behind its head, and makes it durable. Says what it wrote.
///
/// # Errors
/// The device fails.
pub async fn write_clean_header<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    head: &LogHeader,
    now: Timestamp,
) -> Result<LogHeader, ReplayError> {
    let index = journal.after(head.index);
    let addr = journal.block(index);
    let header = LogHeader {
        jid: journal.jid(),
        sequence: head.sequence.wrapping_add(1),
        flags: LogFlags(LogFlags::UNMOUNT | LogFlags::RECOVERY),
        tail: 0,
        index,
        v2: Some(LogHeaderV2 { time: now, addr, jinode: journal.inode(), ..LogHeaderV2::default() }),
    };
    let mut bytes = Buf::zeroed(journal.size().usize());
    header.encode(&mut bytes);
    reader.device().flush().await?;
    write(reader, addr, bytes, WriteFlags { fua: true }).await?;
    reader.device().flush().await?;
    Ok(header)
}

/// So many copies are under way to their places at a time.
const APPLY_AT_ONCE: usize = 256;

async fn put_copy<D: BlockDevice>(
    reader: &Reader<D>,
    block: BlockNo,
    copy: JournalCopy,
) -> Result<(), ReplayError> {
    let mut bytes = reader.raw(copy.at, 1).await?;
    if copy.escaped {
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
    }
    write(reader, block, bytes, WriteFlags::default()).await
}

async fn write<D: BlockDevice>(
    reader: &Reader<D>,
    at: BlockNo,
    bytes: Buf,
    flags: WriteFlags,
) -> Result<(), ReplayError> {
    reader.device().write(at.0 << reader.size().shift(), bytes, flags).await?;
    Ok(())
}
