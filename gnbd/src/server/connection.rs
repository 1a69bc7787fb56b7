//! One connection: the negotiation, TLS in its middle, and then requests until it ends.

use super::Context;
use super::gate::ConnectionGate;
use super::transmission;
use crate::driver::Peer;
use crate::fence::wire::{ControlAnswer, ControlRequest, Hello, HelloAnswer, HelloRefusal, decode, encode};
use crate::proto::{CloseReason, Exports, Found, Negotiation, Step, TlsMode, Transmission};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

/// A client that says nothing for so long while it negotiates is gone.
const NEGOTIATION_IDLE: Duration = Duration::from_secs(60);
/// The TLS handshake is over by then, or never.
const TLS_DEADLINE: Duration = Duration::from_secs(10);

/// Why a connection ended early, for the log.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Closed(#[from] CloseReason),
    #[error("nothing came for too long")]
    Idle,
    #[error("{0}")]
    Request(#[from] crate::proto::BadMagic),
    #[error("a request of {0} bytes")]
    TooLong(u32),
}

/// Shuts the gate when the connection is over, whatever way it ended.
pub(super) struct HeldGate(pub(super) Arc<ConnectionGate>);

impl Drop for HeldGate {
    fn drop(&mut self) {
        self.0.shut();
    }
}

struct Talk {
    machine: Negotiation,
    out: Vec<u8>,
    peer: Option<Peer>,
    gate: Option<HeldGate>,
}

enum Turn {
    Tls,
    Serve(Transmission),
}

impl Exports for Context {
    fn list(&self) -> Vec<(String, String)> {
        self.exports.values().map(|e| e.summary()).collect()
    }

    fn find(&self, name: &str, admitted: Option<&str>) -> Found {
        match self.exports.get(name) {
            None => Found::Unknown,
            Some(e) if e.cluster && admitted != Some(name) => Found::NotAdmitted,
            Some(e) => Found::Export(e.describe()),
        }
    }
}

/// Serves a connection to its end.
pub(super) async fn serve(
    context: Arc<Context>,
    mut stream: TcpStream,
    tls: bool,
) -> Result<(), ConnectionError> {
    stream.set_nodelay(true)?;
    // A client whose host is gone frees its place within a minute.
    rustix::net::sockopt::set_socket_keepalive(&stream, true).map_err(std::io::Error::from)?;
    rustix::net::sockopt::set_tcp_keepidle(&stream, Duration::from_secs(30)).map_err(std::io::Error::from)?;
    rustix::net::sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(10))
        .map_err(std::io::Error::from)?;
    rustix::net::sockopt::set_tcp_keepcnt(&stream, 3).map_err(std::io::Error::from)?;
    let mode = if tls { TlsMode::Required } else { TlsMode::Off };
    let mut out = Vec::new();
    let machine = Negotiation::new(mode, &mut out);
    let mut talk = Talk { machine, out, peer: None, gate: None };
    match talk.negotiate(&context, &mut stream).await? {
        Turn::Serve(session) => transmission::serve(context, stream, session, talk.gate).await,
        Turn::Tls => {
            let tls = context.tls.as_ref().ok_or_else(|| std::io::Error::other("no TLS is configured"))?;
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::clone(&tls.config));
            let stream = tokio::time::timeout(TLS_DEADLINE, acceptor.accept(stream)).await;
            let mut stream = stream.map_err(|_| ConnectionError::Idle)??;
            let certificates = stream.get_ref().1.peer_certificates();
            talk.peer = certificates.and_then(|c| c.first()).and_then(|c| (tls.identify)(c));
            let member = context.fence.is_some() && talk.peer.is_some();
            talk.machine.tls_established(member);
            match talk.negotiate(&context, &mut stream).await? {
                Turn::Serve(session) => transmission::serve(context, stream, session, talk.gate).await,
                Turn::Tls => unreachable!("the machine allows STARTTLS once"),
            }
        }
    }
}

