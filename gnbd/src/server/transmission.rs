//! The transmission phase: a task that reads requests, one per operation, and one that writes the answers.
//!
//! Operations overtake each other; a long read is answered in pieces, so that short ones pass between them. What a
//! connection may have under way is bounded by a number of operations and by a number of bytes.

use super::Context;
use super::connection::{ConnectionError, HeldGate};
use super::export::OpenExport;
use super::gate::{ConnectionGate, Inside, LifeCounter};
use crate::proto::{self, Command, Errno, PAYLOAD_BYTES_MAX, REQUEST_BYTES, Request, Transmission};
use crate::{BlockDevice, Buf, IoError, WriteFlags, ZeroFlags};
use std::io::{Cursor, ErrorKind};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, BufWriter};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// Operations of one connection under way at one time.
const OPERATIONS_MAX: u32 = 128;
/// Bytes read or to be written of one connection under way at one time.
const BYTES_MAX: u32 = 64 << 20;
const _: () = assert!(PAYLOAD_BYTES_MAX <= BYTES_MAX, "one request must fit");
/// The unit in which bytes are counted: a semaphore has 32-bit permits, and small requests cost something too.
const BYTES_UNIT: u32 = 4096;
/// A read is answered in pieces of this size.
const READ_PIECE_BYTES: u32 = 512 << 10;
/// A WRITE that claims more than this is no mistake but an attack; one below it is read and answered EINVAL.
const PAYLOAD_BYTES_ABSURD: u32 = 64 << 20;
/// After its gate was shut, this many requests and this time a connection is still listened to, to say "no".
const REFUSED_MAX: u32 = 1024;
const REFUSED_TIME: Duration = Duration::from_secs(3);
/// A client that takes no answers for so long is gone.
const WRITE_DEADLINE: Duration = Duration::from_secs(60);

/// Bytes for the socket.
struct Outgoing {
    head: Vec<u8>,
    body: Option<Buf>,
    /// What it holds of the connection's limits until it is written.
    _permit: Option<Arc<Permit>>,
}

struct Permit {
    _operation: OwnedSemaphorePermit,
    _bytes: OwnedSemaphorePermit,
}

struct Session {
    context: Arc<Context>,
    export: Arc<OpenExport>,
    gate: Option<Arc<ConnectionGate>>,
    structured: bool,
    allocation_context: Option<u32>,
    admitted: bool,
    answers: mpsc::UnboundedSender<Outgoing>,
    operations: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

/// Serves requests until the client ends the connection, the fence shuts it, or the server stops.
pub(super) async fn serve<S>(
    context: Arc<Context>,
    stream: S,
    negotiated: Transmission,
    gate: Option<HeldGate>,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let export = context.exports.get(&negotiated.export).cloned();
    let export = export.ok_or_else(|| std::io::Error::other("the export is gone"))?;
    let (reader, writer) = tokio::io::split(stream);
    let (answers, outbox) = mpsc::unbounded_channel();
    let mut writer = tokio::spawn(write(outbox, writer));
    let session = Arc::new(Session {
        context,
        export,
        gate: gate.as_ref().map(|g| Arc::clone(&g.0)),
        structured: negotiated.structured,
        allocation_context: negotiated.allocation_context,
        admitted: negotiated.admitted,
        answers,
        operations: Arc::new(Semaphore::new(OPERATIONS_MAX as usize)),
        bytes: Arc::new(Semaphore::new((BYTES_MAX / BYTES_UNIT) as usize)),
    });
    let mut reader = BufReader::with_capacity(128 << 10, Cursor::new(negotiated.rest).chain(reader));
    let mut gone = false;
    let mut hurry = false;
    let result = tokio::select! {
        result = session.read(&mut reader) => result,
        () = session.context.stopping() => {
            hurry = true;
            Ok(())
        }
        () = session.is_shut() => {
            hurry = true;
            // It hears "no" to what it sent in the meantime.
            let refuse = session.refuse(&mut reader);
            let _ = tokio::time::timeout(REFUSED_TIME, refuse).await;
            Ok(())
        }
        // Nobody reads the answers any more.
        _ = &mut writer => {
            gone = true;
            Ok(())
        }
    };
    drop(gate);
    // What is under way ends before the connection does, and is answered if the client takes it. The permits of answers
    // end with the writer.
    let all = session.operations.acquire_many(OPERATIONS_MAX);
    if !hurry || gone {
        let _all = all.await;
    } else if tokio::time::timeout(REFUSED_TIME, all).await.is_err() {
        // A client that takes no answers keeps nobody waiting. Operations that still run keep the export open.
        writer.abort();
    }
    drop(session);
    if !gone {
        let _ = writer.await;
    }
    result
}

async fn write<W: AsyncWrite + Unpin>(
    mut outbox: mpsc::UnboundedReceiver<Outgoing>,
    writer: W,
) -> std::io::Result<()> {
    let mut writer = BufWriter::with_capacity(64 << 10, writer);
    while let Some(first) = outbox.recv().await {
        let mut next = Some(first);
        let batch = async {
            while let Some(answer) = next {
                writer.write_all(&answer.head).await?;
                if let Some(body) = &answer.body {
                    writer.write_all(body).await?;
                }
                next = outbox.try_recv().ok();
            }
            writer.flush().await
        };
        tokio::time::timeout(WRITE_DEADLINE, batch).await.map_err(|_| ErrorKind::TimedOut)??;
    }
    writer.shutdown().await
}

/// Reads the next request; nothing at the end of the stream.
async fn next_request<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<Request>, ConnectionError> {
    let mut bytes = [0; REQUEST_BYTES];
    match reader.read_exact(&mut bytes).await {
        Ok(_) => {}
        // Some clients end without DISC; an end in the middle of a request is the same to us.
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e.into()),
    }
    let request = Request::decode(&bytes)?;
    if PAYLOAD_BYTES_ABSURD < request.payload_bytes() {
        return Err(ConnectionError::TooLong(request.length));
    }
    Ok(Some(request))
}

