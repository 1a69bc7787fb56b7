//! Volume groups of a cluster: every change under the group's lock, every activation a lock.

use crate::error::{VolumeError, lock_error};
use crate::format::{Entropy, LabelError, SECTOR_BYTES, SystemEntropy, Uuid, Value};
use crate::locks::{Lock, LockFailure, lock_name, seqno_of, value_of};
use crate::model::{ChangeError, NewPv, VolumeGroup, Writer};
use crate::store::{CommitError, FoundPv, NamedDevice, Problem, Scan, commit, mark_used};
use crate::volume::LogicalVolume;
use quorate_dlm::{Flags, Lockspace, Mode};
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, WriteFlags, ZeroFlags};
use quorate_membership::{BoxFuture, Runtime};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How a volume is activated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// This node alone uses it.
    Exclusive,
    /// Any number of nodes use it, and order their accesses among themselves, as a cluster filesystem does.
    Shared,
    /// As `Shared`, and writes are refused here.
    ReadOnly,
}

/// What is particular to a node.
#[derive(Clone)]
pub struct VolumesConfig {
    /// The host's name, for the metadata's `creation_host`.
    pub host: String,
    /// Seconds since 1970 by the wall clock, for `creation_time`.
    pub wall_clock: fn() -> u64,
    /// For new identifiers.
    pub entropy: Arc<dyn Entropy>,
}

impl VolumesConfig {
    /// With the system's random numbers.
    #[must_use]
    pub fn new(host: impl Into<String>, wall_clock: fn() -> u64) -> Self {
        Self { host: host.into(), wall_clock, entropy: Arc::new(SystemEntropy) }
    }
}

impl std::fmt::Debug for VolumesConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VolumesConfig").field("host", &self.host).finish_non_exhaustive()
    }
}

/// All that is on the devices of this node.
#[derive(Clone, Debug, PartialEq)]
pub struct Survey {
    /// The newest metadata of every group.
    pub groups: Vec<VolumeGroup>,
    /// What is wrong with the devices and was worked around.
    pub problems: Vec<Problem>,
}

/// Volume groups and volumes. Dropping a future gives up its answer; a change goes on to its end all the same.
pub trait VolumeManager: Send + Sync {
    /// Makes a device a physical volume. Refused where a physical volume or a GFS2 filesystem is, unless `force`.
    fn create_pv<'a>(&'a self, device: &'a str, force: bool) -> BoxFuture<'a, Result<Uuid, VolumeError>>;
    /// Makes a group of physical volumes, named by their devices. `extent_bytes`: 4 MiB is LVM2's default.
    fn create_group<'a>(
        &'a self,
        name: &'a str,
        devices: &'a [String],
        extent_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// Takes more physical volumes into a group.
    fn extend_group<'a>(
        &'a self,
        name: &'a str,
        devices: &'a [String],
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// Makes a linear volume of at least `size_bytes`, rounded up to whole extents.
    fn create_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// Makes a volume larger by at least `more_bytes`. Nodes that have it active see it after [`ActiveVolume::refresh`].
    fn extend_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
        more_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// Removes a volume. Refused while it is active anywhere.
    fn remove_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// A group as it is now: what any node committed before this call is seen.
    fn group<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>>;
    /// All groups on the devices here, and what is wrong with the devices.
    fn groups(&self) -> BoxFuture<'_, Result<Survey, VolumeError>>;
    /// Makes a volume a device of this node, under its lock.
    fn activate<'a>(
        &'a self,
        group: &'a str,
        volume: &'a str,
        activation: Activation,
    ) -> BoxFuture<'a, Result<Arc<ActiveVolume>, VolumeError>>;
}

/// The volume manager of one node. Cloning shares it.
#[derive(Clone)]
pub struct ClusterVolumes {
    shared: Arc<Shared>,
}

