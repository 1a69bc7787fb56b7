//! Damaged devices: never a panic, and the group where one good area is left.

use crate::support::{Memory, block_on, manager, memory, named};
use quorate_clvm::{Label, MdaHeader, VolumeGroup, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::MemoryDevice;
use quorate_membership::Rng;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

async fn images() -> [Memory; 2] {
    let disks = [memory(8), memory(8)];
    let node = manager(&LocalManager::new(), vec![named("a", &disks[0]), named("b", &disks[1])]).await;
    for device in ["a", "b"] {
        node.create_pv(device, false).await.expect("a physical volume");
    }
    node.create_group("vg", &["a".to_owned(), "b".to_owned()], MIB).await.expect("a group");
    node.create_volume("vg", "lv", 9 * MIB).await.expect("made");
    disks
}

#[test]
fn random_damage_never_panics_and_one_good_area_is_enough() {
    block_on(async {
        let disks = images().await;
        let good = disks[0].0.bytes();
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let mut bytes = good.clone();
            for _ in 0..=rng.below(8) {
                // Label, header, and the texts written so far.
                let places = [512 + rng.below(512), 4096 + rng.below(512), 4608 + rng.below(4096)];
                let at = *rng.pick(&places).expect("some");
                bytes[at as usize] = rng.next_u64() as u8;
            }
            let damaged = Memory(Arc::new(MemoryDevice::from_bytes(bytes)));
            let node = manager(&LocalManager::new(), vec![named("a", &damaged), named("b", &disks[1])]).await;
            let group = node.group("vg").await.expect("the other area is good");
            assert_eq!((group.seqno, group.lv("lv").expect("there").extents()), (2, 9));
            let alone = manager(&LocalManager::new(), vec![named("a", &damaged)]).await;
            // Either it is found or there is a clear error.
            if let Err(error) = alone.group("vg").await {
                assert_eq!(error.to_string(), "there is no volume group vg");
                let problems = alone.groups().await.expect("listed").problems;
                let label = Label::find(&damaged.0.bytes()[..2048]);
                assert!(!problems.is_empty() || label.is_err(), "what is wrong is said");
            }
        }
    });
}

#[test]
fn a_group_with_a_missing_device_is_seen_and_not_changed() {
    block_on(async {
        let disks = images().await;
        let node = manager(&LocalManager::new(), vec![named("a", &disks[0])]).await;
        let group = node.group("vg").await.expect("seen");
        let missing = group.pvs.iter().find(|pv| pv.name == "pv1").expect("the other").id;
        let error = node.create_volume("vg", "x", MIB).await.unwrap_err();
        assert_eq!(error.to_string(), format!("volume group vg: physical volume {missing} is missing"));
        let error = node.activate("vg", "lv", quorate_clvm::Activation::Shared).await.unwrap_err();
        assert_eq!(error.to_string(), "logical volume vg/lv: physical volume pv1 is missing");
        node.add_device(named("b", &disks[1]));
        node.create_volume("vg", "x", MIB).await.expect("now it can be changed");
    });
}

#[test]
fn random_bytes_are_no_label_no_header_and_no_group() {
    let mut rng = Rng::new(7);
    let alphabet = b"vg {}[]=\",.#0123456789abc\n\\";
    for _ in 0..2000 {
        let mut bytes: Vec<u8> = (0..2048).map(|_| rng.next_u64() as u8).collect();
        assert!(Label::find(&bytes).is_err());
        bytes[..8].copy_from_slice(b"LABELONE");
        bytes[24..32].copy_from_slice(b"LVM2 001");
        assert!(Label::find(&bytes).is_err());
        assert!(MdaHeader::decode(4096, &bytes).is_err());
        assert!(VolumeGroup::parse(&bytes).is_err());
        let text: Vec<u8> = (0..200).map(|_| *rng.pick(alphabet).expect("some")).collect();
        assert!(VolumeGroup::parse(&text).is_err());
    }
}
