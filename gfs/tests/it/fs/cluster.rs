//! Several nodes at work in one filesystem.

use super::harness::{Node, User, cluster, cred, judge, run};
use quorate_gfs::FsError;
use quorate_gfs::face::{Filesystem, LockKind, LockOwner, RenameFlags};
use quorate_gnbd::MemoryDevice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SIZE: u64 = 96 << 20;

async fn unmount(nodes: &[Node]) {
    for node in nodes {
        assert_eq!(node.gfs.unmount().await, Ok(()));
    }
}

#[test]
fn every_node_sees_at_once_what_another_wrote() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 3).await;
        let users: Vec<User<'_>> = nodes.iter().map(|node| User(&node.gfs)).collect();
        let root = users[0].root();
        users[0].create(root, "file").await.unwrap();
        let mut inos = Vec::new();
        for user in &users {
            inos.push(user.walk("file").await.unwrap());
        }
        for round in 0..30_usize {
            let writer = round % 3;
            let data = vec![round as u8; 100 + round * 1000];
            users[writer].write(inos[writer], 0, &data).await.unwrap();
            for reader in 0..3 {
                assert!(
                    users[reader].read(inos[reader]).await.unwrap() == data,
                    "round {round}, node {reader}"
                );
            }
        }
        unmount(&nodes).await;
        judge("seen", &disk.memory.bytes());
    });
}

#[test]
fn files_that_another_node_wrote_are_given_up_together() {
    const FILES: u64 = 150;
    run(async {
        let (disk, nodes) = cluster(SIZE, 2).await;
        let (writer, reader) = (User(&nodes[0].gfs), User(&nodes[1].gfs));
        let dir = writer.mkdir(writer.root(), "dir").await.unwrap();
        for i in 0..FILES {
            let ino = writer.create(dir, &format!("{i}")).await.unwrap();
            writer.write(ino, 0, &vec![i as u8; 5000]).await.unwrap();
        }
        let before = disk.flushes.load(Ordering::Relaxed);
        for i in 0..FILES {
            let ino = reader.walk(&format!("dir/{i}")).await.unwrap();
            assert!(reader.read(ino).await.unwrap() == vec![i as u8; 5000], "file {i}");
        }
        let flushes = disk.flushes.load(Ordering::Relaxed) - before;
        println!("{FILES} files read on another node: {flushes} flushes of the device");
        assert!(flushes < FILES / 2, "{flushes} flushes for {FILES} files");
        unmount(&nodes).await;
        judge("together", &disk.memory.bytes());
    });
}

