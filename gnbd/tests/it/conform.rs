//! What the trait promises, asked of each implementation by one body: memory, file, and NBD client over both.

use crate::common::*;
use quorate_gnbd::server::Export;
use quorate_gnbd::{
    BlockDevice, Buf, Device, FileDevice, FileOptions, IoError, MemoryDevice, WriteFlags, ZeroFlags,
};
use quorate_membership::Rng;
use std::sync::Arc;

const SIZE: u64 = 1 << 20;

/// Random requests beside plain memory, then the limits.
async fn conforms(device: &impl BlockDevice, seed: u64) {
    let geometry = device.geometry();
    let block = u64::from(geometry.block_bytes);
    assert_eq!((geometry.size_bytes, geometry.read_only), (SIZE, false));
    assert!(block.is_power_of_two() && block <= 65536 && SIZE.is_multiple_of(block));
    assert!(geometry.preferred_bytes >= geometry.block_bytes && 1 << 20 <= geometry.transfer_bytes_max);
    let mut rng = Rng::new(seed);
    let mut model = vec![0_u8; SIZE as usize];
    for turn in 0..400 {
        let offset = rng.below(SIZE / block) * block;
        let len = (rng.below(70_000) / block * block).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        let fua = rng.chance_ppm(200_000);
        match rng.below(8) {
            0..=2 => {
                let data = pattern(seed * 1000 + turn, len as usize);
                let back = device.write(offset, Buf::copy_of(&data), WriteFlags { fua }).await.unwrap();
                assert!(*back == *data, "the buffer comes back as it was");
                model[range].copy_from_slice(&data);
            }
            3 => {
                let no_hole = rng.chance_ppm(500_000);
                device.write_zeroes(offset, len, ZeroFlags { fua, no_hole }).await.unwrap();
                model[range].fill(0);
            }
            4 => {
                device.discard(offset, len).await.unwrap();
                // Undefined now: whatever it is, it stays that.
                let found = device.read(offset, Buf::zeroed(len as usize)).await.unwrap();
                model[range].copy_from_slice(&found);
            }
            5 => device.flush().await.unwrap(),
            _ => {
                let found = device.read(offset, Buf::copy_of(&vec![0xff; len as usize])).await.unwrap();
                assert!(*found == model[range], "turn {turn}: {len} bytes at {offset}");
            }
        }
    }
    for (offset, len) in [(SIZE, block), (SIZE - block, 2 * block), (u64::MAX - block + 1, block)] {
        let out = Err(IoError::OutOfRange { offset, len, size: SIZE });
        assert_eq!(device.read(offset, Buf::zeroed(len as usize)).await.map(drop), out);
        let data = Buf::zeroed(len as usize);
        assert_eq!(device.write(offset, data, WriteFlags::default()).await.map(drop), out);
        assert_eq!(device.write_zeroes(offset, len, ZeroFlags::default()).await, out);
        assert_eq!(device.discard(offset, len).await, out);
    }
    if 1 < block {
        for (offset, len) in [(1, block), (0, block + 1)] {
            let misaligned = Err(IoError::Misaligned { offset, len, block: geometry.block_bytes });
            assert_eq!(device.read(offset, Buf::zeroed(len as usize)).await.map(drop), misaligned);
            let data = Buf::zeroed(len as usize);
            assert_eq!(device.write(offset, data, WriteFlags::default()).await.map(drop), misaligned);
            assert_eq!(device.write_zeroes(offset, len, ZeroFlags::default()).await, misaligned);
            assert_eq!(device.discard(offset, len).await, misaligned);
        }
    }
    device.flush().await.unwrap();
    let all = device.read(0, Buf::zeroed(SIZE as usize)).await.unwrap();
    assert!(*all == model, "nothing that was refused was carried out");
}

async fn refuses_changes(device: &impl BlockDevice, holds: u8) {
    assert!(device.geometry().read_only);
    let found = device.read(4096, Buf::zeroed(4096)).await.unwrap();
    assert!(found.iter().all(|b| *b == holds));
    let write = device.write(4096, Buf::zeroed(4096), WriteFlags { fua: true }).await;
    assert_eq!(write.map(drop), Err(IoError::ReadOnly));
    assert_eq!(device.write_zeroes(4096, 4096, ZeroFlags::default()).await, Err(IoError::ReadOnly));
    assert_eq!(device.discard(4096, 4096).await, Err(IoError::ReadOnly));
    device.flush().await.unwrap();
}

