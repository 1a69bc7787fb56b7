//! What goes over the admin socket: length-prefixed postcard frames, a request and then its answer.
//!
//! | offset | size | meaning |
//! |---|---|---|
//! | 0 | 4 | length of the body in bytes, little-endian, at most [`FRAME_BYTES_MAX`] |
//! | 4 | 1 | [`VERSION`] |
//! | 5 | | the postcard encoding of [`Request`] or [`Reply`] |

use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};

/// The version of this protocol. Both ends must have the same.
pub const VERSION: u8 = 2;

/// The longest frame, the version byte counted.
pub const FRAME_BYTES_MAX: usize = 2 << 20;

/// A reply above this goes in pieces.
const PIECE_BYTES: usize = 1 << 20;

/// The longest reply, all its pieces together.
pub const REPLY_BYTES_MAX: usize = 256 << 20;

/// The most bytes one `Read` or `Write` of the file API carries.
pub const IO_BYTES_MAX: usize = 1 << 20;

/// What a command asks of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// An administrator's command, as typed after `quorate`.
    Command(Command),
    /// A file operation on a mounted filesystem.
    File {
        /// The filesystem's name in the configuration.
        filesystem: String,
        /// What to do.
        operation: FileOperation,
    },
}

/// An administrator's command to a running node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The state of everything on this node.
    Status,
    /// What a stuck cluster waits for.
    Why,
    /// Members, roster and voters.
    Members,
    /// The paths to the other nodes.
    Links,
    /// Why a view followed the one before it; the newest one if none is named.
    Explain(Option<u64>),
    /// Enter a node in the roster.
    AddNode {
        /// Its id.
        id: u32,
        /// Its certificate, in PEM.
        certificate: String,
        /// Where it listens; several addresses, each a path, with commas.
        address: String,
    },
    /// Make every roster node that is a member and meant to vote a voter.
    AdmitVoters,
    /// Who decides, and who is believed.
    Quorum(QuorumCommand),
    /// Strike a node from the roster.
    RemoveNode(u32),
    /// Take a storage server in as a fence.
    Enrol {
        /// Its name, as in its certificate.
        name: String,
        /// Where it listens.
        address: String,
    },
    /// Give a storage server up for good.
    Retire(String),
    /// Leave cleanly and stop.
    Leave {
        /// Whether the vote goes along.
        give_up_vote: bool,
    },
    /// The configuration and its version.
    ConfigShow,
    /// Replace the configuration.
    ConfigApply {
        /// The version this is based on; the newest if `None`.
        expected: Option<u64>,
        /// The document, in TOML.
        document: String,
    },
    /// The versions there were.
    ConfigHistory,
    /// The difference between two versions.
    ConfigDiff(u64, u64),
    /// Go back to the contents of an earlier version.
    ConfigRollback(u64),
    /// What was fenced when, by whom and how.
    FenceHistory,
    /// A person's word that a node is off.
    FenceConfirm(u32),
    /// About locks of all lockspaces and all nodes.
    Locks(LockQuery),
    /// The node's metrics, in the text format of Prometheus.
    Metrics,
    /// Make a device a physical volume.
    PvCreate(String),
    /// Make a volume group.
    VgCreate {
        /// Its name.
        name: String,
        /// Its devices.
        devices: Vec<String>,
    },
    /// Make a linear logical volume.
    LvCreate {
        /// In which group.
        group: String,
        /// Its name.
        name: String,
        /// Its size in bytes, rounded up to whole extents.
        bytes: u64,
    },
    /// Make a logical volume longer.
    LvExtend {
        /// In which group.
        group: String,
        /// Its name.
        name: String,
        /// Its new size in bytes.
        bytes: u64,
    },
    /// Remove a logical volume.
    LvRemove {
        /// In which group.
        group: String,
        /// Its name.
        name: String,
    },
    /// Volume groups, physical and logical volumes.
    Volumes,
    /// Make a filesystem on a logical volume.
    Mkfs {
        /// The filesystem's name in the configuration.
        name: String,
    },
    /// Mount a configured filesystem on this node.
    Mount(String),
    /// Unmount it.
    Unmount(String),
    /// Check an unmounted filesystem.
    Fsck(String),
    /// Services and where they run.
    Services,
    /// Start a service, here or where its domain says.
    ServiceEnable(String),
    /// Stop a service and keep it stopped.
    ServiceDisable(String),
    /// Move a service.
    ServiceRelocate {
        /// Which.
        name: String,
        /// Where to; where the policy says if `None`.
        node: Option<u32>,
    },
}

