//! Replay of journals written by hand, and of corrupted ones.

use crate::tools::block_on;
use quorate_gfs::format::{
    BlockNo, DINODE_BYTES, LogDescriptor, LogFlags, LogHeader, LogHeaderV2, LogKind, MetaHeader, MetaType,
    StatfsChange, Timestamp,
};
use quorate_gfs::mkfs::{MkfsOptions, mkfs};
use quorate_gfs::reader::Reader;
use quorate_gfs::replay::{Journal, ReplayError, find_head, plan, recover};
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use quorate_membership::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const MIB: u64 = 1 << 20;
const NOW: Timestamp = Timestamp { sec: 5, nsec: 6 };

fn fresh(first_sequence: u64) -> MemoryDevice {
    let device = MemoryDevice::new(16 * MIB);
    let mut options = MkfsOptions::new(1);
    options.first_sequence = first_sequence;
    block_on(mkfs(&device, &options)).unwrap();
    device
}

fn write(device: &MemoryDevice, at: BlockNo, bytes: &[u8]) {
    block_on(device.write(at.0 * 4096, Buf::copy_of(bytes), WriteFlags::default())).unwrap();
}

/// A writer of log blocks behind the head of a fresh journal.
struct Log<'a> {
    device: &'a MemoryDevice,
    journal: Journal,
    head: LogHeader,
    next: u32,
}

impl<'a> Log<'a> {
    fn new(device: &'a MemoryDevice) -> Self {
        let reader = block_on(Reader::open(device)).unwrap();
        let journal = block_on(Journal::all(&reader)).unwrap().remove(0);
        let head = block_on(find_head(&reader, &journal)).unwrap();
        assert!(head.flags.is_clean());
        let next = journal.after(head.index);
        Self { device, journal, head, next }
    }

    fn put(&mut self, block: &[u8]) -> u32 {
        let index = self.next;
        write(self.device, self.journal.block(index), block);
        self.next = self.journal.after(index);
        index
    }

    fn metadata(&mut self, copies: &[(BlockNo, Vec<u8>)]) {
        let mut block = vec![0; 4096];
        let targets: Vec<BlockNo> = copies.iter().map(|copy| copy.0).collect();
        let count = targets.len() as u32;
        LogDescriptor { kind: LogKind::Metadata, length: count + 1, count }.encode(&mut block, &targets);
        self.put(&block);
        for (_, copy) in copies {
            self.put(copy);
        }
    }

    fn jdata(&mut self, target: BlockNo, copy: &[u8], escaped: bool) {
        let mut block = vec![0; 4096];
        LogDescriptor::encode_jdata(&mut block, &[(target, escaped)]);
        self.put(&block);
        self.put(copy);
    }

    fn revoke(&mut self, targets: &[BlockNo]) {
        let mut block = vec![0; 4096];
        let (here, rest) = targets.split_at(targets.len().min(503));
        let length = 1 + rest.len().div_ceil(509) as u32;
        LogDescriptor { kind: LogKind::Revoke, length, count: targets.len() as u32 }.encode(&mut block, here);
        self.put(&block);
        for part in rest.chunks(509) {
            LogDescriptor::encode_continuation(&mut block, part);
            self.put(&block);
        }
    }

    fn commit(&mut self, tail: u32, local: StatfsChange) -> u32 {
        self.head.sequence += 1;
        self.head.flags = LogFlags(LogFlags::NORMAL);
        self.head.tail = tail;
        self.head.index = self.next;
        self.head.v2 = Some(LogHeaderV2 { local, ..LogHeaderV2::default() });
        let mut block = vec![0; 4096];
        self.head.encode(&mut block);
        self.put(&block)
    }
}

fn leaf(fill: u8) -> Vec<u8> {
    let mut block = vec![fill; 4096];
    MetaHeader { kind: MetaType::Leaf, jid: 0 }.encode(&mut block);
    block
}

