//! One connection in transmission: a task that writes requests and one that reads replies.

use super::connect::{Negotiated, Stream};
use super::queue::{Command, OpId, Tag};
use crate::Buf;
use crate::proto::consts::*;
use crate::proto::{
    CHUNK_HEADER_BYTES, Chunk, ChunkBody, Errno, ReplyError, ReplyHeader, Request, SIMPLE_HEADER_BYTES,
    Verifier,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter, ReadHalf, WriteHalf,
};
use tokio::sync::mpsc;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Reply(#[from] ReplyError),
    #[error("the server breaks the protocol: {0}")]
    Protocol(&'static str),
    #[error("the device is closed")]
    Closed,
}

/// An answer of the server. A read's data is in the buffer.
pub(super) struct Answer {
    pub(super) tag: Tag,
    pub(super) result: Result<(), Errno>,
    pub(super) verifier: Option<Verifier>,
    pub(super) data: Option<(OpId, Buf)>,
}

/// A request that is not answered.
struct Pending {
    offset: u64,
    len: u64,
    /// For a read: what is filled, and how much of it is.
    read: Option<(OpId, Buf)>,
    filled: u64,
    error: Option<Errno>,
    verifier: Option<Verifier>,
}

/// What is under way on one connection.
#[derive(Clone, Default)]
pub(super) struct Table(Arc<Mutex<BTreeMap<Tag, Pending>>>);

impl Table {
    fn put(&self, tag: Tag, pending: Pending) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(tag, pending);
    }

    fn take(&self, cookie: u64) -> Result<(Tag, Pending), LinkError> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = table.remove(&Tag(cookie));
        found.map(|p| (Tag(cookie), p)).ok_or(LinkError::Protocol("an answer to nothing"))
    }
}

/// A request for the writer; `buf` is where a read goes.
pub(super) struct Job {
    pub(super) tag: Tag,
    pub(super) command: Command,
    pub(super) buf: Option<Buf>,
}

/// Writes requests until the channel ends, then says goodbye.
pub(super) async fn write(
    mut jobs: mpsc::UnboundedReceiver<Job>,
    table: Table,
    flags: u16,
    stream: WriteHalf<Box<dyn Stream>>,
) -> Result<(), LinkError> {
    let mut writer = BufWriter::with_capacity(64 << 10, stream);
    while let Some(first) = jobs.recv().await {
        let mut next = Some(first);
        while let Some(job) = next {
            send(job, &table, flags, &mut writer).await?;
            next = jobs.try_recv().ok();
        }
        writer.flush().await?;
    }
    let goodbye = Request { flags: 0, kind: CMD_DISC, cookie: 0, offset: 0, length: 0 };
    writer.write_all(&goodbye.encode()).await?;
    writer.flush().await?;
    writer.shutdown().await?;
    Err(LinkError::Closed)
}

async fn send<W: AsyncWrite + Unpin>(
    job: Job,
    table: &Table,
    server: u16,
    writer: &mut W,
) -> Result<(), LinkError> {
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let fua_flag = flag(server & TX_SEND_FUA != 0, CMD_FLAG_FUA);
    let (kind, flags, offset, len) = match &job.command {
        Command::Read { offset, len, .. } => (CMD_READ, 0, *offset, *len),
        Command::Write { offset, len, fua, .. } => (CMD_WRITE, flag(*fua, fua_flag), *offset, *len),
        Command::WriteZeroes { offset, len, fua, no_hole } => {
            (CMD_WRITE_ZEROES, flag(*fua, fua_flag) | flag(*no_hole, CMD_FLAG_NO_HOLE), *offset, *len)
        }
        Command::Discard { offset, len } => (CMD_TRIM, 0, *offset, *len),
        Command::Flush => (CMD_FLUSH, 0, 0, 0),
    };
    let length = u32::try_from(len).map_err(|_| LinkError::Protocol("a request above 4 GiB"))?;
    let read = match &job.command {
        Command::Read { op, .. } => {
            let mut buf = job.buf.unwrap_or_else(|| Buf::zeroed(len as usize));
            if buf.len() as u64 != len {
                buf = Buf::zeroed(len as usize);
            }
            Some((*op, buf))
        }
        _ => None,
    };
    // In the table before it is on the wire: the answer may be quick.
    table.put(job.tag, Pending { offset, len, read, filled: 0, error: None, verifier: None });
    let request = Request { flags, kind, cookie: job.tag.0, offset, length };
    writer.write_all(&request.encode()).await?;
    if let Command::Write { data, from, len, .. } = &job.command {
        let bytes = data.get(*from..*from + *len as usize);
        writer.write_all(bytes.ok_or(LinkError::Protocol("a write outside its buffer"))?).await?;
    }
    Ok(())
}