struct Shared {
    lockspace: Arc<dyn Lockspace>,
    runtime: Arc<dyn Runtime>,
    config: VolumesConfig,
    devices: Mutex<BTreeMap<String, Device>>,
    groups: Mutex<BTreeMap<String, Arc<async_lock::Mutex<Group>>>>,
    /// Counts changes of `devices`: a cache of an earlier count is old.
    scans: AtomicU64,
}

/// What is kept of a group between operations.
#[derive(Default)]
struct Group {
    /// Held NL while nothing is done, so that its value block stays.
    lock: Option<Lock>,
    cache: Option<Cached>,
}

#[derive(Clone)]
struct Cached {
    scan: u64,
    group: Arc<VolumeGroup>,
    pvs: Vec<FoundPv>,
}

impl std::fmt::Debug for ClusterVolumes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterVolumes").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

fn guard<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ClusterVolumes {
    /// The volume manager over these devices. Every node of the cluster joins the same lockspace for it.
    #[must_use]
    pub fn new(
        lockspace: Arc<dyn Lockspace>,
        runtime: Arc<dyn Runtime>,
        devices: Vec<NamedDevice>,
        config: VolumesConfig,
    ) -> Self {
        let devices = devices.into_iter().map(|d| (d.name, d.device)).collect();
        let (devices, groups, scans) = (Mutex::new(devices), Mutex::default(), AtomicU64::new(0));
        Self { shared: Arc::new(Shared { lockspace, runtime, config, devices, groups, scans }) }
    }

    /// Takes one more device into view.
    pub fn add_device(&self, named: NamedDevice) {
        guard(&self.shared.devices).insert(named.name, named.device);
        // What was missing may be there now.
        self.shared.scans.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives up the locks that are kept between operations, for a clean leave. Volumes must be deactivated before; the
    /// manager can be used again afterwards.
    ///
    /// # Errors
    /// `Lock`; the other locks were given up all the same.
    pub async fn shutdown(&self) -> Result<(), VolumeError> {
        let groups = std::mem::take(&mut *guard(&self.shared.groups));
        let mut result = Ok(());
        for (name, slot) in groups {
            let lock = slot.lock().await.lock.take();
            if let Some(lock) = lock {
                let ended = lock.unlock().await.map_err(lock_error(format!("volume group {name}")));
                result = result.and(ended);
            }
        }
        result
    }

    /// Runs `work` to its end, whether anybody waits for it or not: a change that stopped half way would hold its locks.
    async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, VolumeError>> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let (sender, receiver) = crate::oneshot::channel();
        self.shared.runtime.spawn(Box::pin(async move { sender.send(work.await) }));
        receiver.await.unwrap_or(Err(VolumeError::Stopped))
    }
}

impl Shared {
    fn all(&self) -> Vec<NamedDevice> {
        let devices = guard(&self.devices);
        devices
            .iter()
            .map(|(name, device)| NamedDevice { name: name.clone(), device: device.clone() })
            .collect()
    }

    fn named(&self, name: &str) -> Result<NamedDevice, VolumeError> {
        let device = guard(&self.devices).get(name).cloned();
        let device = device.ok_or_else(|| VolumeError::NoDevice(name.to_owned()))?;
        Ok(NamedDevice { name: name.to_owned(), device })
    }

    fn uuid(&self) -> Result<Uuid, VolumeError> {
        Uuid::random(&*self.config.entropy).map_err(|e| VolumeError::Entropy(e.to_string()))
    }

    fn slot(&self, group: &str) -> Arc<async_lock::Mutex<Group>> {
        Arc::clone(guard(&self.groups).entry(group.to_owned()).or_default())
    }

    /// Runs `work` under the lock that covers physical volumes without a group and the names of groups.
    async fn with_global<T>(
        &self,
        mode: Mode,
        work: impl Future<Output = Result<T, VolumeError>>,
    ) -> Result<T, VolumeError> {
        let name = lock_name('G', "lvm").map_err(lock_error("all groups"))?;
        let lock = Lock::request(&self.lockspace, name, mode, Flags::NONE)
            .await
            .map_err(lock_error("all groups"))?;
        let result = work.await;
        lock.unlock().await.map_err(lock_error("all groups"))?;
        result
    }

