//! A node's life: which parts it is made of, in which order they start and stop.

use super::convert::{self, Times};
use super::devices::Devices;
use super::filesystems::Filesystems;
use super::inspect::Inspector;
use super::observer::{FenceSink, Observer};
use super::services::Services;
use super::volumes::Volumes;
use super::{AGAIN, NodeOptions, locks, metrics};
use crate::admin::server::listen;
use crate::events::{Events, boottime_ns};
use crate::settings::NodeSettings;
use quorate_ccs::driver::Ccs;
use quorate_ccs::{ConfigStore, Document};
use quorate_dlm::Dlm;
use quorate_dlm::service::{AccessRules, LockServer, ServerConfig};
use quorate_fencing::FencingConfig;
use quorate_fencing::driver::FencingDriver;
use quorate_fencing::supervisor::{LeaseReport, SupervisorLink};
use quorate_gnbd::client::FenceClient;
use quorate_gnbd::driver::ClientTls;
use quorate_membership::driver::pki::Credentials;
use quorate_membership::driver::{BUSY_POLL_MAX, Node, NodeConfig, TokioRuntime};
use quorate_membership::machine::Event;
use quorate_membership::metrics::{Exposition, Registry};
use quorate_membership::{Membership, NodeId, Runtime, Sessions};
use serde_json::json;
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How often the supervisor hears of the lease, and suspicions become events.
const REPORT_INTERVAL: Duration = Duration::from_millis(10);

/// How long a clean leave may take after everything is given up.
const LEAVE_DEADLINE: Duration = Duration::from_secs(10);

/// How long programs' locks may take to be given up in a clean leave.
const LOCKS_DEADLINE: Duration = Duration::from_secs(5);

/// Lockspaces of the system: not for programs.
const RESERVED: [&str; 3] = ["gfs:*", "lvm", "services"];

/// Everything one node runs. Shared by commands and background tasks.
pub(crate) struct World {
    pub(crate) dir: PathBuf,
    pub(crate) settings: NodeSettings,
    pub(crate) events: Events,
    pub(crate) no_fuse: bool,
    pub(crate) link: SupervisorLink,
    pub(crate) credentials: Credentials,
    pub(crate) times: Times,
    pub(crate) node: Arc<Node>,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) observer: Arc<Observer>,
    pub(crate) dlm: Arc<Dlm>,
    pub(crate) ccs: Arc<Ccs>,
    pub(crate) fencing: Arc<FencingDriver>,
    pub(crate) fence_client: Arc<FenceClient>,
    pub(crate) devices: Devices,
    pub(crate) volumes: Volumes,
    pub(crate) filesystems: Filesystems,
    pub(crate) services: OnceLock<Services>,
    pub(crate) inspector: Arc<Inspector>,
    pub(crate) metrics: Registry,
    /// Whether the leave that is under way takes this node's vote along.
    pub(crate) gives_up_vote: AtomicBool,
}