/// A command about votes, keys and CAs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum QuorumCommand {
    /// Whether this node is quorate, with the arithmetic.
    Status,
    /// Who would be quorate on each of these sides.
    WhatIf {
        /// Nodes that are down: the rest is one side.
        down: Vec<u32>,
        /// The sides of a split, if it is one.
        split: Vec<Vec<u32>>,
    },
    /// Gives a node so many votes.
    Votes {
        /// Which.
        id: u32,
        /// How many.
        votes: u32,
    },
    /// Expects so many votes; zero: as many as there are.
    Expected(u32),
    /// Changes options; what is `None` stays.
    Options {
        /// Whether all have to be there once after everybody was gone.
        wait_for_all: Option<bool>,
        /// `off`, `lowest`, `highest` or ids.
        tie_breaker: Option<String>,
        /// The window in milliseconds; zero: off.
        last_man_standing_ms: Option<u32>,
        /// Whether a clean leave takes the vote along.
        allow_downscale: Option<bool>,
    },
    /// Enters a witness in the roster.
    AddWitness {
        /// Its id.
        id: u32,
        /// Its certificate, in PEM.
        certificate: String,
        /// Where it listens.
        address: String,
    },
    /// Puts another machine in the place of a node.
    Replace {
        /// Which.
        id: u32,
        /// The new machine's certificate, in PEM.
        certificate: String,
        /// Where it listens, if elsewhere.
        address: Option<String>,
    },
    /// A person's word that all others are off.
    Force {
        /// Who is off.
        off: Vec<u32>,
        /// Who says so, and why.
        word: String,
    },
    /// Takes `wait_for_all` back at this node.
    CancelWaitForAll,
    /// Takes the certificate of `pki.next` into use.
    Renew,
    /// Refuses a node's key from now on.
    Revoke {
        /// Whose.
        id: u32,
        /// Why.
        reason: String,
    },
    /// Trusts exactly these CAs.
    Trust {
        /// Their certificates, in PEM.
        certificates: Vec<String>,
    },
}

/// A question about locks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockQuery {
    /// Resources with their queues, those with waiters first.
    Ls {
        /// A lockspace, or all.
        lockspace: Option<String>,
    },
    /// One resource.
    Show {
        /// Its lockspace.
        lockspace: String,
        /// Its name, as `ls` shows it.
        resource: String,
    },
    /// What those that wait wait for.
    Why {
        /// A resource, or all.
        resource: Option<String>,
    },
    /// The wait-for graph.
    Graph {
        /// In the language of Graphviz.
        dot: bool,
    },
    /// Rates and waiting times.
    Stats,
}

