//! A filesystem in memory, to be mounted by tests: everything is cached by the kernel until it is told otherwise.

use core::time::Duration;
use event_listener::Event;
use quorate_gfs::FsError;
use quorate_gfs::face::*;
use quorate_membership::BoxFuture;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

const ROOT: u64 = 24;
const VALID: Duration = Duration::from_secs(600);

#[derive(Clone)]
struct Inode {
    attr: Attr,
    data: Vec<u8>,
    names: BTreeMap<Vec<u8>, u64>,
    parent: u64,
    lookups: u64,
    opens: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    flocks: BTreeMap<LockOwner, LockKind>,
    locks: Vec<(LockOwner, PosixLock)>,
}

#[derive(Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    next: u64,
    clock: i64,
}

/// See the module. A file named `gated` can be read only while the gate is open.
pub(crate) struct MemFs {
    state: Mutex<State>,
    sink: Mutex<Option<Arc<dyn Invalidation>>>,
    unlocked: Event,
    gate: AtomicBool,
    gate_opened: Event,
    handles: AtomicU64,
}

fn new_inode(ino: u64, mode: u32, cred: &Credentials, parent: u64, now: i64) -> Inode {
    let now = Timestamp { sec: now, nsec: 0 };
    let attr = Attr {
        ino: Ino(ino),
        generation: 1,
        mode,
        nlink: if mode & S_IFMT == S_IFDIR { 2 } else { 1 },
        uid: cred.uid,
        gid: cred.gid,
        size: 0,
        blocks: 0,
        block_size: 4096,
        major: 0,
        minor: 0,
        atime: now,
        mtime: now,
        ctime: now,
    };
    Inode {
        attr,
        data: Vec::new(),
        names: BTreeMap::new(),
        parent,
        lookups: 0,
        opens: 0,
        xattrs: BTreeMap::new(),
        flocks: BTreeMap::new(),
        locks: Vec::new(),
    }
}

impl State {
    fn tick(&mut self) -> Timestamp {
        self.clock += 1;
        Timestamp { sec: self.clock, nsec: 0 }
    }
    fn inode(&mut self, ino: Ino) -> Result<&mut Inode, FsError> {
        self.inodes.get_mut(&ino.0).ok_or(FsError::Stale)
    }
    fn find(&mut self, parent: Ino, name: &[u8]) -> Result<u64, FsError> {
        self.inode(parent)?.names.get(name).copied().ok_or(FsError::NotFound)
    }
    fn entry(&mut self, ino: u64) -> Result<Entry, FsError> {
        let inode = self.inode(Ino(ino))?;
        inode.lookups += 1;
        Ok(Entry { attr: inode.attr, valid: VALID })
    }
    fn add(&mut self, cred: &Credentials, parent: Ino, name: Vec<u8>, mode: u32) -> Result<u64, FsError> {
        if self.find(parent, &name).is_ok() {
            return Err(FsError::Exists);
        }
        self.next += 1;
        let (ino, now) = (ROOT + self.next, self.tick());
        self.inodes.insert(ino, new_inode(ino, mode, cred, parent.0, now.sec));
        let dir = self.inode(parent)?;
        dir.names.insert(name, ino);
        dir.attr.mtime = now;
        Ok(ino)
    }
    fn drop_if_unused(&mut self, ino: u64) {
        if self.inodes.get(&ino).is_some_and(|i| i.attr.nlink == 0 && i.lookups == 0 && i.opens == 0) {
            self.inodes.remove(&ino);
        }
    }
    fn remove(&mut self, parent: Ino, name: &[u8]) -> Result<u64, FsError> {
        let (ino, now) = (self.find(parent, name)?, self.tick());
        let dir = self.inode(parent)?;
        dir.names.remove(name);
        dir.attr.mtime = now;
        let inode = self.inode(Ino(ino))?;
        inode.attr.nlink = if inode.attr.mode & S_IFMT == S_IFDIR { 0 } else { inode.attr.nlink - 1 };
        inode.attr.ctime = now;
        self.drop_if_unused(ino);
        Ok(ino)
    }
}