#[test]
fn nodes_create_and_remove_in_one_directory() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 3).await;
        let nodes = Arc::new(nodes);
        let root = nodes[0].gfs.root();
        let mut tasks = Vec::new();
        for who in 0..3 {
            let nodes = nodes.clone();
            tasks.push(tokio::spawn(async move {
                let user = User(&nodes[who].gfs);
                for i in 0..120 {
                    let ino = user
                        .create(root, &format!("file {i} of node {who}, with a long name"))
                        .await
                        .unwrap();
                    user.write(ino, 0, format!("{who} {i}").as_bytes()).await.unwrap();
                    nodes[who].gfs.forget(ino, 1);
                    if i % 3 == 0 {
                        let name = format!("file {i} of node {who}, with a long name");
                        nodes[who].gfs.unlink(root, name.into()).await.unwrap();
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        for node in nodes.iter() {
            assert_eq!(User(&node.gfs).names(root).await.unwrap().len(), 3 * 80);
        }
        unmount(&nodes).await;
        judge("create", &disk.memory.bytes());
    });
}

#[test]
fn appends_of_all_nodes_are_all_there() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 3).await;
        let nodes = Arc::new(nodes);
        let root = nodes[0].gfs.root();
        User(&nodes[0].gfs).create(root, "log").await.unwrap();
        let mut tasks = Vec::new();
        for who in 0..3_u32 {
            let nodes = nodes.clone();
            tasks.push(tokio::spawn(async move {
                let user = User(&nodes[who as usize].gfs);
                let ino = user.walk("log").await.unwrap();
                for i in 0..150_u32 {
                    assert_eq!(user.append(ino, &[who.to_be_bytes(), i.to_be_bytes()].concat()).await, Ok(8));
                    if i % 10 == 0 {
                        nodes[who as usize].gfs.fsync(ino, false).await.unwrap();
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        let user = User(&nodes[1].gfs);
        let data = user.read(user.walk("log").await.unwrap()).await.unwrap();
        let mut records: Vec<&[u8]> = data.chunks(8).collect();
        assert_eq!(records.len(), 450);
        for who in 0..3_u32 {
            let own: Vec<_> = records.iter().filter(|record| record[..4] == who.to_be_bytes()).collect();
            assert!(own.iter().enumerate().all(|(i, record)| record[4..] == (i as u32).to_be_bytes()));
        }
        records.dedup();
        unmount(&nodes).await;
        judge("append", &disk.memory.bytes());
    });
}

#[test]
fn renames_between_directories_by_all_nodes_lose_nothing() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 3).await;
        let nodes = Arc::new(nodes);
        let user = User(&nodes[0].gfs);
        for name in ["a", "b"] {
            let dir = user.mkdir(user.root(), name).await.unwrap();
            for i in 0..10 {
                user.mkdir(dir, &format!("{name}{i}")).await.unwrap();
            }
        }
        let mut tasks = Vec::new();
        for who in 0..3_usize {
            let nodes = nodes.clone();
            tasks.push(tokio::spawn(async move {
                let user = User(&nodes[who].gfs);
                let dirs = [user.walk("a").await.unwrap(), user.walk("b").await.unwrap()];
                let mut moved = 0;
                for i in 0..60_usize {
                    let name = format!("{}{}", ["a", "b"][(i + who) % 2], (i * 7 + who) % 10);
                    let (from, to) = (dirs[i / 2 % 2], dirs[1 - i / 2 % 2]);
                    let result = nodes[who]
                        .gfs
                        .rename(from, name.clone().into(), to, name.into(), RenameFlags::default())
                        .await;
                    match result {
                        Ok(()) => moved += 1,
                        Err(FsError::NotFound) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                moved
            }));
        }
        let mut moved = 0;
        for task in tasks {
            moved += task.await.unwrap();
        }
        assert!(10 < moved);
        let user = User(&nodes[2].gfs);
        let mut all = user.names(user.walk("a").await.unwrap()).await.unwrap();
        all.extend(user.names(user.walk("b").await.unwrap()).await.unwrap());
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 20);
        unmount(&nodes).await;
        judge("moves", &disk.memory.bytes());
    });
}

#[test]
fn a_file_open_elsewhere_lives_until_it_is_closed_there() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 2).await;
        let users: Vec<User<'_>> = nodes.iter().map(|node| User(&node.gfs)).collect();
        let root = users[0].root();
        let ino = users[0].create(root, "file").await.unwrap();
        users[0].write(ino, 0, &[9; 50_000]).await.unwrap();
        let there = users[1].walk("file").await.unwrap();
        let handle = nodes[1].gfs.open(there, false).await.unwrap();
        nodes[0].gfs.unlink(root, b"file".to_vec()).await.unwrap();
        nodes[0].gfs.forget(ino, 1);
        assert_eq!(users[1].read(there).await.unwrap(), vec![9; 50_000]);
        assert_eq!(users[1].stat(there).await.unwrap().attr.nlink, 0);
        nodes[1].gfs.forget(there, 1);
        nodes[1].gfs.release(there, handle, None).await.unwrap();
        unmount(&nodes).await;
        judge("open", &disk.memory.bytes());
    });
}

#[test]
fn flock_excludes_between_nodes_and_waits() {
    run(async {
        let (_disk, nodes) = cluster(SIZE, 2).await;
        let nodes = Arc::new(nodes);
        let users: Vec<User<'_>> = nodes.iter().map(|node| User(&node.gfs)).collect();
        users[0].create(users[0].root(), "file").await.unwrap();
        let inos = [users[0].walk("file").await.unwrap(), users[1].walk("file").await.unwrap()];
        let (one, two) = (&nodes[0].gfs, &nodes[1].gfs);
        one.flock(inos[0], LockOwner(1), LockKind::Write, true).await.unwrap();
        assert_eq!(one.flock(inos[0], LockOwner(2), LockKind::Read, false).await, Err(FsError::WouldBlock));
        assert_eq!(two.flock(inos[1], LockOwner(1), LockKind::Read, false).await, Err(FsError::WouldBlock));
        let waiter = {
            let (nodes, ino) = (nodes.clone(), inos[1]);
            tokio::spawn(async move { nodes[1].gfs.flock(ino, LockOwner(1), LockKind::Write, true).await })
        };
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        one.flock(inos[0], LockOwner(1), LockKind::Unlock, true).await.unwrap();
        waiter.await.unwrap().unwrap();
        assert_eq!(one.flock(inos[0], LockOwner(1), LockKind::Read, false).await, Err(FsError::WouldBlock));
        two.flock(inos[1], LockOwner(1), LockKind::Unlock, true).await.unwrap();
        one.flock(inos[0], LockOwner(1), LockKind::Read, false).await.unwrap();
        two.flock(inos[1], LockOwner(1), LockKind::Read, false).await.unwrap();
        unmount(&nodes).await;
    });
}

