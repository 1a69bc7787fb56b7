//! The replica's file: the whole state, checked by a CRC, replaced by rename.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0 | 8 | `QRTCCS1` and a line feed |
//! | 8 | 4 | CRC-32C of what follows, little-endian |
//! | 12 | | the postcard encoding of [`Stored`] |

use crate::Stored;
use quorate_membership::ClusterId;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"QRTCCS1\n";

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged ({what}): move it away, and the node takes the configuration from the others")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How it shows.
        what: &'static str,
    },
    /// It is of another cluster.
    #[error("{path} is of cluster {found}, this is cluster {expected}")]
    OtherCluster {
        /// Which.
        path: PathBuf,
        /// In the file.
        found: ClusterId,
        /// Ours.
        expected: ClusterId,
    },
}

/// Reads the state; the empty one if there is no file.
///
/// # Errors
/// See [`FileError`].
pub fn load(path: &Path, cluster: ClusterId) -> Result<Stored, FileError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Stored::empty(cluster)),
        Err(source) => return Err(FileError::Io { path: path.into(), source }),
    };
    let stored = read(&bytes).map_err(|what| FileError::Damaged { path: path.into(), what })?;
    if stored.cluster != cluster {
        return Err(FileError::OtherCluster { path: path.into(), found: stored.cluster, expected: cluster });
    }
    Ok(stored)
}

/// The state in a file's bytes, or what is wrong with them.
fn read(bytes: &[u8]) -> Result<Stored, &'static str> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("no magic")?;
    let (crc, body) = rest.split_first_chunk::<4>().ok_or("too short")?;
    if u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
        return Err("wrong checksum");
    }
    match postcard::take_from_bytes(body) {
        Ok((stored, [])) => Ok(stored),
        _ => Err("unreadable"),
    }
}

/// Replaces the file: written beside it, made durable, renamed, and the name made durable.
pub(super) fn save(path: &Path, stored: &Stored) -> Result<(), FileError> {
    let io = |source| FileError::Io { path: path.into(), source };
    let body = postcard::to_stdvec(stored).expect("the state has no types that postcard cannot write");
    let beside = path.with_extension("new");
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(io)?;
    let mut file = File::create(&beside).map_err(io)?;
    file.write_all(MAGIC).map_err(io)?;
    file.write_all(&crc32c::crc32c(&body).to_le_bytes()).map_err(io)?;
    file.write_all(&body).map_err(io)?;
    file.sync_all().map_err(io)?;
    std::fs::rename(&beside, path).map_err(io)?;
    let dir = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
    dir.and_then(rustix::fs::fsync).map_err(|e| io(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("quorate-ccs-{name}-{}", std::process::id()))
    }

    #[test]
    fn what_is_saved_is_loaded_and_damage_is_seen() {
        let (dir, cluster) = (scratch("file"), ClusterId::from_bytes([1; 16]));
        let path = dir.join("configuration");
        assert_eq!(load(&path, cluster).unwrap(), Stored::empty(cluster));
        save(&path, &Stored::empty(cluster)).unwrap();
        assert_eq!(load(&path, cluster).unwrap(), Stored::empty(cluster));
        let other = load(&path, ClusterId::from_bytes([2; 16])).unwrap_err();
        assert!(other.to_string().contains("is of cluster"), "{other}");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(load(&path, cluster).unwrap_err().to_string().contains("wrong checksum"));
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[cfg(feature = "sim")]
    #[test]
    fn hostile_files_with_a_right_checksum_are_refused_or_read() {
        use quorate_membership::sim::hostile;
        let entry = |version| crate::Entry {
            stamp: quorate_membership::Epoch(9),
            version,
            request: crate::RequestKey {
                by: quorate_membership::Identity::new(
                    quorate_membership::NodeId(1),
                    quorate_membership::Incarnation(2),
                ),
                number: 7,
            },
            author: "a person".into(),
            written_at: 1,
            text: "name = \"test\"".into(),
        };
        let mut stored = Stored::empty(ClusterId::from_bytes([1; 16]));
        stored.history = (1..4).map(entry).collect();
        stored.accepted = Some(entry(4));
        stored.voter_sets = vec![(quorate_membership::Epoch(2), Default::default())];
        let bodies = [
            postcard::to_stdvec(&stored).unwrap(),
            postcard::to_stdvec(&Stored::empty(stored.cluster)).unwrap(),
        ];
        let verdicts = hostile(&bodies, 1_000, |body| {
            let bytes = [&MAGIC[..], &crc32c::crc32c(body).to_le_bytes(), body].concat();
            let mut torn = bytes.clone();
            torn.pop();
            assert!(read(&torn).is_err());
            match read(&bytes) {
                Ok(stored) => {
                    assert_eq!(postcard::from_bytes(&postcard::to_stdvec(&stored).unwrap()), Ok(stored));
                    true
                }
                Err(what) => {
                    assert_eq!(what, "unreadable");
                    false
                }
            }
        });
        assert!(100 < verdicts.taken && 300 < verdicts.refused, "{verdicts:?}");
    }
}
