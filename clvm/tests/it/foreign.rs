//! Physical volumes that are laid out as other tools lay them out, and devices that must not be touched.

use crate::support::{Memory, block_on, manager, named};
use quorate_clvm::{Activation, Area, Label, MdaHeader, Uuid, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::{BlockDevice, Buf, MemoryDevice, WriteFlags};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// A device of `mib` MiB with a label and these metadata areas, all empty; data starts at 1 MiB.
fn physical_volume(mib: u64, id: u8, metadata: &[Area], is_used: bool) -> Memory {
    let label = Label {
        sector: 1,
        uuid: Uuid::from_bytes([id; 32]).expect("letters"),
        device_bytes: mib * MIB,
        data: vec![Area { offset: MIB, size: 0 }],
        metadata: metadata.to_vec(),
        bootloader: vec![],
        is_used,
    };
    let mut bytes = vec![0; (mib * MIB) as usize];
    bytes[512..1024].copy_from_slice(&label.encode());
    for area in metadata {
        let header = MdaHeader::empty(area.offset, area.size).encode();
        bytes[area.offset as usize..area.offset as usize + 512].copy_from_slice(&header);
    }
    Memory(Arc::new(MemoryDevice::from_bytes(bytes)))
}

const FIRST: Area = Area { offset: 4096, size: MIB - 4096 };

/// `pvcreate --metadatacopies 2` puts a second area at the device's end: no volume may get its bytes.
#[test]
fn a_second_metadata_area_is_not_given_to_volumes() {
    block_on(async {
        let second = Area { offset: 15 * MIB, size: MIB };
        let disk = physical_volume(16, b'a', &[FIRST, second], false);
        let node = manager(&LocalManager::new(), vec![named("a", &disk)]).await;
        let group = node.create_group("vg", &["a".to_owned()], MIB).await.expect("a group");
        assert_eq!(group.free_extents(), 14, "16 MiB without the first and the last");
        node.create_volume("vg", "all", 14 * MIB).await.expect("made");
        let active = node.activate("vg", "all", Activation::Exclusive).await.expect("active");
        let data = Buf::copy_of(&vec![0xee; 14 * MIB as usize]);
        active.device().write(0, data, WriteFlags::default()).await.expect("written");
        active.deactivate().await.expect("ended");
        // Either area alone has the newest group, and a change written to both leaves the data alone.
        for damaged in [FIRST, second] {
            let mut bytes = disk.0.bytes();
            bytes[damaged.offset as usize..damaged.offset as usize + 512].fill(0);
            let copy = Memory(Arc::new(MemoryDevice::from_bytes(bytes)));
            let node = manager(&LocalManager::new(), vec![named("a", &copy)]).await;
            assert_eq!(node.group("vg").await.expect("found").seqno, 2);
            assert_eq!(node.groups().await.expect("listed").problems.len(), 1);
            node.remove_volume("vg", "all").await.expect("removed");
            assert_eq!(node.groups().await.expect("listed").problems, [], "the damaged area is written anew");
            let data = copy.0.bytes();
            assert!(data[MIB as usize..15 * MIB as usize].iter().all(|b| *b == 0xee));
        }
    });
}

/// Its group's metadata is on devices that are not here, or is damaged: taking it would take it from that group.
#[test]
fn a_used_physical_volume_without_its_group_is_not_taken() {
    block_on(async {
        let disks = [physical_volume(16, b'a', &[], true), physical_volume(16, b'b', &[FIRST], false)];
        let node = manager(&LocalManager::new(), vec![named("a", &disks[0]), named("b", &disks[1])]).await;
        let before = disks[0].0.bytes();
        let error = node.create_group("vg", &["a".to_owned()], MIB).await.unwrap_err();
        let text = "a is a physical volume in use by a volume group that is not found here";
        assert_eq!(error.to_string(), text);
        node.create_group("vg", &["b".to_owned()], MIB).await.expect("a group");
        let error = node.extend_group("vg", &["a".to_owned()]).await.unwrap_err();
        assert_eq!(error.to_string(), text);
        assert!(disks[0].0.bytes() == before, "nothing was written");
        // A damaged area of a group that was made here is the same.
        let mut bytes = disks[1].0.bytes();
        bytes[4096] ^= 1;
        let damaged = Memory(Arc::new(MemoryDevice::from_bytes(bytes)));
        let node = manager(&LocalManager::new(), vec![named("b", &damaged)]).await;
        let error = node.create_group("new", &["b".to_owned()], MIB).await.unwrap_err();
        assert_eq!(error.to_string(), text.replacen('a', "b", 1));
        // By force it is made anew.
        node.create_pv("b", true).await.expect("a physical volume");
        node.create_group("new", &["b".to_owned()], MIB).await.expect("a group");
    });
}

/// A change must be somewhere when it is answered.
#[test]
fn a_group_needs_a_place_for_its_metadata() {
    block_on(async {
        let disks = [physical_volume(16, b'a', &[], false), physical_volume(16, b'b', &[FIRST], false)];
        let node = manager(&LocalManager::new(), vec![named("a", &disks[0]), named("b", &disks[1])]).await;
        let error = node.create_group("vg", &["a".to_owned()], MIB).await.unwrap_err();
        assert_eq!(error.to_string(), "volume group vg: no physical volume of it has room for metadata");
        let both = ["a".to_owned(), "b".to_owned()];
        node.create_group("vg", &both, MIB).await.expect("one area is enough");
        assert_eq!(node.group("vg").await.expect("found").pvs.len(), 2);
    });
}

/// The copy of an image: writing to one of the two, and reading from the other, would tear the group apart.
#[test]
fn two_devices_of_one_identity_are_neither_changed_nor_activated() {
    block_on(async {
        let disk = physical_volume(16, b'a', &[FIRST], false);
        let node = manager(&LocalManager::new(), vec![named("a", &disk)]).await;
        node.create_group("vg", &["a".to_owned()], MIB).await.expect("a group");
        node.create_volume("vg", "lv", MIB).await.expect("made");
        let copy = Memory(Arc::new(MemoryDevice::from_bytes(disk.0.bytes())));
        node.add_device(named("b", &copy));
        let (before, after) = (disk.0.bytes(), copy.0.bytes());
        let pv = Uuid::from_bytes([b'a'; 32]).expect("letters");
        let text = format!("physical volume {pv} is on more than one device: a, b");
        let error = node.create_volume("vg", "x", MIB).await.unwrap_err();
        assert_eq!(error.to_string(), text);
        let error = node.activate("vg", "lv", Activation::Exclusive).await.unwrap_err();
        assert_eq!(error.to_string(), text);
        let survey = node.groups().await.expect("listed");
        assert_eq!((survey.groups.len(), survey.problems.len()), (1, 1));
        assert!(survey.problems[0].what.contains("more than one device"), "{:?}", survey.problems);
        assert!(disk.0.bytes() == before && copy.0.bytes() == after, "nothing was written");
        // The same before it has a group.
        let fresh = [physical_volume(16, b'c', &[FIRST], false), physical_volume(16, b'c', &[FIRST], false)];
        let node = manager(&LocalManager::new(), vec![named("c", &fresh[0]), named("d", &fresh[1])]).await;
        let error = node.create_group("vg", &["c".to_owned()], MIB).await.unwrap_err();
        assert!(error.to_string().ends_with("is on more than one device: c, d"), "{error}");
    });
}