/// One operation on a file, by path from the filesystem's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileOperation {
    /// Entries of a directory.
    List(String),
    /// What a file is.
    Stat(String),
    /// Bytes of a file; fewer at its end.
    Read {
        /// Which file.
        path: String,
        /// From where.
        offset: u64,
        /// How many, at most [`IO_BYTES_MAX`].
        len: u32,
    },
    /// Writes bytes; the file is made if it is not there.
    Write {
        /// Which file.
        path: String,
        /// Where to; at the end if `None`.
        offset: Option<u64>,
        /// What, at most [`IO_BYTES_MAX`] bytes.
        data: Vec<u8>,
        /// Answer only when it is durable.
        sync: bool,
    },
    /// Cuts or extends a file.
    Truncate {
        /// Which file.
        path: String,
        /// The new size in bytes.
        bytes: u64,
    },
    /// Makes a directory.
    MakeDir(String),
    /// Makes a symbolic link.
    Symlink {
        /// What it says.
        target: String,
        /// Where it is.
        path: String,
    },
    /// What a symbolic link says.
    ReadLink(String),
    /// Removes a file or an empty directory.
    Remove(String),
    /// Renames within the filesystem.
    Rename(String, String),
    /// Makes everything of the filesystem that this node wrote durable.
    Sync,
    /// Adds one to the decimal number in a file under its exclusive lock; a missing file counts as zero. Durable.
    Increment(String),
    /// Sizes of the filesystem.
    StatFs,
}

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStatus {
    /// Its name in the directory; the path's last part.
    pub name: String,
    /// Its type and permissions, as `st_mode`.
    pub mode: u32,
    /// Size in bytes.
    pub bytes: u64,
    /// Its number.
    pub inode: u64,
}

/// The node's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// A command's outcome.
    Done {
        /// For people.
        text: String,
        /// For scripts.
        json: String,
        /// The exit code of the command.
        code: u8,
    },
    /// Bytes of a file, or what a link says.
    Data(Vec<u8>),
    /// Entries, or one file.
    Files(Vec<FileStatus>),
    /// A number: bytes written, the counter's new value.
    Number(u64),
    /// A file operation failed.
    FileError {
        /// The error number of this host.
        errno: i32,
        /// For people.
        text: String,
    },
    /// The request was not understood, or the caller may not ask this.
    Refused(String),
    /// A part of the encoding of a reply that is longer than a frame.
    Piece {
        /// Whether nothing follows.
        last: bool,
        /// The bytes.
        bytes: Vec<u8>,
    },
}

/// Writes one frame.
///
/// # Errors
/// The stream's, or `InvalidInput` for a message above the limit.
pub fn write_frame(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&encode(message)?)
}

/// One frame with its header.
///
/// # Errors
/// `InvalidInput` for a message above the limit.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut frame = vec![0, 0, 0, 0, VERSION];
    frame = postcard::to_extend(message, frame).map_err(io::Error::other)?;
    let len = frame.len() - 4;
    if FRAME_BYTES_MAX < len {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {len} bytes is too long"),
        ));
    }
    frame[..4].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(frame)
}

/// A reply in one frame, or in as many as it takes.
///
/// # Errors
/// `InvalidInput` for a reply above [`REPLY_BYTES_MAX`].
pub fn encode_reply(reply: &Reply) -> io::Result<Vec<u8>> {
    let whole = postcard::to_allocvec(reply).map_err(io::Error::other)?;
    if whole.len() <= PIECE_BYTES {
        return encode(reply);
    }
    if REPLY_BYTES_MAX < whole.len() {
        let text = format!("an answer of {} bytes is too long: ask for less", whole.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut frames = Vec::with_capacity(whole.len() + whole.len() / PIECE_BYTES * 16);
    let mut pieces = whole.chunks(PIECE_BYTES).peekable();
    while let Some(bytes) = pieces.next() {
        frames.extend(encode(&Reply::Piece { last: pieces.peek().is_none(), bytes: bytes.to_vec() })?);
    }
    Ok(frames)
}

/// Reads a reply, in one frame or in pieces; `None` at the end of the stream.
///
/// # Errors
/// As [`read_frame`], and `InvalidData` for a reply above [`REPLY_BYTES_MAX`].
pub fn read_reply(stream: &mut impl Read) -> io::Result<Option<Reply>> {
    let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut whole = Vec::new();
    loop {
        match read_frame(stream)? {
            Some(Reply::Piece { last, bytes }) => {
                if bytes.is_empty() && !last {
                    return Err(bad("a piece of an answer with nothing in it".into()));
                }
                if REPLY_BYTES_MAX < whole.len() + bytes.len() {
                    return Err(bad(format!("an answer above {REPLY_BYTES_MAX} bytes")));
                }
                whole.extend(bytes);
                if last {
                    return match postcard::take_from_bytes(&whole) {
                        Ok((reply, [])) => Ok(Some(reply)),
                        Ok(_) => Err(bad("malformed message: there are bytes after its end".into())),
                        Err(e) => Err(bad(format!("malformed message: {e}"))),
                    };
                }
            }
            Some(_) if !whole.is_empty() => return Err(bad("an answer that breaks off".into())),
            other => return Ok(other),
        }
    }
}

/// Reads one frame; `None` at the end of the stream.
///
/// # Errors
/// The stream's, or `InvalidData` for a frame that is too long, of another version or malformed.
pub fn read_frame<T: for<'a> Deserialize<'a>>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut header = [0; 4];
    match stream.read_exact(&mut header) {
        Ok(()) => (),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let mut body = vec![0; body_len(header)?];
    stream.read_exact(&mut body)?;
    decode(&body).map(Some)
}

/// The length of the body that follows this header.
///
/// # Errors
/// `InvalidData` if it is out of bounds.
pub fn body_len(header: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(header) as usize;
    if len == 0 || FRAME_BYTES_MAX < len {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {len} bytes is out of bounds"),
        ));
    }
    Ok(len)
}

