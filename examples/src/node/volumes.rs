//! Volume groups over the exports of the configuration, and which volumes are active on this node for what.

use super::devices::Imported;
use super::world::World;
use quorate_clvm::{
    Activation, ActiveVolume, ClusterVolumes, NamedDevice, Survey, VolumeManager, VolumesConfig,
};
use quorate_dlm::{LockManager, LockspaceOptions};
use quorate_gnbd::Device;
use quorate_membership::{Safety, ServerId};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::Mutex;

/// The lockspace of all volume groups.
const LOCKSPACE: &str = "lvm";

/// LVM2's own default.
const EXTENT_BYTES: u64 = 4 << 20;

/// The volume manager of this life, once something needs it.
#[derive(Default)]
pub(crate) struct Volumes {
    manager: Mutex<Option<Managed>>,
    active: Mutex<BTreeMap<String, Arc<ActiveVolume>>>,
}

#[derive(Clone)]
struct Managed {
    volumes: ClusterVolumes,
    known: BTreeSet<String>,
    servers: BTreeSet<ServerId>,
}

/// An active logical volume.
pub(crate) struct Active {
    pub(crate) device: Device,
    pub(crate) servers: BTreeSet<ServerId>,
}

fn unix_now() -> u64 {
    u64::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec).unwrap_or(0)
}

impl World {
    /// The volume manager with every export of the configuration in view.
    async fn managed(&self) -> Result<Managed, String> {
        let mut slot = self.volumes.manager.lock().await;
        let document = self.document()?;
        let mut imports: Vec<(String, Imported)> = Vec::new();
        for export in &document.exports {
            let name = export.name.get_ref();
            imports.push((name.clone(), self.import(name).await?));
        }
        let named = |name: &str, i: &Imported| NamedDevice { name: name.to_owned(), device: i.device() };
        if slot.is_none() {
            let servers: BTreeSet<ServerId> = imports.iter().map(|(_, i)| i.server).collect();
            let options = LockspaceOptions {
                safety: Safety::Storage,
                servers: servers.clone(),
                ..LockspaceOptions::plain(LOCKSPACE)
            };
            let lockspace = self.dlm.join(&options).await.map_err(|e| e.to_string())?;
            let config = VolumesConfig::new(self.settings.name.clone(), unix_now);
            let volumes = ClusterVolumes::new(lockspace, Arc::clone(&self.runtime), Vec::new(), config);
            *slot = Some(Managed { volumes, known: BTreeSet::new(), servers });
        }
        let Some(managed) = slot.as_mut() else { return Err("no volume manager".into()) };
        for (name, imported) in &imports {
            if managed.known.insert(name.clone()) {
                managed.volumes.add_device(named(name, imported));
            }
        }
        Ok(managed.clone())
    }

    /// Activates `GROUP/NAME` on this node.
    pub(crate) async fn activate(&self, volume: &str, exclusive: bool) -> Result<Active, String> {
        let managed = self.managed().await?;
        let (group, name) =
            volume.split_once('/').ok_or_else(|| format!("`{volume}`: GROUP/NAME is wanted"))?;
        let activation = if exclusive { Activation::Exclusive } else { Activation::Shared };
        let mut active = self.volumes.active.lock().await;
        if active.contains_key(volume) {
            return Err(format!("{volume} is active on this node already"));
        }
        let found = managed.volumes.activate(group, name, activation).await.map_err(|e| e.to_string())?;
        let device = found.device();
        active.insert(volume.to_owned(), found);
        Ok(Active { device, servers: managed.servers })
    }

