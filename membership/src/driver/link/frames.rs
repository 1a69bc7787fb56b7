//! Length-prefixed frames out of a byte stream, and a queue that one writer drains into one write.

use std::io::{Error, ErrorKind, Result};
use std::sync::{Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

const LENGTH_BYTES: usize = 4;
/// How much is read at once. What a frame needs beyond it is made room for as its bytes arrive.
const READ_BYTES: usize = 64 << 10;

/// Reads frames `length u32 LE | content`.
pub(crate) struct FrameReader {
    buffer: Vec<u8>,
    start: usize,
    limit: usize,
}

impl FrameReader {
    /// Frames above `limit` bytes are an error before anything is buffered for them.
    pub(crate) fn new(limit: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, limit }
    }

    /// Changes the limit for the frames that follow.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Reads what is there, at least one byte. Dropping the future loses nothing.
    pub(crate) async fn fill(&mut self, from: &mut (dyn AsyncRead + Send + Unpin)) -> Result<()> {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.reserve(READ_BYTES);
        match from.read_buf(&mut self.buffer).await? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The next whole frame among what was read.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>> {
        let rest = self.buffer.get(self.start..).unwrap_or_default();
        let Some((length, rest)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let size = u32::from_le_bytes(*length) as usize;
        if self.limit < size {
            let text = format!("a frame of {size} bytes is above the limit of {}", self.limit);
            return Err(Error::new(ErrorKind::InvalidData, text));
        }
        let frame = rest.get(..size);
        if frame.is_some() {
            self.start += LENGTH_BYTES + size;
        }
        Ok(frame)
    }

    /// Reads one frame, waiting for it.
    pub(crate) async fn one(&mut self, from: &mut (dyn AsyncRead + Send + Unpin)) -> Result<Vec<u8>> {
        loop {
            if let Some(frame) = self.next()? {
                return Ok(frame.to_vec());
            }
            self.fill(from).await?;
        }
    }
}

/// A frame of this content.
pub(crate) fn frame(content: &[u8]) -> Vec<u8> {
    let size = u32::try_from(content.len()).expect("contents are checked against their limits");
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + content.len());
    bytes.extend_from_slice(&size.to_le_bytes());
    bytes.extend_from_slice(content);
    bytes
}

/// What waits to be written on a connection.
#[derive(Debug, Default)]
pub(crate) struct OutQueue {
    inner: Mutex<Inner>,
    wake: Notify,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    closed: bool,
    /// The writer has taken bytes that are not written yet.
    writing: bool,
}

impl OutQueue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends whole frames. What comes after the end is dropped.
    pub(crate) fn push(&self, frames: &[u8]) {
        let mut inner = self.lock();
        if !inner.closed {
            inner.bytes.extend_from_slice(frames);
            drop(inner);
            self.wake.notify_one();
        }
    }

    /// Appends whole frames unless `limit` bytes wait already.
    pub(crate) fn push_below(&self, frames: &[u8], limit: usize) {
        let mut inner = self.lock();
        if !inner.closed && inner.bytes.len() + frames.len() <= limit {
            inner.bytes.extend_from_slice(frames);
            drop(inner);
            self.wake.notify_one();
        }
    }

    /// Appends a frame of this content unless `limit` bytes wait already.
    pub(crate) fn push_frame_below(&self, content: &[u8], limit: usize) {
        let mut inner = self.lock();
        if inner.closed || limit < inner.bytes.len() + content.len() {
            return;
        }
        inner.bytes.extend_from_slice(&frame(content));
        drop(inner);
        self.wake.notify_one();
    }

    /// Whether everything is handed to the network, or nothing more will be.
    pub(crate) fn is_idle(&self) -> bool {
        let inner = self.lock();
        inner.closed || (inner.bytes.is_empty() && !inner.writing)
    }

    /// Ends the connection: the writer stops, and with it the reader.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
        self.ended.notify_one();
    }

    /// Until [`close`](Self::close): also while the other end takes nothing and the writer hangs.
    pub(crate) async fn closed(&self) {
        while !self.lock().closed {
            self.ended.notified().await;
        }
    }
}

/// Writes what is queued until the queue is closed or the connection breaks.
pub(crate) async fn write_out(queue: &OutQueue, to: &mut (dyn AsyncWrite + Send + Unpin)) -> Result<()> {
    let mut chunk = Vec::new();
    loop {
        let closed = {
            let mut inner = queue.lock();
            std::mem::swap(&mut inner.bytes, &mut chunk);
            inner.writing = !chunk.is_empty();
            inner.closed
        };
        if closed {
            return Ok(());
        }
        if chunk.is_empty() {
            queue.wake.notified().await;
            continue;
        }
        to.write_all(&chunk).await?;
        to.flush().await?;
        chunk.clear();
        // A burst must not keep its memory for the life of the connection.
        chunk.shrink_to(READ_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_out_whole_and_a_too_long_one_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut bytes = frame(b"one");
            bytes.extend(frame(b""));
            bytes.extend(frame(&[7; 11]));
            let mut reader = FrameReader::new(10);
            let mut from = bytes.as_slice();
            assert_eq!(reader.one(&mut from).await.unwrap(), b"one");
            assert_eq!(reader.one(&mut from).await.unwrap(), b"");
            let error = reader.one(&mut from).await.unwrap_err();
            assert_eq!(error.to_string(), "a frame of 11 bytes is above the limit of 10");
        });
    }
}
