//! Every decoder of the disk format on hostile bytes: an error or a value, never a panic, and no more memory than bytes.

use proptest::collection::vec;
use proptest::num::u8::ANY;
use quorate_gfs::format::{
    BlockNo, BlockSize, Dinode, Inum, JDATA_TYPE, Leaf, LogDescriptor, LogHeader, METADATA_TYPE, MetaHeader,
    MetaType, QuotaChange, QuotaRecord, REVOKE_TYPE, RgrpHeader, RindexEntry, SUPERBLOCK_BYTES, StatfsChange,
    StatfsCounted, Superblock, jdata_entries, log_blocks,
};
use quorate_gfs::reader::Reader;
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{Device, MemoryDevice};

const KINDS: [MetaType; 13] = [
    MetaType::Superblock,
    MetaType::Rgrp,
    MetaType::RgrpBitmap,
    MetaType::Dinode,
    MetaType::Indirect,
    MetaType::Leaf,
    MetaType::HeaderedData,
    MetaType::LogHeader,
    MetaType::LogDescriptor,
    MetaType::Ea,
    MetaType::EaData,
    MetaType::LogBlock,
    MetaType::QuotaChange,
];

fn all(bytes: &[u8]) {
    let _ = MetaHeader::decode(bytes);
    let _ = Superblock::decode(bytes);
    let _ = RindexEntry::decode(bytes);
    let _ = RgrpHeader::decode(bytes);
    let _ = Leaf::decode(bytes);
    let _ = StatfsChange::decode(bytes);
    let _ = QuotaRecord::decode(bytes);
    let _ = QuotaChange::decode(bytes);
    let _ = StatfsCounted { jid: 3, fingerprint: 1, sequence: 1 }.is_in(bytes);
    if let Ok(dinode) = Dinode::decode(bytes) {
        let _ = (dinode.file_type(), dinode.size_bytes);
    }
    let _ = LogHeader::decode(bytes).map(|header| header.fingerprint());
    for size in [512, 1024, 2048, 4096] {
        let size = BlockSize::new(size).unwrap();
        if let Ok(descriptor) = LogDescriptor::decode(bytes, size) {
            assert!(descriptor.count as usize <= descriptor.length as usize * size.usize() / 8);
        }
    }
    assert!(log_blocks(bytes, 0).count() <= bytes.len() / 8 + 1);
    assert!(jdata_entries(bytes).count() <= bytes.len() / 8 + 1);
}

proptest::proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in vec(ANY, 0..5000)) {
        all(&bytes);
    }

    #[test]
    fn random_bytes_behind_a_right_header_never_panic(
        kind in 0..KINDS.len(), descriptor in 0_usize..3, length in 24_usize..4097, bytes in vec(ANY, 4096),
    ) {
        let mut bytes = bytes[..length].to_vec();
        MetaHeader { kind: KINDS[kind], jid: 0 }.encode(&mut bytes);
        all(&bytes);
        if 28 <= bytes.len() {
            let kind = [METADATA_TYPE, REVOKE_TYPE, JDATA_TYPE][descriptor];
            bytes[24..28].copy_from_slice(&kind.to_be_bytes());
            all(&bytes);
        }
    }

    #[test]
    fn a_superblock_of_random_fields_opens_no_filesystem_and_never_panics(
        at in vec(0..SUPERBLOCK_BYTES, 1..4), values in vec(ANY, 4), blocks in 136_usize..200,
    ) {
        let mut image = vec![0; blocks * 512];
        let superblock = Superblock {
            format: 1802,
            block_size: BlockSize::new(4096).unwrap(),
            master: Inum { formal: 1, addr: BlockNo(18) },
            root: Inum { formal: 2, addr: BlockNo(19) },
            lock_proto: "lock_dlm".into(),
            lock_table: "a:b".into(),
            uuid: [7; 16],
        };
        superblock.encode(&mut image[65536..65536 + SUPERBLOCK_BYTES]).unwrap();
        for (at, value) in at.iter().zip(values) {
            image[65536 + at] = value;
        }
        let device = MemoryDevice::from_bytes(image.clone());
        if let Ok(reader) = crate::tools::block_on(Reader::open(&device)) {
            assert!(reader.device_blocks() << reader.size().shift() <= image.len() as u64);
        }
        let device = Device::new(MemoryDevice::from_bytes(image));
        assert!(crate::tools::block_on(RescueFs::open(device, RescueOptions::default())).is_err());
    }
}
