//! The real LVM2 reads what we wrote, and we read and change what it wrote.

use crate::support::{Dir, block_on, has_tool, lvm, lvm_ok, manager};
use quorate_clvm::{ClusterVolumes, NamedDevice, VolumeManager};
use quorate_dlm::local::LocalManager;
use quorate_gnbd::{Device, FileDevice, FileOptions};
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

fn image(dir: &Dir, name: &str, mib: u64) -> PathBuf {
    let path = dir.0.join(name);
    let file = std::fs::File::create(&path).expect("created");
    file.set_len(mib * MIB).expect("sized");
    path
}

async fn open(paths: &[&Path]) -> ClusterVolumes {
    let device = |(i, path): (usize, &&Path)| NamedDevice {
        name: format!("d{i}"),
        device: Device::new(FileDevice::open(path, FileOptions::server()).expect("opened")),
    };
    manager(&LocalManager::new(), paths.iter().enumerate().map(device).collect()).await
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("d{i}")).collect()
}

#[test]
fn pvck_reads_our_files() {
    if !has_tool("pvck_reads_our_files", "pvck") {
        return;
    }
    let dir = Dir::new("pvck");
    std::fs::create_dir(dir.0.join("lvm")).expect("created");
    let disk = image(&dir, "disk", 128);
    block_on(async {
        let node = open(&[&disk]).await;
        node.create_pv("d0", false).await.expect("a physical volume");
        node.create_group("vg", &names(1), MIB).await.expect("a group");
        node.create_volume("vg", "lv", 20 * MIB).await.expect("made");
        for i in 0..40 {
            node.create_volume("vg", &format!("lv{i}"), MIB).await.expect("made");
        }
        // Often enough to go round the ring of 1020 KiB.
        for _ in 0..80 {
            node.create_volume("vg", "again", MIB).await.expect("made");
            node.remove_volume("vg", "again").await.expect("removed");
        }
        node.extend_volume("vg", "lv", 8 * MIB).await.expect("extended");
    });
    let path = disk.to_str().expect("a plain path");
    let headers = lvm_ok(&dir, &["pvck", "--dump", "headers", path]);
    assert!(headers.contains("label_header.sector 1") && headers.contains("mda_header_1.magic"), "{headers}");
    assert!(!headers.contains("CHECK"), "pvck has nothing to complain of: {headers}");
    let text = lvm_ok(&dir, &["pvck", "--dump", "metadata", path]);
    assert!(text.contains("seqno = 203") && text.contains("extent_count = 8"), "{text}");
    let search = lvm_ok(&dir, &["pvck", "--dump", "metadata_search", path]);
    assert!(search.contains("seqno 203"), "the old texts lie in the ring as LVM2 expects them: {search}");
}

/// A loop device, detached at the end.
struct Loop(String);

impl Loop {
    fn new(path: &Path) -> Option<Self> {
        let output = Command::new("/usr/sbin/losetup").args(["-f", "--show"]).arg(path).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }

    /// Makes the block device forget what it has cached of the file.
    fn flush(&self) {
        let _ = Command::new("/usr/sbin/blockdev").args(["--flushbufs", &self.0]).status();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("/usr/sbin/losetup").args(["-d", &self.0]).status();
    }
}

/// The devices as LVM2 is told them.
fn devices(loops: &[Loop]) -> String {
    loops.iter().map(|l| l.0.clone()).collect::<Vec<_>>().join(",")
}

/// A command of LVM2 that looks at these devices alone, afresh.
fn lvm_on(dir: &Dir, loops: &[Loop], command: &[&str]) -> String {
    loops.iter().for_each(Loop::flush);
    let devices = devices(loops);
    let mut args = vec![command[0], "--devices", &devices];
    args.extend_from_slice(&command[1..]);
    lvm_ok(dir, &args)
}

