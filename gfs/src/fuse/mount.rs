//! Mounting and unmounting: mount(2) with root's rights, the set-uid `fusermount3` without them.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use std::ffi::CString;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// How to mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// The directory to mount on. It must exist.
    pub mountpoint: PathBuf,
    /// What `mount` and `df` show as the source.
    pub source: String,
    /// Let other users than the mounting one in. For ordinary users only where `/etc/fuse.conf` says
    /// `user_allow_other`.
    pub allow_other: bool,
    /// Mount read-only.
    pub read_only: bool,
}

impl MountOptions {
    /// Read-write; other users may use it if root mounts it.
    #[must_use]
    pub fn new(mountpoint: impl Into<PathBuf>, source: impl Into<String>) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            source: source.into(),
            allow_other: rustix::process::geteuid().is_root(),
            read_only: false,
        }
    }
}

/// Why nothing was mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    /// `/dev/fuse` cannot be opened: no such device (the module is not loaded), or no right to.
    #[error("cannot open /dev/fuse: {0}")]
    Device(#[source] Errno),
    /// The mount point cannot be looked at.
    #[error("mount point {0}: {1}")]
    Mountpoint(PathBuf, #[source] std::io::Error),
    /// mount(2) failed.
    #[error("cannot mount on {0}: {1}")]
    Mount(PathBuf, #[source] Errno),
    /// This user may not mount, and there is no set-uid `fusermount3` to do it.
    #[error("only root may mount here: no set-uid fusermount3 is installed (Debian: package fuse3)")]
    NoFusermount,
    /// `fusermount3` refused.
    #[error("fusermount3: {0}")]
    Fusermount(String),
    /// A thread of the mount could not be started, or one ended while mounting.
    #[error("cannot serve the mount: {0}")]
    Serve(#[source] std::io::Error),
}

/// Why a mount is still there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnmountError {
    /// Somebody uses it.
    #[error("{0} is in use")]
    Busy(PathBuf),
    /// umount(2) failed.
    #[error("cannot unmount {0}: {1}")]
    Unmount(PathBuf, #[source] Errno),
    /// `fusermount3` failed.
    #[error("fusermount3: {0}")]
    Fusermount(String),
    /// It did not end in time.
    #[error("{0} did not end before its deadline")]
    Deadline(PathBuf),
}

/// Opens the device and mounts.
pub(crate) fn mount(options: &MountOptions) -> Result<OwnedFd, MountError> {
    let broken = |error| MountError::Mountpoint(options.mountpoint.clone(), error);
    let meta = std::fs::metadata(&options.mountpoint).map_err(broken)?;
    if !meta.is_dir() {
        return Err(broken(std::io::ErrorKind::NotADirectory.into()));
    }
    if rustix::process::geteuid().is_root() {
        mount_as_root(options, meta.mode())
    } else {
        mount_as_user(options)
    }
}

fn mount_as_root(options: &MountOptions, mode: u32) -> Result<OwnedFd, MountError> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(MountError::Device)?;
    let mut data = format!(
        "fd={},rootmode={:o},user_id=0,group_id=0,default_permissions",
        device.as_raw_fd(),
        mode & 0o170_000
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let refused = |errno| MountError::Mount(options.mountpoint.clone(), errno);
    let data = CString::new(data).map_err(|_| refused(Errno::INVAL))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount(&options.source, &options.mountpoint, "fuse.quorate", flags, data.as_c_str())
        .map_err(refused)?;
    Ok(device)
}

/// `fusermount3`, where it is installed with the set-uid bit.
fn fusermount() -> Result<PathBuf, MountError> {
    ["/usr/bin/fusermount3", "/bin/fusermount3", "/usr/local/bin/fusermount3"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| {
            std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o4000 != 0 && m.uid() == 0)
        })
        .ok_or(MountError::NoFusermount)
}

fn mount_as_user(options: &MountOptions) -> Result<OwnedFd, MountError> {
    let program = fusermount()?;
    let io = |errno: Errno| MountError::Serve(errno.into());
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(io)?;
    let mut how =
        format!("fsname={},subtype=quorate,default_permissions,nosuid,nodev", escaped(&options.source));
    if options.allow_other {
        how.push_str(",allow_other");
    }
    if options.read_only {
        how.push_str(",ro");
    }
    // The socket becomes the program's standard input: nothing to inherit by accident, no number to agree on.
    let child = Command::new(program)
        .arg("-o")
        .arg(how)
        .arg("--")
        .arg(&options.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MountError::Serve)?;
    let device = receive_device(&ours);
    let output = child.wait_with_output().map_err(MountError::Serve)?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match device {
        Ok(Some(device)) if output.status.success() => Ok(device),
        Ok(_) => Err(MountError::Fusermount(if said.is_empty() { output.status.to_string() } else { said })),
        Err(errno) => Err(io(errno)),
    }
}

/// Commas and backslashes end an option unless escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace(',', "\\,")
}

fn receive_device(socket: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    loop {
        let mut iov = [IoSliceMut::new(&mut byte)];
        match rustix::net::recvmsg(socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
            Ok(_) => break,
        }
    }
    let mut device = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            device = fds.last();
        }
    }
    Ok(device)
}

