//! Mounted filesystems: their attachments and journals, the FUSE mounts on top, and the replay of dead nodes' journals.

use super::world::World;
use quorate_dlm::{LockManager, Lockspace, LockspaceOptions, Mode};
use quorate_gfs::claim::{Use, check_use};
use quorate_gfs::face::Filesystem;
use quorate_gfs::fs::{Gfs, MountOptions};
use quorate_gfs::fuse::{self, Session, SessionOptions, UnmountMode};
use quorate_gfs::mkfs::{MkfsOptions, mkfs};
use quorate_gfs::reader::Reader;
use quorate_gnbd::Device;
use quorate_membership::{
    AttachRequest, Identity, Instant, Membership, Proof, Request, ResourceId, ResourceKind, Safety, ServerId,
    View,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// How long an unmount waits for processes that use the filesystem.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(10);

/// How soon a replay that failed is tried again.
const REPLAY_RETRY: Duration = Duration::from_millis(200);

/// How long after a mount that came too early the next one is tried.
const REMOUNT_RETRY: Duration = Duration::from_secs(1);

/// Whether a mount would get a journal: all journals of dead nodes are replayed, or may be by the first who opens.
fn may_open(view: &View, resource: &ResourceId) -> bool {
    let mut owed = view.owing(resource).peekable();
    owed.peek().is_none()
        || (view.attached(resource).next().is_none() && owed.all(|(_, item)| item.fenced && item.rebuilt))
}

/// What this life has mounted, by name.
#[derive(Default)]
pub(crate) struct Filesystems {
    mounted: Mutex<BTreeMap<String, Arc<Mounted>>>,
    /// One mount or unmount at a time.
    changing: Mutex<()>,
}

/// A mounted filesystem.
pub(crate) struct Mounted {
    pub(crate) gfs: Gfs,
    session: Option<Session>,
    pub(crate) journal: u32,
}

impl Mounted {
    /// Whether processes of this host see it below a mount point.
    pub(crate) fn has_mount_point(&self) -> bool {
        self.session.is_some()
    }

    fn access(&self) -> &'static str {
        if self.session.is_some() { "fuse" } else { "file api" }
    }
}

/// The lockspace of a filesystem.
fn lockspace_name(filesystem: &str) -> String {
    format!("gfs:{filesystem}")
}

fn resource(filesystem: &str) -> ResourceId {
    ResourceId::new(ResourceKind::Filesystem, filesystem)
}

/// Whether the filesystem on the device is this cluster's (R19).
async fn may_mount(name: &str, configured: &Configured, device: &Device) -> Result<(), String> {
    let reader = Reader::open(device.clone()).await.map_err(|e| format!("filesystem {name}: {e}"))?;
    let wanted = Use::Cluster { cluster: &configured.cluster };
    check_use(reader.superblock(), wanted).map_err(|e| format!("filesystem {name}: {e}"))
}

/// The time now, for the inodes that mkfs makes.
fn now() -> quorate_gfs::format::Timestamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    quorate_gfs::format::Timestamp { sec: now.tv_sec, nsec: u32::try_from(now.tv_nsec).unwrap_or(0) }
}

/// What the configuration says of a filesystem.
struct Configured {
    volume: String,
    journals: u32,
    journal_mib: u32,
    cluster: String,
}

impl World {
    fn configured(&self, name: &str) -> Result<Configured, String> {
        let document = self.document()?;
        let entry = document
            .filesystems
            .iter()
            .find(|f| f.name.get_ref() == name)
            .ok_or_else(|| format!("the configuration has no filesystem {name}"))?;
        Ok(Configured {
            volume: entry.volume.get_ref().clone(),
            journals: *entry.journals.get_ref(),
            journal_mib: *entry.journal_mib.get_ref(),
            cluster: document.name.get_ref().clone(),
        })
    }

    /// Makes the filesystem on its volume, under the exclusive activation of the volume.
    pub(crate) async fn make_filesystem(&self, name: &str) -> Result<Value, String> {
        let configured = self.configured(name)?;
        let volume = self.activate(&configured.volume, true).await?;
        let mut uuid = [0; 16];
        getrandom::fill(&mut uuid).map_err(|e| format!("no randomness: {e}"))?;
        let mut options = MkfsOptions::new(configured.journals);
        options.uuid = uuid;
        options.first_sequence = u64::from(u16::from_le_bytes([uuid[0], uuid[1]]));
        options.now = now();
        options.journal_bytes = u64::from(configured.journal_mib) << 20;
        options.lock_proto = "lock_dlm".into();
        options.lock_table = format!("{}:{name}", configured.cluster);
        let outcome = mkfs(&volume.device, &options).await.map_err(|e| format!("mkfs {name}: {e}"));
        self.deactivate(&configured.volume).await?;
        let report = outcome?;
        Ok(json!({ "filesystem": name, "journals": configured.journals, "report": format!("{report:?}") }))
    }

