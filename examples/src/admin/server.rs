//! The node's end of the admin socket: who may ask, and one task for each connection.

use super::protocol::{Reply, Request, body_len, decode, encode, encode_reply};
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id; 0 if unknown.
    pub pid: u32,
}

/// What answers the requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request of an authorised caller.
    fn answer(self: Arc<Self>, peer: Peer, request: Request) -> impl Future<Output = Reply> + Send;
}

/// The path of a Unix socket may not be longer (`sun_path` of Linux, with room to spare).
const PATH_BYTES_MAX: usize = 100;

/// Listens at `path`, replacing a socket that a former process left behind. Only root and this process's user may ask.
///
/// # Errors
/// The path is too long or cannot be used.
pub fn listen(path: &Path, handler: Arc<impl Handler>) -> io::Result<tokio::task::JoinHandle<()>> {
    let len = path.as_os_str().len();
    if PATH_BYTES_MAX < len {
        let text =
            format!("{}: {len} bytes are too long for a socket, at most {PATH_BYTES_MAX}", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => (),
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handler = Arc::clone(&handler);
            tokio::spawn(async move {
                if let Err(error) = serve(stream, handler).await {
                    tracing::debug!(target: "quorate", "an admin connection ended: {error}");
                }
            });
        }
    }))
}

async fn serve(mut stream: UnixStream, handler: Arc<impl Handler>) -> io::Result<()> {
    let credentials = stream.peer_cred()?;
    let peer = Peer {
        uid: credentials.uid(),
        gid: credentials.gid(),
        pid: credentials.pid().and_then(|p| u32::try_from(p).ok()).unwrap_or(0),
    };
    if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
        let text = format!("user {} may not administer this node", peer.uid);
        return stream.write_all(&encode(&Reply::Refused(text))?).await;
    }
    loop {
        let mut header = [0; 4];
        match stream.read_exact(&mut header).await {
            Ok(_) => (),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut body = vec![0; body_len(header)?];
        stream.read_exact(&mut body).await?;
        let reply = match decode::<Request>(&body) {
            Ok(request) => Arc::clone(&handler).answer(peer, request).await,
            Err(error) => Reply::Refused(error.to_string()),
        };
        let frames = match encode_reply(&reply) {
            Ok(frames) => frames,
            Err(error) => encode(&Reply::Refused(error.to_string()))?,
        };
        stream.write_all(&frames).await?;
    }
}
