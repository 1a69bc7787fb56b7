//! One node: the crates composed into a process, and its supervisor.

mod commands;
mod convert;
mod devices;
mod explain;
mod file_api;
mod filesystems;
mod host;
mod inspect;
mod locks;
mod metrics;
mod observer;
mod quorum;
mod services;
pub(crate) mod times;
mod volumes;
mod why;
mod world;

use crate::events::Events;
use crate::settings::{NodeSettings, load};
use clap::Args;
use quorate_fencing::supervisor::{Supervisor, SupervisorConfig, SupervisorExit, SupervisorLink};
use quorate_membership::driver::pki::Credentials;
use quorate_membership::{NodeId, QuorumOptions, Role, RosterEntry};
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a clean stop may take: services, mounts, locks, the leave itself.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// How a node runs.
#[derive(Debug, Args)]
pub struct NodeOptions {
    /// Its directory, made with `quorate cluster create` or `quorate cluster node`.
    #[arg(long, default_value = "/var/lib/quorate")]
    dir: PathBuf,
    /// Append events to this file, one JSON object a line.
    #[arg(long)]
    events: Option<PathBuf>,
    /// Mount nothing: filesystems are reached through the file API alone.
    #[arg(long)]
    no_fuse: bool,
    /// Start the node again after it died or was removed.
    #[arg(long)]
    restart: bool,
    /// Do not lock memory, do not mark the process as an I/O flusher, do not ask to be spared when memory is short.
    #[arg(long)]
    unprotected: bool,
}

/// Runs the supervisor, or, started by one, the node.
///
/// # Errors
/// It cannot start; the exit code says how it ended.
pub fn run(options: NodeOptions) -> Result<u8, Box<dyn Error>> {
    if let Some(link) = SupervisorLink::from_env()? {
        return run_node(&options, link);
    }
    // A wrong directory is told here, once, by the process a person started.
    let settings: NodeSettings = load(&options.dir.join("node.toml"))?;
    let cluster = Credentials::load(&options.dir.join("pki"))?.cluster();
    let times = times::of_next_life(&options.dir, &settings, cluster)?;
    let state_dir = options.dir.join("state");
    std::fs::create_dir_all(&state_dir).map_err(|e| format!("cannot make {}: {e}", state_dir.display()))?;
    // Absolute: it also marks the processes of this node for a later supervisor, wherever that one is started.
    let dir = std::fs::canonicalize(&options.dir)?;
    let state_dir = dir.join("state");
    let mut args: Vec<OsString> = vec!["node".into(), "--dir".into(), options.dir.clone().into()];
    if let Some(events) = &options.events {
        args.extend(["--events".into(), events.clone().into()]);
    }
    if options.no_fuse {
        args.push("--no-fuse".into());
    }
    if options.unprotected {
        args.push("--unprotected".into());
    }
    let config = SupervisorConfig {
        state_dir,
        program: std::env::current_exe()?.into(),
        args,
        kill_time: times.kill_time(),
        stop_deadline: STOP_DEADLINE,
        restart: options.restart.then_some(Duration::from_secs(1)),
        mounts_below: Some(dir.join("mnt")),
    };
    Ok(Supervisor::run(config)?.code())
}

fn run_node(options: &NodeOptions, link: SupervisorLink) -> Result<u8, Box<dyn Error>> {
    let protection = (!options.unprotected).then(host::Protection::ask);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let settings: NodeSettings = load(&options.dir.join("node.toml"))?;
    let credentials = Credentials::load(&options.dir.join("pki"))?;
    let times = times::of_next_life(&options.dir, &settings, credentials.cluster())?;
    times::settle(&options.dir, times.agreed())?;
    let events = Events::open(&format!("node {}", settings.id), options.events.as_deref())?;
    if let Some(protection) = &protection {
        protection.warn();
        events.emit("host", protection.json());
    }
    let code = runtime.block_on(async {
        let world = world::World::start(options, settings, (credentials, times), events, link).await?;
        world.live().await
    });
    // What is still under way belongs to this life and ends with it (R10).
    runtime.shutdown_background();
    code
}

/// Exit code of a node whose life is over and which may begin another.
pub(crate) const AGAIN: u8 = SupervisorExit::CODE_AGAIN;

/// Makes the first record of a new cluster in a node's directory.
pub(crate) fn create_first_record(dir: &Path, quorum: QuorumOptions) -> Result<(), Box<dyn Error>> {
    let settings: NodeSettings = load(&dir.join("node.toml"))?;
    let credentials = Credentials::load(&dir.join("pki"))?;
    let entry = RosterEntry {
        name: settings.name,
        key: credentials.me().key,
        role: Role::Voter,
        addresses: core::iter::once(settings.listen).chain(settings.listen_also).collect(),
    };
    let roster = BTreeMap::from([(NodeId(settings.id), entry)]);
    quorate_membership::driver::create_cluster_with(&dir.join("state"), &credentials, roster, quorum)?;
    Ok(())
}

/// Resolves at SIGTERM or Ctrl-C.
pub(crate) async fn stop_signal() -> std::io::Result<()> {
    let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = term.recv() => Ok(()),
        outcome = tokio::signal::ctrl_c() => outcome,
    }
}