fn at(device: &MemoryDevice, block: BlockNo) -> Vec<u8> {
    device.bytes()[block.0 as usize * 4096..][..4096].to_vec()
}

/// Blocks in the free part of a fresh filesystem.
fn free(n: u64) -> BlockNo {
    BlockNo(2600 + n)
}

fn workload(log: &mut Log<'_>) {
    let tail = log.next;
    let mut escaped = leaf(7);
    escaped[..4].fill(0);
    log.metadata(&[(free(1), leaf(1)), (free(2), leaf(2)), (free(3), leaf(3))]);
    log.commit(tail, StatfsChange::default());
    log.jdata(free(4), &[9; 4096], false);
    log.jdata(free(5), &escaped, true);
    // Revoked after its copy, so the copy must not come back; the copy after the revoke counts.
    log.revoke(&[free(2), free(3)]);
    log.metadata(&[(free(3), leaf(33)), (free(1), leaf(11))]);
    log.commit(tail, StatfsChange { total: 0, free: -5, dinodes: 2 });
}

fn check_workload(device: &MemoryDevice, before: &[u8]) {
    assert_eq!(at(device, free(1)), leaf(11));
    assert_eq!(at(device, free(2)), before[free(2).0 as usize * 4096..][..4096]);
    assert_eq!(at(device, free(3)), leaf(33));
    assert_eq!(at(device, free(4)), [9; 4096]);
    assert_eq!(at(device, free(5)), leaf(7));
}

fn statfs(device: &MemoryDevice) -> StatfsChange {
    let reader = block_on(Reader::open(device)).unwrap();
    let master = block_on(reader.inode(reader.superblock().master.addr)).unwrap();
    let inode = block_on(reader.system(&master, "statfs")).unwrap();
    StatfsChange::decode(&inode.block[DINODE_BYTES..]).unwrap()
}

#[test]
fn every_fresh_journal_has_its_head_at_the_highest_sequence() {
    for first in [0, 1, 2, 1000, 1655, 2046, 2047, 2048, 987_654_321] {
        let device = fresh(first);
        let log = Log::new(&device);
        assert_eq!(log.head.sequence, 2047);
        assert_eq!(u64::from(log.head.index), 2047 - first % 2048);
    }
}

#[test]
fn the_newest_copy_that_is_not_revoked_is_written_wherever_the_ring_begins() {
    // The flushes wrap around the end of the ring at every possible place.
    for first in (0..17).chain([1000]) {
        let device = fresh(first);
        let before = device.bytes();
        let free_before = statfs(&device);
        let mut log = Log::new(&device);
        workload(&mut log);
        let reader = block_on(Reader::open(&device)).unwrap();
        let done = block_on(recover(&reader, &log.journal, NOW)).unwrap();
        assert_eq!(done.head, log.head);
        assert_eq!((done.found, done.written, done.revoked), (7, 4, 2));
        check_workload(&device, &before);
        let change = StatfsChange { total: 0, free: -5, dinodes: 2 };
        assert_eq!(statfs(&device), free_before.plus(&change));

        let again = block_on(recover(&reader, &log.journal, NOW)).unwrap();
        assert_eq!(again.head, done.clean);
        assert_eq!(again.head.flags, LogFlags(0x21));
        assert_eq!(again.head.sequence, log.head.sequence + 1);
        assert_eq!(again.written, 0);
        assert_eq!(statfs(&device), free_before.plus(&change));
    }
}

/// A device that takes so many writes and then no more.
#[derive(Clone)]
struct Stops {
    device: Arc<MemoryDevice>,
    left: Arc<AtomicU32>,
}

impl BlockDevice for Stops {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        self.device.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map_err(|_| IoError::Fenced { detail: "test".into() })?;
        self.device.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.device.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.device.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.device.write_zeroes(offset, len, flags).await
    }
}

