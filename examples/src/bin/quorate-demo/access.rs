//! Two ways into the shared filesystem: a mount, or a node's own file API where FUSE may not be used.

use quorate::admin::client::Client;
use quorate::admin::protocol::{FileOperation, IO_BYTES_MAX, Reply};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The name of the filesystem in the demo's configuration.
pub(crate) const FILESYSTEM: &str = "data";

/// One node's door to the filesystem. Paths are absolute within it.
#[derive(Debug)]
pub(crate) enum Access {
    /// The mount point.
    Mount(PathBuf),
    /// The admin socket.
    Socket(Client),
}

/// What is in a directory.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Directory,
    File,
    Link,
}

impl Access {
    /// `mount:DIR` or `socket:PATH`.
    pub(crate) fn open(text: &str) -> io::Result<Self> {
        match text.split_once(':') {
            Some(("mount", dir)) => Ok(Self::Mount(dir.into())),
            Some(("socket", path)) => Client::connect(Path::new(path)).map(Self::Socket),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("`{text}` is no way into a filesystem"),
            )),
        }
    }

    pub(crate) fn make_dir(&mut self, path: &str) -> io::Result<()> {
        match self {
            Self::Mount(root) => fs::create_dir(below(root, path)),
            Self::Socket(client) => client.file(FILESYSTEM, FileOperation::MakeDir(path.into())).map(drop),
        }
    }

    pub(crate) fn symlink(&mut self, target: &str, path: &str) -> io::Result<()> {
        match self {
            Self::Mount(root) => std::os::unix::fs::symlink(target, below(root, path)),
            Self::Socket(client) => {
                let operation = FileOperation::Symlink { target: target.into(), path: path.into() };
                client.file(FILESYSTEM, operation).map(drop)
            }
        }
    }

    pub(crate) fn read_link(&mut self, path: &str) -> io::Result<Vec<u8>> {
        match self {
            Self::Mount(root) => Ok(fs::read_link(below(root, path))?.into_os_string().into_encoded_bytes()),
            Self::Socket(client) => match client.file(FILESYSTEM, FileOperation::ReadLink(path.into()))? {
                Reply::Data(data) => Ok(data),
                other => Err(unexpected(&other)),
            },
        }
    }

    /// Writes a whole new file.
    pub(crate) fn write_file(&mut self, path: &str, data: &[u8], sync: bool) -> io::Result<()> {
        match self {
            Self::Mount(root) => {
                let mut file = File::create(below(root, path))?;
                file.write_all(data)?;
                if sync { file.sync_all() } else { Ok(()) }
            }
            Self::Socket(client) => {
                client.file(FILESYSTEM, write(path, Some(0), &[], false))?;
                client.file(FILESYSTEM, FileOperation::Truncate { path: path.into(), bytes: 0 })?;
                let mut at = 0;
                for part in data.chunks(IO_BYTES_MAX) {
                    client.file(FILESYSTEM, write(path, Some(at), part, sync))?;
                    at += part.len() as u64;
                }
                Ok(())
            }
        }
    }

    /// Appends and makes it durable.
    pub(crate) fn append_sync(&mut self, path: &str, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Mount(root) => {
                let mut file = OpenOptions::new().create(true).append(true).open(below(root, path))?;
                file.write_all(data)?;
                file.sync_data()
            }
            Self::Socket(client) => client.file(FILESYSTEM, write(path, None, data, true)).map(drop),
        }
    }

    /// Writes at the start of a file, and makes it durable.
    pub(crate) fn overwrite_sync(&mut self, path: &str, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Mount(root) => {
                let mut file =
                    OpenOptions::new().create(true).truncate(false).write(true).open(below(root, path))?;
                file.write_all(data)?;
                file.sync_data()
            }
            Self::Socket(client) => client.file(FILESYSTEM, write(path, Some(0), data, true)).map(drop),
        }
    }

    pub(crate) fn read_file(&mut self, path: &str) -> io::Result<Vec<u8>> {
        match self {
            Self::Mount(root) => {
                let mut data = Vec::new();
                File::open(below(root, path))?.read_to_end(&mut data)?;
                Ok(data)
            }
            Self::Socket(client) => {
                let mut data = Vec::new();
                loop {
                    let operation = FileOperation::Read {
                        path: path.into(),
                        offset: data.len() as u64,
                        len: IO_BYTES_MAX as u32,
                    };
                    match client.file(FILESYSTEM, operation)? {
                        Reply::Data(part) if part.is_empty() => return Ok(data),
                        Reply::Data(part) => data.extend(part),
                        other => return Err(unexpected(&other)),
                    }
                }
            }
        }
    }

    pub(crate) fn list(&mut self, path: &str) -> io::Result<Vec<Entry>> {
        let mut entries = match self {
            Self::Mount(root) => fs::read_dir(below(root, path))?
                .map(|entry| {
                    let entry = entry?;
                    let metadata = entry.path().symlink_metadata()?;
                    let kind = kind_of(metadata.file_type().is_dir(), metadata.file_type().is_symlink());
                    Ok(Entry {
                        name: entry.file_name().to_string_lossy().into_owned(),
                        kind,
                        bytes: metadata.len(),
                    })
                })
                .collect::<io::Result<Vec<_>>>()?,
            Self::Socket(client) => client
                .list(FILESYSTEM, path)?
                .into_iter()
                .filter(|f| f.name != "." && f.name != "..")
                .map(|f| {
                    let kind = kind_of(f.mode & 0o170_000 == 0o040_000, f.mode & 0o170_000 == 0o120_000);
                    Entry { name: f.name, kind, bytes: f.bytes }
                })
                .collect(),
        };
        entries.sort();
        Ok(entries)
    }

    /// Adds one to the number in the file under the file's exclusive lock, durably; gives the new number.
    pub(crate) fn increment(&mut self, path: &str) -> io::Result<u64> {
        match self {
            Self::Mount(root) => {
                use std::io::{Seek, SeekFrom};
                let mut file = OpenOptions::new()
                    .create(true)
                    .truncate(false)
                    .read(true)
                    .write(true)
                    .open(below(root, path))?;
                rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
                let mut text = String::new();
                file.read_to_string(&mut text)?;
                let bad =
                    || io::Error::new(io::ErrorKind::InvalidData, format!("the counter holds `{text}`"));
                let old: u64 =
                    if text.is_empty() { 0 } else { text.trim_end().parse().map_err(|_| bad())? };
                let value = old + 1;
                file.seek(SeekFrom::Start(0))?;
                file.write_all(format!("{value:020}\n").as_bytes())?;
                file.sync_data()?;
                Ok(value)
            }
            Self::Socket(client) => match client.file(FILESYSTEM, FileOperation::Increment(path.into()))? {
                Reply::Number(value) => Ok(value),
                other => Err(unexpected(&other)),
            },
        }
    }
}

fn kind_of(directory: bool, link: bool) -> Kind {
    match (directory, link) {
        (true, _) => Kind::Directory,
        (_, true) => Kind::Link,
        _ => Kind::File,
    }
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn write(path: &str, offset: Option<u64>, data: &[u8], sync: bool) -> FileOperation {
    FileOperation::Write { path: path.into(), offset, data: data.to_vec(), sync }
}

fn unexpected(reply: &Reply) -> io::Error {
    io::Error::other(format!("unexpected answer: {reply:?}"))
}