fn loops(test: &str, paths: &[&Path]) -> Option<Vec<Loop>> {
    if !has_tool(test, "vgs") || !has_tool(test, "losetup") {
        return None;
    }
    let loops: Option<Vec<Loop>> = paths.iter().map(|p| Loop::new(p)).collect();
    if loops.is_none() {
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "no loop devices");
        println!("SKIP: {test}: losetup cannot make a loop device here");
    }
    loops
}

#[test]
fn vgs_lvs_and_vgck_agree_with_us_and_lvm_goes_on_with_our_group() {
    let dir = Dir::new("vgs");
    std::fs::create_dir(dir.0.join("lvm")).expect("created");
    let disks = [image(&dir, "a", 64), image(&dir, "b", 40)];
    let paths: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let Some(loops) = loops("vgs_lvs_and_vgck_agree_with_us_and_lvm_goes_on_with_our_group", &paths) else {
        return;
    };
    let with = |command: &[&str]| lvm_on(&dir, &loops, command);
    block_on(async {
        let node = open(&paths).await;
        for device in names(2) {
            node.create_pv(&device, false).await.expect("a physical volume");
        }
        node.create_group("vg", &names(1), 4 * MIB).await.expect("a group");
        node.extend_group("vg", &["d1".to_owned()]).await.expect("extended");
        node.create_volume("vg", "one", 20 * MIB).await.expect("made");
        node.create_volume("vg", "two", 60 * MIB).await.expect("made");
    });
    let vgs = with(&[
        "vgs",
        "--noheadings",
        "--nosuffix",
        "--units",
        "m",
        "-o",
        "vg_name,pv_count,lv_count,seqno,vg_size,vg_free,vg_attr",
    ]);
    let fields: Vec<&str> = vgs.split_whitespace().collect();
    assert_eq!(fields, ["vg", "2", "2", "4", "96.00", "16.00", "wz--n-"]);
    let lvs =
        with(&["lvs", "--noheadings", "--nosuffix", "--units", "m", "-o", "lv_name,lv_size,seg_count", "vg"]);
    let fields: Vec<Vec<&str>> = lvs.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(fields[0], ["one", "20.00", "1"]);
    assert_eq!(fields[1][..2], ["two", "60.00"]);
    with(&["vgck", "vg"]);
    for l in &loops {
        let path = l.0.clone();
        with(&["pvck", &path]);
    }
    // Now LVM2 changes it.
    with(&["lvcreate", "--driverloaded", "n", "-an", "-Zn", "-Wn", "-n", "three", "-l", "2", "vg"]);
    with(&["lvextend", "--driverloaded", "n", "-l", "+1", "vg/one"]);
    with(&["vgchange", "--addtag", "keepme", "vg"]);
    block_on(async {
        let node = open(&paths).await;
        let group = node.group("vg").await.expect("read");
        assert_eq!((group.seqno, group.lvs.len(), group.free_extents()), (7, 3, 1));
        assert_eq!(group.lv("one").expect("there").extents(), 6);
        node.remove_volume("vg", "two").await.expect("removed");
        node.extend_volume("vg", "three", 12 * MIB).await.expect("extended");
    });
    let vgs = with(&["vgs", "--noheadings", "-o", "vg_name,lv_count,seqno,tags"]);
    assert_eq!(vgs.split_whitespace().collect::<Vec<_>>(), ["vg", "2", "9", "keepme"]);
    with(&["vgck", "vg"]);
}