#[test]
fn a_replay_that_crashes_at_any_write_is_done_again_and_counts_statfs_once() {
    let device = fresh(3);
    let free_before = statfs(&device);
    let mut log = Log::new(&device);
    workload(&mut log);
    let change = StatfsChange { total: 0, free: -5, dinodes: 2 };
    let dirty = device.bytes();
    let (mut rng, mut counted_early, mut writes) = (Rng::new(11), 0, 0);
    'writes: for left in 0.. {
        // The same crash with other unflushed sectors, and a second replay that crashes too.
        for again in 0..12 {
            let mut image = dirty.clone();
            for left in [left, rng.below(u64::from(left) + 1) as u32].into_iter().take(1 + again % 2) {
                let device = Stops {
                    device: MemoryDevice::from_bytes(image).into(),
                    left: AtomicU32::new(left).into(),
                };
                let reader = block_on(Reader::open(device.clone())).unwrap();
                let done = block_on(recover(&reader, &log.journal, NOW));
                if done.is_ok() && again == 0 {
                    writes = left;
                    break 'writes;
                }
                image = device.device.crashed(if again < 2 { None } else { Some(&mut rng) });
            }
            let device = MemoryDevice::from_bytes(image);
            counted_early += u32::from(statfs(&device) != free_before);
            let rescued = RescueFs::open(
                Device::new(MemoryDevice::from_bytes(device.bytes())),
                RescueOptions::default(),
            );
            assert_eq!(block_on(rescued).unwrap().counters(), free_before.plus(&change), "{left}, {again}");
            let reader = block_on(Reader::open(&device)).unwrap();
            block_on(recover(&reader, &log.journal, NOW)).unwrap();
            assert_eq!(statfs(&device), free_before.plus(&change), "{left}, {again}");
            check_workload(&device, &dirty);
        }
    }
    assert!(6 <= writes, "four blocks, the numbers, the clean header: {writes}");
    assert!(0 < counted_early, "no crash fell between the numbers and the clean header");
}

#[test]
fn a_replay_over_a_reader_shows_the_same_and_writes_nothing() {
    let device = fresh(3);
    let mut log = Log::new(&device);
    workload(&mut log);
    let before = device.bytes();
    let mut reader = block_on(Reader::open(&device)).unwrap();
    let plan = block_on(plan(&reader, &log.journal, &log.head)).unwrap();
    reader.lay_over(plan.copies);
    assert_eq!(**block_on(reader.block(free(1))).unwrap(), leaf(11));
    assert_eq!(**block_on(reader.block(free(5))).unwrap(), leaf(7));
    let run = block_on(reader.run(free(1), 5)).unwrap();
    assert_eq!(run[2 * 4096..3 * 4096], leaf(33));
    assert_eq!(run[3 * 4096..4 * 4096], [9; 4096]);
    assert_eq!(device.bytes(), before);
}

#[test]
fn revokes_go_on_in_continuation_blocks() {
    let device = fresh(9);
    let before = device.bytes();
    let mut log = Log::new(&device);
    let tail = log.next;
    let copies: Vec<_> = (0..3).map(|n| (free(n), leaf(n as u8))).collect();
    log.metadata(&copies);
    let many: Vec<BlockNo> = (0..503 + 509 + 7).map(|n| free(n + 1)).rev().collect();
    log.revoke(&many);
    log.commit(tail, StatfsChange::default());
    let reader = block_on(Reader::open(&device)).unwrap();
    let done = block_on(recover(&reader, &log.journal, NOW)).unwrap();
    assert_eq!((done.found, done.written, done.revoked), (3, 1, many.len()));
    assert_eq!(at(&device, free(0)), leaf(0));
    assert_eq!(at(&device, free(2)), before[free(2).0 as usize * 4096..][..4096]);
}

