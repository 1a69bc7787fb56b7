//! The state directory: what a node promised and what it knows, made durable before anything relies on it (R1, R4).
//!
//! | file | content |
//! |---|---|
//! | `lock` | empty; whoever runs on the directory holds a lock on it |
//! | `origin` | the inode of `lock` and the machine's id: a copied directory has others |
//! | `state` | `QRTSTAT1`, then records `length u32 LE | crc32c of kind and content u32 LE | kind u8 | content`; the first is a snapshot (kind 1), the others are changes (kind 2) |
//!
//! A torn last record was never confirmed and is dropped; damage before it is an error, never skipped.

use crate::machine::{Durable, Record, StateError};
use crate::{ClusterId, Incarnation, NodeId, StateId};
use rustix::fs::FlockOperation;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"QRTSTAT1";
const RECORD_HEADER_BYTES: usize = 9;
const SNAPSHOT: u8 = 1;
const CHANGE: u8 = 2;
/// A record above this is damage. A snapshot holds at most `CHAIN_KEPT_MAX` decisions.
const RECORD_BYTES_MAX: usize = 1 << 30;
/// The file is written afresh when it has grown by this much since the last time.
const GROWTH_MAX: u64 = 16 << 20;

/// Why a state directory cannot be used. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateDirError {
    /// A file operation failed.
    #[error("state directory {path}: {source}")]
    File {
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process runs on it.
    #[error("state directory {path} is in use by another process")]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// There is a state already.
    #[error("state directory {path} holds a state already")]
    Exists {
        /// Which.
        path: PathBuf,
    },
    /// It was copied from elsewhere, or restored from a backup.
    #[error(
        "state directory {path} was copied: made for {made_for}, this is {here}; `renounce` makes another acceptor of it"
    )]
    Copied {
        /// Which.
        path: PathBuf,
        /// The machine and file it was made for.
        made_for: String,
        /// The ones at hand.
        here: String,
    },
    /// Its content is damaged in a place that was durable once.
    #[error("state directory {path} is damaged at byte {at}: {reason}")]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where.
        at: u64,
        /// How.
        reason: String,
    },
    /// It belongs to another node or cluster than the certificate.
    #[error("state directory {path} is of node {node} of cluster {cluster}, the certificate is not")]
    OtherOwner {
        /// Which.
        path: PathBuf,
        /// Its node.
        node: NodeId,
        /// Its cluster.
        cluster: ClusterId,
    },
}

/// An open state directory. The lock on it lasts as long as this value.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    file: File,
    durable: Durable,
    grown: u64,
    _lock: Option<StateLock>,
}