fn export(device: Device) -> Export {
    Export { name: "x".into(), description: String::new(), device, cluster: false }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_device_is_what_the_trait_says() {
    let temp = Temp::new();
    conforms(&MemoryDevice::new(SIZE), 1).await;
    conforms(&Device::new(MemoryDevice::new(SIZE)), 2).await;
    let path = temp.file("plain", SIZE);
    conforms(&FileDevice::open(&path, FileOptions::server()).unwrap(), 3).await;
    let path = temp.file("direct", SIZE);
    match FileDevice::open(&path, FileOptions { direct: true, ..FileOptions::server() }) {
        Ok(device) => conforms(&device, 4).await,
        Err(e) => println!("SKIP: direct I/O: {e}"),
    }
    let (exported, cached) = (temp.file("exported", SIZE), Device::new(MemoryDevice::new(SIZE)));
    let server = plain_server(vec![file_export(&exported, "d", false), export(cached)]).await;
    conforms(&plain_client(server.addresses()[0], "d").await, 5).await;
    conforms(&plain_client(server.addresses()[0], "x").await, 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_device_refuses_every_change_also_over_the_wire() {
    let temp = Temp::new();
    let path = temp.0.join("disk");
    std::fs::write(&path, [7; 16384]).unwrap();
    let open = || FileDevice::open(&path, FileOptions { read_only: true, ..FileOptions::server() }).unwrap();
    refuses_changes(&open(), 7).await;
    let server = plain_server(vec![export(Device::new(open()))]).await;
    refuses_changes(&plain_client(server.addresses()[0], "x").await, 7).await;
    assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 7));
}

/// FUA and FLUSH, seen from the device behind the server: what a crash of it would keep at least.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_answered_as_durable_is_durable_behind_the_server() {
    let memory = Arc::new(MemoryDevice::new(SIZE));
    let server = plain_server(vec![export(Device::new(Arc::clone(&memory)))]).await;
    let address = server.addresses()[0];
    let (one, two) = (plain_client(address, "x").await, plain_client(address, "x").await);
    let kept = |at: usize| memory.crashed(None)[at];
    one.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.unwrap();
    assert_eq!(kept(0), 0, "an answer alone promises nothing");
    one.write(512, Buf::copy_of(&[2; 512]), WriteFlags { fua: true }).await.unwrap();
    assert_eq!(kept(512), 2, "a write with FUA");
    one.write_zeroes(512, 512, ZeroFlags { fua: true, no_hole: false }).await.unwrap();
    assert_eq!(kept(512), 0, "zeros with FUA");
    one.write(1024, Buf::copy_of(&[3; 512]), WriteFlags::default()).await.unwrap();
    assert_eq!(kept(1024), 0);
    // CAN_MULTI_CONN: a flush covers what was answered on any connection of anybody.
    two.flush().await.unwrap();
    assert_eq!((kept(0), kept(1024)), (1, 3), "a flush of another client");
}

/// The crash of a memory device: durable stays, the rest is old or new by sector, and nothing older comes back.
#[tokio::test]
async fn a_crash_keeps_what_is_durable_and_tears_the_rest() {
    let device = MemoryDevice::new(8192);
    device.write(0, Buf::copy_of(&[1; 8192]), WriteFlags::default()).await.unwrap();
    device.flush().await.unwrap();
    device.write(0, Buf::copy_of(&[2; 4096]), WriteFlags::default()).await.unwrap();
    device.write(1024, Buf::copy_of(&[3; 512]), WriteFlags { fua: true }).await.unwrap();
    device.write(4096, Buf::copy_of(&[4; 4096]), WriteFlags::default()).await.unwrap();
    let sure = device.crashed(None);
    assert!(sure[..1024].iter().all(|b| *b == 1) && sure[1024..1536].iter().all(|b| *b == 3));
    let (mut old, mut new) = (0, 0);
    for seed in 0..16 {
        let found = device.crashed(Some(&mut Rng::new(seed)));
        for (i, sector) in found.chunks(512).enumerate() {
            assert!(sector.iter().all(|b| *b == sector[0]), "sectors are not torn");
            let may = match i {
                2 => [3, 3],
                0..8 => [1, 2],
                _ => [1, 4],
            };
            assert!(may.contains(&sector[0]), "sector {i} holds {}", sector[0]);
            if i != 2 {
                *(if sector[0] == 1 { &mut old } else { &mut new }) += 1;
            }
        }
    }
    assert!(0 < old && 0 < new);
    assert!(device.bytes()[..1024].iter().all(|b| *b == 2), "reads see the newest");
}
