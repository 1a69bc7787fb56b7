//! The node's own file API: operations by path on a mounted filesystem, for where FUSE may not be used.
//!
//! Symbolic links are not followed: the last part of a path may be one, an inner part may not.

use crate::admin::protocol::{FileOperation, FileStatus, IO_BYTES_MAX, Reply};
use quorate_gfs::FsError;
use quorate_gfs::face::{
    Attr, Credentials, Entry, Filesystem, Ino, LockKind, LockOwner, RenameFlags, S_IFDIR, S_IFMT, SetAttr,
};
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries asked for at once.
const ENTRIES_MAX: usize = 512;

/// Carries out one operation on behalf of `cred`.
pub(crate) async fn carry_out(fs: &dyn Filesystem, cred: &Credentials, operation: FileOperation) -> Reply {
    match act(fs, cred, operation).await {
        Ok(reply) => reply,
        Err(error) => Reply::FileError { errno: error.errno(), text: error.to_string() },
    }
}

async fn act(fs: &dyn Filesystem, cred: &Credentials, operation: FileOperation) -> Result<Reply, FsError> {
    match operation {
        FileOperation::List(path) => list(fs, cred, &path).await.map(Reply::Files),
        FileOperation::Stat(path) => {
            let found = Found::walk(fs, cred, &path).await?;
            Ok(Reply::Files(vec![status(last_part(&path), &found.entry.attr)]))
        }
        FileOperation::Read { path, offset, len } => {
            let found = Found::walk(fs, cred, &path).await?;
            let len = len.min(IO_BYTES_MAX as u32);
            fs.read(found.ino(), offset, len).await.map(Reply::Data)
        }
        FileOperation::Write { path, offset, data, sync } => {
            let found = Found::walk_or_create(fs, cred, &path).await?;
            let mut written = 0;
            if !data.is_empty() {
                let append = offset.is_none();
                written = fs.write(found.ino(), offset.unwrap_or(0), data, append, false).await?;
            }
            if sync {
                fs.fsync(found.ino(), true).await?;
            }
            Ok(Reply::Number(u64::from(written)))
        }
        FileOperation::Truncate { path, bytes } => {
            let found = Found::walk(fs, cred, &path).await?;
            let set = SetAttr { size: Some(bytes), ..SetAttr::default() };
            fs.setattr(cred.clone(), found.ino(), set).await?;
            Ok(Reply::Number(bytes))
        }
        FileOperation::MakeDir(path) => {
            let (parent, name) = Found::walk_parent(fs, cred, &path).await?;
            let made = fs.mkdir(cred.clone(), parent.ino(), name, 0o755).await?;
            fs.forget(made.attr.ino, 1);
            Ok(Reply::Number(made.attr.ino.0))
        }
        FileOperation::Symlink { target, path } => {
            let (parent, name) = Found::walk_parent(fs, cred, &path).await?;
            let made = fs.symlink(cred.clone(), parent.ino(), name, target.into_bytes()).await?;
            fs.forget(made.attr.ino, 1);
            Ok(Reply::Number(made.attr.ino.0))
        }
        FileOperation::ReadLink(path) => {
            let found = Found::walk(fs, cred, &path).await?;
            fs.readlink(found.ino()).await.map(Reply::Data)
        }
        FileOperation::Remove(path) => {
            let (parent, name) = Found::walk_parent(fs, cred, &path).await?;
            let entry = fs.lookup(cred.clone(), parent.ino(), name.clone()).await?;
            fs.forget(entry.attr.ino, 1);
            if entry.attr.mode & S_IFMT == S_IFDIR {
                fs.rmdir(parent.ino(), name).await?;
            } else {
                fs.unlink(parent.ino(), name).await?;
            }
            Ok(Reply::Number(0))
        }
        FileOperation::Rename(from, to) => {
            let (old, old_name) = Found::walk_parent(fs, cred, &from).await?;
            let (new, new_name) = Found::walk_parent(fs, cred, &to).await?;
            fs.rename(old.ino(), old_name, new.ino(), new_name, RenameFlags::default()).await?;
            Ok(Reply::Number(0))
        }
        FileOperation::Sync => fs.sync().await.map(|()| Reply::Number(0)),
        FileOperation::Increment(path) => increment(fs, cred, &path).await.map(Reply::Number),
        FileOperation::StatFs => {
            let s = fs.statfs().await?;
            let text = format!("{} blocks of {} bytes, {} free", s.blocks, s.block_size, s.free);
            let json = serde_json::json!({
                "block_bytes": s.block_size, "blocks": s.blocks, "free": s.free, "files": s.files,
                "files_free": s.files_free,
            });
            Ok(Reply::Done { text, json: json.to_string(), code: 0 })
        }
    }
}

/// An inode that counts as looked up until this is dropped.
struct Found<'a> {
    fs: &'a dyn Filesystem,
    entry: Entry,
    /// The root needs no lookup and is not forgotten.
    counted: bool,
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.fs.forget(self.entry.attr.ino, 1);
        }
    }
}

