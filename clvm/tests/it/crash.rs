//! A crash after every step of a commit: what is found afterwards is the old group or the new one, and the next change
//! brings all areas up.

use crate::support::{Fuse, Memory, block_on, fused, manager, memory, named};
use quorate_clvm::{MdaHeader, VolumeError, VolumeGroup, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::MemoryDevice;
use quorate_membership::Rng;
use std::collections::BTreeSet;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

async fn group_of(images: &[Memory]) -> VolumeGroup {
    let devices = vec![named("a", &images[0]), named("b", &images[1])];
    let node = manager(&LocalManager::new(), devices).await;
    let group = node.group("vg").await.expect("a group is found after a crash");
    // The next change makes all areas alike, whatever the crash left.
    let next = node.create_volume("vg", "after", MIB).await.expect("changed");
    assert_eq!(next.seqno, group.seqno + 1);
    for image in images {
        let alone = manager(&LocalManager::new(), vec![named("x", image)]).await;
        assert_eq!(alone.group("vg").await.expect("found").seqno, next.seqno, "every area is brought up");
    }
    VolumeGroup::clone(&group)
}

#[test]
fn every_step_of_a_commit_may_be_the_last() {
    block_on(async {
        let (mut old_seen, mut new_seen, mut steps) = (0, 0, 0);
        // Every step is a run of its own, and the texts of all runs lie at the same places.
        let mut announced_seen = BTreeSet::new();
        loop {
            let disks = [memory(16), memory(16)];
            let locks = LocalManager::new();
            let setup = manager(&locks, vec![named("a", &disks[0]), named("b", &disks[1])]).await;
            for device in ["a", "b"] {
                setup.create_pv(device, false).await.expect("a physical volume");
            }
            setup.create_group("vg", &["a".to_owned(), "b".to_owned()], MIB).await.expect("a group");
            for i in 0..3 {
                setup.create_volume("vg", &format!("lv{i}"), MIB).await.expect("made");
            }
            let old = VolumeGroup::clone(&*setup.group("vg").await.expect("found"));

            let fuse = Fuse::new(steps);
            let node =
                manager(&locks, vec![fused("a", &disks[0], &fuse), fused("b", &disks[1], &fuse)]).await;
            let header =
                |d: &Memory| MdaHeader::decode(4096, &d.0.bytes()[4096..4608]).expect("a whole header");
            let before = disks.each_ref().map(header);
            let result = node.create_volume("vg", "new", MIB).await;
            // Slot 1 announces the text that slot 0 will have; only in between are the two different from before.
            for (before, now) in before.iter().zip(disks.each_ref().map(header)) {
                let is_new = now.committed != before.committed;
                assert!(
                    !is_new || now.precommitted.is_none(),
                    "slot 1 is empty after the commit (step {steps})"
                );
                if let Some(announced) = now.precommitted {
                    assert_ne!(Some(announced), before.committed, "step {steps}");
                    announced_seen.insert(announced.offset);
                }
                if is_new {
                    let new = now.committed.expect("there is a group").offset;
                    assert!(
                        announced_seen.contains(&new),
                        "committed without being announced (step {steps})"
                    );
                }
            }
            let has_new = |g: &VolumeGroup| g.lv("new").is_some();
            for seed in 0..8 {
                let mut rng = Rng::new(steps * 100 + seed);
                let images: Vec<Memory> = disks
                    .iter()
                    .map(|d| {
                        Memory(Arc::new(MemoryDevice::from_bytes(
                            d.0.crashed((seed != 0).then_some(&mut rng)),
                        )))
                    })
                    .collect();
                let found = group_of(&images).await;
                if has_new(&found) {
                    assert_eq!(found.seqno, old.seqno + 1);
                    new_seen += 1;
                } else {
                    assert_eq!(found, old);
                    old_seen += 1;
                }
                match &result {
                    Ok(_) => assert!(has_new(&found), "an answered change is never lost (step {steps})"),
                    Err(VolumeError::Store(_)) => {
                        assert!(!has_new(&found), "a change that was not made never shows up (step {steps})");
                    }
                    Err(VolumeError::Unknown { .. }) => {}
                    Err(other) => panic!("step {steps}: {other}"),
                }
            }
            if 0 < fuse.left() {
                break;
            }
            steps += 1;
        }
        // Two areas: three writes each and three rounds of flushes.
        assert_eq!(steps, 12 + 1, "the last round had a step left");
        assert!(0 < old_seen && 0 < new_seen);
    });
}