/// Reads replies until the connection ends.
pub(super) async fn read(
    table: Table,
    stream: ReadHalf<Box<dyn Stream>>,
    negotiated: Negotiated,
    mut answered: impl FnMut(Answer),
) -> Result<(), LinkError> {
    let mut reader = BufReader::with_capacity(128 << 10, stream);
    loop {
        let mut head = [0; SIMPLE_HEADER_BYTES];
        reader.read_exact(&mut head).await?;
        match ReplyHeader::decode(&head)? {
            ReplyHeader::Simple { cookie, error } => {
                let (tag, mut pending) = table.take(cookie)?;
                if pending.read.is_some() && negotiated.structured {
                    return Err(LinkError::Protocol("a simple answer to a read"));
                }
                if let (Some((_, buf)), None) = (&mut pending.read, error) {
                    reader.read_exact(buf).await?;
                    pending.filled = pending.len;
                }
                pending.error = error;
                answered(pending.finish(tag)?);
            }
            ReplyHeader::Chunk(chunk) => {
                let (tag, mut pending) = table.take(chunk.cookie)?;
                let done = read_chunk(&mut reader, chunk, &mut pending).await?;
                if done { answered(pending.finish(tag)?) } else { table.put(tag, pending) }
            }
        }
    }
}

async fn read_chunk<R: AsyncRead + Unpin>(
    reader: &mut R,
    mut chunk: Chunk,
    pending: &mut Pending,
) -> Result<bool, LinkError> {
    let mut length = [0; CHUNK_HEADER_BYTES - SIMPLE_HEADER_BYTES];
    reader.read_exact(&mut length).await?;
    let mut body = vec![0; chunk.set_length(length)?];
    reader.read_exact(&mut body).await?;
    let outside = LinkError::Protocol("data outside of what was asked for");
    match chunk.body(&body)? {
        ChunkBody::None => {}
        ChunkBody::Verifier(verifier) => pending.verifier = Some(verifier),
        ChunkBody::Error(error) => pending.error = Some(error),
        ChunkBody::Data { offset } => {
            let len = u64::from(chunk.length) - 8;
            let place = pending.place(offset, len).ok_or(outside)?;
            reader.read_exact(place).await?;
            pending.filled += len;
        }
        ChunkBody::Hole { offset, len } => {
            pending.place(offset, u64::from(len)).ok_or(outside)?.fill(0);
            pending.filled += u64::from(len);
        }
    }
    Ok(chunk.done)
}

impl Pending {
    /// The part of the buffer for these bytes, if they were asked for.
    fn place(&mut self, offset: u64, len: u64) -> Option<&mut [u8]> {
        let from = usize::try_from(offset.checked_sub(self.offset)?).ok()?;
        let to = from.checked_add(usize::try_from(len).ok()?)?;
        self.read.as_mut()?.1.get_mut(from..to)
    }

    fn finish(self, tag: Tag) -> Result<Answer, LinkError> {
        let Self { len, read, filled, error, verifier, .. } = self;
        if read.is_some() && error.is_none() && filled != len {
            return Err(LinkError::Protocol("an answer to a read that does not cover it once"));
        }
        Ok(Answer { tag, result: error.map_or(Ok(()), Err), verifier, data: read })
    }
}