    /// Ends the activation, after a flush.
    pub(crate) async fn deactivate(&self, volume: &str) -> Result<(), String> {
        let found = self.volumes.active.lock().await.remove(volume);
        match found {
            Some(active) => active.deactivate().await.map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// Gives the volume manager up, for a clean leave; whether all went well.
    pub(crate) async fn release_volumes(&self) -> bool {
        let mut clean = true;
        let names: Vec<String> = self.volumes.active.lock().await.keys().cloned().collect();
        for name in names {
            clean &= self.deactivate(&name).await.is_ok();
        }
        if let Some(managed) = self.volumes.manager.lock().await.take() {
            clean &= managed.volumes.shutdown().await.is_ok();
            clean &= self.dlm.leave(LOCKSPACE).await.is_ok();
        }
        clean
    }

    pub(crate) async fn pv_create(&self, device: &str) -> Result<String, String> {
        let id = self.managed().await?.volumes.create_pv(device, false).await.map_err(|e| e.to_string())?;
        Ok(format!("physical volume {device} ({id})"))
    }

    pub(crate) async fn vg_create(&self, name: &str, devices: &[String]) -> Result<String, String> {
        let manager = self.managed().await?.volumes;
        let group = manager.create_group(name, devices, EXTENT_BYTES).await.map_err(|e| e.to_string())?;
        Ok(format!("volume group {name}: {} free extents", group.free_extents()))
    }

    pub(crate) async fn lv_create(&self, group: &str, name: &str, bytes: u64) -> Result<String, String> {
        let manager = self.managed().await?.volumes;
        manager.create_volume(group, name, bytes).await.map_err(|e| e.to_string())?;
        Ok(format!("logical volume {group}/{name}"))
    }

    pub(crate) async fn lv_extend(&self, group: &str, name: &str, bytes: u64) -> Result<String, String> {
        let manager = self.managed().await?.volumes;
        let now = manager.group(group).await.map_err(|e| e.to_string())?;
        let lv = now.lv(name).ok_or_else(|| format!("there is no volume {group}/{name}"))?;
        let have = lv.extents() * now.extent_bytes();
        let more = bytes.checked_sub(have).filter(|m| 0 < *m);
        let more = more.ok_or_else(|| format!("{group}/{name} has {have} bytes already"))?;
        manager.extend_volume(group, name, more).await.map_err(|e| e.to_string())?;
        if let Some(active) = self.volumes.active.lock().await.get(&format!("{group}/{name}")) {
            active.refresh().await.map_err(|e| e.to_string())?;
        }
        Ok(format!("logical volume {group}/{name} has at least {bytes} bytes"))
    }

    pub(crate) async fn lv_remove(&self, group: &str, name: &str) -> Result<String, String> {
        let manager = self.managed().await?.volumes;
        manager.remove_volume(group, name).await.map_err(|e| e.to_string())?;
        Ok(format!("logical volume {group}/{name} is removed"))
    }

    pub(crate) async fn volumes_shown(&self) -> Result<(String, Value), String> {
        let Survey { groups, problems, .. } =
            self.managed().await?.volumes.groups().await.map_err(|e| e.to_string())?;
        let active = self.volumes.active.lock().await;
        let (mut lines, mut rows) = (Vec::new(), Vec::new());
        for group in &groups {
            let free = group.free_extents() * group.extent_bytes();
            lines.push(format!("group {} seqno {}, {free} bytes free", group.name, group.seqno));
            for lv in group.lvs.iter().filter(|lv| lv.is_visible()) {
                let bytes = lv.extents() * group.extent_bytes();
                let here = active.contains_key(&format!("{}/{}", group.name, lv.name));
                lines.push(format!(
                    "  {}/{} {bytes} bytes{}",
                    group.name,
                    lv.name,
                    if here { ", active" } else { "" }
                ));
                rows.push(json!({ "group": group.name, "name": lv.name, "bytes": bytes, "active": here }));
            }
        }
        let problems: Vec<String> = problems.iter().map(|p| format!("{p:?}")).collect();
        lines.extend(problems.iter().map(|p| format!("problem: {p}")));
        Ok((lines.join("\n"), json!({ "volumes": rows, "problems": problems })))
    }
}
