//! What the locks are for: work of two nodes is mixed at every request to a device, a node dies in the middle of a change,
//! a volume cannot be given up before its data is safe.

use crate::support::{Fuse, block_on, fused, lockspace, manager, memory, named, yielding};
use quorate_clvm::{Activation, ClusterVolumes, VolumeError, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{Completion, Flags, LockCallbacks, LockId, LockName, LockRequest, Mode};
use quorate_gnbd::{BlockDevice, Buf, WriteFlags};
use std::sync::{Arc, Mutex};

const MIB: u64 = 1 << 20;

/// Three nodes with one device of so many MiB, on which the first has made the group `vg`.
async fn three_nodes(mib: u64) -> Vec<ClusterVolumes> {
    let (disk, mut nodes) = (memory(mib), Vec::new());
    for lock in &LocalManager::shared(3) {
        nodes.push(manager(lock, vec![yielding("a", &disk)]).await);
    }
    nodes[0].create_pv("a", false).await.expect("a physical volume");
    nodes[0].create_group("vg", &["a".to_owned()], MIB).await.expect("a group");
    nodes
}

/// Without the group's lock each node would write its own change over the other's.
#[test]
fn changes_that_meet_at_every_request_are_all_made() {
    block_on(async {
        let nodes = three_nodes(64).await;
        let work = async |node: &ClusterVolumes, tag: &str| {
            for i in 0..4 {
                node.create_volume("vg", &format!("{tag}{i}"), MIB).await.expect("made");
            }
            node.extend_volume("vg", &format!("{tag}0"), MIB).await.expect("extended");
            node.remove_volume("vg", &format!("{tag}1")).await.expect("removed");
        };
        tokio::join!(work(&nodes[0], "x"), work(&nodes[1], "y"), work(&nodes[2], "z"));
        let group = nodes[0].group("vg").await.expect("seen");
        // One for the group, six changes of each node.
        assert_eq!((group.seqno, group.lvs.len(), group.free_extents()), (1 + 18, 9, 63 - 12));
    });
}

/// Without the lock over all groups two nodes would take one physical volume into two groups.
#[test]
fn two_nodes_that_take_one_physical_volume_at_once_get_one_group() {
    block_on(async {
        let disk = memory(16);
        let locks = LocalManager::shared(2);
        let one = manager(&locks[0], vec![yielding("a", &disk)]).await;
        let two = manager(&locks[1], vec![yielding("a", &disk)]).await;
        let pvs = tokio::join!(one.create_pv("a", false), two.create_pv("a", false));
        assert!(pvs.0.is_ok() != pvs.1.is_ok(), "{pvs:?}");
        let devices = ["a".to_owned()];
        let groups = tokio::join!(one.create_group("x", &devices, MIB), two.create_group("y", &devices, MIB));
        assert!(groups.0.is_ok() != groups.1.is_ok(), "{groups:?}");
        assert_eq!(one.groups().await.expect("listed").groups.len(), 1);
    });
}

/// A removal and an activation of one volume at once, while a third node makes both wait for the group's lock in every
/// order: either it is gone, or it is active; never both.
#[test]
fn a_volume_is_not_removed_under_a_node_that_activates_it() {
    block_on(async {
        let nodes = three_nodes(16).await;
        let (mut removals, mut activations) = (0, 0);
        for turn in 0..24 {
            nodes[0].create_volume("vg", "lv", MIB).await.expect("made");
            let wait = async |turns: u32| {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            };
            let remove = async {
                wait(12).await;
                nodes[0].remove_volume("vg", "lv").await
            };
            let activate = async {
                wait(turn).await;
                nodes[1].activate("vg", "lv", Activation::Exclusive).await
            };
            let third = async {
                nodes[2].create_volume("vg", "other", MIB).await.expect("made");
                nodes[2].remove_volume("vg", "other").await.expect("removed");
            };
            let (removed, active, ()) = tokio::join!(remove, activate, third);
            assert!(removed.is_ok() != active.is_ok(), "turn {turn}: {removed:?} and {active:?}");
            if let Ok(active) = active {
                activations += 1;
                active.deactivate().await.expect("ended");
                nodes[0].remove_volume("vg", "lv").await.expect("removed");
            } else {
                removals += 1;
            }
        }
        assert!(0 < removals && 0 < activations, "{removals} and {activations}");
    });
}

#[derive(Default)]
struct Told(Mutex<Vec<Completion>>);

impl LockCallbacks for Told {
    fn completion(&self, _: LockId, completion: Completion) {
        self.0.lock().expect("not poisoned").push(completion);
    }
    fn blocking(&self, _: LockId, _: Mode) {}
}

/// A node that died between its commit and the value block left metadata behind that no value tells of.
#[test]
fn after_a_death_in_the_middle_of_a_change_the_disks_are_read() {
    block_on(async {
        let disk = memory(16);
        let locks = LocalManager::shared(2);
        let two = manager(&locks[1], vec![named("a", &disk)]).await;
        two.create_pv("a", false).await.expect("a physical volume");
        two.create_group("vg", &["a".to_owned()], MIB).await.expect("a group");
        assert_eq!(two.group("vg").await.expect("cached").seqno, 1);
        // As a node in the middle of a change: the group's lock is EX, and the disk has the next metadata.
        let space = lockspace(&locks[0]).await;
        let told = Arc::new(Told::default());
        let name = LockName::new(b"V:vg").expect("a name");
        let callbacks: Arc<dyn LockCallbacks> = Arc::clone(&told) as Arc<dyn LockCallbacks>;
        space.request(LockRequest::new(name, Mode::EX).flags(Flags::VALBLK), callbacks).expect("asked");
        assert!(matches!(told.0.lock().expect("not poisoned")[..], [Completion::Granted(_)]));
        let dying = manager(&LocalManager::new(), vec![named("a", &disk)]).await;
        dying.create_volume("vg", "lv", MIB).await.expect("made");
        locks[0].crash();
        let group = two.group("vg").await.expect("seen");
        assert_eq!((group.seqno, group.lvs.len()), (2, 1), "the cache is not believed");
        assert_eq!(two.create_volume("vg", "more", MIB).await.expect("made").seqno, 3);
    });
}

/// R12: no activation ends before what was written under it is durable.
#[test]
fn a_volume_is_given_up_after_a_flush_and_not_if_that_fails() {
    block_on(async {
        let disk = memory(16);
        let locks = LocalManager::shared(2);
        let fuse = Fuse::new(1000);
        let one = manager(&locks[0], vec![fused("a", &disk, &fuse)]).await;
        let two = manager(&locks[1], vec![named("a", &disk)]).await;
        one.create_pv("a", false).await.expect("a physical volume");
        one.create_group("vg", &["a".to_owned()], MIB).await.expect("a group");
        one.create_volume("vg", "lv", MIB).await.expect("made");
        for how in [Activation::Exclusive, Activation::Shared] {
            let active = one.activate("vg", "lv", how).await.expect("active");
            let byte = how as u8 + 1;
            let data = Buf::copy_of(&[byte; 4096]);
            active.device().write(0, data, WriteFlags::default()).await.expect("written");
            let left = fuse.left();
            fuse.set(0);
            let error = active.deactivate().await.unwrap_err();
            assert!(matches!(error, VolumeError::Flush { .. }), "{error}");
            let error = two.activate("vg", "lv", Activation::Exclusive).await.unwrap_err();
            assert_eq!(error, VolumeError::Active("vg/lv".to_owned()), "it is still active");
            fuse.set(left);
            active.deactivate().await.expect("ended");
            assert!(disk.0.crashed(None)[MIB as usize..][..4096].iter().all(|b| *b == byte), "durable");
            two.activate("vg", "lv", Activation::Exclusive)
                .await
                .expect("free")
                .deactivate()
                .await
                .expect("ended");
        }
    });
}
