//! Raw system calls: signals as bytes in a pipe, and standard input put elsewhere. Rules of this file: a handler does one
//! `write` to a pipe that never blocks, nothing else.

#![expect(unsafe_code, reason = "handlers and the standard descriptors are the process's own")]

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// SIGTERM or SIGINT.
pub(super) const STOP: u8 = 1;
/// SIGCHLD.
const CHILD: u8 = 2;

/// Where handlers write; -1 while there is nobody to read.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// The signals that have come.
#[derive(Debug)]
pub(super) struct Signals {
    reader: OwnedFd,
    _writer: OwnedFd,
}

extern "C" fn on_signal(signal: libc::c_int) {
    let byte = if signal == libc::SIGCHLD { CHILD } else { STOP };
    let fd = PIPE.load(Ordering::Relaxed);
    if 0 <= fd {
        // SAFETY: `write` is async-signal-safe, the byte lives on this stack, errno is put back.
        unsafe {
            let errno = libc::__errno_location();
            let before = *errno;
            libc::write(fd, std::ptr::from_ref(&byte).cast(), 1);
            *errno = before;
        }
    }
}

impl Signals {
    /// Handles SIGTERM, SIGINT and SIGCHLD from now on.
    pub(super) fn install() -> std::io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        PIPE.store(writer.as_raw_fd(), Ordering::Relaxed);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
            // SAFETY: all zeros is a valid sigaction; the handler follows the rules above.
            let result = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal, &raw const action, std::ptr::null_mut())
            };
            if result != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(Self { reader, _writer: writer })
    }

    /// The next one, if there is one. Those of one kind may have merged.
    pub(super) fn next(&mut self) -> Option<u8> {
        let mut byte = [0; 1];
        loop {
            return match rustix::io::read(&self.reader, &mut byte[..]) {
                Ok(1) => Some(byte[0]),
                Err(Errno::INTR) => continue,
                _ => None,
            };
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        PIPE.store(-1, Ordering::Relaxed);
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

/// Makes standard input read nothing.
pub(super) fn stdin_from_null() -> std::io::Result<()> {
    let null = std::fs::File::open("/dev/null")?;
    // SAFETY: both are open descriptors; `std::io::stdin` works with whatever is number 0.
    let result = unsafe { libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}