/// The lock on a state directory. A supervisor takes it before it starts the node, and keeps it (R1).
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Makes the directory if it is missing, and locks it. Ends with the value, or with the process.
    ///
    /// # Errors
    /// [`StateDirError::Locked`], [`StateDirError::File`].
    pub fn take(dir: &Path) -> Result<Self, StateDirError> {
        std::fs::create_dir_all(dir).map_err(failed(dir))?;
        let path = dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed(&path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StateDirError::Locked { path: dir.to_owned() }),
            Err(error) => Err(failed(&path)(error.into())),
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> StateDirError {
    let path = path.to_owned();
    move |source| StateDirError::File { path, source }
}

impl StateDir {
    /// Puts a first state into a directory.
    ///
    /// # Errors
    /// [`StateDirError::Exists`] and those of the disk.
    pub fn create(dir: &Path, durable: &Durable) -> Result<(), StateDirError> {
        let _lock = StateLock::take(dir)?;
        Self::create_locked(dir, durable)
    }

    fn create_locked(dir: &Path, durable: &Durable) -> Result<(), StateDirError> {
        if Self::exists(dir) {
            return Err(StateDirError::Exists { path: dir.to_owned() });
        }
        write_origin(dir)?;
        write_afresh(dir, durable).map(|_| ()).map_err(failed(&dir.join("state")))
    }

    /// Whether the directory holds a state.
    #[must_use]
    pub fn exists(dir: &Path) -> bool {
        dir.join("state").exists()
    }

    /// Opens the directory, and makes one that knows nothing if it is empty: that forms nothing and votes on nothing.
    /// With `supervised` the caller's parent holds the lock already.
    ///
    /// # Errors
    /// See [`StateDirError`].
    pub fn open(dir: &Path, fresh: &Durable, supervised: bool) -> Result<Self, StateDirError> {
        std::fs::create_dir_all(dir).map_err(failed(dir))?;
        let lock = if supervised { None } else { Some(StateLock::take(dir)?) };
        if !Self::exists(dir) {
            Self::create_locked(dir, fresh)?;
        }
        check_origin(dir)?;
        let durable = load(&dir.join("state"))?;
        if (durable.cluster, durable.node) != (fresh.cluster, fresh.node) {
            let (node, cluster) = (durable.node, durable.cluster);
            return Err(StateDirError::OtherOwner { path: dir.to_owned(), node, cluster });
        }
        let file = write_afresh(dir, &durable).map_err(failed(&dir.join("state")))?;
        Ok(Self { dir: dir.to_owned(), file, durable, grown: 0, _lock: lock })
    }

    /// What is durable.
    #[must_use]
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// Raises the counter of lives and makes it durable (R1).
    ///
    /// # Errors
    /// The disk's. The life must not be used then.
    pub fn next_life(&mut self) -> Result<Incarnation, StateDirError> {
        let mut durable = self.durable.clone();
        let life = durable.next_life();
        self.replace(durable)?;
        Ok(life)
    }

    /// Makes another acceptor of the directory, after the cluster found its state to be old (R4).
    ///
    /// # Errors
    /// The disk's.
    pub fn renounce(&mut self, state: StateId, known: Incarnation) -> Result<(), StateDirError> {
        let mut durable = self.durable.clone();
        durable.renounce(state, known);
        self.replace(durable)
    }

    fn replace(&mut self, durable: Durable) -> Result<(), StateDirError> {
        self.file = write_afresh(&self.dir, &durable).map_err(failed(&self.dir.join("state")))?;
        self.durable = durable;
        self.grown = 0;
        Ok(())
    }

    /// Appends changes and makes them durable.
    ///
    /// # Errors
    /// The disk's. What is durable is unknown then: the node must stop.
    pub fn append(&mut self, records: Vec<Record>) -> io::Result<()> {
        let mut bytes = Vec::new();
        for record in records {
            put_record(&mut bytes, CHANGE, &record.encode());
            self.durable.apply(record);
        }
        self.grown += bytes.len() as u64;
        if GROWTH_MAX < self.grown {
            self.file = write_afresh(&self.dir, &self.durable)?;
            self.grown = 0;
            return Ok(());
        }
        self.file.write_all(&bytes)?;
        self.file.sync_data()
    }
}

/// Makes a copied or restored directory usable as another acceptor: a fresh state id, nothing accepted (R4).
///
/// # Errors
/// See [`StateDirError`].
pub fn renounce(dir: &Path, state: StateId) -> Result<(), StateDirError> {
    let _lock = StateLock::take(dir)?;
    let mut durable = load(&dir.join("state"))?;
    let life = durable.life;
    durable.renounce(state, life);
    write_afresh(dir, &durable).map_err(failed(&dir.join("state")))?;
    write_origin(dir)
}

fn put_record(bytes: &mut Vec<u8>, kind: u8, content: &[u8]) {
    let length = u32::try_from(content.len()).expect("records are far below 4 GiB");
    let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), content);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.push(kind);
    bytes.extend_from_slice(content);
}

/// A file with a snapshot alone takes the old one's place, durably.
fn write_afresh(dir: &Path, durable: &Durable) -> io::Result<File> {
    let new = dir.join("state.new");
    let mut bytes = MAGIC.to_vec();
    put_record(&mut bytes, SNAPSHOT, &durable.encode());
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join("state"))?;
    File::open(dir)?.sync_all()?;
    Ok(file)
}

/// Where this directory is: what a copy of it does not share.
fn here(dir: &Path) -> Result<String, StateDirError> {
    let path = dir.join("lock");
    let inode = std::fs::metadata(&path).map_err(failed(&path))?.ino();
    // A machine without an id is told from others by the inode alone.
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    Ok(format!("inode {inode} machine {}", machine.trim()))
}

fn write_origin(dir: &Path) -> Result<(), StateDirError> {
    let path = dir.join("origin");
    let text = here(dir)?;
    let write = || -> io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(failed(&path))
}

fn check_origin(dir: &Path) -> Result<(), StateDirError> {
    let path = dir.join("origin");
    let made_for = std::fs::read_to_string(&path).map_err(failed(&path))?;
    let here = here(dir)?;
    if made_for == here {
        Ok(())
    } else {
        Err(StateDirError::Copied { path: dir.to_owned(), made_for, here })
    }
}

