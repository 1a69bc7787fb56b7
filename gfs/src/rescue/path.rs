//! Paths to inodes, and a walk over everything below one.

use super::RescueFs;
use crate::FsError;
use crate::face::Ino;
use crate::format::{BlockNo, FileType};
use crate::reader::Inode;
use std::collections::BTreeSet;

/// As many symbolic links as the kernel follows in one path.
const LINKS_MAX: u32 = 40;

impl RescueFs {
    /// The inode that a path from the root names. Symbolic links on the way are followed, the last component only with
    /// `follow`. An absolute target begins at this filesystem's root.
    ///
    /// # Errors
    /// `NotFound`, `NotDirectory`, too many links, or what reading gives.
    pub async fn resolve(&self, path: &[u8], follow: bool) -> Result<Inode, FsError> {
        let root = self.reader().superblock().root.addr;
        let mut stack = vec![root];
        // Components still to be walked, the next one last.
        let mut rest: Vec<Vec<u8>> = components(path);
        let mut links = 0;
        let mut current = self.reader().inode(root).await?;
        while let Some(name) = rest.pop() {
            if name == b".." {
                if 1 < stack.len() {
                    stack.pop();
                }
                let at = stack.last().copied().unwrap_or(root);
                current = self.reader().inode(at).await?;
                continue;
            }
            if !current.dinode.is_dir() {
                return Err(FsError::NotDirectory);
            }
            let (inum, _) = self.reader().lookup(&current, &name).await?.ok_or(FsError::NotFound)?;
            let found = self.reader().inode(inum.addr).await?;
            let is_link = found.dinode.file_type() == Some(FileType::Symlink);
            if is_link && (follow || !rest.is_empty()) {
                links += 1;
                if LINKS_MAX < links {
                    return Err(FsError::Invalid("too many symbolic links"));
                }
                let target = self.link_target(&found).await?;
                if target.first() == Some(&b'/') {
                    stack.truncate(1);
                    current = self.reader().inode(root).await?;
                }
                rest.extend(components(&target));
                continue;
            }
            stack.push(found.addr());
            current = found;
        }
        Ok(current)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// `Invalid` if it is none, or what reading gives.
    pub async fn link_target(&self, inode: &Inode) -> Result<Vec<u8>, FsError> {
        if inode.dinode.file_type() != Some(FileType::Symlink) {
            return Err(FsError::Invalid("not a symbolic link"));
        }
        Ok(self.reader().read(inode, 0, self.reader().size().usize()).await?)
    }

    /// A walk over `inode` and everything below it, parents first. Directories are listed in the order of their table.
    #[must_use]
    pub fn walk(&self, inode: &Inode) -> Walk<'_> {
        Walk { fs: self, todo: vec![(Vec::new(), inode.addr())], seen: BTreeSet::new() }
    }
}

fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let mut parts: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
    parts.reverse();
    parts
}

/// An inode met on a walk.
#[derive(Clone, Debug)]
pub struct WalkEntry {
    /// From where the walk began; empty for that itself.
    pub path: Vec<u8>,
    /// Its number.
    pub ino: Ino,
    /// What is there, or why it cannot be read; the walk goes on.
    pub inode: Result<Inode, FsError>,
}

/// A walk over a tree.
#[derive(Debug)]
pub struct Walk<'a> {
    fs: &'a RescueFs,
    todo: Vec<(Vec<u8>, BlockNo)>,
    /// Directories visited: a damaged tree may lead back.
    seen: BTreeSet<BlockNo>,
}

impl Walk<'_> {
    /// The next inode.
    pub async fn next(&mut self) -> Option<WalkEntry> {
        let (path, at) = self.todo.pop()?;
        let inode = self.enter(&path, at).await;
        Some(WalkEntry { path, ino: Ino(at.0), inode })
    }

    async fn enter(&mut self, path: &[u8], at: BlockNo) -> Result<Inode, FsError> {
        let inode = self.fs.reader().inode(at).await?;
        if !inode.dinode.is_dir() {
            return Ok(inode);
        }
        if !self.seen.insert(at) {
            return Err(FsError::Corrupt(format!("directory {at} is in more than one place")));
        }
        let entries = self.fs.reader().all_entries(&inode).await?;
        for entry in entries.into_iter().rev().filter(|entry| entry.name != b"." && entry.name != b"..") {
            let mut below = path.to_vec();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend_from_slice(&entry.name);
            self.todo.push((below, entry.inum.addr));
        }
        Ok(inode)
    }
}
