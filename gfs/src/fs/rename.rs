//! Renaming: within a directory, between directories, over something, or in exchange (gfs2.md 10.9).

use super::Inner;
use super::data::check_mutable;
use super::dir::{Found, check_name};
use super::glock::Glock;
use crate::FsError;
use crate::face::{Ino, RenameFlags};
use crate::format::{BlockNo, Dinode, FileType, Inum};
use quorate_dlm::cache::{CacheMode, Held};
use std::collections::BTreeSet;

/// A path with more directories than this is a loop.
const DEPTH_MAX: usize = 1 << 16;

/// The locked directories: one, or two.
struct Dirs {
    old: Dinode,
    new: Option<Dinode>,
    _held: Vec<Held>,
}

impl Dirs {
    fn target(&mut self) -> &mut Dinode {
        self.new.as_mut().unwrap_or(&mut self.old)
    }
}

impl Inner {
    pub(super) async fn rename_name(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        for name in [name, new_name] {
            check_name(name).map_err(|error| if error == FsError::Exists { FsError::Busy } else { error })?;
        }
        // One renamer at a time between directories: then nobody but it moves directories about (10.9).
        let across = parent != new_parent;
        let _rename = if across { Some(self.lock(Glock::RENAME, CacheMode::Exclusive).await?) } else { None };
        let above_old = if across { self.ancestors(parent).await? } else { BTreeSet::new() };
        let above_new = if across { self.ancestors(new_parent).await? } else { BTreeSet::new() };
        let new_first = above_old.contains(&BlockNo(new_parent.0))
            || (new_parent < parent && !above_new.contains(&BlockNo(parent.0)));
        let mut dirs = self.lock_dirs(parent, new_parent, new_first).await?;
        check_mutable(&dirs.old, false)?;
        check_mutable(dirs.target(), false)?;

        let source = self.dir_find(None, &dirs.old, name).await?.ok_or(FsError::NotFound)?;
        let target = self.dir_find(None, dirs.target(), new_name).await?;
        match target {
            None if flags.exchange => return Err(FsError::NotFound),
            Some(_) if flags.no_replace => return Err(FsError::Exists),
            Some(target) if target.inum == source.inum => return Ok(()),
            _ => {}
        }
        if above_new.contains(&source.inum.addr) {
            return Err(FsError::Invalid("a directory cannot be moved into itself"));
        }
        if let Some(target) = target
            && above_old.contains(&target.inum.addr)
        {
            let into_itself = FsError::Invalid("a directory cannot be moved into itself");
            return Err(if flags.exchange { into_itself } else { FsError::NotEmpty });
        }
        let mut children: Vec<Inum> =
            [Some(source), target].into_iter().flatten().map(|found| found.inum).collect();
        children.sort_by_key(|inum| inum.addr);
        let mut child_locks = Vec::new();
        for inum in children {
            child_locks.push(self.lock_inum(inum, CacheMode::Exclusive).await?);
        }
        match (target, flags.exchange) {
            (Some(target), true) => self.exchange(dirs, (name, source), (new_name, target)).await,
            _ => self.move_name(dirs, (name, source), new_name, target).await,
        }
    }

    async fn lock_dirs(&self, parent: Ino, new_parent: Ino, new_first: bool) -> Result<Dirs, FsError> {
        if parent == new_parent {
            let (_, held, old) = self.lock_dir(parent, CacheMode::Exclusive).await?;
            return Ok(Dirs { old, new: None, _held: vec![held] });
        }
        let (first, second) = if new_first { (new_parent, parent) } else { (parent, new_parent) };
        let (_, first_held, first) = self.lock_dir(first, CacheMode::Exclusive).await?;
        let (_, second_held, second) = self.lock_dir(second, CacheMode::Exclusive).await?;
        let (old, new) = if new_first { (second, first) } else { (first, second) };
        Ok(Dirs { old, new: Some(new), _held: vec![first_held, second_held] })
    }

    /// A directory and all above it. The rename lock keeps them where they are.
    async fn ancestors(&self, dir: Ino) -> Result<BTreeSet<BlockNo>, FsError> {
        let mut found = BTreeSet::new();
        let mut at = BlockNo(dir.0);
        for _ in 0..DEPTH_MAX {
            if !found.insert(at) {
                return Ok(found); // `..` of the root is itself
            }
            let _held = self.lock(Glock::inode(at), CacheMode::Shared).await?;
            let dinode = self.dinode_of(None, at).await?;
            if !dinode.is_dir() {
                return Err(FsError::NotDirectory);
            }
            at = self.dir_find(None, &dinode, b"..").await?.ok_or(FsError::NotFound)?.inum.addr;
        }
        Err(super::store::corrupt(BlockNo(dir.0), &"no way up to the root"))
    }

