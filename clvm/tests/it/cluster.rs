//! Two nodes on the same devices: changes seen at once, activations as locks.

use crate::support::{block_on, manager, memory, named};
use quorate_clvm::{Activation, ChangeError, ClusterVolumes, VolumeError, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::{BlockDevice, Buf, IoError, WriteFlags};

const MIB: u64 = 1 << 20;

async fn two_nodes() -> (ClusterVolumes, ClusterVolumes, Vec<LocalManager>) {
    let disks = [memory(64), memory(64)];
    let locks = LocalManager::shared(2);
    let devices = || vec![named("a", &disks[0]), named("b", &disks[1])];
    let (one, two) = (manager(&locks[0], devices()).await, manager(&locks[1], devices()).await);
    for device in ["a", "b"] {
        one.create_pv(device, false).await.expect("a physical volume");
    }
    one.create_group("vg", &["a".to_owned()], 4 * MIB).await.expect("a group");
    (one, two, locks)
}

#[test]
fn what_one_node_changes_the_other_sees_at_once() {
    block_on(async {
        let (one, two, _locks) = two_nodes().await;
        assert_eq!(two.group("vg").await.expect("seen").seqno, 1);
        one.create_volume("vg", "lv", 10 * MIB).await.expect("made");
        let seen = two.group("vg").await.expect("seen");
        assert_eq!((seen.seqno, seen.lv("lv").expect("there").extents()), (2, 3));
        two.extend_group("vg", &["b".to_owned()]).await.expect("extended");
        two.extend_volume("vg", "lv", 60 * MIB).await.expect("extended");
        let seen = one.group("vg").await.expect("seen");
        assert_eq!((seen.seqno, seen.pvs.len(), seen.lv("lv").expect("there").extents()), (4, 2, 18));
        // Nothing changed: the cache answers, and it says the same.
        assert_eq!(one.group("vg").await.expect("seen"), seen);
        let survey = two.groups().await.expect("listed");
        assert_eq!((survey.groups.len(), survey.problems.len()), (1, 0));
    });
}

#[test]
fn changes_of_both_nodes_at_once_are_all_made() {
    block_on(async {
        let (one, two, _locks) = two_nodes().await;
        let make = async |node: &ClusterVolumes, tag: &str| {
            for i in 0..5 {
                node.create_volume("vg", &format!("{tag}{i}"), MIB).await.expect("made");
            }
        };
        tokio::join!(make(&one, "x"), make(&two, "y"));
        let group = one.group("vg").await.expect("seen");
        assert_eq!((group.lvs.len(), group.seqno, group.free_extents()), (10, 11, 5));
    });
}

#[test]
fn an_exclusive_activation_is_alone_and_a_shared_one_is_not() {
    block_on(async {
        let (one, two, _locks) = two_nodes().await;
        one.create_volume("vg", "lv", 8 * MIB).await.expect("made");
        let active = one.activate("vg", "lv", Activation::Exclusive).await.expect("active");
        for how in [Activation::Exclusive, Activation::Shared, Activation::ReadOnly] {
            let error = two.activate("vg", "lv", how).await.unwrap_err();
            assert_eq!(error, VolumeError::Active("vg/lv".to_owned()));
        }
        assert_eq!(two.remove_volume("vg", "lv").await.unwrap_err(), VolumeError::Active("vg/lv".to_owned()));
        active.deactivate().await.expect("ended");
        active.deactivate().await.expect("the second time does nothing");
        let read = active.device().read(0, Buf::zeroed(512)).await;
        assert_eq!(read.unwrap_err(), IoError::Stopped);
        let shared = one.activate("vg", "lv", Activation::Shared).await.expect("active");
        let other = two.activate("vg", "lv", Activation::ReadOnly).await.expect("active");
        shared.device().write(4096, Buf::copy_of(&[7; 512]), WriteFlags::default()).await.expect("written");
        assert_eq!(&*other.device().read(4096, Buf::zeroed(512)).await.expect("read"), &[7; 512]);
        let refused = other.device().write(0, Buf::zeroed(512), WriteFlags::default()).await;
        assert_eq!(refused.unwrap_err(), IoError::ReadOnly);
        shared.deactivate().await.expect("ended");
        other.deactivate().await.expect("ended");
        two.remove_volume("vg", "lv").await.expect("removed");
        let error = one.activate("vg", "lv", Activation::Shared).await.unwrap_err();
        assert!(matches!(error, VolumeError::Change(ChangeError::NoVolume { .. })), "{error}");
    });
}

#[test]
fn an_extended_volume_is_larger_after_a_refresh() {
    block_on(async {
        let (one, two, _locks) = two_nodes().await;
        one.create_volume("vg", "lv", 8 * MIB).await.expect("made");
        let active = one.activate("vg", "lv", Activation::Shared).await.expect("active");
        let device = active.device();
        two.extend_volume("vg", "lv", 8 * MIB).await.expect("extended");
        assert_eq!(active.refresh().await.expect("refreshed").size_bytes, 16 * MIB);
        assert_eq!(device.geometry().size_bytes, 16 * MIB);
        device.write(15 * MIB, Buf::zeroed(512), WriteFlags::default()).await.expect("written");
    });
}

#[test]
fn a_node_that_dies_leaves_its_volume_to_others_and_the_value_is_not_trusted() {
    block_on(async {
        let (one, two, locks) = two_nodes().await;
        one.create_volume("vg", "lv", 8 * MIB).await.expect("made");
        two.group("vg").await.expect("cached");
        one.activate("vg", "lv", Activation::Exclusive).await.expect("active");
        locks[0].crash();
        two.create_volume("vg", "more", MIB).await.expect("made");
        two.activate("vg", "lv", Activation::Exclusive).await.expect("active");
    });
}

#[test]
fn mistakes_have_clear_errors() {
    block_on(async {
        let (one, _two, _locks) = two_nodes().await;
        let text = |e: VolumeError| e.to_string();
        assert_eq!(text(one.create_pv("c", false).await.unwrap_err()), "there is no device c");
        assert!(text(one.create_pv("a", false).await.unwrap_err()).starts_with("a holds physical volume "));
        let taken = one.create_group("other", &["a".to_owned()], 4 * MIB).await.unwrap_err();
        assert_eq!(text(taken), "a holds a physical volume of volume group vg already");
        let exists = one.create_group("vg", &["b".to_owned()], 4 * MIB).await.unwrap_err();
        assert_eq!(text(exists), "volume group vg exists already");
        assert_eq!(text(one.group("nope").await.unwrap_err()), "there is no volume group nope");
        let space = one.create_volume("vg", "lv", 1000 * MIB).await.unwrap_err();
        assert_eq!(text(space), "250 extents are wanted, 15 are free in volume group vg");
        let long = "x".repeat(70);
        let name = one.create_group(&long, &["b".to_owned()], 4 * MIB).await.unwrap_err();
        assert!(text(name).contains("more than 62 bytes"));
        one.shutdown().await.expect("locks are given up");
    });
}