impl World {
    /// Starts everything, and asks to be let in.
    pub(crate) async fn start(
        options: &NodeOptions,
        settings: NodeSettings,
        (credentials, times): (Credentials, Times),
        events: Events,
        link: SupervisorLink,
    ) -> Result<Arc<Self>, Box<dyn Error>> {
        let (dir, no_fuse) = (options.dir.clone(), options.no_fuse);
        let address: SocketAddr = settings.listen.parse().map_err(|e| format!("node.toml: listen: {e}"))?;
        let mut config = NodeConfig::lan(dir.join("state"), credentials.clone(), address);
        config.timing = times.membership.clone();
        config.kill_time = times.kill_time();
        config.busy_poll = Duration::from_micros(settings.busy_poll_us.into());
        if BUSY_POLL_MAX < config.busy_poll {
            let most = BUSY_POLL_MAX.as_micros();
            return Err(format!("node.toml: busy_poll_us: {} is above {most}", settings.busy_poll_us).into());
        }
        for also in &settings.listen_also {
            config.listen_also.push(also.parse().map_err(|e| format!("node.toml: listen_also: {e}"))?);
        }
        for contact in &settings.join {
            let (id, address) = contact.split_once('@').ok_or("node.toml: join: ID@IP:PORT is wanted")?;
            let id: u32 = id.parse().map_err(|_| format!("node.toml: join: `{id}` is no node id"))?;
            let address = address.parse().map_err(|e| format!("node.toml: join: {e}"))?;
            config.peers.entry(NodeId(id)).or_default().push(address);
        }
        let node = Node::start(config)?;
        let runtime: Arc<dyn Runtime> = Arc::new(TokioRuntime::current());
        let membership: Arc<dyn Membership> = Arc::clone(&node) as Arc<dyn Membership>;
        let sessions: Arc<dyn Sessions> = Arc::clone(&node) as Arc<dyn Sessions>;
        let observer = Observer::new(events.clone());
        membership.subscribe(Arc::clone(&observer) as _);
        let dlm = Dlm::new(Arc::clone(&membership), Arc::clone(&sessions), Arc::clone(&runtime));
        let inspector = Inspector::start(Arc::clone(&membership), Arc::clone(&sessions), Arc::clone(&dlm));
        let ccs = Ccs::start(&*membership, Arc::clone(&sessions), node.state_id(), &dir.join("ccs"))?;
        let tls = ClientTls::from_credentials(&credentials, "storage")?;
        let fence_client = Arc::new(FenceClient::new(tls));
        let fencing = FencingDriver::start(
            Arc::clone(&membership),
            Arc::clone(&runtime),
            Arc::clone(&fence_client) as _,
            FencingConfig::new(times.fencing),
            Arc::new(FenceSink(events.clone())),
        )?;
        let me = node.me();
        events.emit("started", json!({ "pid": std::process::id(), "incarnation": me.incarnation.0 }));
        let world = Arc::new(Self {
            dir,
            settings,
            events,
            no_fuse,
            link,
            credentials,
            times,
            node,
            runtime,
            observer,
            dlm,
            ccs: Arc::new(ccs),
            fencing,
            fence_client,
            devices: Devices::default(),
            volumes: Volumes::default(),
            filesystems: Filesystems::default(),
            services: OnceLock::new(),
            inspector,
            metrics: Registry::default(),
            gives_up_vote: AtomicBool::new(false),
        });
        world.serve_locks()?;
        world.node.join();
        Ok(world)
    }

    /// Lets programs in other processes lock, and counts what goes on.
    fn serve_locks(self: &Arc<Self>) -> Result<(), Box<dyn Error>> {
        let access = AccessRules {
            reserved: RESERVED.map(str::to_owned).to_vec(),
            rules: self.settings.locks.clone(),
        };
        let config = ServerConfig { path: self.dir.join("lock.sock"), access };
        let (manager, runtime) = (Arc::clone(&self.dlm), Arc::clone(&self.runtime));
        let server = LockServer::start(config, self.node.me(), manager, runtime)
            .map_err(|e| format!("the lock service: {e}"))?;
        let _ = self.inspector.server.set(server);
        self.metrics.add(Arc::clone(&self.dlm) as _);
        let world = Arc::downgrade(self);
        self.metrics.add(Arc::new(move |out: &mut Exposition| {
            if let Some(world) = world.upgrade() {
                locks::expose(&world, out);
            }
        }));
        Ok(())
    }

    /// Lives until a stop is asked for or this life is over; the exit code.
    pub(crate) async fn live(self: Arc<Self>) -> Result<u8, Box<dyn Error>> {
        let admin = listen(&self.dir.join("admin.sock"), Arc::clone(&self))?;
        if let Err(error) = self.link.report_ready() {
            tracing::warn!(target: "quorate", "the supervisor does not hear that the node is ready: {error}");
        }
        let exporter = match &self.settings.metrics {
            Some(address) => {
                let world = Arc::clone(&self);
                Some(metrics::serve(address, move || world.metrics.text()).await?)
            }
            None => None,
        };
        let reporter = tokio::spawn(Arc::clone(&self).report());
        let keeper = tokio::spawn(Arc::clone(&self).keep_configured());
        let recovery = tokio::spawn(Arc::clone(&self).keep_recovered());
        let mut stopped = self.observer.stopped();
        let mut reason = self.observer.stopped();
        let code = tokio::select! {
            signal = super::stop_signal() => {
                signal?;
                self.leave().await
            }
            end = self.node.ended() => self.over(&end.to_string()).await,
            _ = stopped.wait_for(Option::is_some) => {
                let reason = reason.borrow_and_update().clone().unwrap_or_default();
                self.over(&reason).await
            }
            error = self.ccs.failed() => {
                self.node.abort();
                self.over(&error.to_string()).await
            }
        };
        for task in [reporter, keeper, recovery].into_iter().chain(exporter) {
            task.abort();
        }
        admin.abort();
        Ok(code)
    }

