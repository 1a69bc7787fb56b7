//! Where a logical volume lies on an image, read with the volume manager of a single node.

use quorate_clvm::{ClusterVolumes, NamedDevice, SegmentKind, VolumeManager, VolumesConfig};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockspaceOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use quorate_membership::driver::TokioRuntime;
use std::path::Path;
use std::sync::Arc;

/// Offset and length in bytes of a linear volume in one piece.
///
/// # Errors
/// The image holds no such volume, or it is in several pieces; in words.
pub fn linear_place(image: &Path, group: &str, name: &str) -> Result<(u64, u64), String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    runtime.block_on(async {
        let options = FileOptions { read_only: true, ..FileOptions::server() };
        let device = Device::new(FileDevice::open(image, options).map_err(|e| e.to_string())?);
        let locks = LocalManager::new();
        let lockspace = locks.join(&LockspaceOptions::plain("lvm")).await.map_err(|e| e.to_string())?;
        let devices = vec![NamedDevice { name: "image".into(), device }];
        let config = VolumesConfig::new("image", || 0);
        let volumes = ClusterVolumes::new(lockspace, Arc::new(TokioRuntime::current()), devices, config);
        let found = volumes.group(group).await.map_err(|e| e.to_string())?;
        let lv = found.lv(name).ok_or_else(|| format!("there is no volume {group}/{name}"))?;
        match &lv.segments[..] {
            [one] => match &one.kind {
                SegmentKind::Striped { stripes, .. } if stripes.len() == 1 => {
                    let (pv, extent) = (&stripes[0].0, stripes[0].1);
                    let pv = found.pv(pv).ok_or_else(|| format!("there is no physical volume {pv}"))?;
                    let bytes = found.extent_bytes();
                    Ok((pv.start_sectors * 512 + extent * bytes, one.extents * bytes))
                }
                _ => Err(format!("{group}/{name} is not linear")),
            },
            more => Err(format!("{group}/{name} is in {} pieces", more.len())),
        }
    })
}