async fn skip<R: AsyncRead + Unpin>(reader: &mut R, bytes: u32) -> std::io::Result<()> {
    let mut part = reader.take(u64::from(bytes));
    let skipped = tokio::io::copy(&mut part, &mut tokio::io::sink()).await?;
    if skipped == u64::from(bytes) { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

impl Session {
    async fn is_shut(&self) {
        match &self.gate {
            Some(gate) => gate.is_shut().await,
            None => std::future::pending().await,
        }
    }

    async fn read<R: AsyncRead + Unpin>(self: &Arc<Self>, reader: &mut R) -> Result<(), ConnectionError> {
        let geometry = self.export.device.geometry();
        while let Some(request) = next_request(reader).await? {
            let checked =
                proto::check(&request, &geometry, self.structured, self.allocation_context.is_some());
            let payload = request.payload_bytes();
            let command = match checked {
                Ok(Command::Disconnect) => return Ok(()),
                Ok(command) => command,
                Err(errno) => {
                    skip(reader, payload).await?;
                    let permit = self.permit(0).await;
                    self.fail(&request, errno, Some(permit));
                    continue;
                }
            };
            let held = if matches!(command, Command::Read { .. }) { request.length } else { payload };
            let permit = self.permit(held).await;
            let mut data = None;
            if let Command::Write { .. } = command {
                let mut buf = Buf::zeroed(payload as usize);
                reader.read_exact(&mut buf).await?;
                data = Some(buf);
            }
            let inside = match &self.gate {
                None => None,
                Some(gate) => match gate.enter() {
                    Some(inside) => Some(inside),
                    None => {
                        self.refused(&request, Some(permit));
                        continue;
                    }
                },
            };
            // Never aborted: what was begun ends, and only then leaves the gate.
            tokio::spawn(Arc::clone(self).carry_out(request, command, data, inside, permit));
        }
        Ok(())
    }

    async fn refuse<R: AsyncRead + Unpin>(&self, reader: &mut R) -> Result<(), ConnectionError> {
        for _ in 0..REFUSED_MAX {
            let Some(request) = next_request(reader).await? else { return Ok(()) };
            skip(reader, request.payload_bytes()).await?;
            if request.kind == proto::consts::CMD_DISC {
                return Ok(());
            }
            self.refused(&request, None);
        }
        Ok(())
    }

    fn refused(&self, request: &Request, permit: Option<Arc<Permit>>) {
        if let Some(gate) = &self.gate {
            LifeCounter::add(&gate.life.requests_refused);
        }
        self.fail(request, Errno::Shutdown, permit);
    }

    async fn permit(&self, bytes: u32) -> Arc<Permit> {
        let units = bytes.div_ceil(BYTES_UNIT).max(1);
        let never = "the semaphores of a connection are never closed";
        let operation = Arc::clone(&self.operations).acquire_owned().await.expect(never);
        let bytes = Arc::clone(&self.bytes).acquire_many_owned(units).await.expect(never);
        Arc::new(Permit { _operation: operation, _bytes: bytes })
    }

    fn answer(&self, head: Vec<u8>, body: Option<Buf>, permit: Option<Arc<Permit>>) {
        // Nobody reads it if the connection has ended.
        let _ = self.answers.send(Outgoing { head, body, _permit: permit });
    }

    fn fail(&self, request: &Request, errno: Errno, permit: Option<Arc<Permit>>) {
        let head = if self.structured {
            proto::encode_error(request.cookie, errno, "")
        } else {
            proto::encode_simple(request.cookie, Some(errno))
        };
        self.answer(head, None, permit);
    }

    async fn carry_out(
        self: Arc<Self>,
        request: Request,
        command: Command,
        data: Option<Buf>,
        inside: Option<Inside>,
        permit: Arc<Permit>,
    ) {
        let device = &self.export.device;
        let (offset, len) = (request.offset, u64::from(request.length));
        let (result, fua) = match command {
            Command::Read { df } => return self.send_read(&request, df, permit).await,
            Command::BlockStatus => return self.send_status(&request, permit),
            Command::Flush => {
                let (result, verifier) = self.export.sync().await;
                drop(inside);
                return self.send_flush(&request, result, verifier, permit);
            }
            Command::Disconnect => unreachable!("it ends the reader"),
            Command::Write { fua } => {
                let data = data.unwrap_or_else(|| Buf::zeroed(0));
                (device.write(offset, data, WriteFlags { fua: false }).await.map(drop), fua)
            }
            Command::Trim { fua } => (device.discard(offset, len).await, fua),
            Command::WriteZeroes { fua, no_hole } => {
                (device.write_zeroes(offset, len, ZeroFlags { fua: false, no_hole }).await, fua)
            }
        };
        if let Some(inside) = &inside {
            inside.count_write();
        }
        // FUA goes through the export's one sync, so that no failure of a sync is ever reported to nobody (R12).
        let result = match result {
            Ok(()) if fua => self.export.sync().await.0,
            other => other,
        };
        drop(inside);
        match result {
            Ok(()) => self.answer(self.done(&request), None, Some(permit)),
            Err(e) => self.fail(&request, Errno::from(&e), Some(permit)),
        }
    }

    fn done(&self, request: &Request) -> Vec<u8> {
        if self.structured {
            proto::encode_none(request.cookie)
        } else {
            proto::encode_simple(request.cookie, None)
        }
    }

    fn send_flush(
        &self,
        request: &Request,
        result: Result<(), IoError>,
        verifier: proto::Verifier,
        permit: Arc<Permit>,
    ) {
        if !(self.admitted && self.structured) {
            return match result {
                Ok(()) => self.answer(self.done(request), None, Some(permit)),
                Err(e) => self.fail(request, Errno::from(&e), Some(permit)),
            };
        }
        let mut head = proto::encode_verifier(request.cookie, result.is_ok(), verifier);
        if let Err(e) = &result {
            head.extend(proto::encode_error(request.cookie, Errno::from(e), ""));
        }
        self.answer(head, None, Some(permit));
    }

    fn send_status(&self, request: &Request, permit: Arc<Permit>) {
        // "Allocated, not known to be zero" is true of every range; the device is not asked for holes.
        let context = self.allocation_context.unwrap_or_default();
        let head = if self.structured {
            proto::encode_block_status(request.cookie, context, request.length, 0)
        } else {
            proto::encode_simple(request.cookie, Some(Errno::Inval))
        };
        self.answer(head, None, Some(permit));
    }

    async fn send_read(&self, request: &Request, df: bool, permit: Arc<Permit>) {
        let device = &self.export.device;
        let (cookie, len) = (request.cookie, request.length);
        if !self.structured {
            return match device.read(request.offset, Buf::zeroed(len as usize)).await {
                Ok(data) => self.answer(proto::encode_simple(cookie, None), Some(data), Some(permit)),
                Err(e) => self.fail(request, Errno::from(&e), Some(permit)),
            };
        }
        if len == 0 {
            return self.answer(proto::encode_none(cookie), None, Some(permit));
        }
        let piece = if df { len } else { READ_PIECE_BYTES };
        let mut done = 0;
        while done < len {
            let n = piece.min(len - done);
            let offset = request.offset + u64::from(done);
            match device.read(offset, Buf::zeroed(n as usize)).await {
                Ok(data) => {
                    let last = done + n == len;
                    let head = proto::encode_data_header(cookie, last, offset, n);
                    self.answer(head, Some(data), Some(Arc::clone(&permit)));
                }
                Err(e) => return self.fail(request, Errno::from(&e), Some(permit)),
            }
            done += n;
        }
    }
}
