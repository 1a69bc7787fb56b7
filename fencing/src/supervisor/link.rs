//! The socket between the supervisor and its node: what the node reports, and the messages.
//!
//! | tag | payload | meaning |
//! |---|---|---|
//! | 1 | u64 | the lease ends at this CLOCK_BOOTTIME, nanoseconds |
//! | 2 | | no lease is needed: nothing is attached |
//! | 3, 4 | i32 | a process group was started, is gone |
//! | 5, 6 | u64, path | a FUSE connection was mounted there, is unmounted |
//! | 7 | | the node can be used: commands are answered |
//! | 8 | text | how it is, for people; at most 256 bytes |
//!
//! Integers are little-endian. One message is one packet, so a dying node leaves whole ones or none.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, Signal};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Holds the supervisor's process number in the node's environment.
pub(super) const ENV: &str = "QUORATE_SUPERVISOR";

/// The longest message in bytes: a path of the system's longest length and a little.
const MESSAGE_BYTES_MAX: usize = 4096 + 16;

/// The longest status text in bytes.
const STATUS_BYTES_MAX: usize = 256;

/// What the node says of its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseReport {
    /// It ends then, on CLOCK_BOOTTIME in nanoseconds: everything is killed the kill time after that.
    Until(u64),
    /// This life is attached to nothing, so there is nothing that would have to be killed.
    Idle,
}

/// A message of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Lease(LeaseReport),
    Group { id: i32, is_gone: bool },
    Mount { connection: u64, point: PathBuf, is_gone: bool },
    Ready,
    Status(String),
}

impl Report {
    fn encode(&self) -> Vec<u8> {
        match self {
            Self::Lease(LeaseReport::Until(ns)) => [&[1][..], &ns.to_le_bytes()].concat(),
            Self::Lease(LeaseReport::Idle) => vec![2],
            Self::Group { id, is_gone } => [&[3 + u8::from(*is_gone)][..], &id.to_le_bytes()].concat(),
            Self::Mount { connection, point, is_gone } => {
                let tag = 5 + u8::from(*is_gone);
                [&[tag][..], &connection.to_le_bytes(), point.as_os_str().as_bytes()].concat()
            }
            Self::Ready => vec![7],
            Self::Status(text) => [&[8][..], text.as_bytes()].concat(),
        }
    }

    /// `None` for anything that the node of this version does not say.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        match tag {
            1 => Some(Self::Lease(LeaseReport::Until(u64::from_le_bytes(rest.try_into().ok()?)))),
            2 if rest.is_empty() => Some(Self::Lease(LeaseReport::Idle)),
            3 | 4 => {
                let id = i32::from_le_bytes(rest.try_into().ok()?);
                // 0 and 1 would be the supervisor's own group and everybody.
                (1 < id).then_some(Self::Group { id, is_gone: *tag == 4 })
            }
            5 | 6 => {
                let (connection, path) = rest.split_first_chunk()?;
                let point = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
                let connection = u64::from_le_bytes(*connection);
                point.is_absolute().then_some(Self::Mount { connection, point, is_gone: *tag == 6 })
            }
            7 if rest.is_empty() => Some(Self::Ready),
            8 if rest.len() <= STATUS_BYTES_MAX => {
                Some(Self::Status(String::from_utf8_lossy(rest).into_owned()))
            }
            _ => None,
        }
    }
}

/// The supervisor's end and the node's.
pub(super) fn pair() -> Result<(Receiver, OwnedFd), Errno> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((Receiver { socket: ours, closed: Cell::new(false) }, theirs))
}

/// The supervisor's end.
#[derive(Debug)]
pub(super) struct Receiver {
    socket: OwnedFd,
    closed: Cell<bool>,
}

impl Receiver {
    /// The next message, if there is one now. What is no message is skipped and logged.
    pub(super) fn next(&self) -> Option<Report> {
        let mut bytes = [0; MESSAGE_BYTES_MAX];
        loop {
            match recv(&self.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => self.closed.set(true),
                Ok((_, len)) => match bytes.get(..len).and_then(Report::decode) {
                    Some(report) => return Some(report),
                    None => {
                        tracing::warn!(target: "quorate_supervisor", "the node sent what is no report");
                        continue;
                    }
                },
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(_) => self.closed.set(true),
            }
            return None;
        }
    }

    /// Whether a message waits.
    pub(super) fn has_more(&self) -> bool {
        let mut byte = [0; 1];
        let peeked = recv(&self.socket, &mut byte[..], RecvFlags::DONTWAIT | RecvFlags::PEEK);
        peeked.is_ok_and(|(_, len)| 0 < len)
    }

    /// Whether the node closed its end: it is ending, or closed its standard input against the rules.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The node's end of the link to its supervisor. Cloning shares it.
#[derive(Clone, Debug)]
pub struct SupervisorLink {
    socket: Arc<OwnedFd>,
}

/// Why a node has no link though it was told that it has a supervisor, or a report did not get through.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The supervisor died before this process asked for the death signal. The node must end.
    #[error("the supervisor is gone")]
    Gone,
    /// The socket is full: the supervisor is stopped or overloaded. The report was not taken; an older one stands.
    #[error("the supervisor takes no reports now")]
    Full,
    /// A path that is too long or not absolute.
    #[error("`{0}` is not an absolute path of the length that a mount point may have")]
    Path(PathBuf),
    /// The system refused something.
    #[error("the link to the supervisor: {0}")]
    System(#[from] std::io::Error),
}

impl SupervisorLink {
    /// Takes the link over from the environment: standard input becomes `/dev/null`, and this process will get SIGKILL
    /// when its supervisor dies. `None` where there is no supervisor.
    ///
    /// Call it once, at the start of `main`.
    ///
    /// # Errors
    /// See [`LinkError`]. A node that was started by a supervisor must not go on without the link.
    pub fn from_env() -> Result<Option<Self>, LinkError> {
        let Some(supervisor) = std::env::var_os(ENV) else { return Ok(None) };
        let system = |e: Errno| LinkError::System(e.into());
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(system)?;
        let supervisor = supervisor.to_str().and_then(|s| s.parse().ok()).and_then(Pid::from_raw);
        // It may have died before the line above.
        if supervisor.is_none() || rustix::process::getppid() != supervisor {
            return Err(LinkError::Gone);
        }
        let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
        super::sys::stdin_from_null()?;
        Ok(Some(Self { socket: Arc::new(socket) }))
    }

