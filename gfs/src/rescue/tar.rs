//! A tree as a tar archive: ustar, with pax records (POSIX.1-2001) for what does not fit, and for extended attributes as
//! `SCHILY.xattr`, which GNU tar and libarchive restore.

use super::RescueFs;
use crate::FsError;
use crate::face::Ino;
use crate::format::{FileType, Timestamp};
use crate::reader::Inode;
use std::collections::BTreeMap;
use std::io::{self, Write};

const RECORD_BYTES: usize = 512;
/// An archive ends with zeros up to a multiple of this.
const ARCHIVE_BLOCK_BYTES: u64 = 10240;
/// What is read of a file at once.
const PIECE_BYTES: usize = 1 << 20;
/// Eleven octal digits.
const SIZE_MAX: u64 = (1 << 33) - 1;
/// Seven octal digits.
const ID_MAX: u64 = (1 << 21) - 1;

/// What an archive holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TarReport {
    /// Members written.
    pub members: u64,
    /// Bytes of the archive.
    pub bytes: u64,
    /// Sockets, which no archive can hold.
    pub sockets: u64,
    /// Paths that could not be read in whole, and why. A file is filled up with zeros.
    pub damaged: Vec<(Vec<u8>, FsError)>,
}

/// Why an archive is incomplete: what was to be read is in [`TarReport::damaged`], so only writing can fail.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// The archive could not be written.
    #[error("cannot write the archive: {0}")]
    Write(#[from] io::Error),
}

impl RescueFs {
    /// Writes `inode` and everything below it; names begin with `prefix`.
    ///
    /// # Errors
    /// Only writing: what cannot be read is reported, and the archive goes on.
    pub async fn tar(
        &self,
        inode: &Inode,
        prefix: &[u8],
        sink: &mut (dyn Write + Send),
    ) -> Result<TarReport, TarError> {
        let mut archive = Archive { fs: self, sink, report: TarReport::default(), linked: BTreeMap::new() };
        let mut walk = self.walk(inode);
        while let Some(entry) = walk.next().await {
            let mut path = prefix.to_vec();
            if !path.is_empty() && !entry.path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&entry.path);
            if path.is_empty() {
                path.push(b'.');
            }
            match entry.inode {
                Ok(inode) => archive.member(path, &inode).await?,
                Err(error) => archive.report.damaged.push((path, error)),
            }
        }
        archive.finish()
    }
}

struct Archive<'a> {
    fs: &'a RescueFs,
    sink: &'a mut (dyn Write + Send),
    report: TarReport,
    /// The first name of every inode with several.
    linked: BTreeMap<Ino, Vec<u8>>,
}

/// The fields of a member's header.
struct Member {
    path: Vec<u8>,
    link: Vec<u8>,
    size: u64,
    kind: u8,
}