#[test]
fn a_counter_under_flock_counts_every_increment() {
    run(async {
        let (_disk, nodes) = cluster(SIZE, 3).await;
        let nodes = Arc::new(nodes);
        let user = User(&nodes[0].gfs);
        let ino = user.create(user.root(), "counter").await.unwrap();
        user.write(ino, 0, b"0").await.unwrap();
        let mut tasks = Vec::new();
        for who in 0..3 {
            let nodes = nodes.clone();
            tasks.push(tokio::spawn(async move {
                let gfs = &nodes[who].gfs;
                let user = User(gfs);
                let ino = user.walk("counter").await.unwrap();
                for _ in 0..40 {
                    gfs.flock(ino, LockOwner(7), LockKind::Write, true).await.unwrap();
                    let text = String::from_utf8(user.read(ino).await.unwrap()).unwrap();
                    let next = text.parse::<u32>().unwrap() + 1;
                    user.write(ino, 0, next.to_string().as_bytes()).await.unwrap();
                    gfs.flock(ino, LockOwner(7), LockKind::Unlock, true).await.unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(user.read(ino).await.unwrap(), b"120");
        unmount(&nodes).await;
    });
}

#[test]
fn a_survivor_replays_the_journal_of_a_dead_node() {
    run(async {
        let (disk, nodes) = cluster(SIZE, 2).await;
        let users: Vec<User<'_>> = nodes.iter().map(|node| User(&node.gfs)).collect();
        let root = users[0].root();
        let dir = users[0].mkdir(root, "dir").await.unwrap();
        for i in 0..50 {
            let ino = users[0].create(dir, &format!("file {i}")).await.unwrap();
            users[0].write(ino, 0, &vec![i as u8; 5000]).await.unwrap();
            nodes[0].gfs.fsync(ino, false).await.unwrap();
        }
        nodes[0].kill();
        // The lock table of the test grants at once; what a cluster does in between is its business.
        let replayed = nodes[1].gfs.recover_journal(0).await.unwrap();
        assert!(!replayed.was_clean && 0 < replayed.blocks);
        for i in 0..50 {
            let ino = users[1].walk(&format!("dir/file {i}")).await.unwrap();
            assert!(users[1].read(ino).await.unwrap() == vec![i as u8; 5000], "file {i}");
        }
        users[1].create(users[1].walk("dir").await.unwrap(), "after").await.unwrap();
        assert!(nodes[1].gfs.recover_journal(0).await.unwrap().was_clean);
        assert_eq!(nodes[1].gfs.unmount().await, Ok(()));
        judge("survivor", &disk.memory.bytes());
        let _ = cred();
    });
}

#[test]
fn a_survivor_that_dies_at_any_write_of_a_replay_leaves_the_numbers_right() {
    run(async {
        for (fence_after, own_work) in (0..).map(|n| (n, n % 2 == 0)) {
            let (disk, nodes) = cluster(32 << 20, 3).await;
            let users: Vec<User<'_>> = nodes.iter().map(|node| User(&node.gfs)).collect();
            let root = users[0].root();
            // The second survivor has numbers of its own that have not yet been added, the first one in every other round.
            users[2].mkdir(root, "third").await.unwrap();
            if own_work {
                let second = users[1].mkdir(root, "second").await.unwrap();
                users[1].create(second, "file").await.unwrap();
                nodes[1].gfs.sync().await.unwrap();
            }
            let dir = users[0].mkdir(root, "dir").await.unwrap();
            for i in 0..5 {
                let ino = users[0].create(dir, &format!("file {i}")).await.unwrap();
                users[0].write(ino, 0, &vec![i as u8; 50_000]).await.unwrap();
            }
            nodes[0].gfs.sync().await.unwrap();
            nodes[0].kill();
            nodes[1].fence_after(fence_after);
            let died = nodes[1].gfs.recover_journal(0).await.is_err();
            nodes[1].kill();
            // The dead replayer's journal first: whatever it had of the common numbers is in place then, and others add
            // theirs (at their unmount) before the first journal is replayed.
            assert!(!nodes[2].gfs.recover_journal(1).await.unwrap().was_clean || !own_work);
            assert_eq!(nodes[2].gfs.unmount().await, Ok(()));
            let third = Node::mount(&disk, &nodes[2].manager, 2).await;
            assert_eq!(third.gfs.recover_journal(0).await.unwrap().was_clean, !died);
            let user = User(&third.gfs);
            for i in 0..5 {
                let ino = user.walk(&format!("dir/file {i}")).await.unwrap();
                assert!(user.read(ino).await.unwrap() == vec![i as u8; 50_000], "file {i}");
            }
            assert_eq!(third.gfs.unmount().await, Ok(()));
            let image = disk.memory.bytes();
            let report = quorate_gfs::fsck::fsck(MemoryDevice::from_bytes(image.clone())).await.unwrap();
            assert!(report.is_clean(), "{fence_after}: {:#?}", report.problems);
            if !died {
                judge("replayer", &image);
                assert!(8 <= fence_after, "a replay of {fence_after} writes");
                break;
            }
        }
    });
}
