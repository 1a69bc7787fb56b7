//! The NBD server on tokio: plain for everybody's exports, TLS with the fence in front of the cluster's (R9, R10).

mod connection;
mod export;
mod fence;
mod gate;
mod transmission;

use crate::BlockDevice;
use crate::driver::ServerTls;
use crate::fence::ConnectionId;
use crate::fence::wire::{ExportStatus, FenceStatus, InstallError};
use crate::proto::STRING_BYTES_MAX;
use connection::ConnectionError;
use export::OpenExport;
use fence::Fence;
use quorate_membership::{ClusterId, Decision, Epoch, ServerId, Trust};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

pub use export::Export;
pub use fence::FenceOpenError;

/// Where to listen, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Port 0 lets the system choose.
    pub address: SocketAddr,
    /// Whether TLS is required of everybody (FORCEDTLS), or not spoken at all.
    pub tls: bool,
}

/// What makes a server the fence of a cluster.
#[derive(Clone)]
pub struct FenceConfig {
    /// Where its record is; one server per directory.
    pub state_dir: PathBuf,
    /// The only cluster whose records it takes.
    pub cluster: Option<ClusterId>,
    /// Is told whose certificates the cluster believes: at the start what the record says, then with each installed view
    /// that changes it. It is called on the server's own task and must not block.
    pub trust: Option<TrustListener>,
}

/// See [`FenceConfig::trust`].
pub type TrustListener = Arc<dyn Fn(&Trust) + Send + Sync>;

impl std::fmt::Debug for FenceConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("FenceConfig");
        out.field("state_dir", &self.state_dir).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// What a server is.
#[derive(Debug)]
pub struct ServerConfig {
    /// Its addresses.
    pub listen: Vec<Listen>,
    /// Needed where an address wants TLS.
    pub tls: Option<ServerTls>,
    /// What it offers.
    pub exports: Vec<Export>,
    /// Needed where an export is the cluster's.
    pub fence: Option<FenceConfig>,
    /// Connections at one time; more wait in the system's queue. 1 to 65,535.
    pub connections_max: u16,
}

/// Why a server did not start. Nothing is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// Two exports of one name, or a name no client can ask for.
    #[error("export {name:?}: {reason}")]
    Export {
        /// Which.
        name: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// An address wants TLS, and there is none.
    #[error("{0} is to speak TLS, but no certificate was given")]
    NoTls(SocketAddr),
    /// The fence's state.
    #[error(transparent)]
    Fence(#[from] FenceOpenError),
}

/// What all connections share.
pub(crate) struct Context {
    exports: BTreeMap<String, Arc<OpenExport>>,
    tls: Option<ServerTls>,
    fence: Option<Fence>,
    connections: AtomicU64,
    stop: watch::Sender<bool>,
}

impl Context {
    async fn stopping(&self) {
        // Cannot fail: the sender is in `self`.
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.connections.fetch_add(1, Ordering::Relaxed))
    }

    async fn status(&self) -> Option<FenceStatus> {
        let mut status = self.fence.as_ref()?.status().await?;
        status.exports = self.exports.values().map(|e| export_status(e)).collect();
        Some(status)
    }
}

fn export_status(export: &OpenExport) -> ExportStatus {
    ExportStatus {
        name: export.name.clone(),
        size_bytes: export.device.geometry().size_bytes,
        cluster: export.cluster,
        verifier: export.verifier(),
    }
}