    /// Gets the group's lock in `mode` and what its value block says of the newest sequence number.
    async fn lock_group(
        &self,
        state: &mut Group,
        name: &str,
        mode: Mode,
    ) -> Result<Option<u32>, VolumeError> {
        let fail = || lock_error(format!("volume group {name}"));
        if state.lock.is_none() {
            let lock_name = lock_name('V', name).map_err(fail())?;
            let lock =
                Lock::request(&self.lockspace, lock_name, Mode::NL, Flags::NONE).await.map_err(fail())?;
            state.lock = Some(lock);
        }
        let lock = state.lock.as_ref().expect("it was just made");
        let grant = lock.convert(mode, Flags::VALBLK, None).await.map_err(fail())?;
        Ok(seqno_of(&grant))
    }

    /// Gives the group's lock back; after a change with the new sequence number for all to see.
    async fn unlock_group(&self, state: &Group, name: &str, seqno: Option<u32>) -> Result<(), VolumeError> {
        let Some(lock) = &state.lock else { return Ok(()) };
        let value = seqno.map(|s| value_of(s, self.lockspace.value_bytes()));
        let flags = if value.is_some() { Flags::VALBLK } else { Flags::NONE };
        lock.convert(Mode::NL, flags, value).await.map_err(lock_error(format!("volume group {name}")))?;
        Ok(())
    }

    /// The group as it is on disk, or from the cache if the value block says that nothing changed.
    async fn load(&self, state: &mut Group, name: &str, seqno: Option<u32>) -> Result<Cached, VolumeError> {
        let count = self.scans.load(Ordering::Relaxed);
        if let Some(cached) = state.cache.as_ref().filter(|c| Some(c.group.seqno) == seqno && c.scan == count)
        {
            return Ok(cached.clone());
        }
        state.cache = None;
        let scan = Scan::read(&self.all()).await?;
        for problem in &scan.problems {
            tracing::warn!(target: "quorate_clvm", device = problem.device, what = problem.what, "metadata");
        }
        let mut found: Vec<VolumeGroup> = scan.groups().into_values().filter(|g| g.name == name).collect();
        if 1 < found.len() {
            let ids = found.iter().map(|g| g.id).collect();
            return Err(VolumeError::Ambiguous { name: name.to_owned(), ids });
        }
        let group = Arc::new(found.pop().ok_or_else(|| VolumeError::NoGroup(name.to_owned()))?);
        group.pvs.iter().try_for_each(|pv| unique(&scan, pv.id))?;
        let pvs = group.pvs.iter().filter_map(|pv| scan.pv(pv.id).cloned()).collect();
        let cached = Cached { scan: count, group, pvs };
        state.cache = Some(cached.clone());
        Ok(cached)
    }

    /// Writes `group` with its next sequence number to all its physical volumes; `added` are those new to it.
    async fn store(
        &self,
        pvs: Vec<FoundPv>,
        group: VolumeGroup,
        what: &str,
    ) -> Result<Arc<VolumeGroup>, VolumeError> {
        for pv in &group.pvs {
            if !pvs.iter().any(|found| found.label.uuid == pv.id) {
                return Err(VolumeError::Missing { group: group.name.clone(), pv: pv.id });
            }
        }
        let writer =
            Writer { description: what, host: &self.config.host, unix_seconds: (self.config.wall_clock)() };
        let text = group.to_text(&writer);
        // What we write we must be able to read: a mistake of ours must not reach the disk.
        assert_eq!(VolumeGroup::parse(&text).as_ref(), Ok(&group), "the text says what the group is");
        let targets: Vec<&FoundPv> = pvs.iter().collect();
        commit(&targets, &text).await.map_err(|error| match error {
            CommitError::NotCommitted(store) => VolumeError::Store(store),
            CommitError::NoArea => VolumeError::NoArea { group: group.name.clone() },
            CommitError::Full(full) => {
                VolumeError::Full { group: group.name.clone(), detail: full.to_string() }
            }
            CommitError::Unknown(store) => {
                VolumeError::Unknown { group: group.name.clone(), detail: store.to_string() }
            }
        })?;
        if let Err(error) = mark_used(&targets).await {
            tracing::warn!(target: "quorate_clvm", %error, "a label does not say yet that it is used");
        }
        Ok(Arc::new(group))
    }