impl Archive<'_> {
    async fn member(&mut self, mut path: Vec<u8>, inode: &Inode) -> Result<(), TarError> {
        let dinode = &inode.dinode;
        let mut pax = Vec::new();
        match self.fs.reader().xattrs(inode).await {
            Ok(xattrs) => {
                for xattr in xattrs {
                    let name = [&b"SCHILY.xattr."[..], &xattr.full_name()].concat();
                    pax_record(&mut pax, &name, &xattr.value);
                }
            }
            Err(error) => self.report.damaged.push((path.clone(), error.into())),
        }
        let ino = Ino(inode.addr().0);
        let (mut link, mut size) = (Vec::new(), 0);
        let kind = match dinode.file_type() {
            Some(kind)
                if kind != FileType::Directory && 1 < dinode.nlink && self.linked.contains_key(&ino) =>
            {
                link = self.linked[&ino].clone();
                if kind == FileType::Socket {
                    return Ok(());
                }
                b'1'
            }
            Some(FileType::Regular) => {
                size = dinode.size_bytes;
                b'0'
            }
            Some(FileType::Symlink) => {
                match self.fs.link_target(inode).await {
                    Ok(target) => link = target,
                    Err(error) => {
                        self.report.damaged.push((path, error));
                        return Ok(());
                    }
                }
                b'2'
            }
            Some(FileType::CharDevice) => b'3',
            Some(FileType::BlockDevice) => b'4',
            Some(FileType::Directory) => {
                path.push(b'/');
                b'5'
            }
            Some(FileType::Fifo) => b'6',
            Some(FileType::Socket) | None => {
                self.report.sockets += 1;
                return Ok(());
            }
        };
        if 1 < dinode.nlink && kind != b'5' && kind != b'1' {
            self.linked.insert(ino, path.clone());
        }
        self.header(&Member { path: path.clone(), link, size, kind }, inode, pax)?;
        if kind == b'0' {
            self.contents(path, inode).await?;
        }
        Ok(())
    }

    fn header(&mut self, member: &Member, inode: &Inode, mut pax: Vec<u8>) -> Result<(), TarError> {
        let dinode = &inode.dinode;
        if 100 < member.path.len() || !member.path.is_ascii() {
            pax_record(&mut pax, b"path", &member.path);
        }
        if 100 < member.link.len() || !member.link.is_ascii() {
            pax_record(&mut pax, b"linkpath", &member.link);
        }
        if SIZE_MAX < member.size {
            pax_record(&mut pax, b"size", member.size.to_string().as_bytes());
        }
        for (name, id) in [(&b"uid"[..], dinode.uid), (b"gid", dinode.gid)] {
            if ID_MAX < u64::from(id) {
                pax_record(&mut pax, name, id.to_string().as_bytes());
            }
        }
        if dinode.mtime.nsec != 0
            || u64::try_from(dinode.mtime.sec).is_ok_and(|sec| SIZE_MAX < sec)
            || dinode.mtime.sec < 0
        {
            pax_record(&mut pax, b"mtime", decimal(dinode.mtime).as_bytes());
        }
        if !pax.is_empty() {
            let extended = Member {
                path: b"./PaxHeaders/x".to_vec(),
                link: Vec::new(),
                size: pax.len() as u64,
                kind: b'x',
            };
            self.ustar(&extended, None)?;
            self.put(&pax)?;
            self.pad(pax.len() as u64)?;
        }
        self.ustar(member, Some(inode))?;
        self.report.members += 1;
        Ok(())
    }

    fn ustar(&mut self, member: &Member, inode: Option<&Inode>) -> Result<(), TarError> {
        let mut record = [0; RECORD_BYTES];
        put_text(&mut record[..100], &member.path);
        let dinode = inode.map(|inode| &inode.dinode);
        let field = |value: Option<u32>| value.map_or(0, u64::from).min(ID_MAX);
        put_octal(&mut record[100..108], dinode.map_or(0o644, |dinode| u64::from(dinode.mode & 0o7777)));
        put_octal(&mut record[108..116], field(dinode.map(|dinode| dinode.uid)));
        put_octal(&mut record[116..124], field(dinode.map(|dinode| dinode.gid)));
        put_octal(&mut record[124..136], member.size.min(SIZE_MAX));
        let mtime = dinode.map_or(0, |dinode| u64::try_from(dinode.mtime.sec).unwrap_or(0));
        put_octal(&mut record[136..148], mtime.min(SIZE_MAX));
        record[148..156].fill(b' ');
        record[156] = member.kind;
        put_text(&mut record[157..257], &member.link);
        record[257..265].copy_from_slice(b"ustar\x0000");
        if matches!(member.kind, b'3' | b'4') {
            put_octal(&mut record[329..337], field(dinode.map(|dinode| dinode.major)));
            put_octal(&mut record[337..345], field(dinode.map(|dinode| dinode.minor)));
        }
        let sum: u64 = record.iter().map(|&byte| u64::from(byte)).sum();
        put_octal(&mut record[148..155], sum);
        self.put(&record)
    }

    async fn contents(&mut self, path: Vec<u8>, inode: &Inode) -> Result<(), TarError> {
        let size = inode.dinode.size_bytes;
        let mut offset = 0;
        let mut damage = None;
        while offset < size {
            let want = (size - offset).min(PIECE_BYTES as u64) as usize;
            let mut piece = match self.fs.reader().read(inode, offset, want).await {
                Ok(piece) => piece,
                Err(error) => {
                    damage = damage.or(Some(error));
                    Vec::new()
                }
            };
            piece.resize(want, 0);
            self.put(&piece)?;
            offset += want as u64;
        }
        if let Some(error) = damage {
            self.report.damaged.push((path, error.into()));
        }
        self.pad(size)
    }

    fn finish(mut self) -> Result<TarReport, TarError> {
        self.put(&[0; 2 * RECORD_BYTES])?;
        let rest = (ARCHIVE_BLOCK_BYTES - self.report.bytes % ARCHIVE_BLOCK_BYTES) % ARCHIVE_BLOCK_BYTES;
        self.put(&vec![0; rest as usize])?;
        self.sink.flush()?;
        Ok(self.report)
    }

    fn pad(&mut self, written: u64) -> Result<(), TarError> {
        let rest = written.next_multiple_of(RECORD_BYTES as u64) - written;
        self.put(&vec![0; rest as usize])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        self.sink.write_all(bytes)?;
        self.report.bytes += bytes.len() as u64;
        Ok(())
    }
}

/// As much as fits; what does not is in a pax record.
fn put_text(field: &mut [u8], text: &[u8]) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
}

/// Octal digits and a NUL.
fn put_octal(field: &mut [u8], value: u64) {
    let digits = format!("{value:0width$o}", width = field.len() - 1);
    field[..digits.len()].copy_from_slice(digits.as_bytes());
    field[digits.len()] = 0;
}

/// `LENGTH KEY=VALUE\n`, where the length counts its own digits.
fn pax_record(pax: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    pax.extend_from_slice(format!("{len} ").as_bytes());
    pax.extend_from_slice(key);
    pax.push(b'=');
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

fn decimal(time: Timestamp) -> String {
    // The seconds are rounded down, the fraction counts up from them; a decimal number below zero counts down.
    if time.sec < 0 && time.nsec != 0 {
        return format!("-{}.{:09}", -(time.sec + 1), 1_000_000_000 - time.nsec.min(999_999_999));
    }
    format!("{}.{:09}", time.sec, time.nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pax_record_counts_its_own_length() {
        let mut pax = Vec::new();
        pax_record(&mut pax, b"path", b"abc");
        assert_eq!(pax, b"12 path=abc\n");
        for len in 0..200 {
            let mut pax = Vec::new();
            pax_record(&mut pax, b"path", &vec![b'x'; len]);
            assert!(pax.starts_with(format!("{} ", pax.len()).as_bytes()), "{len}");
        }
    }

    #[test]
    fn times_before_1970_count_down() {
        assert_eq!(decimal(Timestamp { sec: -5, nsec: 250_000_000 }), "-4.750000000");
        assert_eq!(decimal(Timestamp { sec: 5, nsec: 1 }), "5.000000001");
        assert_eq!(decimal(Timestamp { sec: -5, nsec: 0 }), "-5.000000000");
    }
}
