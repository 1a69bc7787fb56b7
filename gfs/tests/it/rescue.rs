//! Images opened read-only, without node or kernel.

use crate::fs::harness::{self, User, cluster, cred};
use crate::tools::{TempDir, block_on, mkfs_gfs2, run, sparse, tool};
use quorate_gfs::face::{Credentials, Filesystem, Ino, NodeKind, XattrFlags};
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions, MemoryDevice};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn open(path: &Path) -> RescueFs {
    let options = FileOptions { read_only: true, ..FileOptions::server() };
    let device = Device::new(FileDevice::open(path, options).unwrap());
    block_on(RescueFs::open(device, RescueOptions::default())).unwrap()
}

#[test]
fn fresh_images_of_every_block_size_and_format_open() {
    let test = "fresh_images_of_every_block_size_and_format_open";
    let Some(mkfs) = tool(test, "mkfs.gfs2") else { return };
    for (block, format) in [(512, 1802), (1024, 1801), (2048, 1802), (4096, 1801), (4096, 1802)] {
        let dir = TempDir::new();
        let image = dir.path("image");
        sparse(&image, 96 << 20);
        let (block_text, options) = (block.to_string(), format!("format={format}"));
        mkfs_gfs2(
            &mkfs,
            &image,
            &["-j", "2", "-J", "8", "-b", &block_text, "-o", &options, "-p", "lock_nolock"],
        );
        let before = std::fs::read(&image).unwrap();
        let fs = open(&image);
        assert_eq!(fs.reader().superblock().format, format);
        assert_eq!(fs.journals().len(), 2);
        assert!(fs.journals().iter().all(|journal| journal.blocks == 0 && journal.error.is_none()));
        let root = block_on(fs.getattr(fs.root())).unwrap();
        assert_eq!((root.attr.mode, root.attr.nlink), (0o040_755, 2));
        let names: Vec<_> =
            block_on(fs.readdir(fs.root(), 0, 10)).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, [b".".to_vec(), b"..".to_vec()]);
        let statfs = block_on(fs.statfs()).unwrap();
        assert_eq!(statfs.block_size, block);
        assert!(0 < statfs.free && statfs.free < statfs.blocks);
        // The system directory has files of all sizes; hashed at 512 bytes a block.
        let master = Ino(fs.reader().superblock().master.addr.0);
        let find = |dir, name: &str| block_on(fs.lookup(Credentials::default(), dir, name.into())).unwrap();
        let jindex = find(master, "jindex").attr.ino;
        let journal = find(jindex, "journal1").attr;
        assert_eq!(journal.size, 8 << 20);
        let bytes = block_on(fs.read(journal.ino, 4 << 20, block)).unwrap();
        assert_eq!(bytes[..8], [1, 0x16, 0x19, 0x70, 0, 0, 0, 8]);
        drop(fs);
        assert_eq!(std::fs::read(&image).unwrap(), before);
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + seed + at / 4096) as u8).collect()
}

/// An image as a node left it that died: synced, but its journal not closed.
fn crashed() -> Vec<u8> {
    harness::run(async {
        let (disk, nodes) = cluster(24 << 20, 1).await;
        let user = User(&nodes[0].gfs);
        let root = user.root();
        let dir = user.mkdir(root, "dir").await.unwrap();
        let file = user.create(dir, "file").await.unwrap();
        user.write(file, 0, &pattern(50_000, 1)).await.unwrap();
        let sparse = user.create(root, "sparse").await.unwrap();
        user.write(sparse, 3_000_000, &pattern(9000, 2)).await.unwrap();
        user.0.link(file, root, "hard".into()).await.unwrap();
        user.0.symlink(cred(), root, "link".into(), "dir/file".into()).await.unwrap();
        user.0.symlink(cred(), dir, "loop".into(), "/dir/loop".into()).await.unwrap();
        user.0.mknod(cred(), root, "fifo".into(), 0o600, NodeKind::Fifo).await.unwrap();
        let long = "n".repeat(200);
        user.create(dir, &long).await.unwrap();
        let many = user.mkdir(root, "many").await.unwrap();
        for i in 0..250 {
            user.create(many, &format!("entry-{i}")).await.unwrap();
        }
        for (name, len) in [("user.small", 10), ("user.big", 9000)] {
            user.0.setxattr(file, name.into(), pattern(len, 3), XattrFlags::default()).await.unwrap();
        }
        user.0.sync().await.unwrap();
        // Only in the journal: no sync has brought it to its place.
        for i in 0..20 {
            user.0.unlink(many, format!("entry-{i}").into()).await.unwrap();
        }
        user.0.fsyncdir(many).await.unwrap();
        disk.memory.bytes()
    })
}

