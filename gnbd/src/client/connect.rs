//! From an address to a negotiated connection.

use super::ask::Listed;
use crate::driver::ClientTls;
use crate::fence::wire::{ControlAnswer, ControlRequest, Hello, HelloAnswer, HelloRefusal, decode, encode};
use crate::proto::consts::*;
use crate::proto::{
    OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, PRIVATE_BYTES_MAX, Verifier, put_option, put_u16, put_u32, take_u16,
    take_u32, take_u64,
};
use quorate_membership::{Epoch, ServerId};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// A TCP connection is there by then, or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// So many answers to one option are more than any server has to say.
const REPLIES_MAX: usize = 4096;
/// How many bytes they may have together: the longest answer to one of our own options, and room.
const REPLIES_BYTES_MAX: usize = PRIVATE_BYTES_MAX + OPTION_BYTES_MAX;

/// Why there is no connection to an export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody answers there, or the connection broke. Worth a retry.
    #[error("{address}: {source}")]
    Io {
        /// Where.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// It took too long. Worth a retry.
    #[error("{address}: no answer in time")]
    Timeout {
        /// Where.
        address: String,
    },
    /// The other side does not speak NBD as we do.
    #[error("not an NBD server of ours: {0}")]
    Protocol(&'static str),
    /// The server refuses an option; the text is its own.
    #[error("the server refuses {option}: error {code:#x}, {text}")]
    Refused {
        /// Which.
        option: &'static str,
        /// The type of its reply.
        code: u32,
        /// For people.
        text: String,
    },
    /// The server refuses this member. Worth a retry, but for another version, node or cluster.
    #[error("the storage server refuses this node: {0}")]
    Hello(HelloRefusal),
    /// This life of the node was removed from the cluster, and is refused for ever (R10).
    #[error("this node is fenced: {0}")]
    Fenced(String),
}

impl From<std::io::Error> for ConnectError {
    fn from(source: std::io::Error) -> Self {
        Self::Io { address: String::new(), source }
    }
}

impl ConnectError {
    fn at(self, address: &str) -> Self {
        match self {
            Self::Io { source, .. } => Self::Io { address: address.into(), source },
            other => other,
        }
    }
}

/// Both directions of a connection.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What was negotiated.
#[derive(Clone, Debug)]
pub(super) struct Negotiated {
    pub(super) size_bytes: u64,
    pub(super) flags: u16,
    pub(super) block_bytes: u32,
    pub(super) preferred_bytes: u32,
    pub(super) payload_bytes_max: u32,
    pub(super) structured: bool,
}

/// Keeps small requests from waiting for others, and ends connections to hosts that are gone within about ten seconds.
///
/// # Errors
/// What the system says; the connection works all the same.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(5))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(2))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 10_000)?;
    Ok(())
}

/// Connects, starts TLS if wanted, and switches structured replies on.
pub(super) async fn open(address: &str, tls: Option<&ClientTls>) -> Result<Opened, ConnectError> {
    let connect = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(address));
    let timeout = |_| ConnectError::Timeout { address: address.into() };
    let stream = connect.await.map_err(timeout)?.map_err(|e| ConnectError::from(e).at(address))?;
    if let Err(error) = tune(&stream) {
        tracing::debug!(target: "quorate_gnbd", %error, "socket options");
    }
    greet(stream, tls).await.map_err(|e| e.at(address))
}

/// A connection in the haggling phase.
pub(super) struct Opened {
    stream: Box<dyn Stream>,
    structured: bool,
    padded: bool,
}

