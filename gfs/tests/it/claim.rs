//! Claiming a filesystem for a cluster and giving it back (R19).

use crate::tools::{TempDir, block_on, fsck_gfs2, tool};
use quorate_gfs::claim::{ClaimError, Use, check_use, claim, release};
use quorate_gfs::format::SUPERBLOCK_OFFSET_BYTES;
use quorate_gfs::mkfs::{MkfsOptions, mkfs};
use quorate_gfs::reader::Reader;
use quorate_gnbd::MemoryDevice;

fn fresh(proto: &str, table: &str) -> MemoryDevice {
    let device = MemoryDevice::new(32 << 20);
    let mut options = MkfsOptions::new(1);
    (options.lock_proto, options.lock_table) = (proto.into(), table.into());
    block_on(mkfs(&device, &options)).unwrap();
    device
}

fn used(device: &MemoryDevice, wanted: Use<'_>) -> Result<(), ClaimError> {
    check_use(block_on(Reader::open(device)).unwrap().superblock(), wanted)
}

#[test]
fn a_claim_is_undone_by_a_release_byte_for_byte() {
    for (proto, table) in [("lock_dlm", "old:web"), ("lock_nolock", "")] {
        let device = fresh(proto, table);
        let before = device.bytes();
        assert!(matches!(block_on(claim(&device, "alpha:web", false)), Err(ClaimError::NotSaid { .. })));
        assert!(matches!(block_on(claim(&device, "alpha", true)), Err(ClaimError::Table { .. })));
        assert!(matches!(block_on(release(&device, true)), Err(ClaimError::NotClaimed { .. })));
        assert_eq!(device.bytes(), before);
        let done = block_on(claim(&device, "alpha:web", true)).unwrap();
        assert_eq!(done.before, (proto.to_string(), table.to_string()));
        assert_eq!(used(&device, Use::Cluster { cluster: "alpha" }), Ok(()));
        // Claiming again changes nothing, and another claim keeps the first owner.
        let claimed = device.bytes();
        block_on(claim(&device, "alpha:web", false)).unwrap();
        assert_eq!(device.bytes(), claimed);
        block_on(claim(&device, "beta:web", true)).unwrap();
        assert!(matches!(block_on(release(&device, false)), Err(ClaimError::NotSaid { .. })));
        block_on(release(&device, true)).unwrap();
        assert_eq!(device.bytes(), before);
    }
}

#[test]
fn only_the_owner_may_write() {
    let alpha = Use::Cluster { cluster: "alpha" };
    let device = fresh("lock_dlm", "beta:web");
    let error = used(&device, alpha).unwrap_err();
    assert!(error.to_string().contains("beta:web") && error.to_string().contains("alpha"), "{error}");
    assert!(matches!(used(&device, Use::Alone), Err(ClaimError::Clustered { .. })));
    assert_eq!(used(&device, Use::Cluster { cluster: "beta" }), Ok(()));
    // A prefix of a name is not the name.
    assert!(used(&device, Use::Cluster { cluster: "bet" }).is_err());
    let device = fresh("lock_nolock", "");
    assert_eq!(used(&device, Use::Alone), Ok(()));
    assert!(matches!(used(&device, alpha), Err(ClaimError::SingleHost { .. })));
}

#[test]
fn an_unfinished_check_bars_everything() {
    let mut bytes = fresh("lock_dlm", "alpha:web").bytes();
    let at = SUPERBLOCK_OFFSET_BYTES as usize + 96;
    bytes[at..at + 5].copy_from_slice(b"fsck_");
    let device = MemoryDevice::from_bytes(bytes);
    assert!(matches!(used(&device, Use::Cluster { cluster: "alpha" }), Err(ClaimError::Fsck { .. })));
    assert!(matches!(used(&device, Use::Alone), Err(ClaimError::Fsck { .. })));
    assert!(matches!(block_on(claim(&device, "alpha:x", true)), Err(ClaimError::Fsck { .. })));
    assert!(matches!(block_on(release(&device, true)), Err(ClaimError::Fsck { .. })));
}

#[test]
fn a_claimed_filesystem_is_clean_for_fsck() {
    let Some(fsck) = tool("a_claimed_filesystem_is_clean_for_fsck", "fsck.gfs2") else { return };
    let device = fresh("lock_nolock", "");
    block_on(claim(&device, "alpha:web", true)).unwrap();
    let dir = TempDir::new();
    std::fs::write(dir.path("image"), device.bytes()).unwrap();
    let (code, text) = fsck_gfs2(&fsck, &dir.path("image"));
    assert_eq!(code, 0, "{text}");
}