#[test]
fn what_lvm_made_we_read_and_change() {
    let dir = Dir::new("made");
    std::fs::create_dir(dir.0.join("lvm")).expect("created");
    let disks = [image(&dir, "a", 64), image(&dir, "b", 64)];
    let paths: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let Some(loops) = loops("what_lvm_made_we_read_and_change", &paths) else { return };
    let with = |command: &[&str]| lvm_on(&dir, &loops, command);
    with(&["pvcreate", "-q", &loops[0].0]);
    with(&["pvcreate", "-q", "--metadatacopies", "2", &loops[1].0]);
    with(&["vgcreate", "-q", "vg", &loops[0].0, &loops[1].0]);
    with(&["lvcreate", "--driverloaded", "n", "-an", "-Zn", "-Wn", "-n", "lin", "-l", "4", "vg"]);
    with(&[
        "lvcreate",
        "--driverloaded",
        "n",
        "-an",
        "-Zn",
        "-Wn",
        "-i",
        "2",
        "-I",
        "64",
        "-n",
        "str",
        "-l",
        "6",
        "vg",
    ]);
    // The file's pages and those of the loop device are different caches.
    loops.iter().for_each(Loop::flush);
    block_on(async {
        let node = open(&paths).await;
        let group = node.group("vg").await.expect("read");
        assert_eq!((group.pvs.len(), group.lv("lin").expect("there").extents()), (2, 4));
        assert_eq!(group.lv("str").expect("there").extents(), 6);
        node.create_volume("vg", "ours", 16 * MIB).await.expect("made");
        node.activate("vg", "str", quorate_clvm::Activation::Shared).await.expect("a striped volume is used");
    });
    let lvs = with(&["lvs", "--noheadings", "-o", "lv_name,stripes", "vg"]);
    let fields: Vec<&str> = lvs.split_whitespace().collect();
    assert_eq!(fields, ["lin", "1", "ours", "1", "str", "2"]);
    with(&["vgck", "vg"]);
    // A third copy of the metadata was kept up too: the tools have nothing to repair.
    let check = lvm(&dir, &["vgs", "--devices", &devices(&loops), "vg"]);
    assert!(!String::from_utf8_lossy(&check.stderr).contains("WARNING"), "{check:?}");
}

/// LVM2 leaves the second metadata area at the end of a device out of the extents it gives away, and keeps what is there
/// for a boot loader; so do we.
#[test]
fn a_physical_volume_as_lvm_can_make_it_is_taken_as_lvm_takes_it() {
    let test = "a_physical_volume_as_lvm_can_make_it_is_taken_as_lvm_takes_it";
    let dir = Dir::new("two");
    std::fs::create_dir(dir.0.join("lvm")).expect("created");
    let disks = [image(&dir, "a", 32), image(&dir, "b", 32)];
    let paths: Vec<&Path> = disks.iter().map(PathBuf::as_path).collect();
    let Some(loops) = loops(test, &paths) else { return };
    let with = |command: &[&str]| lvm_on(&dir, &loops, command);
    for l in &loops {
        with(&["pvcreate", "-q", "--metadatacopies", "2", "--bootloaderareasize", "1m", &l.0]);
    }
    with(&["vgcreate", "-q", "-s", "1m", "theirs", &loops[0].0]);
    loops.iter().for_each(Loop::flush);
    block_on(async {
        let node = open(&paths).await;
        node.create_group("ours", &["d1".to_owned()], MIB).await.expect("a group");
    });
    let vgs = with(&["vgs", "--noheadings", "-o", "vg_name,vg_extent_count"]);
    let fields: Vec<&str> = vgs.split_whitespace().collect();
    assert_eq!(fields, ["ours", "29", "theirs", "29"]);
    with(&["vgck", "ours"]);
    // What is kept for a boot loader stays, also when LVM2 changes our group.
    let kept = || {
        with(&["pvs", "--noheadings", "--nosuffix", "--units", "k", "-o", "vg_name,pv_ba_start,pv_ba_size"])
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(kept(), ["theirs", "1024.00", "1024.00", "ours", "1024.00", "1024.00"]);
    with(&["vgchange", "-q", "--addtag", "kept", "ours"]);
    assert_eq!(kept(), ["theirs", "1024.00", "1024.00", "ours", "1024.00", "1024.00"]);
    // Both copies on the device are those of the newest group.
    let check = lvm(&dir, &["vgs", "--devices", &devices(&loops), "ours"]);
    assert!(!String::from_utf8_lossy(&check.stderr).contains("WARNING"), "{check:?}");
}
