//! One node: every operation, and the image it leaves.

use super::harness::{User, cluster, cred, judge, run};
use quorate_gfs::FsError;
use quorate_gfs::face::{Filesystem, NodeKind, RenameFlags, SetAttr, XattrFlags};

const SIZE: u64 = 64 << 20;

#[test]
fn an_untouched_mount_leaves_a_clean_image() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        assert_eq!(nodes[0].gfs.unmount().await, Ok(()));
        judge("untouched", &disk.memory.bytes());
    });
}

#[test]
fn small_and_large_files_read_back() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let user = User(&nodes[0].gfs);
        let root = user.root();
        for (i, size) in [0_usize, 1, 3864, 3865, 4096, 5000, 1 << 20, (1 << 21) + 77].into_iter().enumerate()
        {
            let data: Vec<u8> = (0..size).map(|at| (at * 7 + i) as u8).collect();
            let ino = user.create(root, &format!("f{i}")).await.unwrap();
            assert_eq!(user.write(ino, 0, &data).await, Ok(size as u32));
            assert!(user.read(ino).await.unwrap() == data, "file of {size} bytes");
        }
        nodes[0].gfs.unmount().await.unwrap();
        judge("files", &disk.memory.bytes());
    });
}

#[test]
fn what_was_written_is_there_after_a_new_mount() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let user = User(&nodes[0].gfs);
        let dir = user.mkdir(user.root(), "dir").await.unwrap();
        let ino = user.create(dir, "file").await.unwrap();
        user.write(ino, 10_000, b"hello").await.unwrap();
        nodes[0].gfs.unmount().await.unwrap();
        let manager = quorate_dlm::local::LocalManager::new();
        let node = super::harness::Node::mount(&disk, &manager, 0).await;
        let user = User(&node.gfs);
        let ino = user.walk("dir/file").await.unwrap();
        let data = user.read(ino).await.unwrap();
        assert_eq!((data.len(), &data[10_000..]), (10_005, &b"hello"[..]));
        assert!(data[..10_000].iter().all(|&byte| byte == 0));
        node.gfs.unmount().await.unwrap();
    });
}

#[test]
fn a_directory_of_thousands_grows_and_shrinks() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let user = User(&nodes[0].gfs);
        let dir = user.mkdir(user.root(), "big").await.unwrap();
        let mut expected = Vec::new();
        for i in 0..5000 {
            let name = format!("a rather long name of a file, number {i}");
            user.create(dir, &name).await.unwrap();
            expected.push(name);
        }
        expected.sort();
        assert_eq!(user.names(dir).await.unwrap(), expected);
        for name in expected.iter().step_by(2) {
            nodes[0].gfs.unlink(dir, name.clone().into()).await.unwrap();
        }
        let left: Vec<_> = expected.iter().skip(1).step_by(2).cloned().collect();
        assert_eq!(user.names(dir).await.unwrap(), left);
        assert_eq!(nodes[0].gfs.rmdir(user.root(), b"big".to_vec()).await, Err(FsError::NotEmpty));
        let gone = user.mkdir(user.root(), "gone").await.unwrap();
        for i in 0..300 {
            user.create(gone, &format!("file {i} with some more letters")).await.unwrap();
        }
        for i in 0..300 {
            nodes[0].gfs.unlink(gone, format!("file {i} with some more letters").into()).await.unwrap();
        }
        nodes[0].gfs.rmdir(user.root(), b"gone".to_vec()).await.unwrap();
        nodes[0].gfs.forget(gone, 1);
        nodes[0].gfs.unmount().await.unwrap();
        judge("directory", &disk.memory.bytes());
    });
}

#[test]
fn truncation_frees_and_zeroes() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let user = User(&nodes[0].gfs);
        let ino = user.create(user.root(), "file").await.unwrap();
        let before = nodes[0].gfs.statfs().await.unwrap().free;
        let size = |size| SetAttr { size: Some(size), ..SetAttr::default() };
        user.write(ino, 0, &vec![7; 9 << 20]).await.unwrap();
        assert!(nodes[0].gfs.statfs().await.unwrap().free < before - 2300);
        nodes[0].gfs.setattr(cred(), ino, size(5000)).await.unwrap();
        nodes[0].gfs.setattr(cred(), ino, size(20_000)).await.unwrap();
        let data = user.read(ino).await.unwrap();
        assert!(data[..5000].iter().all(|&byte| byte == 7) && data[5000..].iter().all(|&byte| byte == 0));
        nodes[0].gfs.setattr(cred(), ino, size(0)).await.unwrap();
        assert_eq!(user.stat(ino).await.unwrap().attr.blocks, 8);
        assert_eq!(nodes[0].gfs.statfs().await.unwrap().free, before);
        user.write(ino, 3 << 40, b"far").await.unwrap();
        nodes[0].gfs.setattr(cred(), ino, size((3 << 40) + 1)).await.unwrap();
        assert_eq!(nodes[0].gfs.read(ino, 3 << 40, 10).await.unwrap(), b"f");
        nodes[0].gfs.unmount().await.unwrap();
        judge("truncate", &disk.memory.bytes());
    });
}

