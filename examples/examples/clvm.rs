//! A volume group on two devices in memory, and a logical volume over both.
//!
//! `cargo run --example clvm` prints the group as LVM2's own tools would read it.

use quorate_clvm::{Activation, ClusterVolumes, NamedDevice, VolumeManager, VolumesConfig};
use quorate_dlm::local::LocalManager;
use quorate_dlm::{LockManager, LockspaceOptions};
use quorate_gnbd::{BlockDevice, Device, MemoryDevice};
use quorate_membership::driver::TokioRuntime;
use std::error::Error;
use std::sync::Arc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let disk =
        |name: &str| NamedDevice { name: name.into(), device: Device::new(MemoryDevice::new(64 << 20)) };
    let lockspace = LocalManager::new().join(&LockspaceOptions::plain("lvm")).await?;
    let config = VolumesConfig::new("example", || 0);
    let devices = vec![disk("left"), disk("right")];
    let volumes = ClusterVolumes::new(lockspace, Arc::new(TokioRuntime::current()), devices, config);

    let names = ["left".to_owned(), "right".to_owned()];
    for name in &names {
        println!("physical volume {name}: {}", volumes.create_pv(name, false).await?);
    }
    volumes.create_group("vg", &names, 4 << 20).await?;
    let group = volumes.create_volume("vg", "data", 96 << 20).await?;
    println!(
        "group {} at sequence number {}, {} extents free",
        group.name,
        group.seqno,
        group.free_extents()
    );
    for segment in group.lv("data").map(|lv| &lv.segments[..]).unwrap_or_default() {
        println!(
            "  data: extents {} to {}: {:?}",
            segment.start,
            segment.start + segment.extents,
            segment.kind
        );
    }
    let active = volumes.activate("vg", "data", Activation::Exclusive).await?;
    println!("active: {} bytes", active.device().geometry().size_bytes);
    active.deactivate().await?;
    Ok(())
}