    /// Changes a group under its lock.
    async fn change(
        &self,
        name: &str,
        what: &str,
        more: Vec<FoundPv>,
        edit: impl FnOnce(&mut VolumeGroup) -> Result<(), VolumeError>,
    ) -> Result<Arc<VolumeGroup>, VolumeError> {
        let slot = self.slot(name);
        let mut state = slot.lock().await;
        let seqno = self.lock_group(&mut state, name, Mode::EX).await?;
        let result = async {
            let cached = self.load(&mut state, name, seqno).await?;
            let mut group = VolumeGroup::clone(&cached.group);
            group.changeable()?;
            edit(&mut group)?;
            let mut pvs = cached.pvs;
            pvs.extend(more);
            self.store(pvs, group.next(), what).await
        }
        .await;
        // The places in the areas moved on; the next operation reads them.
        state.cache = None;
        // After an unknown outcome the value must not vouch for any number: others read the disks.
        let value = match &result {
            Ok(group) => Some(group.seqno),
            Err(VolumeError::Unknown { .. }) => Some(0),
            Err(_) => None,
        };
        self.unlock_group(&state, name, value).await?;
        result
    }

    /// A group under a shared lock, and `work` done before the lock is given back.
    async fn with_group<T>(
        &self,
        name: &str,
        work: impl AsyncFnOnce(Cached) -> Result<T, VolumeError>,
    ) -> Result<T, VolumeError> {
        let slot = self.slot(name);
        let mut state = slot.lock().await;
        let seqno = self.lock_group(&mut state, name, Mode::PR).await?;
        let loaded = self.load(&mut state, name, seqno).await;
        let result = match loaded {
            Ok(cached) => work(cached).await,
            Err(error) => Err(error),
        };
        self.unlock_group(&state, name, None).await?;
        result
    }

    /// Physical volumes that belong to no group, by their devices.
    async fn orphans(&self, devices: &[String]) -> Result<Vec<FoundPv>, VolumeError> {
        let scan = Scan::read(&self.all()).await?;
        let groups = scan.groups();
        let mut pvs = Vec::new();
        for name in devices {
            let named = self.named(name)?;
            let label = named.label().await?;
            let label = label.map_err(|source| VolumeError::NotPv { device: name.clone(), source })?;
            let owner = groups.values().find(|g| g.pvs.iter().any(|pv| pv.id == label.uuid));
            if let Some(group) = owner {
                let what = format!("a physical volume of volume group {}", group.name);
                return Err(VolumeError::Occupied { device: name.clone(), what });
            }
            if label.is_used {
                return Err(VolumeError::Used { device: name.clone() });
            }
            unique(&scan, label.uuid)?;
            if let Some(pv) = scan.pvs.iter().find(|pv| pv.named.name == *name) {
                pvs.push(pv.clone());
            }
        }
        Ok(pvs)
    }
}

/// Fails where more than one device here claims to be the physical volume `id`.
fn unique(scan: &Scan, id: Uuid) -> Result<(), VolumeError> {
    let devices = scan.devices_of(id);
    if devices.len() < 2 { Ok(()) } else { Err(VolumeError::Duplicate { pv: id, devices }) }
}

fn new_pvs(found: &[FoundPv]) -> Vec<NewPv> {
    let new = |pv: &FoundPv| {
        let device_bytes = pv.named.device.geometry().size_bytes;
        let data = pv.label.data.first();
        let data_bytes = data.map_or(1 << 20, |a| a.offset);
        let data_len = data.map_or(0, |a| a.size);
        // An area of size 0 goes to the device's end, or to the metadata that lies there.
        let end = if data_len == 0 { device_bytes } else { data_bytes.saturating_add(data_len) };
        let behind = pv.label.metadata.iter().map(|a| a.offset).filter(|at| data_bytes < *at);
        NewPv {
            id: pv.label.uuid,
            device: pv.named.name.clone(),
            device_bytes,
            data_bytes,
            data_end_bytes: behind.fold(end, u64::min),
        }
    };
    found.iter().map(new).collect()
}