/// A running server. Dropping it stops it without waiting; [`Server::shutdown`] waits.
pub struct Server {
    context: Arc<Context>,
    addresses: Vec<SocketAddr>,
    server: Option<ServerId>,
    /// One permit per connection that may be open.
    slots: Arc<Semaphore>,
    slots_max: u32,
    listening: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

impl Server {
    /// Starts a server on the tokio runtime of the caller.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: ServerConfig) -> Result<Self, StartError> {
        let mut exports = BTreeMap::new();
        for export in config.exports {
            let name = export.name.clone();
            let fail = |reason| StartError::Export { name: name.clone(), reason };
            if STRING_BYTES_MAX < name.len() || name.contains('\0') {
                return Err(fail("a name has at most 4096 bytes and no NUL"));
            }
            if STRING_BYTES_MAX < export.description.len() {
                return Err(fail("a description has at most 4096 bytes"));
            }
            if export.cluster && config.fence.is_none() {
                return Err(fail("a cluster's export needs the fence"));
            }
            // Random: the verifier must never be one of an earlier run, in which more may have been lost (R12).
            let open = Arc::new(OpenExport::new(export, fence::random()?));
            if exports.insert(name.clone(), open).is_some() {
                return Err(fail("another export has this name"));
            }
        }
        let mut listeners = Vec::new();
        let mut addresses = Vec::new();
        for listen in &config.listen {
            if listen.tls && config.tls.is_none() {
                return Err(StartError::NoTls(listen.address));
            }
            let fail = |source| StartError::Listen { address: listen.address, source };
            let listener = TcpListener::bind(listen.address).await.map_err(fail)?;
            addresses.push(listener.local_addr().map_err(fail)?);
            listeners.push((listener, listen.tls));
        }
        let (fence, server) = match &config.fence {
            Some(f) => Fence::open(f).map(|(f, id)| (Some(f), Some(id)))?,
            None => (None, None),
        };
        let context = Arc::new(Context {
            exports,
            tls: config.tls,
            fence,
            connections: AtomicU64::new(1),
            stop: watch::Sender::new(false),
        });
        let slots_max = u32::from(config.connections_max.max(1));
        let slots = Arc::new(Semaphore::new(slots_max as usize));
        let listening = listeners
            .into_iter()
            .map(|(l, tls)| tokio::spawn(accept(Arc::clone(&context), l, tls, Arc::clone(&slots))))
            .collect();
        Ok(Self { context, addresses, server, slots, slots_max, listening })
    }

    /// Where it listens, in the order of the configuration.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Who it was when it started, if it is a fence: what `Request::Enrol` wants. A retired server is another one later.
    #[must_use]
    pub fn server_id(&self) -> Option<ServerId> {
        self.server
    }

    /// The state of the fence; nothing without one.
    pub async fn status(&self) -> Option<FenceStatus> {
        self.context.status().await
    }

    /// Installs a chain that came in another way than through a connection, for tools on the server itself.
    ///
    /// # Errors
    /// See [`InstallError`]. A server without fence has nothing to install.
    pub async fn install(&self, chain: Vec<Decision>) -> Result<(ServerId, Epoch), InstallError> {
        match &self.context.fence {
            Some(fence) => fence.install(chain).await,
            None => Err(InstallError::NotDurable("this server is no fence".into())),
        }
    }

    /// Stops: takes no more requests, answers those under way, makes everything durable. Returns whether all of that was
    /// done before `deadline` was over; what was not is done as if the process had been killed.
    ///
    /// Afterwards the addresses, the state directory and (once their last users are gone) the devices are free.
    pub async fn shutdown(mut self, deadline: Duration) -> bool {
        self.context.stop.send_replace(true);
        let listening = std::mem::take(&mut self.listening);
        let work = async {
            for task in listening {
                // It ends by itself, or panicked: it is over in both cases.
                let _ = task.await;
            }
            // Every connection, and with it every operation, has ended.
            let _all = self.slots.acquire_many(self.slots_max).await;
            let mut durable = true;
            for export in self.context.exports.values() {
                durable &= export.sync().await.0.is_ok();
            }
            if let Some(fence) = &self.context.fence {
                fence.stop().await;
            }
            durable
        };
        tokio::time::timeout(deadline, work).await.unwrap_or(false)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.context.stop.send_replace(true);
    }
}

async fn accept(context: Arc<Context>, listener: TcpListener, tls: bool, slots: Arc<Semaphore>) {
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = context.stopping() => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: connections that end will free some.
                tracing::warn!(target: "quorate_gnbd", %error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let context = Arc::clone(&context);
        tokio::spawn(async move {
            match connection::serve(context, stream, tls).await {
                Ok(()) => tracing::debug!(target: "quorate_gnbd", %peer, "connection ended"),
                Err(ConnectionError::Closed(crate::proto::CloseReason::Abort)) => {}
                Err(error) => tracing::info!(target: "quorate_gnbd", %peer, %error, "connection closed"),
            }
            drop(slot);
        });
    }
}
