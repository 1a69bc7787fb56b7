//! `quorate storage`: a storage server that exports images and devices over NBD and is a fence of the cluster.

use crate::admin::protocol::{Command, Reply, Request};
use crate::admin::server::{Handler, Peer, listen};
use crate::events::Events;
use crate::settings::{StorageSettings, load};
use clap::Args;
use quorate_fencing::supervisor::Notifier;
use quorate_gfs::host::Host;
use quorate_gnbd::driver::ServerTls;
use quorate_gnbd::fence::wire::FenceStatus;
use quorate_gnbd::server::{Export, FenceConfig, Listen, Server, ServerConfig};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use quorate_membership::driver::pki::Credentials;
use serde_json::{Value, json};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How often the fence is looked at for events. Nothing waits for it but people and the demo.
const EVENT_INTERVAL: Duration = Duration::from_millis(5);

/// How long connections get to end when the server stops.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// How a storage server runs.
#[derive(Debug, Args)]
pub struct StorageOptions {
    /// Its directory, made with `quorate cluster server`.
    #[arg(long, default_value = "/var/lib/quorate-storage")]
    dir: PathBuf,
    /// A cluster export: NAME=PATH, or NAME=PATH:BYTES to make a sparse image if there is none.
    #[arg(long = "export", value_name = "NAME=PATH[:BYTES]")]
    exports: Vec<String>,
    /// An export for clients outside the cluster (a client certificate is still needed).
    #[arg(long = "plain-export", value_name = "NAME=PATH[:BYTES]")]
    plain_exports: Vec<String>,
    /// Append events to this file, one JSON object a line.
    #[arg(long)]
    events: Option<PathBuf>,
}

/// Runs until SIGTERM or Ctrl-C.
///
/// # Errors
/// It cannot start.
pub fn run(options: StorageOptions) -> Result<u8, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: StorageOptions) -> Result<u8, Box<dyn Error>> {
    let settings: StorageSettings = load(&options.dir.join("storage.toml"))?;
    let credentials = Credentials::load(&options.dir.join("pki"))?;
    let events = Events::open("storage", options.events.as_deref())?;
    let address = settings.listen.parse().map_err(|e| format!("storage.toml: listen: {e}"))?;
    let mut exports = Vec::new();
    for (text, cluster) in
        options.exports.iter().map(|e| (e, true)).chain(options.plain_exports.iter().map(|e| (e, false)))
    {
        exports.push(open_export(text, cluster)?);
    }
    // The TLS settings follow what the credentials believe, from the next handshake on.
    let believed = credentials.clone();
    let config = ServerConfig {
        listen: vec![Listen { address, tls: true }],
        tls: Some(ServerTls::from_credentials(&credentials)?),
        exports,
        fence: Some(FenceConfig {
            state_dir: options.dir.join("fence"),
            cluster: Some(credentials.cluster()),
            trust: Some(Arc::new(move |trust| {
                if let Err(error) = believed.believe(trust) {
                    tracing::error!(target: "quorate", %error, "the record's CAs are not believed");
                }
            })),
        }),
        connections_max: 256,
    };
    let server = Arc::new(Server::start(config).await?);
    let admin = listen(&options.dir.join("admin.sock"), Arc::new(Admin { server: Arc::clone(&server) }))?;
    let id = server.server_id().map(|s| s.to_string());
    events.emit("listening", json!({ "address": settings.listen, "server": id }));
    let watcher = tokio::spawn(watch(Arc::clone(&server), events));
    let notifier = Arc::new(Notifier::from_env());
    notifier.ready();
    let alive = tokio::spawn(keep_alive(Arc::clone(&notifier), Arc::clone(&server)));
    crate::node::stop_signal().await?;
    notifier.stopping(STOP_DEADLINE);
    alive.abort();
    let _ended = alive.await;
    watcher.abort();
    admin.abort();
    let _ended = (watcher.await, admin.await);
    match Arc::try_unwrap(server) {
        Ok(server) => {
            if server.shutdown(STOP_DEADLINE).await {
                Ok(0)
            } else {
                Err("connections did not end in time".into())
            }
        }
        Err(_) => Ok(0),
    }
}