#[test]
fn a_dead_nodes_journal_is_seen_replayed_and_the_device_stays() {
    let bytes = crashed();
    let device = Arc::new(MemoryDevice::from_bytes(bytes.clone()));
    let fs = block_on(RescueFs::open(Device::new(device.clone()), RescueOptions::default())).unwrap();
    assert!(fs.journals()[0].blocks > 0, "{:?}", fs.journals());
    let find = |path: &str| block_on(fs.resolve(path.as_bytes(), true));
    let read = |path: &str| {
        let inode = find(path).unwrap();
        block_on(fs.reader().read(&inode, 0, inode.dinode.size_bytes as usize)).unwrap()
    };
    assert!(read("/dir/file") == pattern(50_000, 1));
    assert!(read("link") == pattern(50_000, 1) && read("dir/../hard") == pattern(50_000, 1));
    let sparse = read("sparse");
    assert!(sparse[..3_000_000].iter().all(|&byte| byte == 0) && sparse[3_000_000..] == pattern(9000, 2));
    assert!(find("dir/loop").unwrap_err().to_string().contains("too many"));
    assert!(find("dir/file/x").is_err() && find("many/entry-3").is_err() && find("many/entry-20").is_ok());
    let file = Ino(find("hard").unwrap().addr().0);
    assert_eq!(block_on(fs.getxattr(file, b"user.big".to_vec())), Ok(pattern(9000, 3)));
    assert_eq!(block_on(fs.listxattr(file)).unwrap(), b"user.small\0user.big\0");
    // Listed in pieces of any size, every name comes once.
    let many = Ino(find("many").unwrap().addr().0);
    for max in [1, 7, 1000] {
        let (mut cookie, mut names) = (0, Vec::new());
        loop {
            let entries = block_on(fs.readdir(many, cookie, max)).unwrap();
            let Some(last) = entries.last() else { break };
            cookie = last.cookie;
            names.extend(entries.iter().map(|entry| entry.name.clone()));
        }
        names.sort();
        assert_eq!(names.len(), 2 + 230);
        names.dedup();
        assert_eq!(names.len(), 2 + 230);
    }
    assert!(device.bytes() == bytes, "the device was changed");
}

#[test]
fn an_archive_of_an_image_unpacks() {
    let test = "an_archive_of_an_image_unpacks";
    let Some(tar) = tool(test, "tar") else { return };
    let device = Device::new(MemoryDevice::from_bytes(crashed()));
    let fs = block_on(RescueFs::open(device, RescueOptions::default())).unwrap();
    let root = block_on(fs.resolve(b"/", true)).unwrap();
    let mut archive = Vec::new();
    let report = block_on(fs.tar(&root, b"", &mut archive)).unwrap();
    assert_eq!(report.damaged, []);
    assert_eq!(report.bytes, archive.len() as u64);
    let dir = TempDir::new();
    std::fs::write(dir.path("a.tar"), &archive).unwrap();
    std::fs::create_dir(dir.path("out")).unwrap();
    let unpack = |args: &[&str]| {
        let output = Command::new(&tar).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let (archive, out) = (dir.path("a.tar"), dir.path("out"));
    let (archive, out) = (archive.to_str().unwrap(), out.to_str().unwrap());
    let list = unpack(&["tvf", archive, "--xattrs", "--numeric-owner"]);
    assert_eq!(list.lines().count() as u64, report.members);
    assert!(list.lines().any(|line| line.starts_with("prw-------") && line.contains("1000/100")), "{list}");
    unpack(&["xf", archive, "-C", out, "--no-same-owner"]);
    let read = |path: &str| std::fs::read(dir.path("out").join(path)).unwrap();
    assert!(read("dir/file") == pattern(50_000, 1) && read("hard") == pattern(50_000, 1));
    assert!(read("link") == pattern(50_000, 1) && read("sparse").len() == 3_009_000);
    assert!(read(&format!("dir/{}", "n".repeat(200))).is_empty());
    assert_eq!(std::fs::read_dir(dir.path("out/many")).unwrap().count(), 230);
}

/// For an image that a kernel filled: `QUORATE_GFS_IMAGE=IMAGE QUORATE_GFS_TAR=OUTPUT` writes it as an archive.
#[test]
fn a_kernels_image_becomes_an_archive() {
    let (Ok(image), Ok(output)) = (std::env::var("QUORATE_GFS_IMAGE"), std::env::var("QUORATE_GFS_TAR"))
    else {
        return;
    };
    let fs = open(Path::new(&image));
    for journal in fs.journals() {
        eprintln!("journal {}: {} blocks", journal.jid, journal.blocks);
    }
    let root = block_on(fs.resolve(b"/", true)).unwrap();
    let mut file = std::fs::File::create(&output).unwrap();
    let report = block_on(fs.tar(&root, b"", &mut file)).unwrap();
    eprintln!("{report:?}");
    assert_eq!(report.damaged, []);
    let Some(tar) = tool("a_kernels_image_becomes_an_archive", "tar") else { return };
    let (status, text) = run(&tar, &["tvf", &output]);
    assert!(status.status.success(), "{text}");
}