async fn greet(mut stream: TcpStream, tls: Option<&ClientTls>) -> Result<Opened, ConnectError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).await?;
    let mut from = &greeting[..];
    let magics = (take_u64(&mut from), take_u64(&mut from));
    let flags = take_u16(&mut from).unwrap_or(0);
    if magics != (Some(NBDMAGIC), Some(IHAVEOPT)) || flags & FLAG_FIXED_NEWSTYLE == 0 {
        return Err(ConnectError::Protocol("its greeting is not of the fixed newstyle"));
    }
    let padded = flags & FLAG_NO_ZEROES == 0;
    let flags = u32::from(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES));
    stream.write_all(&flags.to_be_bytes()).await?;
    let mut stream: Box<dyn Stream> = match tls {
        None => Box::new(stream),
        Some(tls) => {
            option(&mut stream, "STARTTLS", OPT_STARTTLS, &[]).await?;
            let connector = tokio_rustls::TlsConnector::from(Arc::clone(&tls.config));
            Box::new(connector.connect(tls.server_name.clone(), stream).await?)
        }
    };
    let structured = match option(&mut stream, "STRUCTURED_REPLY", OPT_STRUCTURED_REPLY, &[]).await {
        Ok(_) => true,
        Err(ConnectError::Refused { code, .. }) if code != REP_ERR_TLS_REQD => false,
        Err(e) => return Err(e),
    };
    Ok(Opened { stream, structured, padded })
}

/// Sends an option and reads its replies up to the final one; errors of the server are `Refused`.
async fn option<S: Stream + ?Sized>(
    stream: &mut S,
    name: &'static str,
    number: u32,
    data: &[u8],
) -> Result<Vec<(u32, Vec<u8>)>, ConnectError> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    put_option(&mut bytes, number, data);
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    let mut replies = Vec::new();
    let mut bytes_max = REPLIES_BYTES_MAX;
    while replies.len() < REPLIES_MAX {
        let mut header = [0; 20];
        stream.read_exact(&mut header).await?;
        let mut from = &header[..];
        let (magic, echoed) = (take_u64(&mut from), take_u32(&mut from));
        let kind = take_u32(&mut from).unwrap_or(0);
        let length = take_u32(&mut from).unwrap_or(0) as usize;
        if magic != Some(OPTION_REPLY_MAGIC) || echoed != Some(number) {
            return Err(ConnectError::Protocol("its answer is not to the option that was sent"));
        }
        let limit = if kind == number { PRIVATE_BYTES_MAX } else { OPTION_BYTES_MAX };
        if limit < length {
            return Err(ConnectError::Protocol("its answer to an option is too long"));
        }
        bytes_max = bytes_max
            .checked_sub(length)
            .ok_or(ConnectError::Protocol("its answers to an option are too long"))?;
        // Room only for what arrives.
        let mut data = Vec::new();
        (&mut *stream).take(length as u64).read_to_end(&mut data).await?;
        if data.len() < length {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        match kind {
            REP_ACK => return Ok(replies),
            error if error & 0x8000_0000 != 0 => {
                let text = String::from_utf8_lossy(&data).chars().take(256).collect();
                return Err(ConnectError::Refused { option: name, code: error, text });
            }
            _ => replies.push((kind, data)),
        }
    }
    Err(ConnectError::Protocol("its answers to an option do not end"))
}

impl Opened {
    /// Sends one of our own options.
    async fn private(
        &mut self,
        name: &'static str,
        number: u32,
        data: &[u8],
    ) -> Result<Vec<u8>, ConnectError> {
        let replies = option(&mut self.stream, name, number, data).await?;
        let found = replies.into_iter().find(|(kind, _)| *kind == number);
        found.map(|(_, data)| data).ok_or(ConnectError::Protocol("its answer to our option is missing"))
    }

    /// A request to the fence service.
    pub(super) async fn control(&mut self, request: &ControlRequest) -> Result<ControlAnswer, ConnectError> {
        let answer = self.private("the fence service", OPT_QUORATE_CONTROL, &encode(request)).await?;
        decode(&answer).map_err(|_| ConnectError::Protocol("its fence service speaks another version"))
    }

    /// Announces a member.
    pub(super) async fn hello(
        &mut self,
        hello: &Hello,
    ) -> Result<Result<(ServerId, Epoch, Verifier), HelloRefusal>, ConnectError> {
        let answer = self.private("the hello of a member", OPT_QUORATE_HELLO, &encode(hello)).await?;
        match decode(&answer) {
            Ok(HelloAnswer::Admitted { server, epoch, verifier }) => Ok(Ok((server, epoch, verifier))),
            Ok(HelloAnswer::Refused(refusal)) => Ok(Err(refusal)),
            Err(_) => Err(ConnectError::Protocol("its answer to the hello is of another version")),
        }
    }

