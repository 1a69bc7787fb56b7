//! Our mkfs against mkfs.gfs2, block by block, and against fsck.gfs2.

use crate::tools::{TempDir, block_on, fsck_gfs2, mkfs_gfs2, sparse, tool};
use quorate_gfs::format::{BlockSize, LogHeader, MetaHeader, MetaType, Timestamp};
use quorate_gfs::mkfs::{MkfsError, MkfsOptions, default_journal_bytes, mkfs};
use quorate_gnbd::{FileDevice, FileOptions, MemoryDevice};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn make(path: &Path, bytes: u64, options: &MkfsOptions) {
    sparse(path, bytes);
    let device = FileDevice::open(path, FileOptions::server()).unwrap();
    block_on(mkfs(&device, options)).unwrap();
}

/// A copy of a block without what may differ: uuid, times, sequences and their sums, garbage in rindex.
fn masked(mut block: Vec<u8>) -> Vec<u8> {
    match MetaHeader::decode(&block).map(|header| header.kind) {
        Ok(MetaType::Superblock) => block[256..272].fill(0),
        Ok(MetaType::Dinode) => {
            block[72..96].fill(0);
            if block[132..136] == 1100_u32.to_be_bytes() {
                mask_rindex(&mut block[232..]);
            }
        }
        Ok(MetaType::LogHeader) => {
            let header = LogHeader::decode(&block).unwrap();
            let blank = LogHeader { sequence: 0, ..header };
            blank.encode(&mut block);
        }
        _ => {}
    }
    block
}

fn mask_rindex(payload: &mut [u8]) {
    for entry in payload.chunks_mut(96) {
        if 96 == entry.len() {
            entry[12..16].fill(0);
            entry[32..].fill(0);
        }
    }
}

fn compare(ours: &Path, theirs: &Path, block_bytes: usize) {
    let (ours, theirs) = (File::open(ours).unwrap(), File::open(theirs).unwrap());
    let len = theirs.metadata().unwrap().len();
    let chunk = 1 << 20;
    let (mut a, mut b) = (vec![0; chunk], vec![0; chunk]);
    let mut differing = Vec::new();
    for offset in (0..len).step_by(chunk) {
        ours.read_exact_at(&mut a, offset).unwrap();
        theirs.read_exact_at(&mut b, offset).unwrap();
        if a == b {
            continue;
        }
        for at in (0..chunk).step_by(block_bytes) {
            let range = at..at + block_bytes;
            if masked(a[range.clone()].to_vec()) != masked(b[range].to_vec()) {
                differing.push((offset as usize + at) / block_bytes);
            }
        }
    }
    assert!(
        differing.is_empty(),
        "{} blocks differ: {:?}",
        differing.len(),
        &differing[..differing.len().min(20)]
    );
}

fn options(journals: u32, block_bytes: u32) -> MkfsOptions {
    let mut options = MkfsOptions::new(journals);
    options.uuid = [0x5a; 16];
    options.first_sequence = 1655;
    options.now = Timestamp { sec: 1_790_000_000, nsec: 0 };
    options.block_size = BlockSize::new(block_bytes).unwrap();
    options
}

#[test]
fn images_are_those_of_mkfs_gfs2() {
    let test = "images_are_those_of_mkfs_gfs2";
    let (Some(mkfs_tool), Some(fsck)) = (tool(test, "mkfs.gfs2"), tool(test, "fsck.gfs2")) else { return };
    for (mebibytes, journals, block) in [
        (256, 2, 4096),
        (16, 1, 4096),
        (300, 1, 4096),
        (300, 3, 4096),
        (600, 4, 4096),
        (1024, 3, 4096),
        (700, 12, 4096),
        (64, 1, 1024),
        (100, 2, 2048),
        (100, 2, 1024),
    ] {
        let dir = TempDir::new();
        let (ours, theirs) = (dir.path("ours"), dir.path("theirs"));
        make(&ours, mebibytes << 20, &options(journals, block));
        sparse(&theirs, mebibytes << 20);
        let (j, b) = (journals.to_string(), block.to_string());
        mkfs_gfs2(&mkfs_tool, &theirs, &["-j", &j, "-J", "8", "-b", &b, "-p", "lock_nolock"]);
        eprintln!("{mebibytes} MiB, {journals} journals, blocks of {block}");
        compare(&ours, &theirs, block as usize);
        let (code, text) = fsck_gfs2(&fsck, &ours);
        assert_eq!(code, 0, "{text}");
    }
}

#[test]
fn a_large_image_with_default_journals_is_clean() {
    let test = "a_large_image_with_default_journals_is_clean";
    let (Some(mkfs_tool), Some(fsck)) = (tool(test, "mkfs.gfs2"), tool(test, "fsck.gfs2")) else { return };
    let dir = TempDir::new();
    let (ours, theirs) = (dir.path("ours"), dir.path("theirs"));
    let bytes = 13 << 30;
    let mut options = options(3, 4096);
    options.journal_bytes = default_journal_bytes(bytes, 3);
    (options.lock_proto, options.lock_table) = ("lock_dlm".into(), "alpha:web".into());
    make(&ours, bytes, &options);
    sparse(&theirs, bytes);
    mkfs_gfs2(&mkfs_tool, &theirs, &["-j", "3", "-p", "lock_dlm", "-t", "alpha:web"]);
    let (ours_file, theirs_file) = (File::open(&ours).unwrap(), File::open(&theirs).unwrap());
    let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
    // Superblock and all resource group headers, found by the distance that each names.
    let mut at = 17_u64;
    loop {
        ours_file.read_exact_at(&mut a, at * 4096).unwrap();
        theirs_file.read_exact_at(&mut b, at * 4096).unwrap();
        assert_eq!(a, b, "block {at}");
        match u32::from_be_bytes(a[36..40].try_into().unwrap()) {
            0 => break,
            skip => at += u64::from(skip),
        }
    }
    let (code, text) = fsck_gfs2(&fsck, &ours);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let device = MemoryDevice::new(10 << 20);
    let before = device.bytes();
    let error = block_on(mkfs(&device, &options(2, 4096))).unwrap_err();
    assert!(matches!(error, MkfsError::TooSmall { device_bytes: 10_485_760, .. }), "{error}");
    assert!(error.to_string().contains("make it larger"));
    type Change = fn(&mut MkfsOptions);
    let cases: [Change; 8] = [
        |o| o.journals = 0,
        |o| o.journal_bytes = 4 << 20,
        |o| o.lock_proto = "lock_gulm".into(),
        |o| (o.lock_proto, o.lock_table) = ("lock_dlm".into(), "noname".into()),
        |o| (o.lock_proto, o.lock_table) = ("lock_dlm".into(), format!("a:{}", "x".repeat(31))),
        |o| o.rgrp_bytes = 1,
        |o| o.block_size = BlockSize::new(512).unwrap(),
        |o| (o.journals, o.block_size) = (5, BlockSize::new(1024).unwrap()),
    ];
    for change in cases {
        let mut options = options(1, 4096);
        change(&mut options);
        assert!(block_on(mkfs(&device, &options)).is_err());
    }
    assert_eq!(device.bytes(), before);
}
