//! The commands' end of the admin socket, with plain blocking calls.

use super::protocol::{Command, FileOperation, FileStatus, Reply, Request, read_reply, write_frame};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a node's admin socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// No node runs there, or the socket may not be used.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)
            .map_err(|e| io::Error::new(e.kind(), format!("no node answers at {}: {e}", socket.display())))?;
        Ok(Self { stream })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The connection broke.
    pub fn ask(&mut self, request: &Request) -> io::Result<Reply> {
        write_frame(&mut self.stream, request)?;
        read_reply(&mut self.stream)?
            .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the node closed the connection"))
    }

    /// Asks a command: its exit code, text and JSON.
    ///
    /// # Errors
    /// The connection broke or the node refused to listen.
    pub fn command(&mut self, command: Command) -> io::Result<(u8, String, String)> {
        match self.ask(&Request::Command(command))? {
            Reply::Done { text, json, code } => Ok((code, text, json)),
            Reply::Refused(text) => Err(io::Error::new(io::ErrorKind::PermissionDenied, text)),
            other => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
        }
    }

    /// Asks for a file operation. The error has the operation's own error number.
    ///
    /// # Errors
    /// The operation's, or the connection's.
    pub fn file(&mut self, filesystem: &str, operation: FileOperation) -> io::Result<Reply> {
        match self.ask(&Request::File { filesystem: filesystem.into(), operation })? {
            Reply::FileError { errno, .. } => Err(io::Error::from_raw_os_error(errno)),
            Reply::Refused(text) => Err(io::Error::other(text)),
            reply => Ok(reply),
        }
    }

    /// The entries of a directory.
    ///
    /// # Errors
    /// See [`file`](Self::file).
    pub fn list(&mut self, filesystem: &str, path: &str) -> io::Result<Vec<FileStatus>> {
        match self.file(filesystem, FileOperation::List(path.into()))? {
            Reply::Files(files) => Ok(files),
            other => Err(io::Error::other(format!("unexpected answer: {other:?}"))),
        }
    }
}
