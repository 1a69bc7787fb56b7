//! The open `/dev/fuse`: one request per read, one reply or notice per write.

use super::codec::{self, Notice, Reply, Unique};
use rustix::io::Errno;
use std::io::IoSlice;
use std::os::fd::OwnedFd;

/// The kernel's end of a mount. Any thread may read, any may write.
#[derive(Debug)]
pub(crate) struct Device {
    fd: OwnedFd,
}

/// What reading the device brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A message of so many bytes.
    Message(usize),
    /// Unmounted: nothing will come any more.
    Unmounted,
    /// The connection was aborted, or the device failed.
    Aborted(Errno),
}

impl Device {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Waits for a message. `buffer` must hold [`codec::READ_BUFFER_BYTES`].
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Received {
        assert!(codec::READ_BUFFER_BYTES <= buffer.len(), "the kernel refuses smaller buffers");
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => return Received::Message(len),
                // ENOENT: the request was withdrawn while it was read.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => {}
                Err(Errno::NODEV) => return Received::Unmounted,
                Err(errno) => return Received::Aborted(errno),
            }
        }
    }

    /// Answers a request.
    ///
    /// # Errors
    /// NOENT: the kernel gave the request up. NODEV, CONNABORTED: the mount is gone.
    pub(crate) fn reply(&self, unique: Unique, reply: &Reply) -> Result<(), Errno> {
        let (head, tail) = codec::encode(unique, reply);
        self.write(head.as_bytes(), tail)
    }

    /// Sends a notice. May block in the kernel, see [`Notice`].
    ///
    /// # Errors
    /// NOENT: the kernel does not know the inode, or the name. INVAL: nor the notice.
    pub(crate) fn notify(&self, notice: &Notice) -> Result<(), Errno> {
        let (head, tail) = codec::encode_notice(notice);
        self.write(head.as_bytes(), &tail)
    }

    fn write(&self, head: &[u8], tail: &[u8]) -> Result<(), Errno> {
        loop {
            // One call: the kernel takes a message whole or not at all.
            match rustix::io::writev(&self.fd, &[IoSlice::new(head), IoSlice::new(tail)]) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}