    /// Mounts a configured filesystem: journal, locks, replay of what is dirty, then the mount point.
    pub(crate) async fn mount(&self, name: &str) -> Result<Value, String> {
        let _one = self.filesystems.changing.lock().await;
        if let Some(mounted) = self.mounted(name).await {
            return Ok(json!({ "filesystem": name, "journal": mounted.journal, "access": mounted.access() }));
        }
        let configured = self.configured(name)?;
        let volume = self.activate(&configured.volume, false).await?;
        let mounted = match may_mount(name, &configured, &volume.device).await {
            Ok(()) => self.mount_device(name, &configured, volume.device, volume.servers).await,
            Err(error) => Err(error),
        };
        let mounted = match mounted {
            Ok(mounted) => Arc::new(mounted),
            Err(error) => {
                if let Err(second) = self.deactivate(&configured.volume).await {
                    tracing::error!(target: "quorate", "after a failed mount: {second}");
                }
                return Err(error);
            }
        };
        let answer = json!({ "filesystem": name, "journal": mounted.journal, "access": mounted.access() });
        self.filesystems.mounted.lock().await.insert(name.to_owned(), mounted);
        self.remember_mounts().await;
        self.events.emit("mounted", answer.clone());
        Ok(answer)
    }

    async fn mount_device(
        &self,
        name: &str,
        configured: &Configured,
        device: Device,
        servers: BTreeSet<ServerId>,
    ) -> Result<Mounted, String> {
        let attach = AttachRequest {
            resource: resource(name),
            safety: Safety::Storage,
            servers: servers.clone(),
            journals: Some(configured.journals),
            lockspace: Some(lockspace_name(name)),
            exclusive: false,
        };
        let view = self
            .node
            .propose(Request::Attach(attach))
            .await
            .map_err(|e| format!("filesystem {name}: {e}"))?;
        let outcome = self.mount_attached(name, device, servers, &view).await;
        if outcome.is_err() {
            // The locks first: their holds protect the filesystem.
            let left = self.dlm.leave(&lockspace_name(name)).await;
            let detached = self.node.propose(Request::Detach(resource(name))).await;
            if let (Err(error), _) | (_, Err(error)) =
                (left.map_err(|e| e.to_string()), detached.map_err(|e| e.to_string()))
            {
                tracing::error!(target: "quorate", "after a failed mount: {error}");
            }
        }
        outcome
    }

    async fn mount_attached(
        &self,
        name: &str,
        device: Device,
        servers: BTreeSet<ServerId>,
        view: &View,
    ) -> Result<Mounted, String> {
        let me = self.node.me();
        let resource = resource(name);
        let journal = view
            .attached(&resource)
            .find(|a| a.owner == me)
            .and_then(|a| a.journal)
            .ok_or_else(|| format!("filesystem {name}: no journal was given"))?;
        let options = LockspaceOptions {
            safety: Safety::Storage,
            servers,
            holds: Some(Mode::EX),
            ..LockspaceOptions::plain(lockspace_name(name))
        };
        let lockspace = self.dlm.join(&options).await.map_err(|e| e.to_string())?;
        self.replay_first(name, &device, &lockspace).await?;
        let gfs = Gfs::mount(
            device,
            lockspace,
            Arc::clone(&self.runtime),
            self.node.lease(),
            MountOptions::new(journal),
        )
        .await
        .map_err(|e| format!("filesystem {name}, journal {journal}: {e}"))?;
        let session = if self.no_fuse { None } else { self.mount_point(name, &gfs) };
        Ok(Mounted { gfs, session, journal })
    }

    /// Where all who had it mounted have failed, the first to open it replays for them: what they hold keeps a mount waiting
    /// until then (R14). That is the one whom the recovery's stage waits for.
    async fn replay_first(
        &self,
        name: &str,
        device: &Device,
        lockspace: &Arc<dyn Lockspace>,
    ) -> Result<(), String> {
        let (resource, me) = (resource(name), self.node.me());
        let mut views = self.observer.views();
        loop {
            let view = views.borrow_and_update().clone().unwrap_or_else(|| self.node.view());
            let first = view.attached(&resource).find(|a| a.journal.is_some()).map(|a| a.owner);
            let owed: Vec<(Identity, bool, Option<u32>)> = view
                .owing(&resource)
                .map(|(who, item)| (who, item.fenced && item.rebuilt, item.attachment.journal))
                .collect();
            if owed.is_empty() || first.is_some_and(|first| first != me) {
                return Ok(());
            }
            if first.is_some() && owed.iter().all(|(_, ready, _)| *ready) {
                let journals: BTreeSet<u32> = owed.iter().filter_map(|(.., journal)| *journal).collect();
                let (device, lockspace) = (device.clone(), Arc::clone(lockspace));
                let runtime = Arc::clone(&self.runtime);
                let replayed =
                    Gfs::replay_unmounted(device, lockspace, runtime, self.node.lease(), &journals)
                        .await
                        .map_err(|e| format!("filesystem {name}: {e}"))?;
                for (journal, outcome) in replayed {
                    self.events.emit(
                        "replayed",
                        json!({ "filesystem": name, "journal": journal, "outcome": format!("{outcome:?}") }),
                    );
                }
                for (debtor, ..) in owed {
                    let resources = BTreeSet::from([resource.clone()]);
                    let proof = Request::Prove { debtor, resources, proof: Proof::Replayed };
                    if let Err(error) = self.node.propose(proof).await
                        && self.node.view().owing(&resource).any(|(who, _)| who == debtor)
                    {
                        return Err(format!("filesystem {name}: {error}"));
                    }
                }
                return Ok(());
            }
            if views.changed().await.is_err() {
                return Err(format!("filesystem {name}: the node stops"));
            }
        }
    }