/// Says in the metadata of new physical volumes what their labels keep for a boot loader: LVM2 believes the metadata, and
/// writes the label anew without what it does not find there.
fn keep_bootloader(group: &mut VolumeGroup, added: &[FoundPv]) {
    for pv in &mut group.pvs {
        let found = added.iter().find(|f| f.label.uuid == pv.id);
        if let Some(area) = found.and_then(|f| f.label.bootloader.first()) {
            let sectors = |bytes: u64| i64::try_from(bytes / SECTOR_BYTES as u64).unwrap_or(i64::MAX);
            pv.other.push("ba_start", Value::Int(sectors(area.offset)));
            pv.other.push("ba_size", Value::Int(sectors(area.size)));
        }
    }
}

fn devices_of(cached: &Cached) -> BTreeMap<String, Device> {
    let device = |id: Uuid| cached.pvs.iter().find(|f| f.label.uuid == id).map(|f| f.named.device.clone());
    cached.group.pvs.iter().filter_map(|pv| Some((pv.name.clone(), device(pv.id)?))).collect()
}

impl VolumeManager for ClusterVolumes {
    fn create_pv<'a>(&'a self, device: &'a str, force: bool) -> BoxFuture<'a, Result<Uuid, VolumeError>> {
        let (shared, device) = (Arc::clone(&self.shared), device.to_owned());
        Box::pin(self.finish(async move {
            let work = async {
                let named = shared.named(&device)?;
                let bytes = named.device.geometry().size_bytes;
                let min = 2 << 20;
                if bytes < min {
                    return Err(VolumeError::TooSmall { device: device.clone(), bytes, min });
                }
                if !force {
                    let occupied = |what: String| VolumeError::Occupied { device: device.clone(), what };
                    match named.label().await? {
                        Ok(label) => return Err(occupied(format!("physical volume {}", label.uuid))),
                        Err(LabelError::None) => {}
                        Err(error) => return Err(occupied(format!("a damaged label ({error})"))),
                    }
                    if named.has_gfs2().await? {
                        return Err(occupied("a GFS2 filesystem".to_owned()));
                    }
                }
                let uuid = shared.uuid()?;
                named.create_pv(uuid).await?;
                Ok(uuid)
            };
            shared.with_global(Mode::EX, work).await
        }))
    }