/// The message in a frame's body.
///
/// # Errors
/// `InvalidData` for another version or a malformed message.
pub fn decode<T: for<'a> Deserialize<'a>>(body: &[u8]) -> io::Result<T> {
    let bad = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    match body.split_first() {
        Some((&VERSION, message)) => match postcard::take_from_bytes(message) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(bad("malformed message: there are bytes after its end".into())),
            Err(e) => Err(bad(format!("malformed message: {e}"))),
        },
        Some((version, _)) => Err(bad(format!("protocol version {version}, {VERSION} is wanted"))),
        None => Err(bad("empty frame".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let request = Request::File {
            filesystem: "data".into(),
            operation: FileOperation::Write {
                path: "/a".into(),
                offset: None,
                data: vec![1; 1000],
                sync: true,
            },
        };
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &request).unwrap();
        assert_eq!(read_frame::<Request>(&mut &bytes[..]).unwrap(), Some(request));
        assert_eq!(read_frame::<Request>(&mut &[][..]).unwrap(), None);
    }

    #[test]
    fn a_long_reply_goes_in_pieces_and_one_that_breaks_off_is_an_error() {
        let reply = Reply::Done { text: "x".repeat(3 << 20), json: "{}".into(), code: 0 };
        let bytes = encode_reply(&reply).unwrap();
        assert_eq!(read_reply(&mut &bytes[..]).unwrap(), Some(reply));
        assert!(
            encode_reply(&Reply::Data(vec![0; REPLY_BYTES_MAX]))
                .unwrap_err()
                .to_string()
                .contains("ask for less")
        );
        let mut broken = bytes[..4 + u32::from_le_bytes(*bytes.first_chunk().unwrap()) as usize].to_vec();
        broken.extend(encode(&Reply::Number(1)).unwrap());
        assert!(read_reply(&mut &broken[..]).unwrap_err().to_string().contains("breaks off"));
    }

    #[test]
    fn a_hostile_length_is_refused_before_memory_is_taken() {
        let error = read_frame::<Request>(&mut &[255, 255, 255, 255, 0][..]).unwrap_err();
        assert!(error.to_string().contains("out of bounds"), "{error}");
    }

    /// Random bodies, and real ones with changed, missing and added bytes: an error, or a message that is written as it was
    /// read.
    #[test]
    fn hostile_bodies_are_refused_and_never_panic() {
        let mut rng = quorate_membership::Rng::new(5);
        let samples = [
            Request::Command(Command::Status),
            Request::Command(Command::Explain(Some(7))),
            Request::Command(Command::ConfigApply { expected: Some(3), document: "name = \"x\"".into() }),
            Request::Command(Command::AddNode { id: 1, certificate: "x".into(), address: "y".into() }),
            Request::File {
                filesystem: "data".into(),
                operation: FileOperation::Write {
                    path: "/a".into(),
                    offset: Some(1),
                    data: vec![1; 40],
                    sync: true,
                },
            },
        ];
        let (mut taken, mut refused) = (0, 0);
        for round in 0..20_000 {
            let mut body = if round % 4 == 0 {
                (0..rng.below(60)).map(|_| rng.next_u64() as u8).collect()
            } else {
                let mut frame = Vec::new();
                write_frame(&mut frame, &samples[round % samples.len()]).unwrap();
                frame.split_off(4)
            };
            for _ in 0..rng.below(3) {
                let at = rng.below(body.len() as u64 + 1) as usize;
                match rng.below(4) {
                    0 => body.truncate(at),
                    1 => body.insert(at, rng.next_u64() as u8),
                    _ if at < body.len() => body[at] = rng.next_u64() as u8,
                    _ => {}
                }
            }
            if let Ok(request) = decode::<Request>(&body) {
                let mut frame = Vec::new();
                write_frame(&mut frame, &request).unwrap();
                assert_eq!(decode::<Request>(&frame[4..]).unwrap(), request);
                taken += 1;
            } else {
                refused += 1;
            }
            let _ = decode::<Reply>(&body);
        }
        assert!(1_000 < taken && 1_000 < refused, "{taken} {refused}");
        let mut whole = Vec::new();
        write_frame(&mut whole, &samples[0]).unwrap();
        whole.push(0);
        assert!(decode::<Request>(&whole[4..]).unwrap_err().to_string().contains("after its end"));
    }

    /// Every kind in both directions, damaged.
    #[test]
    fn hostile_messages_of_every_kind_are_refused_or_read() {
        use quorate_membership::sim::{hostile, samples};
        fn read<T: for<'a> Deserialize<'a> + Serialize + PartialEq + core::fmt::Debug>(body: &[u8]) -> bool {
            match decode::<T>(body) {
                Ok(message) => {
                    assert_eq!(decode::<T>(&encode(&message).unwrap()[4..]).unwrap(), message);
                    true
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                    false
                }
            }
        }
        let requests = [
            samples(&[VERSION, 0], 0..35, read::<Request>),
            samples(&[VERSION, 0, 7], 0..12, read::<Request>),
            samples(&[VERSION, 0, 19], 0..5, read::<Request>),
            samples(&[VERSION, 1, 1, b'd'], 0..13, read::<Request>),
        ];
        let verdicts = hostile(&requests.concat(), 60, read::<Request>);
        assert!(1_000 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
        let replies = samples(&[VERSION], 0..7, read::<Reply>);
        let verdicts = hostile(&replies, 300, read::<Reply>);
        assert!(500 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    /// A stream of frames as a client reads it: it ends with a reply, an error or the stream.
    #[test]
    fn a_hostile_stream_of_pieces_ends() {
        let whole = postcard::to_allocvec(&Reply::Data(vec![7; 300])).unwrap();
        let mut pieces = whole.chunks(100).peekable();
        let mut good = Vec::new();
        while let Some(bytes) = pieces.next() {
            let piece = Reply::Piece { last: pieces.peek().is_none(), bytes: bytes.to_vec() };
            good.extend(encode(&piece).unwrap());
        }
        // A header that claims much takes as much as a frame may have.
        let verdicts = quorate_membership::sim::hostile(&[good], 3_000, |mut bytes| {
            let claims = bytes.first_chunk().is_some_and(|h| body_len(*h).is_ok_and(|len| bytes.len() < len));
            claims || matches!(read_reply(&mut bytes), Ok(Some(_)))
        });
        assert!(50 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
        let empty = encode(&Reply::Piece { last: false, bytes: Vec::new() }).unwrap();
        let error = read_reply(&mut &empty.repeat(2)[..]).unwrap_err();
        assert_eq!(error.to_string(), "a piece of an answer with nothing in it");
    }
}