    /// The FUSE mount; none, and a word in the log, where FUSE may not be used.
    fn mount_point(&self, name: &str, gfs: &Gfs) -> Option<Session> {
        let point = self.point(name);
        if let Err(error) = std::fs::create_dir_all(&point) {
            tracing::warn!(target: "quorate", "no mount point {}: {error}", point.display());
            return None;
        }
        let options = fuse::MountOptions::new(&point, format!("quorate:{name}"));
        let filesystem: Arc<dyn Filesystem> = Arc::new(gfs.clone());
        match Session::mount(filesystem, Arc::clone(&self.runtime), &options, SessionOptions::local()) {
            Ok(session) => {
                if let Some(connection) = session.connection()
                    && let Err(error) = self.link.add_mount(u64::from(connection.0), &point)
                {
                    tracing::error!(target: "quorate", "the supervisor does not know of the mount: {error}");
                }
                Some(session)
            }
            Err(error) => {
                tracing::warn!(target: "quorate", "{error}; {name} is reached through the file API alone");
                None
            }
        }
    }

    fn point(&self, name: &str) -> PathBuf {
        self.dir.join("mnt").join(name)
    }

    /// The mounted filesystem of that name.
    pub(crate) async fn mounted(&self, name: &str) -> Option<Arc<Mounted>> {
        self.filesystems.mounted.lock().await.get(name).cloned()
    }

    /// Names of mounted filesystems with their journals and how they are reached.
    pub(crate) async fn mounts(&self) -> Vec<Value> {
        let mounted = self.filesystems.mounted.lock().await;
        mounted
            .iter()
            .map(|(name, m)| json!({ "filesystem": name, "journal": m.journal, "access": m.access() }))
            .collect()
    }

    /// Unmounts: the mount point, the filesystem, its locks, its journal, its volume.
    pub(crate) async fn unmount(&self, name: &str) -> Result<(), String> {
        let _one = self.filesystems.changing.lock().await;
        let Some(mounted) = self.mounted(name).await else {
            return Err(format!("{name} is not mounted here"));
        };
        if let Some(session) = &mounted.session {
            let deadline = self.runtime.now() + UNMOUNT_DEADLINE;
            session.unmount(UnmountMode::Clean, deadline).await.map_err(|e| format!("{name}: {e}"))?;
            if let Some(connection) = session.connection()
                && let Err(error) = self.link.remove_mount(u64::from(connection.0), &self.point(name))
            {
                tracing::warn!(target: "quorate", "the supervisor still counts on a mount: {error}");
            }
        }
        mounted.gfs.unmount().await.map_err(|e| format!("{name}: {e}"))?;
        self.filesystems.mounted.lock().await.remove(name);
        self.dlm.leave(&lockspace_name(name)).await.map_err(|e| e.to_string())?;
        self.node.propose(Request::Detach(resource(name))).await.map_err(|e| format!("{name}: {e}"))?;
        let configured = self.configured(name)?;
        self.deactivate(&configured.volume).await?;
        self.remember_mounts().await;
        self.events.emit("unmounted", json!({ "filesystem": name }));
        Ok(())
    }

    /// Unmounts everything for the end of this life, without forgetting what was mounted; whether all went well.
    pub(crate) async fn unmount_all(&self) -> bool {
        let names: Vec<String> = self.filesystems.mounted.lock().await.keys().cloned().collect();
        let kept = std::fs::read_to_string(self.dir.join("mounts")).unwrap_or_default();
        let mut clean = true;
        for name in names {
            if let Err(error) = self.unmount(&name).await {
                tracing::error!(target: "quorate", "{error}");
                clean = false;
            }
        }
        // The next life mounts them again.
        let _lost = std::fs::write(self.dir.join("mounts"), kept);
        clean
    }