/// `NAME=PATH` or `NAME=PATH:BYTES`.
fn open_export(text: &str, cluster: bool) -> Result<Export, Box<dyn Error>> {
    let (name, rest) = text.split_once('=').ok_or_else(|| format!("`{text}`: NAME=PATH is wanted"))?;
    let (path, bytes) = match rest.rsplit_once(':').map(|(p, b)| (p, b.parse::<u64>())) {
        Some((path, Ok(bytes))) => (path, Some(bytes)),
        _ => (rest, None),
    };
    let path = Path::new(path);
    if let Some(bytes) = bytes
        && !path.exists()
    {
        let file =
            std::fs::File::create_new(path).map_err(|e| format!("cannot make {}: {e}", path.display()))?;
        file.set_len(bytes).map_err(|e| format!("cannot make {} of {bytes} bytes: {e}", path.display()))?;
    }
    if path.exists() {
        // A mount by this host's kernel, or a node of an older cluster that holds reservation keys, knows nothing of our fence.
        Host::default().check(path).map_err(|e| format!("export {name}: {e}"))?;
    }
    let device = FileDevice::open(path, FileOptions::server()).map_err(|e| format!("export {name}: {e}"))?;
    Ok(Export { name: name.into(), description: String::new(), device: Device::new(device), cluster })
}

/// Writes an event whenever a view is confirmed.
async fn watch(server: Arc<Server>, events: Events) {
    let mut interval = tokio::time::interval(EVENT_INTERVAL);
    let mut last = None;
    loop {
        interval.tick().await;
        let Some(status) = server.status().await else { return };
        if status.confirmed != last {
            last = status.confirmed;
            let admitted: Vec<u32> = status.admitted.keys().map(|n| n.0).collect();
            events.emit("fence", json!({ "epoch": last.map(|e| e.0), "admitted": admitted }));
        }
    }
}

/// Tells the service manager that the fence still answers, as often as it wants to hear it.
async fn keep_alive(notifier: Arc<Notifier>, server: Arc<Server>) {
    let Some(every) = notifier.watchdog_interval() else { return };
    let mut interval = tokio::time::interval(every);
    loop {
        interval.tick().await;
        if server.status().await.is_none() {
            return;
        }
        notifier.alive();
    }
}

/// Answers `quorate status` on the storage server's own socket.
struct Admin {
    server: Arc<Server>,
}

impl Handler for Admin {
    async fn answer(self: Arc<Self>, _peer: Peer, request: Request) -> Reply {
        match request {
            Request::Command(Command::Status) => match self.server.status().await {
                Some(status) => {
                    Reply::Done { text: text(&status), json: describe(&status).to_string(), code: 0 }
                }
                None => Reply::Refused("the server is stopping".into()),
            },
            _ => Reply::Refused("a storage server answers `status` alone".into()),
        }
    }
}

fn text(status: &FenceStatus) -> String {
    let epoch = status.epoch.map_or("none: not enrolled".to_owned(), |e| e.to_string());
    let admitted: Vec<String> = status.admitted.iter().map(|(n, i)| format!("{n}#{i}")).collect();
    let exports: Vec<String> =
        status.exports.iter().map(|e| format!("{} ({} bytes)", e.name, e.size_bytes)).collect();
    format!(
        "storage server {}\nepoch    {epoch}\nadmitted {}\nexports  {}",
        status.server,
        admitted.join(" "),
        exports.join(", ")
    )
}

fn describe(status: &FenceStatus) -> Value {
    let clients: Vec<Value> = status
        .lives
        .iter()
        .map(|(who, counts)| {
            json!({
                "node": who.node.0, "incarnation": who.incarnation.0, "connections": counts.connections,
                "writes_applied": counts.writes_applied, "writes_applied_after_fence": counts.writes_after_fence,
                "refused": counts.hellos_refused + counts.requests_refused,
            })
        })
        .collect();
    let exports: Vec<Value> = status
        .exports
        .iter()
        .map(|e| json!({ "name": e.name, "bytes": e.size_bytes, "cluster": e.cluster }))
        .collect();
    json!({
        "server": status.server.to_string(), "epoch": status.epoch.map(|e| e.0),
        "confirmed": status.confirmed.map(|e| e.0), "clients": clients, "exports": exports,
    })
}