    /// This life is over: nothing may be answered or written any more (R10). The supervisor ends what it started.
    async fn over(&self, reason: &str) -> u8 {
        tracing::error!(target: "quorate", "this life of the node is over: {reason}");
        self.events.emit("over", json!({ "reason": reason }));
        self.last_words().await;
        AGAIN
    }

    /// Gives everything up in order and leaves the cluster.
    async fn leave(&self) -> u8 {
        let mut clean = true;
        if let Some(services) = self.services.get() {
            clean &= services.stop_all(self).await;
        }
        clean &= self.unmount_all().await;
        if let Some(server) = self.inspector.server.get() {
            clean &= server.leave(LOCKS_DEADLINE).await;
        }
        clean &= self.release_volumes().await;
        clean &= self.release_devices().await;
        let gives_up_vote = self.gives_up_vote.load(Ordering::Relaxed);
        match self.node.shutdown_with(LEAVE_DEADLINE, gives_up_vote).await {
            Ok(()) if clean => 0,
            Ok(()) => 1,
            Err(error) => {
                tracing::error!(target: "quorate", "no clean leave: {error}");
                1
            }
        }
    }

    /// Tells the supervisor of the lease, and people of suspicions.
    async fn report(self: Arc<Self>) {
        let mut interval = tokio::time::interval(REPORT_INTERVAL);
        let mut seen = quorate_membership::Instant(0);
        let mut told = String::new();
        loop {
            interval.tick().await;
            let me = self.node.me();
            let attached = self.node.view().attachments.iter().any(|a| a.owner == me);
            let until = self.node.lease().until().0;
            let report = if attached && 0 < until { LeaseReport::Until(until) } else { LeaseReport::Idle };
            if let Err(error) = self.link.report_lease(report) {
                tracing::warn!(target: "quorate", "the supervisor does not hear of the lease: {error}");
            }
            let members = self.node.view().members.len();
            let quorum = if self.node.is_quorate() { "quorate" } else { "no quorum" };
            let status = format!("node {}, {quorum}, {members} members", me.node.0);
            // Told again where the supervisor was too busy to hear it.
            if status != told && self.link.report_status(&status).is_ok() {
                told = status;
            }
            for (at, event) in self.node.events() {
                if at <= seen {
                    continue;
                }
                seen = at;
                if let Event::Suspected(who) = event {
                    self.events
                        .emit("suspect", json!({ "node": who.node.0, "incarnation": who.incarnation.0 }));
                }
            }
        }
    }

    /// The newest configuration; an error where there is none.
    pub(crate) fn document(&self) -> Result<Document, String> {
        let entry =
            self.ccs.get().ok_or("there is no configuration yet: apply one with `quorate config apply`")?;
        quorate_ccs::parse(&entry.text).map_err(|e| format!("configuration version {}: {e}", entry.version))
    }

    /// Follows the configuration: fencing and services are told of every version; mounts come back after a start.
    async fn keep_configured(self: Arc<Self>) {
        let mut version = 0;
        loop {
            let entry = self.ccs.changed(version).await;
            version = entry.version;
            let Ok(document) = quorate_ccs::parse(&entry.text) else { continue };
            let wanted = Times::of(&document.timing).agreed();
            if wanted != self.times.agreed() {
                let now = self.times.agreed();
                tracing::warn!(target: "quorate", "`[timing]` is {wanted}, this life has {now}: stop and start all nodes");
            }
            if let Err(error) = self.fencing.configure(convert::fencing(&document, self.times.fencing)) {
                tracing::error!(target: "quorate", "fencing keeps its former configuration: {error}");
            }
            self.wait_until_quorate().await;
            Arc::clone(&self).remount().await;
            self.configure_services(&document).await;
        }
    }

    /// Resolves once this node is a member with a lease.
    pub(crate) async fn wait_until_quorate(&self) {
        let mut views = self.observer.views();
        while !self.node.is_quorate() {
            // The lease comes a little after the view; either is looked for again soon.
            let soon = self.runtime.sleep_until(quorate_membership::Instant(boottime_ns()) + REPORT_INTERVAL);
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = soon => (),
            }
        }
    }
}