    /// Writes down what is mounted, for the next life.
    async fn remember_mounts(&self) {
        let names: Vec<String> = self.filesystems.mounted.lock().await.keys().cloned().collect();
        if let Err(error) = std::fs::write(self.dir.join("mounts"), names.join("\n")) {
            tracing::warn!(target: "quorate", "the next life will not know of the mounts: {error}");
        }
    }

    /// Mounts what the life before had mounted, where the configuration wants that.
    pub(crate) async fn remount(self: Arc<Self>) {
        let Ok(document) = self.document() else { return };
        let names = std::fs::read_to_string(self.dir.join("mounts")).unwrap_or_default();
        for name in names.lines() {
            let wanted = document.filesystems.iter().any(|f| f.remount && f.name.get_ref() == name);
            if !wanted || self.mounted(name).await.is_some() {
                continue;
            }
            let was_owed = self.node.view().owing(&resource(name)).next().is_some();
            match self.mount(name).await {
                Ok(_) => {}
                Err(error) if was_owed => {
                    tracing::info!(target: "quorate", "{name} is mounted again after the recovery: {error}");
                    drop(tokio::spawn(Arc::clone(&self).mount_after_recovery(name.to_owned())));
                }
                Err(error) => tracing::error!(target: "quorate", "{name} is not mounted again: {error}"),
            }
        }
    }

    /// Mounts when the record allows it: dead nodes, this one's former life among them, may have left journals that are given
    /// to nobody yet.
    async fn mount_after_recovery(self: Arc<Self>, name: String) {
        let resource = resource(&name);
        let mut views = self.observer.views();
        loop {
            let view = views.borrow_and_update().clone();
            if view.is_some_and(|view| may_open(&view, &resource)) {
                let Err(error) = self.mount(&name).await else { return };
                if self.node.view().owing(&resource).next().is_none() {
                    tracing::error!(target: "quorate", "{name} is not mounted again: {error}");
                    return;
                }
                // Somebody was faster, and replays first.
                self.runtime.sleep_until(self.runtime.now() + REMOUNT_RETRY).await;
            } else if views.changed().await.is_err() {
                return;
            }
        }
    }

    /// Replays the journals of dead nodes as views show them to be fenced and their locks rebuilt (R14).
    pub(crate) async fn keep_recovered(self: Arc<Self>) {
        let mut views = self.observer.views();
        loop {
            let view = views.borrow_and_update().clone();
            let again = match view {
                Some(view) => self.recover_all(&view).await,
                None => false,
            };
            let wake = if again { self.runtime.now() + REPLAY_RETRY } else { Instant(u64::MAX) };
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = self.runtime.sleep_until(wake) => (),
            }
        }
    }

    /// One round; whether something has to be tried again.
    async fn recover_all(&self, view: &View) -> bool {
        let mut again = false;
        let mounted: Vec<(String, Arc<Mounted>)> =
            self.filesystems.mounted.lock().await.iter().map(|(n, m)| (n.clone(), Arc::clone(m))).collect();
        for (name, mounted) in mounted {
            let resource = resource(&name);
            for (debtor, item) in view.owing(&resource) {
                if !(item.fenced && item.rebuilt) {
                    continue;
                }
                if let Some(journal) = item.attachment.journal {
                    match mounted.gfs.recover_journal(journal).await {
                        Ok(replayed) => self.events.emit(
                            "replayed",
                            json!({ "filesystem": name, "journal": journal, "outcome": format!("{replayed:?}") }),
                        ),
                        // Another survivor is at it; its proof comes with a view.
                        Err(error) => {
                            tracing::info!(target: "quorate", "{name}: journal {journal} of {debtor}: {error}");
                            again = true;
                            continue;
                        }
                    }
                }
                let proof = Request::Prove {
                    debtor,
                    resources: BTreeSet::from([resource.clone()]),
                    proof: Proof::Replayed,
                };
                if let Err(error) = self.node.propose(proof).await {
                    tracing::warn!(target: "quorate", "{name}: the replay for {debtor} is not proven yet: {error}");
                    again = true;
                }
            }
        }
        again
    }

    /// Checks a filesystem that nobody has mounted: whether it is clean, and what was found.
    pub(crate) async fn check_filesystem(&self, name: &str) -> Result<(bool, String), String> {
        let configured = self.configured(name)?;
        let volume = self.activate(&configured.volume, true).await?;
        let outcome = quorate_gfs::fsck::fsck(volume.device).await;
        self.deactivate(&configured.volume).await?;
        let report = outcome.map_err(|e| format!("{name}: {e}"))?;
        let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
        let text = match report.is_clean() {
            true => format!("{name}: clean, {} inodes", report.inodes),
            false => format!("{name}:\n{}", problems.join("\n")),
        };
        Ok((report.is_clean(), text))
    }
}