#[test]
fn what_no_flush_wrote_is_refused_before_anything_is_written() {
    type Break = fn(&mut Log<'_>);
    let cases: [Break; 5] = [
        |log| assert_ne!(log.put(&[0; 4096]), 5000),
        |log| assert_ne!(log.put(&leaf(1)), 5000),
        |log| log.metadata(&[(free(1), vec![1; 4096])]),
        |log| log.metadata(&[(BlockNo(1 << 40), leaf(1))]),
        |log| {
            let mut block = vec![0; 4096];
            LogDescriptor { kind: LogKind::Metadata, length: 9, count: 8 }.encode(&mut block, &[free(1); 8]);
            log.put(&block);
        },
    ];
    for case in cases {
        let device = fresh(0);
        let mut log = Log::new(&device);
        let tail = log.next;
        case(&mut log);
        log.commit(tail, StatfsChange::default());
        let before = device.bytes();
        let reader = block_on(Reader::open(&device)).unwrap();
        let error = block_on(recover(&reader, &log.journal, NOW)).unwrap_err();
        assert!(matches!(error, ReplayError::Ring { .. }), "{error}");
        assert_eq!(device.bytes(), before);
    }
}

#[test]
fn random_damage_never_panics() {
    let device = fresh(100);
    let mut log = Log::new(&device);
    workload(&mut log);
    let sound = device.bytes();
    let interesting: Vec<u64> = (0..20)
        .map(|n| log.journal.block((log.head.index + 2048 - n) % 2048).0)
        .chain([16, 18, 19, 2072, 2073])
        .collect();
    let mut rng = Rng::new(7);
    let mut refused = 0;
    for _ in 0..150 {
        let mut bytes = sound.clone();
        for _ in 0..=rng.below(3) {
            let block = interesting[rng.below(interesting.len() as u64) as usize] as usize;
            let byte = if rng.chance_ppm(700_000) { rng.below(256) } else { rng.below(4096) } as usize;
            bytes[block * 4096 + byte] = rng.below(256) as u8;
        }
        let device = MemoryDevice::from_bytes(bytes);
        let result = block_on(async {
            let reader = Reader::open(&device).await?;
            let journals = Journal::all(&reader).await?;
            recover(&reader, &journals[0], NOW).await
        });
        refused += u32::from(result.is_err());
    }
    assert!(15 < refused && refused < 150, "{refused}");
}

/// For images that a kernel left behind: `QUORATE_GFS_DIRTY=IMAGE QUORATE_GFS_REPLAYED=IMAGE`, the second replayed by it.
#[test]
fn a_kernels_journal_is_replayed_as_the_kernel_does() {
    let (Ok(dirty), Ok(replayed)) =
        (std::env::var("QUORATE_GFS_DIRTY"), std::env::var("QUORATE_GFS_REPLAYED"))
    else {
        return;
    };
    let device = MemoryDevice::from_bytes(std::fs::read(dirty).unwrap());
    let theirs = std::fs::read(replayed).unwrap();
    let reader = block_on(Reader::open(&device)).unwrap();
    let size = reader.size().usize();
    let journals = block_on(Journal::all(&reader)).unwrap();
    let mut rings = std::collections::BTreeSet::new();
    for journal in &journals {
        let done = block_on(recover(&reader, journal, NOW)).unwrap();
        eprintln!("{done:?}");
        rings.extend((0..journal.blocks()).map(|index| journal.block(index).0 as usize));
    }
    // Whoever looked at the kernel's has moved times of last access, and left readdir's marks in unused bytes.
    let masked = |bytes: &[u8], block: usize| {
        let mut bytes = bytes[block * size..][..size].to_vec();
        if MetaHeader::expect(&bytes, MetaType::Dinode).is_ok() {
            bytes[72..80].fill(0);
            bytes[176..180].fill(0);
            if bytes[42] & 0xf0 == 0x40 {
                bytes.truncate(DINODE_BYTES);
            }
        }
        bytes
    };
    let ours = device.bytes();
    let differing: Vec<usize> = (0..ours.len() / size)
        .filter(|block| !rings.contains(block) && masked(&ours, *block) != masked(&theirs, *block))
        .collect();
    assert!(differing.is_empty(), "{differing:?}");
}