    async fn move_name(
        &self,
        mut dirs: Dirs,
        (name, source): (&[u8], Found),
        new_name: &[u8],
        target: Option<Found>,
    ) -> Result<(), FsError> {
        let mut moved = self.dinode_of(None, source.inum.addr).await?;
        check_mutable(&moved, false)?;
        let mut victim = match target {
            Some(target) => Some(self.dinode_of(None, target.inum.addr).await?),
            None => None,
        };
        let moves_dir = moved.is_dir();
        if let Some(victim) = &victim {
            check_mutable(victim, false)?;
            match (moves_dir, victim.is_dir()) {
                (true, false) => return Err(FsError::NotDirectory),
                (false, true) => return Err(FsError::IsDirectory),
                (true, true) if 2 < victim.entries => return Err(FsError::NotEmpty),
                _ => {}
            }
        }
        let need = if victim.is_some() { 0 } else { self.dir_need(dirs.target(), new_name).await? };
        let also = match &victim {
            Some(victim) => self.rgrps_to_unlink(victim)?,
            None => BTreeSet::new(),
        };
        let goal = dirs.target().goal_meta;
        let locks = self.lock_for_alloc(&also, need, goal).await?;
        let mut tx = self.begin(need as usize + 24).await?;
        match &victim {
            Some(_) => self.dir_replace(&mut tx, dirs.target(), new_name, source.inum, source.kind).await?,
            None => {
                self.dir_insert(&mut tx, &locks, dirs.target(), new_name, source.inum, source.kind).await?;
            }
        }
        self.dir_remove(&mut tx, &mut dirs.old, name).await?;
        if moves_dir {
            dirs.old.nlink = dirs.old.nlink.saturating_sub(1);
            if victim.is_none() {
                let new = dirs.target();
                new.nlink = new.nlink.checked_add(1).ok_or(FsError::TooManyLinks)?;
            }
        }
        moved.ctime = (self.clock)();
        if moves_dir && let Some(new) = &dirs.new {
            self.dir_replace(&mut tx, &mut moved, b"..", new.inum, FileType::Directory).await?;
        }
        tx.put_dinode(&moved).await?;
        if let Some(victim) = &mut victim {
            self.drop_link(&mut tx, &locks, victim).await?;
        }
        tx.put_dinode(&dirs.old).await?;
        if let Some(new) = &dirs.new {
            tx.put_dinode(new).await?;
        }
        tx.commit();
        drop(locks);
        if let Some(victim) = &victim {
            self.unlinked(victim);
        }
        Ok(())
    }

    async fn exchange(
        &self,
        mut dirs: Dirs,
        (name, source): (&[u8], Found),
        (new_name, target): (&[u8], Found),
    ) -> Result<(), FsError> {
        let mut tx = self.begin(24).await?;
        self.dir_replace(&mut tx, &mut dirs.old, name, target.inum, target.kind).await?;
        self.dir_replace(&mut tx, dirs.target(), new_name, source.inum, source.kind).await?;
        let old_inum = dirs.old.inum;
        let new_inum = dirs.target().inum;
        for (found, to) in [(source, new_inum), (target, old_inum)] {
            let mut dinode = self.dinode_of(None, found.inum.addr).await?;
            check_mutable(&dinode, false)?;
            dinode.ctime = (self.clock)();
            if dinode.is_dir() && dirs.new.is_some() {
                self.dir_replace(&mut tx, &mut dinode, b"..", to, FileType::Directory).await?;
            }
            tx.put_dinode(&dinode).await?;
        }
        if let Some(new) = &mut dirs.new {
            let change =
                i32::from(source.kind == FileType::Directory) - i32::from(target.kind == FileType::Directory);
            new.nlink = new.nlink.saturating_add_signed(change);
            dirs.old.nlink = dirs.old.nlink.saturating_add_signed(-change);
        }
        tx.put_dinode(&dirs.old).await?;
        if let Some(new) = &dirs.new {
            tx.put_dinode(new).await?;
        }
        tx.commit();
        Ok(())
    }
}
