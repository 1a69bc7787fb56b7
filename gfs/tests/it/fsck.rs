//! Our checker and fsck.gfs2: agreed on good images, and each finds what is planted.

use crate::fs::harness::{User, cluster, cred, run};
use crate::tools::{TempDir, block_on, fsck_gfs2, tool};
use quorate_gfs::face::{Filesystem, NodeKind, XattrFlags};
use quorate_gfs::format::{
    BlockNo, BlockState, DINODE_BYTES, Dinode, EaRecords, EaValue, Inum, LEAF_BYTES, Leaf, META_HEADER_BYTES,
    RgrpHeader, RindexEntry, StatfsChange, find_dirent, pointer, remove_dirent, replace_dirent, set_pointer,
    set_state,
};
use quorate_gfs::fsck::{FsckReport, Problem, fsck};
use quorate_gfs::reader::Reader;
use quorate_gnbd::MemoryDevice;
use quorate_membership::Rng;

const SIZE: u64 = 24 << 20;
const BLOCK: usize = 4096;

/// A filesystem with files of several heights, a linear and a hashed directory, links and attributes.
fn populated() -> Vec<u8> {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let user = User(&nodes[0].gfs);
        let root = user.root();
        let file = user.create(root, "file").await.unwrap();
        user.write(file, 0, &[7; 20_000]).await.unwrap();
        let big = user.create(root, "big").await.unwrap();
        user.write(big, 3_000_000, &[8; 5000]).await.unwrap();
        user.0.link(file, root, "hard".into()).await.unwrap();
        user.0.symlink(cred(), root, "link".into(), "file".into()).await.unwrap();
        user.0.mknod(cred(), root, "fifo".into(), 0o600, NodeKind::Fifo).await.unwrap();
        let dir = user.mkdir(root, "dir").await.unwrap();
        let sub = user.mkdir(dir, "sub").await.unwrap();
        user.create(sub, "deep").await.unwrap();
        let hashed = user.mkdir(root, "hashed").await.unwrap();
        for i in 0..300 {
            user.create(hashed, &format!("some-name-{i}")).await.unwrap();
        }
        for (name, len) in [("user.small", 10), ("user.big", 9000)] {
            user.0.setxattr(file, name.into(), vec![1; len], XattrFlags::default()).await.unwrap();
        }
        nodes[0].gfs.unmount().await.unwrap();
        disk.memory.bytes()
    })
}

fn check(bytes: &[u8]) -> FsckReport {
    block_on(fsck(MemoryDevice::from_bytes(bytes.to_vec()))).unwrap()
}

/// An image to be damaged.
struct Patient {
    bytes: Vec<u8>,
}

impl Patient {
    fn block(&mut self, at: BlockNo) -> &mut [u8] {
        &mut self.bytes[at.0 as usize * BLOCK..][..BLOCK]
    }

    /// The block of the inode with this path; a leading `%` begins at the master directory.
    fn find(&self, path: &str) -> BlockNo {
        let reader = block_on(Reader::open(MemoryDevice::from_bytes(self.bytes.clone()))).unwrap();
        let superblock = reader.superblock();
        let (mut at, path) = match path.strip_prefix('%') {
            Some(path) => (superblock.master.addr, path),
            None => (superblock.root.addr, path),
        };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let dir = block_on(reader.inode(at)).unwrap();
            at = block_on(reader.lookup(&dir, name.as_bytes())).unwrap().unwrap().0.addr;
        }
        at
    }

    fn dinode(&mut self, path: &str, change: impl FnOnce(&mut Dinode)) {
        let at = self.find(path);
        let mut dinode = Dinode::decode(self.block(at)).unwrap();
        change(&mut dinode);
        dinode.encode(self.block(at));
    }

    /// The last resource group, where everything but the journal is.
    fn rgrp(&self) -> RindexEntry {
        let at = self.find("%rindex").0 as usize * BLOCK + DINODE_BYTES;
        RindexEntry::decode(&self.bytes[at + 96..]).unwrap()
    }

    fn rgrp_header(&mut self, change: impl FnOnce(&mut RgrpHeader)) {
        let at = self.rgrp().addr;
        let mut header = RgrpHeader::decode(self.block(at)).unwrap();
        change(&mut header);
        header.encode(self.block(at));
    }

    fn state(&mut self, block: BlockNo, state: BlockState) {
        let entry = self.rgrp();
        let (bitmap, index) = entry.locate(quorate_gfs::format::BlockSize::B4096, block).unwrap();
        let at = BlockNo(entry.addr.0 + u64::from(bitmap.block));
        set_state(&mut self.block(at)[bitmap.start..], index, state);
    }

    /// The first leaf of the hashed directory.
    fn leaf(&mut self) -> BlockNo {
        let at = self.find("hashed");
        pointer(self.block(at), 0).unwrap()
    }

    fn entry(&mut self, dir: &str, name: &str) -> (BlockNo, usize) {
        let at = self.find(dir);
        let offset = find_dirent(self.block(at), DINODE_BYTES, name.as_bytes()).unwrap().unwrap().offset;
        (at, offset)
    }
}