    /// Reports the end of the lease. Never blocks.
    ///
    /// # Errors
    /// See [`LinkError`]; what was reported before stands.
    pub fn report_lease(&self, report: LeaseReport) -> Result<(), LinkError> {
        self.send(&Report::Lease(report))
    }

    /// A process group was started and is to be killed with this node. Say so right after the start.
    ///
    /// # Errors
    /// See [`LinkError`]; then the group must be ended.
    pub fn add_group(&self, id: i32) -> Result<(), LinkError> {
        self.send(&Report::Group { id, is_gone: false })
    }

    /// A process group is gone. Say so before its number can be used again, that is before its leader is waited for.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn remove_group(&self, id: i32) -> Result<(), LinkError> {
        self.send(&Report::Group { id, is_gone: true })
    }

    /// A FUSE filesystem was mounted: connection number (the device's minor) and mount point.
    ///
    /// # Errors
    /// See [`LinkError`]; then it must be unmounted.
    pub fn add_mount(&self, connection: u64, point: &Path) -> Result<(), LinkError> {
        self.send(&Report::Mount { connection, point: checked(point)?, is_gone: false })
    }

    /// It is unmounted.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn remove_mount(&self, connection: u64, point: &Path) -> Result<(), LinkError> {
        self.send(&Report::Mount { connection, point: checked(point)?, is_gone: true })
    }

    /// The node can be used from now on: its supervisor tells the service manager.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn report_ready(&self) -> Result<(), LinkError> {
        self.send(&Report::Ready)
    }

    /// How the node is, in a line for people; what is longer than 256 bytes is cut off.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn report_status(&self, line: &str) -> Result<(), LinkError> {
        let mut end = line.len().min(STATUS_BYTES_MAX);
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        self.send(&Report::Status(line[..end].to_owned()))
    }

    fn send(&self, report: &Report) -> Result<(), LinkError> {
        let bytes = report.encode();
        loop {
            return match send(&*self.socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(_) => Ok(()),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Err(LinkError::Full),
                Err(Errno::PIPE | Errno::CONNRESET) => Err(LinkError::Gone),
                Err(error) => Err(LinkError::System(error.into())),
            };
        }
    }
}

fn checked(point: &Path) -> Result<PathBuf, LinkError> {
    let bytes = point.as_os_str().as_bytes().len();
    if point.is_absolute() && bytes <= 4096 {
        Ok(point.to_owned())
    } else {
        Err(LinkError::Path(point.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_received_and_junk_is_skipped() {
        let (receiver, theirs) = pair().unwrap();
        let link = SupervisorLink { socket: Arc::new(theirs) };
        link.report_lease(LeaseReport::Until(77)).unwrap();
        send(&*link.socket, &[9, 9, 9], SendFlags::empty()).unwrap();
        send(&*link.socket, &[3, 1, 0, 0, 0], SendFlags::empty()).unwrap();
        link.add_group(4711).unwrap();
        link.add_mount(42, Path::new("/mnt/x")).unwrap();
        assert!(matches!(link.add_mount(42, Path::new("x")), Err(LinkError::Path(_))));
        assert_eq!(receiver.next(), Some(Report::Lease(LeaseReport::Until(77))));
        assert_eq!(receiver.next(), Some(Report::Group { id: 4711, is_gone: false }), "junk is skipped");
        let point = PathBuf::from("/mnt/x");
        assert_eq!(receiver.next(), Some(Report::Mount { connection: 42, point, is_gone: false }));
        link.report_ready().unwrap();
        link.report_status(&"ä".repeat(200)).unwrap();
        assert_eq!(receiver.next(), Some(Report::Ready));
        assert_eq!(receiver.next(), Some(Report::Status("ä".repeat(128))));
        assert_eq!(receiver.next(), None);
        assert!(!receiver.is_closed());
        drop(link);
        assert_eq!(receiver.next(), None);
        assert!(receiver.is_closed());
    }

    proptest::proptest! {
        #[test]
        fn hostile_packets_never_name_the_supervisor_itself(
            tag in 0_u8..12,
            rest in proptest::collection::vec(proptest::num::u8::ANY, 0..64),
        ) {
            let bytes = [&[tag][..], &rest].concat();
            match Report::decode(&bytes) {
                Some(Report::Group { id, .. }) => assert!(1 < id),
                Some(Report::Mount { point, .. }) => assert!(point.is_absolute()),
                Some(report) => assert!(matches!(tag, 1 | 2 | 7 | 8), "{report:?}"),
                None => {}
            }
        }
    }

    #[test]
    fn a_full_socket_is_an_error_and_never_blocks() {
        let (_receiver, theirs) = pair().unwrap();
        let link = SupervisorLink { socket: Arc::new(theirs) };
        let full = (0..100_000).find_map(|i| link.report_lease(LeaseReport::Until(i)).err());
        assert!(matches!(full, Some(LinkError::Full)));
    }
}
