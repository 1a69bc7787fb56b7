//! Crashes at any moment: what is left replays, passes fsck.gfs2, and has everything that was acknowledged as durable.

use super::harness::{Disk, Node, User, cluster, judge_after_crash, run};
use quorate_dlm::local::LocalManager;
use quorate_gfs::FsError;
use quorate_gfs::face::{Filesystem, RenameFlags};
use quorate_gfs::fs::MountOptions;
use quorate_membership::Rng;
use quorate_membership::sim::seeds;
use std::collections::BTreeMap;

const SIZE: u64 = 48 << 20;

type Files = BTreeMap<String, Vec<u8>>;

async fn workload(node: &Node, rng: &mut Rng, live: &mut Files, steps: u64) -> Files {
    let (gfs, user) = (&node.gfs, User(&node.gfs));
    let root = user.root();
    // What must be there after a crash: files whose last change was followed by an fsync.
    let mut durable = Files::new();
    for step in 0..steps {
        let name = format!("file {} of a small set of names", rng.below(40));
        match rng.below(10) {
            0..=4 => {
                let ino = match user.walk(&name).await {
                    Ok(ino) => ino,
                    Err(FsError::NotFound) => user.create(root, &name).await.unwrap(),
                    Err(error) => panic!("{error}"),
                };
                let data = vec![step as u8; rng.below(60_000) as usize];
                let file = live.entry(name.clone()).or_default();
                file.resize(file.len().max(data.len()), 0);
                file[..data.len()].copy_from_slice(&data);
                durable.remove(&name);
                user.write(ino, 0, &data).await.unwrap();
                if rng.chance_ppm(400_000) {
                    gfs.fsync(ino, false).await.unwrap();
                    durable.insert(name.clone(), live[&name].clone());
                }
            }
            5 | 6 => {
                durable.remove(&name);
                live.remove(&name);
                let _ = gfs.unlink(root, name.clone().into()).await;
            }
            7 => {
                let other = format!("file {} of a small set of names", rng.below(40));
                durable.remove(&name);
                durable.remove(&other);
                let moved = gfs
                    .rename(root, name.clone().into(), root, other.clone().into(), RenameFlags::default())
                    .await;
                if moved.is_ok() && name != other {
                    let data = live.remove(&name).unwrap_or_default();
                    live.insert(other, data);
                }
            }
            8 => {
                let _ = user.mkdir(root, &format!("dir {}", rng.below(20))).await;
                let _ = gfs.rmdir(root, format!("dir {}", rng.below(20)).into()).await;
            }
            _ => {
                if rng.chance_ppm(200_000) {
                    gfs.sync().await.unwrap();
                    durable = live.clone();
                }
            }
        }
    }
    durable
}

async fn verify(image: Vec<u8>, durable: &BTreeMap<String, Vec<u8>>, name: &str) {
    let disk = Disk::new(image);
    let mut options = MountOptions::new(0);
    options.recover_all = true;
    let node = Node::mount_with(&disk, &LocalManager::new(), options).await;
    let user = User(&node.gfs);
    for (file, data) in durable {
        let ino = user.walk(file).await.unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
        assert!(user.read(ino).await.unwrap() == *data, "{name}: contents of {file}");
    }
    node.gfs.reclaim().await.unwrap();
    node.gfs.unmount().await.unwrap();
    judge_after_crash(name, &disk.memory.bytes());
}

#[test]
fn crash_images_replay_and_keep_what_was_synced() {
    for seed in seeds(0..8) {
        run(async {
            let mut rng = Rng::new(seed);
            let (disk, nodes) = cluster(SIZE, 1).await;
            let mut live = Files::new();
            for round in 0..3 {
                let durable = workload(&nodes[0], &mut rng, &mut live, 60).await;
                let image = disk.memory.crashed(if round == 0 { None } else { Some(&mut rng) });
                verify(image, &durable, &format!("crash-{seed}-{round}")).await;
            }
            nodes[0].gfs.unmount().await.unwrap();
        });
    }
}

#[test]
fn crash_images_of_three_nodes_at_work_replay() {
    for seed in seeds(0..3) {
        run(async {
            let mut rng = Rng::new(seed);
            let (disk, nodes) = cluster(96 << 20, 3).await;
            let nodes = std::sync::Arc::new(nodes);
            let mut tasks = Vec::new();
            for who in 0..3 {
                let nodes = nodes.clone();
                let mut rng = rng.child();
                tasks.push(tokio::spawn(async move {
                    let (gfs, user) = (&nodes[who].gfs, User(&nodes[who].gfs));
                    let root = user.root();
                    for step in 0..80_u64 {
                        let name = format!("a name of some length, number {}", rng.below(30));
                        match rng.below(5) {
                            0..=2 => {
                                let ino = match user.create(root, &name).await {
                                    Err(FsError::Exists) => match user.walk(&name).await {
                                        Err(FsError::NotFound) => continue,
                                        other => other.unwrap(),
                                    },
                                    other => other.unwrap(),
                                };
                                let data = vec![step as u8; rng.below(20_000) as usize];
                                user.write(ino, rng.below(5000), &data).await.unwrap();
                                if rng.chance_ppm(200_000) {
                                    gfs.fsync(ino, false).await.unwrap();
                                }
                                gfs.forget(ino, 1);
                            }
                            3 => drop(gfs.unlink(root, name.into()).await),
                            _ => {
                                let other = format!("a name of some length, number {}", rng.below(30));
                                let _ = gfs
                                    .rename(root, name.into(), root, other.into(), RenameFlags::default())
                                    .await;
                            }
                        }
                    }
                }));
            }
            for round in 0..4 {
                for _ in 0..rng.below(200) {
                    tokio::task::yield_now().await;
                }
                let image = disk.memory.crashed(Some(&mut rng));
                verify(image, &BTreeMap::new(), &format!("three-{seed}-{round}")).await;
            }
            for task in tasks {
                task.await.unwrap();
            }
            for node in nodes.iter() {
                node.gfs.unmount().await.unwrap();
            }
            super::harness::judge(&format!("three-{seed}"), &disk.memory.bytes());
        });
    }
}