impl<'a> Found<'a> {
    fn ino(&self) -> Ino {
        self.entry.attr.ino
    }

    async fn root(fs: &'a dyn Filesystem) -> Result<Self, FsError> {
        Ok(Self { fs, entry: fs.getattr(fs.root()).await?, counted: false })
    }

    async fn child(&self, cred: &Credentials, name: &str) -> Result<Self, FsError> {
        let entry = self.fs.lookup(cred.clone(), self.ino(), name.as_bytes().to_vec()).await?;
        Ok(Self { fs: self.fs, entry, counted: true })
    }

    async fn walk(fs: &'a dyn Filesystem, cred: &Credentials, path: &str) -> Result<Self, FsError> {
        let mut at = Self::root(fs).await?;
        for part in parts(path)? {
            at = at.child(cred, part).await?;
        }
        Ok(at)
    }

    async fn walk_parent(
        fs: &'a dyn Filesystem,
        cred: &Credentials,
        path: &str,
    ) -> Result<(Self, Vec<u8>), FsError> {
        let parts = parts(path)?;
        let (name, folders) = parts.split_last().ok_or(FsError::Invalid("the root has no name"))?;
        let mut at = Self::root(fs).await?;
        for part in folders {
            at = at.child(cred, part).await?;
        }
        Ok((at, name.as_bytes().to_vec()))
    }

    async fn walk_or_create(fs: &'a dyn Filesystem, cred: &Credentials, path: &str) -> Result<Self, FsError> {
        match Self::walk(fs, cred, path).await {
            Err(FsError::NotFound) => {
                let (parent, name) = Self::walk_parent(fs, cred, path).await?;
                let (entry, handle) = fs.create(cred.clone(), parent.ino(), name, 0o644, false).await?;
                let found = Self { fs, entry, counted: true };
                fs.release(found.ino(), handle, None).await?;
                Ok(found)
            }
            other => other,
        }
    }
}

/// The parts of a path; `.` and empty ones do not count, `..` is refused.
fn parts(path: &str) -> Result<Vec<&str>, FsError> {
    let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty() && *p != ".").collect();
    if parts.contains(&"..") { Err(FsError::Invalid("`..` in a path")) } else { Ok(parts) }
}

fn last_part(path: &str) -> &str {
    path.rsplit('/').find(|p| !p.is_empty()).unwrap_or("/")
}

fn status(name: &str, attr: &Attr) -> FileStatus {
    FileStatus { name: name.to_owned(), mode: attr.mode, bytes: attr.size, inode: attr.ino.0 }
}

async fn list(fs: &dyn Filesystem, cred: &Credentials, path: &str) -> Result<Vec<FileStatus>, FsError> {
    let folder = Found::walk(fs, cred, path).await?;
    if folder.entry.attr.mode & S_IFMT != S_IFDIR {
        return Ok(vec![status(last_part(path), &folder.entry.attr)]);
    }
    let handle = fs.opendir(folder.ino()).await?;
    let mut files = Vec::new();
    let mut cookie = 0;
    loop {
        let entries = fs.readdir(folder.ino(), cookie, ENTRIES_MAX).await?;
        let Some(last) = entries.last() else { break };
        cookie = last.cookie;
        for entry in &entries {
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            match fs.lookup(cred.clone(), folder.ino(), entry.name.clone()).await {
                Ok(found) => {
                    files.push(status(&String::from_utf8_lossy(&entry.name), &found.attr));
                    fs.forget(found.attr.ino, 1);
                }
                // Removed by another node since it was listed.
                Err(FsError::NotFound | FsError::Stale) => (),
                Err(error) => return Err(error),
            }
        }
    }
    fs.releasedir(folder.ino(), handle).await?;
    Ok(files)
}

/// Adds one to the decimal number in the file, under its exclusive flock, durably.
async fn increment(fs: &dyn Filesystem, cred: &Credentials, path: &str) -> Result<u64, FsError> {
    /// Owners of this API's own locks, apart from the kernel's, which are addresses.
    static OWNERS: AtomicU64 = AtomicU64::new(1);
    let found = Found::walk_or_create(fs, cred, path).await?;
    let owner = LockOwner(OWNERS.fetch_add(1, Ordering::Relaxed));
    let handle = fs.open(found.ino(), true).await?;
    let outcome = async {
        fs.flock(found.ino(), owner, LockKind::Write, true).await?;
        let text = fs.read(found.ino(), 0, 64).await?;
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        let old =
            if text.is_empty() { 0 } else { text.parse().map_err(|_| FsError::Invalid("not a number"))? };
        let value: u64 = old + 1;
        fs.write(found.ino(), 0, format!("{value:020}\n").into_bytes(), false, false).await?;
        fs.fsync(found.ino(), true).await?;
        Ok(value)
    }
    .await;
    // Ends the flock too, whatever happened.
    fs.release(found.ino(), handle, Some(owner)).await?;
    outcome
}