    fn create_group<'a>(
        &'a self,
        name: &'a str,
        devices: &'a [String],
        extent_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, name, devices) = (Arc::clone(&self.shared), name.to_owned(), devices.to_vec());
        Box::pin(self.finish(async move {
            let work = async {
                let pvs = shared.orphans(&devices).await?;
                let groups = Scan::read(&shared.all()).await?.groups();
                if groups.values().any(|g| g.name == name) {
                    return Err(VolumeError::GroupExists(name.clone()));
                }
                let mut group = VolumeGroup::create(&name, shared.uuid()?, extent_bytes, &new_pvs(&pvs))?;
                keep_bootloader(&mut group, &pvs);
                // A name too long for a lock must not become a group that nobody can use.
                lock_name('V', &name).map_err(lock_error(format!("volume group {name}")))?;
                let slot = shared.slot(&name);
                let mut state = slot.lock().await;
                shared.lock_group(&mut state, &name, Mode::EX).await?;
                let result = shared.store(pvs, group, "created by quorate").await;
                state.cache = None;
                shared.unlock_group(&state, &name, Some(result.as_ref().map_or(0, |g| g.seqno))).await?;
                result
            };
            shared.with_global(Mode::EX, work).await
        }))
    }

    fn extend_group<'a>(
        &'a self,
        name: &'a str,
        devices: &'a [String],
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, name, devices) = (Arc::clone(&self.shared), name.to_owned(), devices.to_vec());
        Box::pin(self.finish(async move {
            let work = async {
                let pvs = shared.orphans(&devices).await?;
                let added = pvs.clone();
                let edit = move |g: &mut VolumeGroup| {
                    g.extend(&new_pvs(&added))?;
                    keep_bootloader(g, &added);
                    Ok(())
                };
                shared.change(&name, "extended by quorate", pvs, edit).await
            };
            shared.with_global(Mode::EX, work).await
        }))
    }

    fn create_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
        size_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, group, name) = (Arc::clone(&self.shared), group.to_owned(), name.to_owned());
        Box::pin(self.finish(async move {
            let id = shared.uuid()?;
            let (host, now) = (shared.config.host.clone(), (shared.config.wall_clock)());
            let edit = |g: &mut VolumeGroup| {
                let extents = size_bytes.div_ceil(g.extent_bytes());
                Ok(g.create_lv(&name, id, extents, &host, now)?)
            };
            shared.change(&group, "volume created by quorate", Vec::new(), edit).await
        }))
    }

    fn extend_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
        more_bytes: u64,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, group, name) = (Arc::clone(&self.shared), group.to_owned(), name.to_owned());
        Box::pin(self.finish(async move {
            let edit = |g: &mut VolumeGroup| {
                let extents = more_bytes.div_ceil(g.extent_bytes());
                Ok(g.extend_lv(&name, extents)?)
            };
            shared.change(&group, "volume extended by quorate", Vec::new(), edit).await
        }))
    }

    fn remove_volume<'a>(
        &'a self,
        group: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, group, name) = (Arc::clone(&self.shared), group.to_owned(), name.to_owned());
        Box::pin(self.finish(async move {
            // The volume's lock is got under the group's shared lock, as by an activation, and kept over the change:
            // nobody can activate the volume in between.
            let lock = shared
                .with_group(&group, async |cached| shared.lock_volume(&cached.group, &name, Mode::EX).await)
                .await?;
            let result = shared
                .change(&group, "volume removed by quorate", Vec::new(), |g| Ok(g.remove_lv(&name)?))
                .await;
            lock.unlock().await.map_err(lock_error(format!("logical volume {group}/{name}")))?;
            result
        }))
    }

    fn group<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Arc<VolumeGroup>, VolumeError>> {
        let (shared, name) = (Arc::clone(&self.shared), name.to_owned());
        Box::pin(self.finish(async move { shared.with_group(&name, async |cached| Ok(cached.group)).await }))
    }

    fn groups(&self) -> BoxFuture<'_, Result<Survey, VolumeError>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(self.finish(async move {
            let work = async {
                let scan = Scan::read(&shared.all()).await?;
                Ok(Survey { groups: scan.groups().into_values().collect(), problems: scan.problems })
            };
            shared.with_global(Mode::PR, work).await
        }))
    }

    fn activate<'a>(
        &'a self,
        group: &'a str,
        volume: &'a str,
        activation: Activation,
    ) -> BoxFuture<'a, Result<Arc<ActiveVolume>, VolumeError>> {
        let (shared, group, volume) = (Arc::clone(&self.shared), group.to_owned(), volume.to_owned());
        Box::pin(self.finish(async move {
            let read_only = activation == Activation::ReadOnly;
            let mode = if activation == Activation::Exclusive { Mode::EX } else { Mode::PR };
            let work = async |cached: Cached| {
                let lock = shared.lock_volume(&cached.group, &volume, mode).await?;
                let lv = cached.group.lv(&volume).expect("its lock was got by its name");
                match LogicalVolume::new(&cached.group, lv, &devices_of(&cached), read_only) {
                    Ok(mapped) => Ok((lv.id, mapped, lock)),
                    Err(error) => {
                        lock.unlock()
                            .await
                            .map_err(lock_error(format!("logical volume {group}/{volume}")))?;
                        Err(error.into())
                    }
                }
            };
            let (id, mapped, lock) = shared.with_group(&group, work).await?;
            let volumes = ClusterVolumes { shared: Arc::clone(&shared) };
            let lock = async_lock::Mutex::new(Some(lock));
            let device = SharedVolume(Arc::new(mapped));
            Ok(Arc::new(ActiveVolume {
                volumes,
                group: group.clone(),
                name: volume.clone(),
                id,
                read_only,
                device,
                lock,
            }))
        }))
    }
}

