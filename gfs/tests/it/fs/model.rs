//! Random operations against a model in memory.

use super::harness::{Node, User, cluster, cred, judge, run};
use quorate_gfs::FsError;
use quorate_gfs::face::{Filesystem, Ino, RenameFlags, SetAttr};
use quorate_membership::Rng;
use quorate_membership::sim::seeds;
use std::collections::BTreeMap;

/// A directory's path ends in a slash; a file has contents, shared by hard links through the number.
#[derive(Default)]
struct Model {
    dirs: std::collections::BTreeSet<String>,
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Vec<u8>>,
    next: u64,
}

impl Model {
    fn dir(&self, rng: &mut Rng) -> String {
        let dirs: Vec<&String> = self.dirs.iter().collect();
        (*rng.pick(&dirs).unwrap()).clone()
    }
    fn path(&self, rng: &mut Rng) -> String {
        let names: Vec<&String> = self.names.keys().collect();
        match rng.pick(&names) {
            Some(name) if rng.chance_ppm(700_000) => (*name).clone(),
            _ => format!("{}name-{}", self.dir(rng), rng.below(60)),
        }
    }
}

fn split(path: &str) -> (&str, &str) {
    let at = path.trim_end_matches('/').rfind('/').unwrap();
    (&path[..=at], path[at + 1..].trim_end_matches('/'))
}

async fn parent(user: &User<'_>, path: &str) -> Ino {
    user.walk(split(path).0).await.unwrap()
}

async fn step(nodes: &[Node], model: &mut Model, rng: &mut Rng) {
    let node = rng.pick(&(0..nodes.len()).collect::<Vec<_>>()).copied().unwrap();
    let (gfs, user) = (&nodes[node].gfs, User(&nodes[node].gfs));
    match rng.below(12) {
        0..=3 => {
            let path = model.path(rng);
            let (dir, name) = (parent(&user, &path).await, split(&path).1);
            let ino = match (user.create(dir, name).await, model.names.contains_key(&path)) {
                (Ok(ino), false) => {
                    model.next += 1;
                    model.names.insert(path.clone(), model.next);
                    model.files.insert(model.next, Vec::new());
                    ino
                }
                (Err(FsError::Exists), true) => user.walk(&path).await.unwrap(),
                (result, known) => panic!("create {path}: {result:?}, in the model: {known}"),
            };
            let file = model.files.get_mut(&model.names[&path]).unwrap();
            let sizes = [10, 4000, 5000, 100_000, 3_000_000];
            let offset = rng.below(*rng.clone().pick(&sizes).unwrap());
            let len = rng.below(*rng.clone().pick(&[10, 5000, 300_000]).unwrap());
            let data: Vec<u8> = (0..len).map(|i| (i * 31 + offset) as u8).collect();
            assert_eq!(user.write(ino, offset, &data).await, Ok(len as u32));
            if 0 < len {
                let end = (offset + len) as usize;
                file.resize(file.len().max(end), 0);
                file[offset as usize..end].copy_from_slice(&data);
            }
            gfs.forget(ino, 1);
        }
        4 => {
            let path = model.path(rng);
            let result = gfs.unlink(parent(&user, &path).await, split(&path).1.into()).await;
            assert_eq!(result.is_ok(), model.names.remove(&path).is_some(), "unlink {path}: {result:?}");
        }
        5 => {
            let path = format!("{}dir-{}/", model.dir(rng), rng.below(4));
            if path.matches('/').count() < 6 {
                let result = user.mkdir(parent(&user, &path).await, split(&path).1).await;
                assert_eq!(result.is_ok(), model.dirs.insert(path.clone()), "mkdir {path}: {result:?}");
            }
        }
        6 => {
            let path = model.dir(rng);
            if path != "/" {
                let empty = !model.names.keys().any(|name| name.starts_with(&path))
                    && !model.dirs.iter().any(|dir| *dir != path && dir.starts_with(&path));
                let result = gfs.rmdir(parent(&user, &path).await, split(&path).1.into()).await;
                assert_eq!(result, if empty { Ok(()) } else { Err(FsError::NotEmpty) }, "rmdir {path}");
                if empty {
                    model.dirs.remove(&path);
                }
            }
        }
        7 | 8 => {
            let (from, to) = (model.path(rng), model.path(rng));
            let (from_dir, to_dir) = (parent(&user, &from).await, parent(&user, &to).await);
            let flags = RenameFlags::default();
            let result =
                gfs.rename(from_dir, split(&from).1.into(), to_dir, split(&to).1.into(), flags).await;
            assert_eq!(result.is_ok(), model.names.contains_key(&from), "rename {from} {to}: {result:?}");
            if let Some(&file) = model.names.get(&from)
                && model.names.get(&to) != Some(&file)
            {
                model.names.remove(&from);
                model.names.insert(to, file);
            }
        }
        9 => {
            let (from, to) = (model.path(rng), model.path(rng));
            if let (Some(&file), false) = (model.names.get(&from), model.names.contains_key(&to)) {
                let ino = user.walk(&from).await.unwrap();
                gfs.link(ino, parent(&user, &to).await, split(&to).1.into()).await.unwrap();
                model.names.insert(to, file);
            }
        }
        10 => {
            let path = model.path(rng);
            if let Some(file) = model.names.get(&path) {
                let size = rng.below(*rng.clone().pick(&[1, 5000, 1_000_000]).unwrap());
                let ino = user.walk(&path).await.unwrap();
                let set = SetAttr { size: Some(size), ..SetAttr::default() };
                gfs.setattr(cred(), ino, set).await.unwrap();
                model.files.get_mut(file).unwrap().resize(size as usize, 0);
            }
        }
        _ => compare(&user, model, rng.below(3) == 0).await,
    }
}

async fn compare(user: &User<'_>, model: &Model, contents: bool) {
    for dir in &model.dirs {
        let names = user.names(user.walk(dir).await.unwrap()).await.unwrap();
        let files =
            model.names.keys().filter(|name| split(name).0 == dir).map(|name| split(name).1.to_owned());
        let dirs = model.dirs.iter().filter(|other| *other != "/" && split(other).0 == dir);
        let mut expected: Vec<String> = files.chain(dirs.map(|dir| split(dir).1.to_owned())).collect();
        expected.sort();
        assert_eq!(names, expected, "{dir}");
    }
    if contents {
        for (path, file) in &model.names {
            let ino = user.walk(path).await.unwrap();
            assert!(user.read(ino).await.unwrap() == model.files[file], "contents of {path}");
            user.0.forget(ino, 1);
        }
    }
}

fn random(seed: u64, count: u32, steps: u64) {
    run(async {
        let mut rng = Rng::new(seed);
        let (disk, nodes) = cluster(160 << 20, count).await;
        let mut model = Model::default();
        model.dirs.insert("/".to_owned());
        for _ in 0..steps {
            step(&nodes, &mut model, &mut rng).await;
        }
        for node in &nodes {
            compare(&User(&node.gfs), &model, true).await;
        }
        assert!(!model.names.is_empty());
        for node in &nodes {
            node.gfs.unmount().await.unwrap();
        }
        judge(&format!("model-{count}-{seed}"), &disk.memory.bytes());
    });
}

#[test]
fn one_node_behaves_like_the_model() {
    for seed in seeds(0..6) {
        eprintln!("seed {seed}");
        random(seed, 1, 400);
    }
}

#[test]
fn two_nodes_behave_like_the_model() {
    for seed in seeds(100..106) {
        eprintln!("seed {seed}");
        random(seed, 2, 250);
    }
}