    /// The exports that the server lists.
    pub(super) async fn list(&mut self) -> Result<Vec<Listed>, ConnectError> {
        let bad = || ConnectError::Protocol("its list of exports is malformed");
        let replies = option(&mut self.stream, "LIST", OPT_LIST, &[]).await?;
        let mut listed = Vec::new();
        for (_, data) in replies.iter().filter(|(kind, _)| *kind == REP_SERVER) {
            let mut from = &data[..];
            let len = take_u32(&mut from).ok_or_else(bad)? as usize;
            let (name, description) = from.split_at_checked(len).ok_or_else(bad)?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            listed.push(Listed { name: text(name), description: text(description) });
        }
        Ok(listed)
    }

    /// What the server says of an export, with texts by their kind.
    pub(super) async fn info(
        &mut self,
        export: &str,
    ) -> Result<(Negotiated, Vec<(u16, String)>), ConnectError> {
        let data = info_data(export, &[INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION]);
        let replies = option(&mut self.stream, "INFO", OPT_INFO, &data).await?;
        let texts = replies.iter().filter(|(kind, _)| *kind == REP_INFO).filter_map(|(_, info)| {
            let mut from = &info[..];
            let kind = take_u16(&mut from).filter(|k| matches!(*k, INFO_NAME | INFO_DESCRIPTION))?;
            Some((kind, String::from_utf8_lossy(from).into_owned()))
        });
        let texts = texts.collect();
        Ok((Negotiated::from_replies(&replies, self.structured)?, texts))
    }

    /// Says that nothing more is wanted. Whether the server hears it does not matter.
    pub(super) async fn abort(mut self) {
        let mut bytes = Vec::new();
        put_option(&mut bytes, OPT_ABORT, &[]);
        let _ = self.stream.write_all(&bytes).await;
        let _ = self.stream.shutdown().await;
    }

    /// Starts transmission.
    pub(super) async fn go(mut self, export: &str) -> Result<(Box<dyn Stream>, Negotiated), ConnectError> {
        let data = info_data(export, &[INFO_BLOCK_SIZE]);
        let negotiated = match option(&mut self.stream, "GO", OPT_GO, &data).await {
            Ok(replies) => Negotiated::from_replies(&replies, self.structured)?,
            Err(ConnectError::Refused { code: REP_ERR_UNSUP, .. }) => {
                let mut bytes = Vec::new();
                put_option(&mut bytes, OPT_EXPORT_NAME, export.as_bytes());
                self.stream.write_all(&bytes).await?;
                self.stream.flush().await?;
                let mut answer = vec![0; if self.padded { 134 } else { 10 }];
                self.stream.read_exact(&mut answer).await?;
                let mut from = &answer[..];
                let mut negotiated = Negotiated::unsaid(self.structured);
                negotiated.size_bytes = take_u64(&mut from).unwrap_or(0);
                negotiated.flags = take_u16(&mut from).unwrap_or(0);
                negotiated
            }
            Err(e) => return Err(e),
        };
        Ok((self.stream, negotiated))
    }
}

/// The data of INFO and GO.
fn info_data(export: &str, kinds: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    put_u32(&mut data, export.len() as u32);
    data.extend_from_slice(export.as_bytes());
    put_u16(&mut data, kinds.len() as u16);
    kinds.iter().for_each(|kind| put_u16(&mut data, *kind));
    data
}

impl Negotiated {
    /// What counts where a server says nothing of sizes.
    fn unsaid(structured: bool) -> Self {
        Self {
            size_bytes: 0,
            flags: 0,
            block_bytes: 1,
            preferred_bytes: 4096,
            payload_bytes_max: PAYLOAD_BYTES_MAX,
            structured,
        }
    }

    fn from_replies(replies: &[(u32, Vec<u8>)], structured: bool) -> Result<Self, ConnectError> {
        let mut negotiated = Self::unsaid(structured);
        let mut found = false;
        for (_, info) in replies.iter().filter(|(kind, _)| *kind == REP_INFO) {
            found |= negotiated.read_info(info)?;
        }
        if found { Ok(negotiated) } else { Err(ConnectError::Protocol("it does not tell the export's size")) }
    }