impl Shared {
    async fn lock_volume(&self, group: &VolumeGroup, name: &str, mode: Mode) -> Result<Lock, VolumeError> {
        let full = format!("{}/{name}", group.name);
        let lv = group.lv(name).ok_or_else(|| {
            VolumeError::Change(ChangeError::NoVolume { group: group.name.clone(), name: name.to_owned() })
        })?;
        let fail = || lock_error(format!("logical volume {full}"));
        let lock_name = lock_name('L', &lv.id.to_string()).map_err(fail())?;
        match Lock::request(&self.lockspace, lock_name, mode, Flags::NOQUEUE).await {
            Err(LockFailure::Held) => Err(VolumeError::Active(full)),
            other => other.map_err(fail()),
        }
    }
}

/// A volume that is active on this node, under its lock. It stays active until [`ActiveVolume::deactivate`], also if this
/// handle is dropped: a lock that went with a forgotten handle could leave unflushed writes behind.
#[derive(Debug)]
pub struct ActiveVolume {
    volumes: ClusterVolumes,
    group: String,
    name: String,
    id: Uuid,
    read_only: bool,
    device: SharedVolume,
    lock: async_lock::Mutex<Option<Lock>>,
}

impl ActiveVolume {
    /// The volume as a device. Its requests fail with `Stopped` after deactivation.
    #[must_use]
    pub fn device(&self) -> Device {
        Device::new(self.device.clone())
    }

    /// The group's name and the volume's.
    #[must_use]
    pub fn name(&self) -> (&str, &str) {
        (&self.group, &self.name)
    }

    /// Its identifier.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Reads the metadata again: a volume that another node extended has its new size here afterwards.
    ///
    /// # Errors
    /// See [`VolumeError`]; the volume stays as it was.
    pub async fn refresh(&self) -> Result<Geometry, VolumeError> {
        let (shared, group) = (Arc::clone(&self.volumes.shared), self.group.clone());
        let loaded =
            self.volumes.finish(async move { shared.with_group(&group, async |cached| Ok(cached)).await });
        let cached = loaded.await?;
        let lv = cached.group.lvs.iter().find(|lv| lv.id == self.id).ok_or_else(|| {
            VolumeError::Change(ChangeError::NoVolume { group: self.group.clone(), name: self.name.clone() })
        })?;
        self.device.0.remap(&cached.group, lv, &devices_of(&cached), self.read_only)?;
        Ok(self.device.geometry())
    }

    /// Ends the activation: requests under way are awaited, everything is made durable, and then the lock is given up.
    /// Does nothing the second time.
    ///
    /// # Errors
    /// `Flush`: the volume stays active. `Lock`: it is closed here, and its lock goes with this life of the node.
    pub async fn deactivate(&self) -> Result<(), VolumeError> {
        let mut lock = self.lock.lock().await;
        let volume = format!("{}/{}", self.group, self.name);
        if lock.is_none() {
            return Ok(());
        }
        self.device
            .0
            .close()
            .await
            .map_err(|source| VolumeError::Flush { volume: volume.clone(), source })?;
        match lock.take() {
            Some(lock) => lock.unlock().await.map_err(lock_error(format!("logical volume {volume}"))),
            None => Ok(()),
        }
    }
}

/// A logical volume that several devices stand for.
#[derive(Clone, Debug)]
struct SharedVolume(Arc<LogicalVolume>);

impl BlockDevice for SharedVolume {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf, IoError> {
        self.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.0.write(offset, buf, flags).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.0.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.0.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.0.write_zeroes(offset, len, flags).await
    }
}