impl MemFs {
    pub(crate) fn new() -> Arc<Self> {
        let mut state = State { clock: 1_000_000, ..State::default() };
        let mut root = new_inode(ROOT, S_IFDIR | 0o777, &Credentials::default(), ROOT, 1_000_000);
        root.lookups = 1;
        state.inodes.insert(ROOT, root);
        Arc::new(Self {
            state: Mutex::new(state),
            sink: Mutex::new(None),
            unlocked: Event::new(),
            gate: AtomicBool::new(false),
            gate_opened: Event::new(),
            handles: AtomicU64::new(1),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn sink(&self) -> Arc<dyn Invalidation> {
        self.sink.lock().unwrap().clone().unwrap()
    }

    /// As if another node wrote the file: its contents change, then the kernel is told.
    pub(crate) async fn write_elsewhere(&self, name: &str, contents: &str) {
        let ino = {
            let mut state = self.state();
            let (ino, now) = (state.find(Ino(ROOT), name.as_bytes()).unwrap(), state.tick());
            let inode = state.inode(Ino(ino)).unwrap();
            inode.data = contents.into();
            inode.attr.size = contents.len() as u64;
            inode.attr.mtime = now;
            ino
        };
        self.sink().inode(Ino(ino), true).await;
    }

    /// As if another node removed the name.
    pub(crate) async fn remove_elsewhere(&self, name: &str) {
        let ino = self.state().remove(Ino(ROOT), name.as_bytes()).unwrap();
        self.sink().entries(Ino(ROOT)).await;
        self.sink().inode(Ino(ROOT), false).await;
        self.sink().prune(Ino(ino));
    }

    /// As if another node made a file.
    pub(crate) async fn create_elsewhere(&self, name: &str) {
        self.state().add(&Credentials::default(), Ino(ROOT), name.into(), S_IFREG | 0o644).unwrap();
        self.sink().entries(Ino(ROOT)).await;
        self.sink().inode(Ino(ROOT), false).await;
    }

    /// Tells the kernel to forget a file's pages, as before giving up its lock.
    pub(crate) async fn invalidate(&self, name: &str) {
        let ino = self.state().find(Ino(ROOT), name.as_bytes()).unwrap();
        self.sink().inode(Ino(ino), true).await;
    }

    pub(crate) fn open_gate(&self) {
        self.gate.store(true, Ordering::SeqCst);
        self.gate_opened.notify(usize::MAX);
    }

    async fn pass_gate(&self) {
        while !self.gate.load(Ordering::SeqCst) {
            let listener = self.gate_opened.listen();
            if !self.gate.load(Ordering::SeqCst) {
                listener.await;
            }
        }
    }

    /// How many files are open, and how many inodes without a name are left.
    pub(crate) fn leftovers(&self) -> (u64, usize) {
        let state = self.state();
        let nameless = state.inodes.values().filter(|i| i.attr.nlink == 0).count();
        (state.inodes.values().map(|i| i.opens).sum(), nameless)
    }

    fn open_handle(&self, ino: Ino) -> Result<Handle, FsError> {
        self.state().inode(ino)?.opens += 1;
        Ok(Handle(self.handles.fetch_add(1, Ordering::SeqCst)))
    }

    /// Tries until it works; with `wait` after every unlock.
    async fn until(
        &self,
        wait: bool,
        mut attempt: impl FnMut(&mut State) -> Result<bool, FsError>,
    ) -> Result<(), FsError> {
        loop {
            let listener = self.unlocked.listen();
            if attempt(&mut self.state())? {
                return Ok(());
            }
            if !wait {
                return Err(FsError::WouldBlock);
            }
            listener.await;
        }
    }
}

fn bars(held: LockKind, wanted: LockKind) -> bool {
    held == LockKind::Write || wanted == LockKind::Write
}

fn ready<'a, T: Send + 'a>(result: Result<T, FsError>) -> BoxFuture<'a, Result<T, FsError>> {
    Box::pin(core::future::ready(result))
}

impl Filesystem for MemFs {
    fn root(&self) -> Ino {
        Ino(ROOT)
    }
    fn set_invalidation(&self, sink: Arc<dyn Invalidation>) {
        *self.sink.lock().unwrap() = Some(sink);
    }
    fn lookup(&self, _: Credentials, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>> {
        let mut state = self.state();
        let found = state.find(parent, &name).and_then(|ino| state.entry(ino));
        ready(found)
    }
    fn forget(&self, ino: Ino, count: u64) {
        let mut state = self.state();
        let Ok(inode) = state.inode(ino) else { panic!("forgot {ino}, which is gone") };
        assert!(count <= inode.lookups, "{ino} was looked up {} times, {count} forgotten", inode.lookups);
        inode.lookups -= count;
        state.drop_if_unused(ino.0);
    }
    fn getattr(&self, ino: Ino) -> BoxFuture<'_, Result<Entry, FsError>> {
        ready(self.state().inode(ino).map(|i| Entry { attr: i.attr, valid: VALID }))
    }
    fn setattr(&self, _: Credentials, ino: Ino, set: SetAttr) -> BoxFuture<'_, Result<Entry, FsError>> {
        let mut state = self.state();
        let now = state.tick();
        ready(state.inode(ino).map(|i| {
            if let Some(mode) = set.mode {
                i.attr.mode = i.attr.mode & S_IFMT | mode;
            }
            i.attr.uid = set.uid.unwrap_or(i.attr.uid);
            i.attr.gid = set.gid.unwrap_or(i.attr.gid);
            if let Some(size) = set.size {
                i.data.resize(size as usize, 0);
                i.attr.size = size;
                i.attr.mtime = now;
            }
            if let Some(SetTime::At(mtime)) = set.mtime {
                i.attr.mtime = mtime;
            }
            Entry { attr: i.attr, valid: VALID }
        }))
    }
    fn readlink(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        ready(self.state().inode(ino).map(|i| i.data.clone()))
    }
    fn mknod(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        kind: NodeKind,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let kind = if kind == NodeKind::Fifo { S_IFIFO } else { S_IFREG };
        let mut state = self.state();
        ready(state.add(&cred, parent, name, kind | mode).and_then(|ino| state.entry(ino)))
    }
    fn create(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
        _exclusive: bool,
    ) -> BoxFuture<'_, Result<(Entry, Handle), FsError>> {
        let mut state = self.state();
        let made = state.add(&cred, parent, name, S_IFREG | mode).and_then(|ino| state.entry(ino));
        drop(state);
        ready(made.and_then(|entry| Ok((entry, self.open_handle(entry.attr.ino)?))))
    }
    fn mkdir(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        mode: u32,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let mut state = self.state();
        ready(state.add(&cred, parent, name, S_IFDIR | mode).and_then(|ino| state.entry(ino)))
    }
    fn symlink(
        &self,
        cred: Credentials,
        parent: Ino,
        name: Vec<u8>,
        target: Vec<u8>,
    ) -> BoxFuture<'_, Result<Entry, FsError>> {
        let mut state = self.state();
        ready(state.add(&cred, parent, name, S_IFLNK | 0o777).and_then(|ino| {
            let inode = state.inode(Ino(ino))?;
            inode.attr.size = target.len() as u64;
            inode.data = target;
            state.entry(ino)
        }))
    }
    fn link(&self, ino: Ino, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Entry, FsError>> {
        let mut state = self.state();
        ready((|| {
            state.inode(parent)?.names.insert(name, ino.0);
            state.inode(ino)?.attr.nlink += 1;
            state.entry(ino.0)
        })())
    }
    fn unlink(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        ready(self.state().remove(parent, &name).map(drop))
    }
    fn rmdir(&self, parent: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<(), FsError>> {
        let mut state = self.state();
        ready((|| {
            let ino = state.find(parent, &name)?;
            if !state.inode(Ino(ino))?.names.is_empty() {
                return Err(FsError::NotEmpty);
            }
            state.remove(parent, &name).map(drop)
        })())
    }
    fn rename(
        &self,
        parent: Ino,
        name: Vec<u8>,
        new_parent: Ino,
        new_name: Vec<u8>,
        flags: RenameFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let mut state = self.state();
        ready((|| {
            let ino = state.find(parent, &name)?;
            match state.find(new_parent, &new_name) {
                Ok(_) if flags.no_replace => return Err(FsError::Exists),
                Ok(_) => drop(state.remove(new_parent, &new_name)?),
                Err(_) => {}
            }
            state.inode(parent)?.names.remove(&name);
            state.inode(new_parent)?.names.insert(new_name, ino);
            Ok(())
        })())
    }

    fn open(&self, ino: Ino, _write: bool) -> BoxFuture<'_, Result<Handle, FsError>> {
        ready(self.open_handle(ino))
    }
    fn read(&self, ino: Ino, offset: u64, len: u32) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        Box::pin(async move {
            let gated = self.state().find(Ino(ROOT), b"gated") == Ok(ino.0);
            if gated {
                self.pass_gate().await;
            }
            let mut state = self.state();
            let data = &state.inode(ino)?.data;
            let start = data.len().min(offset as usize);
            Ok(data[start..data.len().min(start + len as usize)].to_vec())
        })
    }
    fn write(
        &self,
        ino: Ino,
        offset: u64,
        data: Vec<u8>,
        append: bool,
        kill_priv: bool,
    ) -> BoxFuture<'_, Result<u32, FsError>> {
        let mut state = self.state();
        let now = state.tick();
        ready(state.inode(ino).map(|i| {
            let start = if append { i.data.len() } else { offset as usize };
            let end = start + data.len();
            if i.data.len() < end {
                i.data.resize(end, 0);
            }
            i.data[start..end].copy_from_slice(&data);
            i.attr.size = i.data.len() as u64;
            i.attr.blocks = i.attr.size.div_ceil(512);
            i.attr.mtime = now;
            if kill_priv {
                i.attr.mode &= !0o6000;
            }
            data.len() as u32
        }))
    }
    fn flush(&self, ino: Ino, owner: LockOwner) -> BoxFuture<'_, Result<(), FsError>> {
        let done = self.state().inode(ino).map(|i| i.locks.retain(|(o, _)| *o != owner));
        self.unlocked.notify(usize::MAX);
        ready(done)
    }
    fn fsync(&self, _: Ino, _: bool) -> BoxFuture<'_, Result<(), FsError>> {
        ready(Ok(()))
    }
    fn release(&self, ino: Ino, _: Handle, owner: Option<LockOwner>) -> BoxFuture<'_, Result<(), FsError>> {
        let mut state = self.state();
        let done = state.inode(ino).map(|i| {
            i.opens -= 1;
            if let Some(owner) = owner {
                i.flocks.remove(&owner);
            }
        });
        state.drop_if_unused(ino.0);
        self.unlocked.notify(usize::MAX);
        ready(done)
    }

    fn opendir(&self, ino: Ino) -> BoxFuture<'_, Result<Handle, FsError>> {
        ready(self.open_handle(ino))
    }
    fn readdir(&self, ino: Ino, cookie: u64, max: usize) -> BoxFuture<'_, Result<Vec<DirEntry>, FsError>> {
        let mut state = self.state();
        ready((|| {
            let dir = state.inode(ino)?;
            let mut all = vec![(b".".to_vec(), ino.0), (b"..".to_vec(), dir.parent)];
            all.extend(dir.names.iter().map(|(name, ino)| (name.clone(), *ino)));
            Ok((1..)
                .zip(all)
                .skip(cookie as usize)
                .take(max)
                .map(|(cookie, (name, ino))| {
                    let kind = state.inodes.get(&ino).map_or(0, |i| i.attr.mode & S_IFMT);
                    DirEntry { ino: Ino(ino), kind, cookie, name }
                })
                .collect())
        })())
    }
    fn fsyncdir(&self, _: Ino) -> BoxFuture<'_, Result<(), FsError>> {
        ready(Ok(()))
    }
    fn releasedir(&self, ino: Ino, _: Handle) -> BoxFuture<'_, Result<(), FsError>> {
        let mut state = self.state();
        let done = state.inode(ino).map(|i| i.opens -= 1);
        state.drop_if_unused(ino.0);
        ready(done)
    }
    fn statfs(&self) -> BoxFuture<'_, Result<FsStat, FsError>> {
        let (files, files_free) = (100, 50);
        ready(Ok(FsStat {
            block_size: 4096,
            blocks: 1000,
            free: 400,
            files,
            files_free,
            name_bytes_max: 255,
        }))
    }
    fn sync(&self) -> BoxFuture<'_, Result<(), FsError>> {
        ready(Ok(()))
    }

    fn getxattr(&self, ino: Ino, name: Vec<u8>) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        ready(self.state().inode(ino).and_then(|i| i.xattrs.get(&name).cloned().ok_or(FsError::NoAttribute)))
    }
    fn listxattr(&self, ino: Ino) -> BoxFuture<'_, Result<Vec<u8>, FsError>> {
        let zero = |name: &Vec<u8>| name.iter().copied().chain([0]).collect::<Vec<_>>();
        ready(self.state().inode(ino).map(|i| i.xattrs.keys().flat_map(zero).collect()))
    }
    fn setxattr(
        &self,
        ino: Ino,
        name: Vec<u8>,
        value: Vec<u8>,
        _: XattrFlags,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        ready(self.state().inode(ino).map(|i| drop(i.xattrs.insert(name, value))))
    }

    fn getlk(
        &self,
        ino: Ino,
        owner: LockOwner,
        lock: PosixLock,
    ) -> BoxFuture<'_, Result<Option<PosixHolder>, FsError>> {
        ready(self.state().inode(ino).map(|i| {
            i.locks
                .iter()
                .find(|(o, l)| *o != owner && bars(l.kind, lock.kind))
                .map(|(_, l)| PosixHolder { lock: *l, node: None })
        }))
    }
    fn setlk(
        &self,
        ino: Ino,
        _: Handle,
        owner: LockOwner,
        lock: PosixLock,
        wait: Wait,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        let wait = matches!(wait, Wait::Until(_));
        // Whole files only: ranges are the business of the real filesystem.
        Box::pin(self.until(wait, move |state| {
            let locks = &mut state.inode(ino)?.locks;
            if lock.kind == LockKind::Unlock {
                locks.retain(|(o, _)| *o != owner);
                self.unlocked.notify(usize::MAX);
                return Ok(true);
            }
            if locks.iter().any(|(o, l)| *o != owner && bars(l.kind, lock.kind)) {
                return Ok(false);
            }
            locks.push((owner, lock));
            Ok(true)
        }))
    }
    fn flock(
        &self,
        ino: Ino,
        owner: LockOwner,
        kind: LockKind,
        wait: bool,
    ) -> BoxFuture<'_, Result<(), FsError>> {
        Box::pin(self.until(wait, move |state| {
            let locks = &mut state.inode(ino)?.flocks;
            locks.remove(&owner);
            if kind == LockKind::Unlock {
                self.unlocked.notify(usize::MAX);
                return Ok(true);
            }
            if locks.values().any(|held| bars(*held, kind)) {
                return Ok(false);
            }
            locks.insert(owner, kind);
            Ok(true)
        }))
    }
}