fn load(path: &Path) -> Result<Durable, StateDirError> {
    let bytes = std::fs::read(path).map_err(failed(path))?;
    read_state(&bytes).map_err(|(at, reason)| StateDirError::Damaged {
        path: path.to_owned(),
        at: at as u64,
        reason,
    })
}

/// Reads a whole file, or says where and how it is damaged.
fn read_state(bytes: &[u8]) -> Result<Durable, (usize, String)> {
    if !bytes.starts_with(MAGIC) {
        return Err((0, "it does not begin as a state file".into()));
    }
    let mut at = MAGIC.len();
    let mut durable: Option<Durable> = None;
    while at < bytes.len() {
        let Some((kind, content, next)) = record_at(bytes, at) else {
            return match durable {
                Some(durable) if is_torn_tail(bytes, at) => Ok(durable),
                _ => Err((at, "a checksum is wrong".into())),
            };
        };
        let decoded = match (kind, &mut durable) {
            (SNAPSHOT, None) => Durable::decode(content).map(|d| durable = Some(d)),
            (CHANGE, Some(durable)) => Record::decode(content).map(|r| durable.apply(r)),
            _ => Err(StateError::Damaged("a record of a kind that cannot be here")),
        };
        decoded.map_err(|e| (at, e.to_string()))?;
        at = next;
    }
    let durable = durable.ok_or((at, "it is empty".to_owned()))?;
    durable.check().map_err(|e| (at, e.to_string()))?;
    Ok(durable)
}

fn record_at(bytes: &[u8], at: usize) -> Option<(u8, &[u8], usize)> {
    let header = bytes.get(at..)?.first_chunk::<RECORD_HEADER_BYTES>()?;
    let [l0, l1, l2, l3, c0, c1, c2, c3, kind] = *header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let start = at + RECORD_HEADER_BYTES;
    let content = bytes.get(start..start.checked_add(length.min(RECORD_BYTES_MAX))?)?;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&[kind]), content);
    (crc == u32::from_le_bytes([c0, c1, c2, c3])).then_some((kind, content, start + length))
}