#[test]
fn links_nodes_and_attributes() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let (gfs, user) = (&nodes[0].gfs, User(&nodes[0].gfs));
        let root = user.root();
        let link = gfs.symlink(cred(), root, b"link".to_vec(), b"/some/where".to_vec()).await.unwrap();
        assert_eq!(gfs.readlink(link.attr.ino).await.unwrap(), b"/some/where");
        let ino = user.create(root, "one").await.unwrap();
        assert_eq!(gfs.link(ino, root, b"two".to_vec()).await.unwrap().attr.nlink, 2);
        gfs.mknod(cred(), root, b"dev".to_vec(), 0o600, NodeKind::CharDevice(5, 70_000)).await.unwrap();
        gfs.mknod(cred(), root, b"pipe".to_vec(), 0o600, NodeKind::Fifo).await.unwrap();
        let set = SetAttr { mode: Some(0o4711), uid: Some(5), ..SetAttr::default() };
        let attr = gfs.setattr(cred(), ino, set).await.unwrap().attr;
        assert_eq!((attr.mode, attr.uid, attr.gid), (0o104_711, 5, 100));
        let long = "x".repeat(256);
        assert_eq!(user.create(root, &long).await, Err(FsError::NameTooLong));
        assert_eq!(user.create(root, "one").await, Err(FsError::Exists));
        assert_eq!(gfs.unlink(root, b"nothing".to_vec()).await, Err(FsError::NotFound));
        gfs.unlink(root, b"one".to_vec()).await.unwrap();
        assert_eq!(user.stat(ino).await.unwrap().attr.nlink, 1);
        gfs.unmount().await.unwrap();
        judge("links", &disk.memory.bytes());
    });
}

#[test]
fn an_open_file_lives_on_without_a_name() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let (gfs, user) = (&nodes[0].gfs, User(&nodes[0].gfs));
        let before = gfs.statfs().await.unwrap();
        let ino = user.create(user.root(), "file").await.unwrap();
        let handle = gfs.open(ino, true).await.unwrap();
        user.write(ino, 0, &[1; 100_000]).await.unwrap();
        gfs.unlink(user.root(), b"file".to_vec()).await.unwrap();
        assert_eq!(user.read(ino).await.unwrap().len(), 100_000);
        gfs.forget(ino, 1);
        gfs.release(ino, handle, None).await.unwrap();
        gfs.unmount().await.unwrap();
        judge("unlinked", &disk.memory.bytes());
        let manager = quorate_dlm::local::LocalManager::new();
        let node = super::harness::Node::mount(&disk, &manager, 0).await;
        assert_eq!(node.gfs.statfs().await.unwrap(), before);
        node.gfs.unmount().await.unwrap();
    });
}

