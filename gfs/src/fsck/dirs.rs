//! Directories: hash table, leaves, entries; and whether every inode is where its number of links says.

use super::{Check, Problem};
use crate::format::{
    BlockNo, DINODE_BYTES, Dirent, Dirents, FileType, LEAF_BYTES, Leaf, META_HEADER_BYTES, MetaType,
    indirect_pointer, name_hash, pointer,
};
use crate::reader::{Inode, ReadError};
use quorate_gnbd::BlockDevice;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

impl<D: BlockDevice> Check<D> {
    /// The hash table, as far as it can be read.
    async fn table(&mut self, dir: &Inode) -> Result<Vec<BlockNo>, ReadError> {
        let slots = 1_usize << dir.dinode.depth;
        if dir.dinode.height == 0 {
            return Ok((0..slots).filter_map(|index| pointer(&dir.block, index)).collect());
        }
        let per_block = (self.reader.size().usize() - META_HEADER_BYTES) / 8;
        let extents = self.reader.extents(dir, 0, slots.div_ceil(per_block) as u64).await;
        let mut table = Vec::with_capacity(slots);
        for extent in self.noted(dir.addr(), extents)?.unwrap_or_default() {
            let Some(start) = extent.start else { break };
            for index in 0..extent.count {
                let block = self.reader.meta(BlockNo(start.0 + index), MetaType::HeaderedData).await;
                let Some(block) = self.noted(dir.addr(), block)? else { return Ok(table) };
                table.extend((0..per_block).filter_map(|slot| indirect_pointer(&block, slot)));
            }
        }
        table.truncate(slots);
        Ok(table)
    }

    /// Takes the leaves of a hashed directory and counts them.
    pub(super) async fn leaves(&mut self, dir: &Inode) -> Result<u64, ReadError> {
        let at = dir.addr();
        let table = self.table(dir).await?;
        if table.len() != 1 << dir.dinode.depth {
            self.directory(at, "the hash table is not whole");
        }
        let mut count = 0;
        let mut last = BlockNo::NONE;
        for leaf in table {
            if leaf == last {
                continue;
            }
            last = leaf;
            let mut next = leaf;
            while !next.is_none() && self.take(at, next) {
                count += 1;
                let block = self.reader.meta(next, MetaType::Leaf).await;
                let Some(block) = self.noted(at, block)? else { break };
                next = Leaf::decode(&block).map_or(BlockNo::NONE, |leaf| leaf.next);
            }
        }
        Ok(count)
    }

    /// Checks the entries of every directory and counts the links.
    pub(super) async fn all_directories(&mut self) -> Result<(), ReadError> {
        let is_dir = |mode| FileType::from_mode(mode) == Some(FileType::Directory);
        let dirs: Vec<BlockNo> = self
            .inodes
            .iter()
            .filter(|(_, known)| is_dir(known.mode) && !known.unlinked)
            .map(|(&at, _)| at)
            .collect();
        for at in dirs {
            let dir = self.reader.inode(at).await;
            let Some(dir) = self.noted(at, dir)? else { continue };
            self.report.directories += 1;
            let mut seen = Seen::default();
            if dir.dinode.is_hashed() {
                self.hashed(&dir, &mut seen).await?;
            } else {
                self.entries(&dir, &dir.block, DINODE_BYTES, None, &mut seen);
            }
            if seen.entries != u64::from(dir.dinode.entries) {
                let (stored, counted) = (dir.dinode.entries, seen.entries);
                self.directory(at, format!("says it has {stored} entries, it has {counted}"));
            }
            for (name, count) in [(".", seen.dot), ("..", seen.dotdot)] {
                if count != 1 {
                    self.directory(at, format!("has {count} entries {name:?}"));
                }
            }
        }
        Ok(())
    }

    async fn hashed(&mut self, dir: &Inode, seen: &mut Seen) -> Result<(), ReadError> {
        let at = dir.addr();
        let depth = dir.dinode.depth;
        let table = self.table(dir).await?;
        let mut index = 0;
        while index < table.len() {
            let leaf_at = table[index];
            let run = table[index..].iter().take_while(|&&other| other == leaf_at).count();
            let first = index;
            index += run;
            if leaf_at.is_none() {
                self.directory(at, format!("a hole in the hash table at {first}"));
                continue;
            }
            let mut next = leaf_at;
            let mut chain = BTreeSet::new();
            while !next.is_none() && chain.insert(next) {
                let block = self.reader.meta(next, MetaType::Leaf).await;
                let Some(block) = self.noted(at, block)? else { break };
                let Ok(leaf) = Leaf::decode(&block) else { break };
                let fits =
                    leaf.depth <= depth && run == 1 << (depth - leaf.depth) && first.is_multiple_of(run);
                if !fits {
                    let d = leaf.depth;
                    self.directory(
                        at,
                        format!("leaf {next} of depth {d} has {run} pointers from {first} on"),
                    );
                }
                if leaf.inode != at {
                    self.directory(at, format!("leaf {next} says it belongs to {}", leaf.inode));
                }
                let before = seen.entries;
                let shift = 32 - u32::from(depth);
                let low = (first as u64) << shift;
                let hashes = low..=low + ((run as u64) << shift) - 1;
                self.entries(dir, &block, LEAF_BYTES, Some(hashes), seen);
                if seen.entries - before != u64::from(leaf.entries) {
                    let counted = seen.entries - before;
                    self.directory(
                        at,
                        format!("leaf {next} says it has {} entries, it has {counted}", leaf.entries),
                    );
                }
                next = leaf.next;
            }
        }
        Ok(())
    }

