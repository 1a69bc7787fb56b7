//! Reserved blocks, holes and zeroed ranges, against a vector of bytes; fsck.gfs2 has the last word.

use super::harness::{User, cluster, cred, judge, run};
use quorate_gfs::FsError;
use quorate_gfs::face::{FallocateMode, Filesystem, Seek, SetAttr};
use quorate_membership::Rng;
use quorate_membership::sim::seeds;

const KEEP: FallocateMode = FallocateMode { keep_size: true, punch_hole: false, zero_range: false };
const GROW: FallocateMode = FallocateMode { keep_size: false, punch_hole: false, zero_range: false };
const PUNCH: FallocateMode = FallocateMode { keep_size: true, punch_hole: true, zero_range: false };
const ZERO: FallocateMode = FallocateMode { keep_size: false, punch_hole: false, zero_range: true };
const ZERO_KEEP: FallocateMode = FallocateMode { keep_size: true, punch_hole: false, zero_range: true };

#[test]
fn random_ranges_read_as_a_vector_does() {
    for seed in seeds(0..4) {
        run(async {
            let mut rng = Rng::new(seed);
            let (disk, nodes) = cluster(96 << 20, 2).await;
            let users = [User(&nodes[0].gfs), User(&nodes[1].gfs)];
            let root = users[0].root();
            let made = users[0].create(root, "file").await.unwrap();
            assert_eq!(users[1].walk("file").await, Ok(made));
            let mut model: Vec<u8> = Vec::new();
            for step in 0..120 {
                let user = &users[rng.below(2) as usize];
                // Now and then far out, so that the tree grows and holes span pointer blocks.
                let reach = if rng.chance_ppm(100_000) { 6_000_000 } else { 60_000 };
                let (at, len) = (rng.below(reach), 1 + rng.below(40_000));
                let (from, to) = (at as usize, (at + len) as usize);
                let mode = *rng.pick(&[KEEP, GROW, PUNCH, ZERO, ZERO_KEEP]).unwrap();
                match rng.below(8) {
                    0..=2 => {
                        let data = vec![1 + (step % 250) as u8; len as usize];
                        user.write(made, at, &data).await.unwrap();
                        model.resize(model.len().max(to), 0);
                        model[from..to].fill(data[0]);
                    }
                    3 => {
                        let set = SetAttr { size: Some(at), ..SetAttr::default() };
                        user.0.setattr(cred(), made, set).await.unwrap();
                        model.resize(from, 0);
                    }
                    _ => {
                        user.0.fallocate(made, at, len, mode).await.unwrap();
                        if !mode.keep_size {
                            model.resize(model.len().max(to), 0);
                        }
                        if mode.punch_hole || mode.zero_range {
                            let to = to.min(model.len());
                            model[from.min(to)..to].fill(0);
                        }
                    }
                }
                let reader = &users[rng.below(2) as usize];
                assert!(reader.read(made).await.unwrap() == model, "seed {seed}, step {step}, {mode:?}");
                // What is not zero is data, wherever holes are said to be.
                if let Some(first) = model.iter().position(|b| *b != 0) {
                    let data = reader.0.lseek(made, 0, Seek::Data).await.unwrap();
                    assert!(data <= first as u64, "seed {seed}, step {step}");
                    let hole = reader.0.lseek(made, first as u64, Seek::Hole).await.unwrap();
                    let next = hole.min(model.len() as u64) as usize;
                    assert!(first < next);
                }
            }
            for node in &nodes {
                node.gfs.unmount().await.unwrap();
            }
            judge(&format!("fallocate-{seed}"), &disk.memory.bytes());
        });
    }
}

#[test]
fn a_hole_gives_blocks_back_and_a_reservation_takes_them() {
    run(async {
        let (disk, nodes) = cluster(64 << 20, 1).await;
        let user = User(&nodes[0].gfs);
        let ino = user.create(user.root(), "file").await.unwrap();
        let blocks = async || user.stat(ino).await.unwrap().attr.blocks;
        user.0.fallocate(ino, 0, 8 << 20, KEEP).await.unwrap();
        let reserved = blocks().await;
        assert!(8 << 20 <= reserved * 512, "{reserved} blocks of 512");
        assert_eq!(user.stat(ino).await.unwrap().attr.size, 0);
        user.write(ino, 0, &vec![7; 8 << 20]).await.unwrap();
        assert_eq!(blocks().await, reserved, "what is written was reserved");
        user.0.fallocate(ino, 100, 4 << 20, PUNCH).await.unwrap();
        // 1,023 whole blocks, and the pointer block that had nothing else.
        assert_eq!(blocks().await, reserved - (1_023 + 1) * 8);
        assert_eq!(user.0.lseek(ino, 0, Seek::Hole).await, Ok(4096));
        assert_eq!(user.0.lseek(ino, 4096, Seek::Data).await, Ok(4 << 20));
        // More than there is: an error, and nothing is corrupt.
        assert_eq!(user.0.fallocate(ino, 0, 200 << 20, KEEP).await, Err(FsError::NoSpace));
        user.0.fallocate(ino, 4 << 20, 300 << 20, PUNCH).await.unwrap();
        assert_eq!(user.read(ino).await.unwrap()[4 << 20..], vec![0; 4 << 20]);
        let unsupported = FallocateMode { punch_hole: true, ..FallocateMode::default() };
        assert_eq!(user.0.fallocate(ino, 0, 1, unsupported).await, Err(FsError::Unsupported));
        nodes[0].gfs.unmount().await.unwrap();
        judge("reservation", &disk.memory.bytes());
    });
}