#[test]
fn renames_of_all_kinds() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let (gfs, user) = (&nodes[0].gfs, User(&nodes[0].gfs));
        let root = user.root();
        let plain = RenameFlags::default();
        let a = user.mkdir(root, "a").await.unwrap();
        let b = user.mkdir(root, "b").await.unwrap();
        let sub = user.mkdir(a, "sub").await.unwrap();
        let file = user.create(a, "file").await.unwrap();
        let other = user.create(b, "other").await.unwrap();
        user.write(other, 0, &[3; 10_000]).await.unwrap();
        let mv = |from, name: &'static str, to, new: &'static str, flags| {
            gfs.rename(from, name.into(), to, new.into(), flags)
        };
        assert_eq!(mv(a, "file", a, "name", plain).await, Ok(()));
        assert_eq!(
            mv(a, "name", b, "other", RenameFlags { no_replace: true, ..plain }).await,
            Err(FsError::Exists)
        );
        assert_eq!(mv(a, "name", b, "other", plain).await, Ok(()));
        assert_eq!(user.walk("b/other").await.unwrap(), file);
        assert_eq!(mv(a, "sub", b, "sub2", plain).await, Ok(()));
        assert_eq!(user.stat(a).await.unwrap().attr.nlink, 2);
        assert_eq!(user.stat(b).await.unwrap().attr.nlink, 3);
        assert!(matches!(mv(root, "b", sub, "x", plain).await, Err(FsError::Invalid(_))));
        assert_eq!(mv(b, "sub2", root, "b", plain).await, Err(FsError::NotEmpty));
        assert_eq!(mv(b, "other", root, "a", plain).await, Err(FsError::IsDirectory));
        assert_eq!(mv(root, "a", b, "other", plain).await, Err(FsError::NotDirectory));
        let c = user.create(root, "c").await.unwrap();
        assert_eq!(mv(root, "c", b, "sub2", RenameFlags { exchange: true, ..plain }).await, Ok(()));
        assert_eq!((user.walk("c").await.unwrap(), user.walk("b/sub2").await.unwrap()), (sub, c));
        let empty = user.mkdir(root, "empty").await.unwrap();
        assert_eq!(mv(root, "c", root, "empty", plain).await, Ok(()));
        gfs.forget(empty, 1);
        gfs.forget(other, 1);
        gfs.unmount().await.unwrap();
        judge("rename", &disk.memory.bytes());
    });
}

#[test]
fn extended_attributes_of_all_sizes() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 1).await;
        let (gfs, user) = (&nodes[0].gfs, User(&nodes[0].gfs));
        let ino = user.create(user.root(), "file").await.unwrap();
        let other = user.create(user.root(), "other").await.unwrap();
        let any = XattrFlags::default();
        for size in [0_usize, 5, 3000, 4000, 4072, 10_000, 65_536] {
            let value: Vec<u8> = (0..size).map(|at| at as u8).collect();
            for ino in [ino, other] {
                let name = format!("user.size{size}").into_bytes();
                gfs.setxattr(ino, name.clone(), value.clone(), any).await.unwrap();
                assert_eq!(gfs.getxattr(ino, name).await.unwrap(), value);
            }
        }
        for i in 0..200 {
            gfs.setxattr(ino, format!("trusted.n{i}").into(), vec![1; i], any).await.unwrap();
        }
        gfs.setxattr(ino, b"user.size5".to_vec(), vec![9; 9000], any).await.unwrap();
        gfs.setxattr(ino, b"user.size10000".to_vec(), b"short".to_vec(), any).await.unwrap();
        assert_eq!(gfs.getxattr(ino, b"user.size5".to_vec()).await.unwrap(), vec![9; 9000]);
        gfs.removexattr(ino, b"user.size65536".to_vec()).await.unwrap();
        assert_eq!(gfs.removexattr(ino, b"user.none".to_vec()).await, Err(FsError::NoAttribute));
        let names = gfs.listxattr(ino).await.unwrap();
        assert_eq!(names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).count(), 206);
        gfs.unlink(user.root(), b"other".to_vec()).await.unwrap();
        gfs.forget(other, 1);
        gfs.unmount().await.unwrap();
        judge("xattr", &disk.memory.bytes());
    });
}

#[test]
fn a_full_filesystem_says_so_and_stays_whole() {
    run(async {
        let (disk, nodes) = cluster(24 << 20, 1).await;
        let (gfs, user) = (&nodes[0].gfs, User(&nodes[0].gfs));
        let root = user.root();
        let mut full = 0;
        for i in 0..64 {
            let name = format!("f{i}");
            let Ok(ino) = user.create(root, &name).await else {
                full += 1;
                continue;
            };
            match user.write(ino, 0, &vec![i as u8; 1 << 20]).await {
                Ok(done) if done == 1 << 20 => {}
                Ok(_) | Err(FsError::NoSpace) => full += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(0 < full, "24 MiB do not hold 64");
        assert!(gfs.statfs().await.unwrap().free < 64);
        for i in 0..8 {
            let ino = user.walk(&format!("f{i}")).await.unwrap();
            gfs.unlink(root, format!("f{i}").into()).await.unwrap();
            gfs.forget(ino, 2);
        }
        let dir = user.mkdir(root, "again").await.unwrap();
        let ino = user.create(dir, "works").await.unwrap();
        assert_eq!(user.write(ino, 0, &vec![5; 4 << 20]).await, Ok(4 << 20));
        gfs.unmount().await.unwrap();
        judge("full", &disk.memory.bytes());
    });
}