/// What is damaged, how, whether ours finds it as it should, and whether fsck.gfs2 (3.5) complains too: `-n` lets a wrong
/// ".." pass.
type Case = (&'static str, fn(&mut Patient), fn(&Problem) -> bool, bool);

#[rustfmt::skip]
const CASES: &[Case] = &[
    ("a leaked block", |p| { let free = BlockNo(p.rgrp().end().0 - 3); p.state(free, BlockState::Used); p.rgrp_header(|h| h.free -= 1); },
        |x| matches!(x, Problem::Leak { count: 1, .. }), true),
    ("a used block marked free", |p| { let at = p.find("file"); let data = pointer(p.block(at), 0).unwrap(); p.state(data, BlockState::Free); p.rgrp_header(|h| h.free += 1); },
        |x| matches!(x, Problem::State { state: BlockState::Free, .. }), true),
    ("a dinode marked used", |p| { let at = p.find("fifo"); p.state(at, BlockState::Used); p.rgrp_header(|h| h.dinodes -= 1); },
        |x| matches!(x, Problem::Entry { what: "it names no inode", .. }), true),
    ("an orphan", |p| { let (at, offset) = p.entry("", "fifo"); let inode = p.find("fifo"); remove_dirent(p.block(at), DINODE_BYTES, offset).unwrap();
            p.dinode("", |d| d.entries -= 1); p.state(inode, BlockState::Unlinked);
            let mut dinode = Dinode::decode(p.block(inode)).unwrap(); dinode.nlink = 0; dinode.encode(p.block(inode)); },
        |x| matches!(x, Problem::Orphan { .. }), true),
    ("a count of free blocks", |p| p.rgrp_header(|h| h.free += 5), |x| matches!(x, Problem::RgrpCount { what: "free blocks", .. }), true),
    ("a count of dinodes", |p| p.rgrp_header(|h| h.dinodes += 5), |x| matches!(x, Problem::RgrpCount { what: "dinodes", .. }), true),
    ("a checksum of a resource group", |p| { let at = p.rgrp().addr; p.block(at)[100] = 1; }, |x| matches!(x, Problem::Rgrp { .. }), true),
    ("a bitmap block without header", |p| { let at = BlockNo(p.rgrp().addr.0); p.block(at)[4..8].fill(0); }, |x| matches!(x, Problem::Rgrp { .. }), true),
    ("a block shared by two files", |p| { let (a, b) = (p.find("file"), p.find("big")); let data = pointer(p.block(a), 0).unwrap(); set_pointer(p.block(b), 5, data); },
        |x| matches!(x, Problem::Shared { .. } | Problem::Broken { .. }), true),
    ("a pointer outside", |p| { let at = p.find("file"); set_pointer(p.block(at), 1, BlockNo(1 << 40)); }, |x| matches!(x, Problem::Pointer { .. }), true),
    ("a number of blocks", |p| p.dinode("file", |d| d.blocks += 1), |x| matches!(x, Problem::Blocks { .. }), true),
    ("an inode's own number", |p| { let at = p.find("file"); p.block(at)[39] ^= 1; }, |x| matches!(x, Problem::Broken { .. }), true),
    ("a mode of no type", |p| p.dinode("file", |d| d.mode &= 0o7777), |x| matches!(x, Problem::Broken { .. }), true),
    ("a formal number", |p| p.dinode("file", |d| d.inum.formal += 1), |x| matches!(x, Problem::Entry { .. }), true),
    ("links of a file", |p| p.dinode("file", |d| d.nlink = 7), |x| matches!(x, Problem::Nlink { stored: 7, counted: 2, .. }), true),
    ("links of a directory", |p| p.dinode("dir", |d| d.nlink = 2), |x| matches!(x, Problem::Nlink { stored: 2, counted: 3, .. }), true),
    ("entries of a directory", |p| p.dinode("dir", |d| d.entries += 1), |x| matches!(x, Problem::Directory { .. }), true),
    ("entries of a leaf", |p| { let at = p.leaf(); let mut leaf = Leaf::decode(p.block(at)).unwrap(); leaf.entries += 1; leaf.encode(p.block(at)); },
        |x| matches!(x, Problem::Directory { .. }), true),
    ("depth of a leaf", |p| { let at = p.leaf(); let mut leaf = Leaf::decode(p.block(at)).unwrap(); leaf.depth += 1; leaf.encode(p.block(at)); },
        |x| matches!(x, Problem::Directory { .. }), true),
    ("a leaf that is none", |p| { let at = p.leaf(); p.block(at)[7] = 5; }, |x| matches!(x, Problem::Broken { .. } | Problem::Directory { .. }), true),
    ("a hole in the hash table", |p| { let at = p.find("hashed"); set_pointer(p.block(at), 200, BlockNo::NONE); }, |x| matches!(x, Problem::Directory { .. }), true),
    ("a wrong hash", |p| { let (at, offset) = p.entry("", "file"); p.block(at)[offset + 16] ^= 1; }, |x| matches!(x, Problem::Entry { what: "its hash is not that of its name", .. }), true),
    ("a wrong type", |p| { let (at, offset) = p.entry("", "file"); p.block(at)[offset + 25] = 4; }, |x| matches!(x, Problem::Entry { what: "its type is not that of the inode", .. }), true),
    ("a record length", |p| { let (at, offset) = p.entry("", "file"); p.block(at)[offset + 21] = 7; }, |x| matches!(x, Problem::Directory { .. }), true),
    ("a name of nothing", |p| { let (at, offset) = p.entry("", "fifo"); let free = BlockNo(p.rgrp().end().0 - 3);
            replace_dirent(p.block(at), offset, Inum { formal: 9, addr: free }, quorate_gfs::format::FileType::Fifo, 0); },
        |x| matches!(x, Problem::Entry { what: "it names no inode", .. }), true),
    ("a file without a name", |p| { let (at, offset) = p.entry("", "fifo"); remove_dirent(p.block(at), DINODE_BYTES, offset).unwrap(); p.dinode("", |d| d.entries -= 1); },
        |x| matches!(x, Problem::Unconnected { .. }), true),
    ("a directory without a name", |p| { let (at, offset) = p.entry("dir", "sub"); remove_dirent(p.block(at), DINODE_BYTES, offset).unwrap(); p.dinode("dir", |d| d.entries -= 1); },
        |x| matches!(x, Problem::Unconnected { .. }), true),
    ("a parent that is another", |p| { let root = p.find(""); let formal = Dinode::decode(p.block(root)).unwrap().inum; let (at, offset) = p.entry("dir/sub", "..");
            replace_dirent(p.block(at), offset, formal, quorate_gfs::format::FileType::Directory, 0); },
        |x| matches!(x, Problem::Directory { .. }), false),
    ("no entry for itself", |p| { let (at, offset) = p.entry("dir/sub", "."); remove_dirent(p.block(at), DINODE_BYTES, offset).unwrap(); p.dinode("dir/sub", |d| d.entries -= 1); },
        |x| matches!(x, Problem::Directory { .. }), true),
    ("an attribute of no type", |p| { let at = eattr(p); p.block(at)[META_HEADER_BYTES + 9] = 9; }, |x| matches!(x, Problem::Broken { .. }), true),
    ("a record length of an attribute", |p| { let at = eattr(p); p.block(at)[META_HEADER_BYTES..META_HEADER_BYTES + 4].fill(0); }, |x| matches!(x, Problem::Broken { .. }), true),
    ("a block of a long attribute", |p| { let at = ea_data(p); p.block(at)[7] = 1; }, |x| matches!(x, Problem::Broken { .. }), true),
    ("the counters", |p| { let at = p.find("%statfs"); StatfsChange { total: 1, free: 2, dinodes: 3 }.encode(&mut p.block(at)[DINODE_BYTES..]); },
        |x| matches!(x, Problem::Statfs { .. }), true),
    ("a size of a system file", |p| p.dinode("%per_node/statfs_change0", |d| d.size_bytes = 16), |x| matches!(x, Problem::System { .. }), true),
    ("a block of quota changes", |p| { let at = p.find("%per_node/quota_change0"); let block = pointer(p.block(at), 0).unwrap(); p.block(block)[7] = 1; },
        |x| matches!(x, Problem::System { .. }), true),
    ("a journal without headers", |p| { let ring = BlockNo(24); p.bytes[ring.0 as usize * BLOCK..][..2048 * BLOCK].fill(0); },
        |x| matches!(x, Problem::Journal { .. }), true),
];

fn eattr(p: &mut Patient) -> BlockNo {
    let at = p.find("file");
    Dinode::decode(p.block(at)).unwrap().eattr
}

fn ea_data(p: &mut Patient) -> BlockNo {
    let at = eattr(p);
    let records = EaRecords::new(p.block(at)).unwrap();
    let blocks = records.filter_map(|record| match record.unwrap().value {
        EaValue::Blocks { blocks, .. } => Some(blocks[0]),
        EaValue::Inline(_) => None,
    });
    blocks.last().unwrap()
}

#[test]
fn a_sound_image_is_clean_for_both() {
    let bytes = populated();
    let report = check(&bytes);
    assert_eq!(report.problems, []);
    assert!(report.inodes > 310 && report.directories == 7, "{report:?}");
    let Some(tool) = tool("a_sound_image_is_clean_for_both", "fsck.gfs2") else { return };
    let dir = TempDir::new();
    std::fs::write(dir.path("image"), &bytes).unwrap();
    let (code, text) = fsck_gfs2(&tool, &dir.path("image"));
    assert_eq!(code, 0, "{text}");
}

#[test]
fn every_planted_fault_is_found_by_both() {
    let sound = populated();
    let tool = tool("every_planted_fault_is_found_by_both", "fsck.gfs2");
    let dir = TempDir::new();
    let mut wrong = Vec::new();
    for (name, damage, expected, theirs) in CASES {
        let mut patient = Patient { bytes: sound.clone() };
        damage(&mut patient);
        assert!(patient.bytes != sound, "{name}");
        let report = check(&patient.bytes);
        if !report.problems.iter().any(expected) {
            wrong.push(format!("{name}: ours finds {:?}", report.problems));
        }
        if let (Some(tool), true) = (&tool, theirs) {
            std::fs::write(dir.path("image"), &patient.bytes).unwrap();
            let (code, _) = fsck_gfs2(tool, &dir.path("image"));
            if code == 0 {
                wrong.push(format!("{name}: fsck.gfs2 finds nothing, ours {:?}", report.problems));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn random_damage_never_panics() {
    let sound = populated();
    let device = MemoryDevice::from_bytes(sound.clone());
    let reader = block_on(Reader::open(&device)).unwrap();
    // Blocks with metadata outside the journal's ring.
    let blocks: Vec<usize> = (16..sound.len() / BLOCK)
        .filter(|at| !(30..2072).contains(at) && sound[at * BLOCK..].starts_with(&[1, 0x16, 0x19, 0x70]))
        .collect();
    assert!(blocks.len() > 300 && reader.device_blocks() > 0);
    let mut rng = Rng::new(11);
    let mut found = 0;
    for _ in 0..80 {
        let mut bytes = sound.clone();
        for _ in 0..=rng.below(8) {
            let block = blocks[rng.below(blocks.len() as u64) as usize];
            let near = if rng.chance_ppm(700_000) { LEAF_BYTES + DINODE_BYTES } else { BLOCK };
            bytes[block * BLOCK + rng.below(near as u64) as usize] = rng.below(256) as u8;
        }
        let result = block_on(fsck(MemoryDevice::from_bytes(bytes)));
        found += u32::from(!result.is_ok_and(|report| report.is_clean()));
    }
    assert!(20 < found, "{found}");
}

/// For an image that a kernel left behind: `QUORATE_GFS_CHECK=IMAGE` prints what is found.
#[test]
fn a_kernels_image_is_checked() {
    let Ok(path) = std::env::var("QUORATE_GFS_CHECK") else { return };
    let report = check(&std::fs::read(path).unwrap());
    eprintln!("{report:#?}");
    assert!(report.is_clean());
}