    fn entries(
        &mut self,
        dir: &Inode,
        block: &[u8],
        start: usize,
        hashes: Option<RangeInclusive<u64>>,
        seen: &mut Seen,
    ) {
        for (place, entry) in Dirents::new(block, start).enumerate() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    self.directory(dir.addr(), error.to_string());
                    return;
                }
            };
            if entry.is_unused() {
                if place != 0 {
                    self.directory(dir.addr(), "an unused entry that is not the first");
                }
                continue;
            }
            seen.entries += 1;
            let fault = self.entry(dir, &entry, hashes.as_ref(), seen);
            if let Some(what) = fault {
                let name = String::from_utf8_lossy(entry.name).into_owned();
                self.problem(Problem::Entry { dir: dir.addr(), name, what });
            }
        }
    }

    /// Counts a link; says what is wrong with its entry.
    fn entry(
        &mut self,
        dir: &Inode,
        entry: &Dirent<'_>,
        hashes: Option<&RangeInclusive<u64>>,
        seen: &mut Seen,
    ) -> Option<&'static str> {
        let at = dir.addr();
        let mut fault = None;
        if name_hash(entry.name) != entry.hash {
            fault = Some("its hash is not that of its name");
        } else if hashes.is_some_and(|hashes| !hashes.contains(&u64::from(entry.hash))) {
            fault = Some("it is in the wrong leaf");
        } else if entry.name.contains(&b'/') || entry.name.contains(&0) {
            fault = Some("a character that no name may have");
        }
        let Some(known) = self.inodes.get_mut(&entry.inum.addr) else {
            return Some("it names no inode");
        };
        known.links = known.links.saturating_add(1);
        if known.unlinked {
            fault = fault.or(Some("it names an inode without links"));
        }
        if known.inum != entry.inum {
            fault = fault.or(Some("it names another generation of the inode"));
        }
        if FileType::from_mode(known.mode).map(FileType::dirent) != Some(entry.kind) {
            fault = fault.or(Some("its type is not that of the inode"));
        }
        let is_dir = FileType::from_mode(known.mode) == Some(FileType::Directory);
        match entry.name {
            b"." => {
                seen.dot += 1;
                (entry.inum.addr != at).then_some("it names another directory")
            }
            b".." => {
                seen.dotdot += 1;
                let target = entry.inum.addr;
                if let Some(own) = self.inodes.get_mut(&at) {
                    own.dotdot = target;
                }
                (!is_dir).then_some("it names no directory")
            }
            _ if is_dir => {
                let first = known.parent.is_none();
                known.parent = at;
                (!first).then_some("it is a second name of a directory")
            }
            _ => None,
        }
        .or(fault)
    }

    /// Whether links, parents and the root agree.
    pub(super) fn connections(&mut self) {
        let tops = [self.reader.superblock().root.addr, self.reader.superblock().master.addr];
        let mut problems = Vec::new();
        for top in tops {
            match self.inodes.get_mut(&top) {
                Some(known) if FileType::from_mode(known.mode) == Some(FileType::Directory) => {
                    known.parent = top
                }
                _ => problems.push(Problem::Broken {
                    inode: top,
                    what: "not a directory, but the top of a tree".into(),
                }),
            }
        }
        for (&inode, known) in &self.inodes {
            if known.unlinked {
                continue;
            }
            let is_dir = FileType::from_mode(known.mode) == Some(FileType::Directory);
            // A directory's own `.` counts, so a lost one has links, but no parent.
            if known.links == 0 || is_dir && known.parent.is_none() {
                problems.push(Problem::Unconnected { inode });
            }
            if known.links != known.nlink {
                problems.push(Problem::Nlink { inode, stored: known.nlink, counted: known.links });
            }
            if is_dir && !known.parent.is_none() && known.parent != known.dotdot {
                let what = format!("its \"..\" is {}, it is in {}", known.dotdot, known.parent);
                problems.push(Problem::Directory { dir: inode, what });
            }
        }
        problems.extend(self.islands(&tops));
        for problem in problems {
            self.problem(problem);
        }
    }

    /// Directories that only name each other.
    fn islands(&self, tops: &[BlockNo]) -> Vec<Problem> {
        let mut reached: BTreeSet<BlockNo> = tops.iter().copied().collect();
        let mut islands = Vec::new();
        for (&inode, known) in &self.inodes {
            if FileType::from_mode(known.mode) != Some(FileType::Directory) || known.parent.is_none() {
                continue;
            }
            let mut way = Vec::new();
            let mut at = inode;
            let mut met = BTreeSet::new();
            while !reached.contains(&at) && met.insert(at) {
                way.push(at);
                at = self.inodes.get(&at).map_or(BlockNo::NONE, |known| known.parent);
            }
            if reached.contains(&at) {
                reached.extend(way);
            } else if met.contains(&at) {
                islands.push(Problem::Unconnected { inode });
            }
        }
        islands
    }

    fn directory(&mut self, dir: BlockNo, what: impl Into<String>) {
        self.problem(Problem::Directory { dir, what: what.into() });
    }
}

/// What was met in one directory.
#[derive(Debug, Default)]
struct Seen {
    entries: u64,
    dot: u32,
    dotdot: u32,
}