/// How a mount is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmountMode {
    /// Only if nobody uses it.
    Clean,
    /// From the tree at once, for its users when they are done.
    Lazy,
    /// Abort what is under way: every waiting operation fails. Root only.
    Force,
}

/// Unmounts. May block while the filesystem is flushed: never call it on a thread that serves the mount.
///
/// # Errors
/// See [`UnmountError`].
pub fn unmount(mountpoint: &Path, mode: UnmountMode) -> Result<(), UnmountError> {
    if rustix::process::geteuid().is_root() {
        let flags = match mode {
            UnmountMode::Clean => UnmountFlags::NOFOLLOW,
            UnmountMode::Lazy => UnmountFlags::DETACH | UnmountFlags::NOFOLLOW,
            UnmountMode::Force => UnmountFlags::FORCE | UnmountFlags::NOFOLLOW,
        };
        return match rustix::mount::unmount(mountpoint, flags) {
            Ok(()) => Ok(()),
            Err(Errno::BUSY) => Err(UnmountError::Busy(mountpoint.into())),
            Err(errno) => Err(UnmountError::Unmount(mountpoint.into(), errno)),
        };
    }
    let program = fusermount().map_err(|e| UnmountError::Fusermount(e.to_string()))?;
    let mut command = Command::new(program);
    command.arg("-u");
    if mode != UnmountMode::Clean {
        command.arg("-z");
    }
    let output = command
        .arg("--")
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| UnmountError::Fusermount(e.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(()),
        false if said.contains("busy") => Err(UnmountError::Busy(mountpoint.into())),
        false => Err(UnmountError::Fusermount(said.trim().into())),
    }
}

/// A FUSE connection of this machine: the number of its directory in `/sys/fs/fuse/connections`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ConnectionId(pub u32);

impl ConnectionId {
    /// The connection of a mount, found without touching it. The last one, if several are stacked.
    #[must_use]
    pub fn of_mount(mountpoint: &Path) -> Option<Self> {
        let wanted = std::path::absolute(mountpoint).ok()?;
        let wanted = match wanted.parent().and_then(|p| p.canonicalize().ok()) {
            Some(parent) => parent.join(wanted.file_name()?),
            None => wanted,
        };
        // Of this thread: it may have a mount namespace of its own.
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo").ok()?;
        table.lines().filter_map(|line| parse_mount(line, &wanted)).next_back()
    }

    /// Ends the connection: every request under way and to come fails, also of processes that could not be killed.
    ///
    /// # Errors
    /// The connection is gone, or the caller may not.
    pub fn abort(self) -> std::io::Result<()> {
        match std::fs::write(format!("/sys/fs/fuse/connections/{}/abort", self.0), "1") {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.abort_unmounted().map_err(Into::into)
            }
            other => other,
        }
    }

    /// The control filesystem is mounted nowhere (containers): root can open it without a mount point.
    fn abort_unmounted(self) -> Result<(), Errno> {
        use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let control = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let path = format!("{}/abort", self.0);
        let file = rustix::fs::openat(&control, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        rustix::io::write(&file, b"1").map(drop)
    }
}

/// A line of `/proc/self/mountinfo`: ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS ... - TYPE SOURCE OPTIONS.
fn parse_mount(line: &str, wanted: &Path) -> Option<ConnectionId> {
    let (before, after) = line.split_once(" - ")?;
    if !after.starts_with("fuse") {
        return None;
    }
    let mut fields = before.split(' ').skip(2);
    let (_, minor) = fields.next()?.split_once(':')?;
    let _root = fields.next()?;
    let path = fields.next()?;
    (unescaped(path) == wanted.as_os_str().as_encoded_bytes()).then_some(ConnectionId(minor.parse().ok()?))
}

/// Space, tab, newline and backslash stand as `\ooo`.
fn unescaped(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| byte == b'\\').and_then(|d| std::str::from_utf8(d).ok());
        if let Some(code) = octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            out.push(code);
            rest = tail.get(3..).unwrap_or_default();
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_is_read_from_the_mount_table() {
        let line = r"36 35 0:51 / /mnt/a\040b rw,nosuid - fuse.quorate vg/lv rw,user_id=0";
        assert_eq!(parse_mount(line, Path::new("/mnt/a b")), Some(ConnectionId(51)));
        assert_eq!(parse_mount(line, Path::new("/mnt/a")), None);
        let other = "36 35 0:51 / /mnt rw - tmpfs none rw";
        assert_eq!(parse_mount(other, Path::new("/mnt")), None);
    }

    #[test]
    fn a_mount_point_that_is_no_directory_is_named() {
        let error = mount(&MountOptions::new("/proc/self/status", "x")).unwrap_err();
        assert!(error.to_string().contains("/proc/self/status"), "{error}");
    }
}
