//! Bytes written to a volume are read back, wherever its segments and stripes lie.

use crate::support::{block_on, manager, memory, named};
use quorate_clvm::{Activation, LogicalVolume, VolumeGroup, VolumeManager, Writer};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::{BlockDevice, Buf, Device, IoError, MemoryDevice, WriteFlags, ZeroFlags};
use quorate_membership::Rng;
use std::collections::BTreeMap;

const MIB: u64 = 1 << 20;

/// Random requests against the device and against plain memory.
async fn compare(device: &impl BlockDevice, seed: u64) {
    let size = device.geometry().size_bytes;
    let mut rng = Rng::new(seed);
    let mut model = device.read(0, Buf::zeroed(size as usize)).await.expect("read").to_vec();
    for _ in 0..300 {
        let offset = rng.below(size / 512) * 512;
        let len = (rng.below(3 * MIB / 512) * 512).min(size - offset);
        let range = offset as usize..(offset + len) as usize;
        match rng.below(4) {
            0 => {
                let read = device.read(offset, Buf::zeroed(len as usize)).await.expect("read");
                assert_eq!(&*read, &model[range]);
            }
            1 => {
                device.write_zeroes(offset, len, ZeroFlags::default()).await.expect("zeroed");
                model[range].fill(0);
            }
            _ => {
                let byte = rng.below(256) as u8;
                let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i / 512) as u8)).collect();
                device.write(offset, Buf::copy_of(&data), WriteFlags::default()).await.expect("written");
                model[range].copy_from_slice(&data);
            }
        }
    }
    device.flush().await.expect("flushed");
    assert_eq!(&*device.read(0, Buf::zeroed(size as usize)).await.expect("read"), &model[..]);
    let beyond = device.read(size, Buf::zeroed(512)).await.expect_err("beyond the end");
    assert_eq!(beyond, IoError::OutOfRange { offset: size, len: 512, size });
}

#[test]
fn a_volume_over_two_devices_in_pieces_is_one_device() {
    block_on(async {
        let disks = [memory(12), memory(12)];
        let node = manager(&LocalManager::new(), vec![named("a", &disks[0]), named("b", &disks[1])]).await;
        for device in ["a", "b"] {
            node.create_pv(device, false).await.expect("a physical volume");
        }
        node.create_group("vg", &["a".to_owned(), "b".to_owned()], MIB).await.expect("a group");
        for (name, mib) in [("x", 3), ("y", 3), ("z", 2)] {
            node.create_volume("vg", name, mib * MIB).await.expect("made");
        }
        node.remove_volume("vg", "y").await.expect("removed");
        node.extend_volume("vg", "z", 12 * MIB).await.expect("extended");
        let group = node.group("vg").await.expect("found");
        assert!(2 <= group.lv("z").expect("there").segments.len(), "{group:?}");
        let z = node.activate("vg", "z", Activation::Exclusive).await.expect("active");
        let x = node.activate("vg", "x", Activation::Exclusive).await.expect("active");
        compare(&x.device(), 1).await;
        let before = x.device().read(0, Buf::zeroed(3 << 20)).await.expect("read");
        compare(&z.device(), 2).await;
        let after = x.device().read(0, Buf::zeroed(3 << 20)).await.expect("read");
        assert!(*before == *after, "the other volume is untouched");
        z.deactivate().await.expect("ended");
    });
}

#[test]
fn stripes_are_laid_out_as_lvm_does() {
    block_on(async {
        let text = "vg {\nid = \"111111-1111-1111-1111-1111-1111-111111\"\nseqno = 1\nstatus = [\"RESIZEABLE\", \"READ\", \
            \"WRITE\"]\nextent_size = 2048\nmax_lv = 0\nmax_pv = 0\nphysical_volumes {\npv0 {\nid = \
            \"222222-2222-2222-2222-2222-2222-222222\"\nstatus = [\"ALLOCATABLE\"]\npe_start = 2048\npe_count = 8\n}\npv1 {\n\
            id = \"333333-3333-3333-3333-3333-3333-333333\"\nstatus = [\"ALLOCATABLE\"]\npe_start = 2048\npe_count = 8\n}\n}\n\
            logical_volumes {\nlv {\nid = \"444444-4444-4444-4444-4444-4444-444444\"\nstatus = [\"READ\", \"WRITE\", \
            \"VISIBLE\"]\nsegment_count = 1\nsegment1 {\nstart_extent = 0\nextent_count = 6\ntype = \"striped\"\n\
            stripe_count = 2\nstripe_size = 128\nstripes = [\"pv0\", 2, \"pv1\", 1]\n}\n}\n}\n}\n\
            contents = \"Text Format Volume Group\"\nversion = 1\n";
        let group = VolumeGroup::parse(text.as_bytes()).expect("a group");
        let again = group.to_text(&Writer { description: "", host: "", unix_seconds: 0 });
        assert_eq!(VolumeGroup::parse(&again).as_ref(), Ok(&group));
        let disks: Vec<Device> = (0..2).map(|_| Device::new(MemoryDevice::new(10 * MIB))).collect();
        let pvs: BTreeMap<String, Device> =
            disks.iter().enumerate().map(|(i, d)| (format!("pv{i}"), d.clone())).collect();
        let lv = LogicalVolume::new(&group, group.lv("lv").expect("there"), &pvs, false).expect("mapped");
        // Chunk 0 is at extent 2 of pv0, chunk 1 at extent 1 of pv1, chunk 2 behind chunk 0.
        for (chunk, disk, at) in
            [(0, 0, 3 * MIB), (1, 1, 2 * MIB), (2, 0, 3 * MIB + 65536), (3, 1, 2 * MIB + 65536)]
        {
            let data = Buf::copy_of(&[chunk as u8 + 1; 65536]);
            lv.write(chunk * 65536, data, WriteFlags::default()).await.expect("written");
            let there: &Device = &disks[disk];
            assert_eq!(&*there.read(at, Buf::zeroed(65536)).await.expect("read"), &[chunk as u8 + 1; 65536]);
        }
        compare(&lv, 3).await;
    });
}