impl Talk {
    async fn negotiate<S>(&mut self, context: &Context, stream: &mut S) -> Result<Turn, ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut buf = vec![0; 16 << 10];
        loop {
            let step = self.machine.next(context, &mut self.out);
            if let Step::Close(CloseReason::Abort) = step {
                // The client may have gone without waiting for the answer.
                let _ = stream.write_all(&self.out).await;
                let _ = stream.shutdown().await;
                return Err(CloseReason::Abort.into());
            }
            stream.write_all(&self.out).await?;
            stream.flush().await?;
            self.out.clear();
            match step {
                Step::NeedMore => {
                    let wanted = self.machine.wanted().min(buf.len());
                    let read = tokio::time::timeout(NEGOTIATION_IDLE, stream.read(&mut buf[..wanted]));
                    let n = tokio::select! {
                        n = read => n.map_err(|_| ConnectionError::Idle)??,
                        () = context.stopping() => 0,
                    };
                    if n == 0 {
                        return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
                    }
                    self.machine.receive(&buf[..n]);
                }
                Step::StartTls => return Ok(Turn::Tls),
                Step::Hello(bytes) => self.hello(context, &bytes).await,
                Step::Control(bytes) => {
                    let answer = control(context, &bytes).await;
                    self.machine.answer_private(&encode(&answer), None, &mut self.out);
                }
                Step::Transmission(session) => return Ok(Turn::Serve(session)),
                Step::Close(reason) => return Err(reason.into()),
            }
        }
    }

    async fn hello(&mut self, context: &Context, bytes: &[u8]) {
        // Whatever was admitted before is not any more.
        self.gate = None;
        let (answer, admitted) = match self.judge(context, bytes).await {
            Ok((answer, export)) => (answer, Some(export)),
            Err(refusal) => {
                let peer = self.peer.as_ref().map_or("?", |p| p.name.as_str());
                tracing::info!(target: "quorate_gnbd", peer, %refusal, "hello refused");
                (HelloAnswer::Refused(refusal), None)
            }
        };
        self.machine.answer_private(&encode(&answer), admitted, &mut self.out);
    }

    async fn judge(
        &mut self,
        context: &Context,
        bytes: &[u8],
    ) -> Result<(HelloAnswer, String), HelloRefusal> {
        let hello: Hello = decode(bytes).map_err(|_| HelloRefusal::Version(crate::fence::wire::VERSION))?;
        let fence = context.fence.as_ref().ok_or(HelloRefusal::UnknownExport)?;
        let found = context.exports.get(&hello.export).filter(|e| e.cluster);
        let export = Arc::clone(found.ok_or(HelloRefusal::UnknownExport)?);
        // A certificate that is no node's admits nobody; node 0 is nobody.
        let certified = self.peer.as_ref().and_then(|p| p.node);
        let certified = certified.ok_or(HelloRefusal::OtherNode(quorate_membership::NodeId(0)))?;
        let id = context.next_connection();
        let (answer, gate) = fence.hello(id, certified, hello).await;
        let (server, epoch) = answer?;
        self.gate = Some(HeldGate(gate));
        // Read after the admission: what was volatile before is covered by the verifier of now.
        let verifier = export.verifier();
        Ok((HelloAnswer::Admitted { server, epoch, verifier }, export.name.clone()))
    }
}

async fn control(context: &Context, bytes: &[u8]) -> ControlAnswer {
    let (Ok(request), Some(fence)) = (decode::<ControlRequest>(bytes), &context.fence) else {
        return ControlAnswer::Malformed;
    };
    match request {
        ControlRequest::Install { chain } => match fence.install(chain).await {
            Ok((server, epoch)) => ControlAnswer::Installed { server, epoch },
            Err(e) => ControlAnswer::InstallFailed(e),
        },
        ControlRequest::Status => match context.status().await {
            Some(status) => ControlAnswer::Status(status),
            None => ControlAnswer::Malformed,
        },
    }
}
