//! The real directory tree that is copied in: found, or generated from the seed; and its fingerprint.

use crate::access::{Access, Kind};
use quorate_membership::Rng;
use ring::digest::{Context, SHA256};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How many files the demo wants at least.
pub(crate) const FILES_MIN: usize = 2000;

/// How many files it copies at most, so that the whole run stays under two minutes.
const FILES_MAX: usize = 2600;

/// How many bytes it copies at most.
const BYTES_MAX: u64 = 48 << 20;

/// A file or symbolic link of the tree: its path there and what it holds.
#[derive(Debug)]
pub(crate) enum Node {
    Directory,
    File(PathBuf),
    Link(String),
}

/// What is copied: paths below the tree's root, parents before children.
pub(crate) type Tree = BTreeMap<String, Node>;

/// SHA-256 by path.
pub(crate) type Fingerprint = BTreeMap<String, [u8; 32]>;

/// Where the tree comes from, in words, and the tree.
pub(crate) fn find(input: Option<&Path>, scratch: &Path, seed: u64) -> io::Result<(String, Tree)> {
    if let Some(dir) = input {
        let tree = scan(dir)?;
        return Ok((dir.display().to_string(), tree));
    }
    if let Some(dir) = cargo_sources() {
        let tree = scan(&dir)?;
        if FILES_MIN <= files(&tree) {
            return Ok(("sources that cargo has downloaded".into(), tree));
        }
    }
    let dir = scratch.join("generated-tree");
    generate(&dir, seed)?;
    Ok((format!("a tree generated from seed {seed}"), scan(&dir)?))
}

pub(crate) fn files(tree: &Tree) -> usize {
    tree.values().filter(|n| matches!(n, Node::File(_))).count()
}

fn cargo_sources() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cargo")))?;
    let mut sources: Vec<PathBuf> =
        fs::read_dir(home.join("registry/src")).ok()?.flatten().map(|e| e.path()).collect();
    sources.sort();
    sources.into_iter().next()
}

/// Reads a tree up to the limits, in order of name.
fn scan(root: &Path) -> io::Result<Tree> {
    let mut tree = Tree::new();
    let (mut count, mut bytes) = (0, 0);
    let mut folders = vec![(root.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        let mut entries = fs::read_dir(&folder)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot list {}: {e}", folder.display())))?
            .collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = format!("{prefix}/{name}");
            let metadata = entry.path().symlink_metadata()?;
            if metadata.is_dir() {
                tree.insert(path.clone(), Node::Directory);
                folders.push((entry.path(), path));
            } else if metadata.is_symlink() {
                let target = fs::read_link(entry.path())?;
                tree.insert(path, Node::Link(target.to_string_lossy().into_owned()));
            } else if metadata.is_file() && bytes + metadata.len() <= BYTES_MAX {
                bytes += metadata.len();
                count += 1;
                tree.insert(path, Node::File(entry.path()));
            }
            if FILES_MAX <= count {
                return Ok(tree);
            }
        }
    }
    Ok(tree)
}

fn generate(dir: &Path, seed: u64) -> io::Result<()> {
    let mut random = Rng::new(seed);
    for folder in 0..50 {
        let folder = dir.join(format!("folder-{folder:02}"));
        fs::create_dir_all(&folder)?;
        for file in 0..44 {
            let len = random.below(40_000) as usize;
            let data: Vec<u8> = (0..len).map(|_| random.next_u64() as u8).collect();
            fs::write(folder.join(format!("file-{file:02}")), data)?;
        }
    }
    Ok(())
}

/// The fingerprint of what is copied, from the source.
pub(crate) fn fingerprint_of_source(tree: &Tree) -> io::Result<Fingerprint> {
    let mut all = Fingerprint::new();
    for (path, node) in tree {
        match node {
            Node::Directory => (),
            Node::File(source) => {
                all.insert(path.clone(), sha256(&fs::read(source)?));
            }
            Node::Link(target) => {
                all.insert(path.clone(), sha256(target.as_bytes()));
            }
        }
    }
    Ok(all)
}

/// Copies the tree below `to`.
pub(crate) fn copy(
    tree: &Tree,
    access: &mut Access,
    to: &str,
    mut progress: impl FnMut(usize),
) -> io::Result<()> {
    access.make_dir(to)?;
    for (done, (path, node)) in tree.iter().enumerate() {
        let target = format!("{to}{path}");
        let outcome = match node {
            Node::Directory => access.make_dir(&target),
            Node::File(source) => access.write_file(&target, &fs::read(source)?, false),
            Node::Link(link) => access.symlink(link, &target),
        };
        outcome.map_err(|e| io::Error::new(e.kind(), format!("copying {target}: {e}")))?;
        progress(done + 1);
    }
    Ok(())
}

/// The fingerprint of what a node sees below `root`.
pub(crate) fn fingerprint(access: &mut Access, root: &str) -> io::Result<Fingerprint> {
    let mut all = Fingerprint::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in access.list(&format!("{root}{folder}"))? {
            let path = format!("{folder}/{}", entry.name);
            let seen = format!("{root}{path}");
            let context = |e: io::Error| io::Error::new(e.kind(), format!("reading {seen}: {e}"));
            match entry.kind {
                Kind::Directory => folders.push(path),
                Kind::File => {
                    let data = access.read_file(&seen).map_err(context)?;
                    all.insert(path, sha256(&data));
                }
                Kind::Link => {
                    let target = access.read_link(&seen).map_err(context)?;
                    all.insert(path, sha256(&target));
                }
            }
        }
    }
    Ok(all)
}

fn sha256(data: &[u8]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(data);
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