    /// Takes in one piece of information; says whether it was the export's size.
    fn read_info(&mut self, mut info: &[u8]) -> Result<bool, ConnectError> {
        let bad = ConnectError::Protocol("its information about the export is malformed");
        match take_u16(&mut info) {
            Some(INFO_EXPORT) => {
                let (Some(size), Some(flags)) = (take_u64(&mut info), take_u16(&mut info)) else {
                    return Err(bad);
                };
                (self.size_bytes, self.flags) = (size, flags);
                Ok(true)
            }
            Some(INFO_BLOCK_SIZE) => {
                let sizes = (take_u32(&mut info), take_u32(&mut info), take_u32(&mut info));
                let (Some(min), Some(preferred), Some(max)) = sizes else { return Err(bad) };
                let sound = min.is_power_of_two() && min <= 65536 && preferred.is_power_of_two();
                if !sound || max < min {
                    return Err(bad);
                }
                self.block_bytes = min;
                self.preferred_bytes = preferred;
                self.payload_bytes_max = (max - max % min).min(PAYLOAD_BYTES_MAX);
                Ok(false)
            }
            Some(_) => Ok(false),
            None => Err(bad),
        }
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    use super::*;
    use quorate_membership::sim::hostile;

    /// A server that has said all it will ever say.
    fn said(bytes: &[u8]) -> Opened {
        let stream = tokio::io::join(std::io::Cursor::new(bytes.to_vec()), tokio::io::sink());
        Opened { stream: Box::new(stream), structured: true, padded: true }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
    }

    fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let header =
            [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
        [&header[..], &(data.len() as u32).to_be_bytes(), data].concat()
    }

    #[test]
    fn a_hostile_answer_to_go_is_refused_or_a_sound_export() {
        let export = [&INFO_EXPORT.to_be_bytes()[..], &(1_u64 << 30).to_be_bytes(), &[0, 1]].concat();
        let sizes = [&INFO_BLOCK_SIZE.to_be_bytes()[..], &512_u32.to_be_bytes(), &4096_u32.to_be_bytes()];
        let sizes = [&sizes.concat()[..], &(32_u32 << 20).to_be_bytes()].concat();
        let good =
            [reply(OPT_GO, REP_INFO, &export), reply(OPT_GO, REP_INFO, &sizes), reply(OPT_GO, REP_ACK, b"")]
                .concat();
        let plain = [reply(OPT_GO, REP_INFO, &export), reply(OPT_GO, REP_ACK, b"")].concat();
        let verdicts = hostile(&[good, plain], 1_500, |bytes| match block_on(said(bytes).go("disk")) {
            Ok((_, negotiated)) => {
                assert!(negotiated.block_bytes.is_power_of_two() && negotiated.block_bytes <= 65536);
                assert!(negotiated.payload_bytes_max <= PAYLOAD_BYTES_MAX);
                true
            }
            Err(_) => false,
        });
        assert!(100 < verdicts.taken && 1_000 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn a_hostile_answer_to_our_own_options_is_refused_or_read() {
        let answer =
            encode(&ControlAnswer::Installed { server: ServerId::from_bytes([1; 16]), epoch: Epoch(9) });
        let good = [
            reply(OPT_QUORATE_CONTROL, OPT_QUORATE_CONTROL, &answer),
            reply(OPT_QUORATE_CONTROL, REP_ACK, b""),
        ]
        .concat();
        let verdicts =
            hostile(&[good], 1_500, |bytes| block_on(said(bytes).control(&ControlRequest::Status)).is_ok());
        assert!(20 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn answers_without_end_take_no_more_memory_than_one() {
        let piece = reply(OPT_GO, REP_INFO, &vec![0; OPTION_BYTES_MAX]);
        let error = block_on(said(&piece.repeat(64)).go("disk")).map(drop).unwrap_err();
        assert!(error.to_string().contains("its answers to an option are too long"), "{error}");
        let error = block_on(said(&reply(OPT_GO, REP_INFO, b"").repeat(REPLIES_MAX)).go("disk"))
            .map(drop)
            .unwrap_err();
        assert!(error.to_string().contains("its answers to an option do not end"), "{error}");
    }
}
