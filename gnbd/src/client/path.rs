//! One more path of a life to a storage server, below the device: for tools that look at what the server says to a
//! request which a network held up.

use super::connect::{ConnectError, Stream, open};
use super::device::NbdConfig;
use crate::fence::wire::{Hello, HelloRefusal, VERSION};
use crate::proto::consts::{CMD_DISC, CMD_WRITE};
use crate::proto::{
    CHUNK_HEADER_BYTES, ChunkBody, Errno, PAYLOAD_BYTES_MAX, ReplyError, ReplyHeader, Request,
    SIMPLE_HEADER_BYTES,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A single connection that joins the generation its life has under way, and so takes nothing from it (R11).
///
/// It does not reconnect, resend or retain: what the server answers is what the caller gets.
pub struct Path {
    stream: Box<dyn Stream>,
    cookie: u64,
}

impl std::fmt::Debug for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Path").field("cookie", &self.cookie).finish_non_exhaustive()
    }
}

/// Why a request on a [`Path`] has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathError {
    /// The connection ended: what was sent may have been carried out or not.
    #[error("the connection ended: {0}")]
    Io(#[from] std::io::Error),
    /// What came is no answer.
    #[error(transparent)]
    Reply(#[from] ReplyError),
    /// More bytes than one request carries.
    #[error("{0} bytes are more than one request carries")]
    TooLong(usize),
}

impl Path {
    /// Connects with the configuration of the life's device; `config.member` must be there.
    ///
    /// # Errors
    /// No connection, or the server does not admit this life now.
    pub async fn join(config: &NbdConfig) -> Result<Self, ConnectError> {
        let member = config.member.as_ref().ok_or(ConnectError::Protocol("a path belongs to a member"))?;
        let mut opened = open(&config.address, config.tls.as_ref()).await?;
        let mut hello = Hello {
            version: VERSION,
            cluster: member.cluster,
            who: member.who,
            epoch: member.chain.epoch(),
            generation: 0,
            export: config.export.clone(),
        };
        // Generation 0 begins none where there is one: the refusal tells which.
        let mut answer = opened.hello(&hello).await?;
        if let Err(HelloRefusal::Stale(current)) = answer {
            hello.generation = current;
            answer = opened.hello(&hello).await?;
        }
        answer.map_err(ConnectError::Hello)?;
        let (stream, _) = opened.go(&config.export).await?;
        Ok(Self { stream, cookie: 0 })
    }

    /// Sends one write and waits for the server's answer to it, which may be that it refuses.
    ///
    /// # Errors
    /// There is no answer. Dropping the future leaves the request sent or not, and the path of no more use.
    pub async fn write(&mut self, offset: u64, data: &[u8]) -> Result<Result<(), Errno>, PathError> {
        let length = u32::try_from(data.len()).ok().filter(|len| *len <= PAYLOAD_BYTES_MAX);
        let length = length.ok_or(PathError::TooLong(data.len()))?;
        self.cookie += 1;
        let request = Request { flags: 0, kind: CMD_WRITE, cookie: self.cookie, offset, length };
        self.stream.write_all(&request.encode()).await?;
        self.stream.write_all(data).await?;
        self.stream.flush().await?;
        let mut error = None;
        loop {
            let mut head = [0; SIMPLE_HEADER_BYTES];
            self.stream.read_exact(&mut head).await?;
            match ReplyHeader::decode(&head)? {
                ReplyHeader::Simple { error, .. } => return Ok(error.map_or(Ok(()), Err)),
                ReplyHeader::Chunk(mut chunk) => {
                    let mut length = [0; CHUNK_HEADER_BYTES - SIMPLE_HEADER_BYTES];
                    self.stream.read_exact(&mut length).await?;
                    let mut body = vec![0; chunk.set_length(length)?];
                    self.stream.read_exact(&mut body).await?;
                    if let ChunkBody::Error(errno) = chunk.body(&body)? {
                        error = Some(errno);
                    }
                    if chunk.done {
                        return Ok(error.map_or(Ok(()), Err));
                    }
                }
            }
        }
    }

    /// Ends the connection as the protocol wants it.
    pub async fn close(mut self) {
        let goodbye = Request { flags: 0, kind: CMD_DISC, cookie: 0, offset: 0, length: 0 };
        // The server may have ended it already.
        let _ = self.stream.write_all(&goodbye.encode()).await;
        let _ = self.stream.shutdown().await;
    }
}