/// Whether nothing valid follows a bad record: a write that a crash cut short, and that was never confirmed.
fn is_torn_tail(bytes: &[u8], at: usize) -> bool {
    (at + 1..bytes.len()).all(|later| {
        // An empty content with a zero header would check out by chance of the format; no record of ours is empty.
        record_at(bytes, later).is_none_or(|(_, content, _)| content.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Durable;
    use crate::{Ballot, Rng};

    fn durable() -> Durable {
        let state = StateId::from_bytes([2; 16]);
        Durable::create(ClusterId::from_bytes([1; 16]), NodeId(1), state, Default::default())
    }

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("quorate-state-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn promise(round: u64) -> Record {
        Record::Promised(Ballot { round, node: 1 })
    }

    #[test]
    fn lives_and_promises_survive_a_restart() {
        let dir = Dir::new("restart");
        StateDir::create(&dir.0, &durable()).unwrap();
        let mut state = StateDir::open(&dir.0, &durable(), false).unwrap();
        assert_eq!(state.next_life().unwrap(), Incarnation(1));
        state.append(vec![promise(3), promise(4)]).unwrap();
        state.append(vec![promise(5)]).unwrap();
        drop(state);
        let mut state = StateDir::open(&dir.0, &durable(), false).unwrap();
        assert_eq!(state.durable().promised.round, 5);
        assert_eq!(state.next_life().unwrap(), Incarnation(2));
        assert!(matches!(StateDir::create(&dir.0, &durable()), Err(StateDirError::Locked { .. })));
        drop(state);
        assert!(matches!(StateDir::create(&dir.0, &durable()), Err(StateDirError::Exists { .. })));
    }

    #[test]
    fn a_second_process_is_locked_out() {
        let dir = Dir::new("locked");
        let _first = StateDir::open(&dir.0, &durable(), false).unwrap();
        let error = StateDir::open(&dir.0, &durable(), false).unwrap_err();
        assert!(error.to_string().ends_with("is in use by another process"), "{error}");
    }

    #[test]
    fn a_copied_directory_is_refused_until_it_is_renounced() {
        let (dir, copy) = (Dir::new("original"), Dir::new("copy"));
        drop(StateDir::open(&dir.0, &durable(), false).unwrap());
        std::fs::create_dir_all(&copy.0).unwrap();
        for file in ["lock", "origin", "state"] {
            std::fs::copy(dir.0.join(file), copy.0.join(file)).unwrap();
        }
        let error = StateDir::open(&copy.0, &durable(), false).unwrap_err();
        assert!(matches!(error, StateDirError::Copied { .. }), "{error}");
        renounce(&copy.0, StateId::from_bytes([9; 16])).unwrap();
        let state = StateDir::open(&copy.0, &durable(), false).unwrap();
        assert_eq!(state.durable().state, StateId::from_bytes([9; 16]));
    }

    #[test]
    fn a_directory_of_another_node_is_refused() {
        let dir = Dir::new("other");
        StateDir::create(&dir.0, &durable()).unwrap();
        let other = Durable::empty(ClusterId::from_bytes([1; 16]), NodeId(2), StateId::from_bytes([3; 16]));
        let error = StateDir::open(&dir.0, &other, false).unwrap_err();
        assert!(error.to_string().contains("is of node 1 of cluster"), "{error}");
    }

    fn file(rounds: u64) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        put_record(&mut bytes, SNAPSHOT, &durable().encode());
        for round in 1..=rounds {
            put_record(&mut bytes, CHANGE, &promise(round).encode());
        }
        bytes
    }

    #[test]
    fn a_torn_tail_is_dropped_and_damage_before_it_is_an_error() {
        let whole = file(3);
        let two = file(2).len();
        for cut in two..whole.len() {
            let durable = read_state(&whole[..cut]).unwrap();
            assert_eq!(durable.promised.round, 2, "cut at {cut}");
        }
        let mut bad = whole.clone();
        bad[two - 1] ^= 1;
        let (at, reason) = read_state(&bad).unwrap_err();
        assert_eq!((at, reason.as_str()), (file(1).len(), "a checksum is wrong"));
    }

    /// Records with the right checksums and anything in them: the file is refused, or gone on from and read back.
    #[test]
    fn hostile_records_with_right_checksums_are_refused_or_read() {
        let mut on = durable();
        let before = on.chain.tip().unwrap().clone();
        let accept = on.chain.since(crate::Epoch(0))[0].accepts[&NodeId(1)].clone();
        let view = crate::View { epoch: before.epoch.next(), ..crate::View::clone(&before) };
        let accepts = std::collections::BTreeMap::from([(NodeId(1), accept.clone())]);
        let decision = crate::Decision { view: view.clone(), accepts };
        let step = crate::Step::between(&before, &decision);
        on.apply(Record::Decided(Box::new(decision.clone())));
        let records = [
            promise(300),
            Record::Accepted(Box::new(crate::machine::Accepted { view, accept })),
            Record::Decided(Box::new(decision)),
            Record::Step(Box::new(step)),
        ];
        let contents: Vec<Vec<u8>> = records.iter().map(Record::encode).collect();
        let verdicts = crate::sim::hostile(&contents, 500, |content| {
            let mut bytes = file(2);
            put_record(&mut bytes, CHANGE, content);
            put_record(&mut bytes, CHANGE, &promise(400).encode());
            match read_state(&bytes) {
                Ok(durable) => {
                    assert_eq!(Durable::decode(&durable.encode()).as_ref(), Ok(&durable));
                    true
                }
                Err((at, reason)) => {
                    assert!(at <= bytes.len() && !reason.is_empty());
                    false
                }
            }
        });
        assert!(100 < verdicts.taken && 100 < verdicts.refused, "{verdicts:?}");
        let snapshots = [durable().encode(), on.encode()];
        let verdicts = crate::sim::hostile(&snapshots, 500, |content| {
            let mut bytes = MAGIC.to_vec();
            put_record(&mut bytes, SNAPSHOT, content);
            read_state(&bytes).is_ok()
        });
        assert!(50 < verdicts.taken && 100 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn mutated_files_never_panic() {
        let whole = file(20);
        let mut rng = Rng::new(5);
        for _ in 0..3_000 {
            let mut bad = whole.clone();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(bad.len() as u64) as usize;
                bad[at] = rng.next_u64() as u8;
            }
            bad.truncate(rng.below(bad.len() as u64 + 1) as usize);
            let _ = read_state(&bad);
        }
    }
}
