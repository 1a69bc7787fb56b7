//! Imported block devices: attached to, connected to, and given up again.

use super::world::World;
use quorate_gnbd::client::{ChainSource, Member, NbdConfig, NbdDevice};
use quorate_gnbd::driver::ClientTls;
use quorate_gnbd::{BlockDevice, Buf, Device, Geometry, IoError, WriteFlags, ZeroFlags};
use quorate_membership::driver::Node;
use quorate_membership::{
    AttachRequest, Decision, Epoch, Membership, Request, ResourceId, ResourceKind, Safety, ServerId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Connections to one device: two keep two cores busy with encryption.
const CONNECTIONS: u8 = 2;

/// How long giving a device up waits for its last flush.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// How long the end of a life waits for the storage servers' word on it. Well below the kill time of the supervisor.
const LAST_WORD_DEADLINE: Duration = Duration::from_millis(250);

/// The devices of this life, by export.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    open: Mutex<BTreeMap<String, Imported>>,
}

/// An imported device.
#[derive(Clone, Debug)]
pub(crate) struct Imported {
    /// The server it is on.
    pub(crate) server: ServerId,
    nbd: Arc<NbdDevice>,
}

impl Imported {
    /// As a block device for the layers above.
    pub(crate) fn device(&self) -> Device {
        Device::new(SharedNbd(Arc::clone(&self.nbd)))
    }
}

/// A device that its import keeps a hold on.
struct SharedNbd(Arc<NbdDevice>);

impl BlockDevice for SharedNbd {
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

/// The node's own records, for a server that does not know the newest view yet.
struct Records(Arc<Node>);

impl ChainSource for Records {
    fn epoch(&self) -> Epoch {
        self.0.view().epoch
    }
    fn chain_since(&self, epoch: Epoch) -> Vec<Decision> {
        self.0.decisions_since(epoch)
    }
}

impl World {
    /// The device of an export, imported if it is not yet.
    pub(crate) async fn import(&self, export: &str) -> Result<Imported, String> {
        let mut open = self.devices.open.lock().await;
        if let Some(imported) = open.get(export) {
            return Ok(imported.clone());
        }
        let document = self.document()?;
        let entry = document
            .exports
            .iter()
            .find(|e| e.name.get_ref() == export)
            .ok_or_else(|| format!("the configuration has no export {export}"))?;
        let view = self.node.view();
        let (server, _) = view.servers.iter().find(|(_, s)| s.name == entry.server).ok_or_else(|| {
            format!(
                "storage server {} is not enrolled: `quorate member enrol {} {}`",
                entry.server,
                entry.server,
                entry.address.get_ref()
            )
        })?;
        let server = *server;
        // Decided before the first byte: whoever fails with this device open owes a fence at this server (R6).
        let attach = AttachRequest {
            resource: ResourceId::new(ResourceKind::BlockDevice, export),
            safety: Safety::Storage,
            servers: BTreeSet::from([server]),
            journals: None,
            lockspace: None,
            exclusive: false,
        };
        self.node.propose(Request::Attach(attach)).await.map_err(|e| format!("device {export}: {e}"))?;
        let tls = ClientTls::from_credentials(&self.credentials, &entry.server).map_err(|e| e.to_string())?;
        let config = NbdConfig {
            address: entry.address.get_ref().clone(),
            export: export.to_owned(),
            tls: Some(tls),
            member: Some(Member {
                cluster: self.credentials.cluster(),
                who: self.node.me(),
                chain: Arc::new(Records(Arc::clone(&self.node))),
            }),
            connections: CONNECTIONS,
        };
        let nbd = NbdDevice::connect(config).await.map_err(|e| format!("device {export}: {e}"))?;
        let imported = Imported { server, nbd: Arc::new(nbd) };
        open.insert(export.to_owned(), imported.clone());
        Ok(imported)
    }

    /// The storage servers' own word on a life that is over, for its events: a flush, which changes nothing, either is
    /// refused with the reason, or a server does not know of the end yet or is away.
    pub(crate) async fn last_words(&self) {
        let Ok(open) = self.devices.open.try_lock() else { return };
        let asked = open.iter().map(|(export, imported)| async move {
            let word = match tokio::time::timeout(LAST_WORD_DEADLINE, imported.nbd.flush()).await {
                Ok(Ok(())) => "not refused".to_owned(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            self.events.emit("storage_says", serde_json::json!({ "export": export, "word": word }));
        });
        futures_util::future::join_all(asked).await;
    }

    /// Gives every device up; whether all was flushed and decided.
    pub(crate) async fn release_devices(&self) -> bool {
        let open = std::mem::take(&mut *self.devices.open.lock().await);
        let mut clean = true;
        for (export, imported) in open {
            if let Err(error) = imported.nbd.shutdown(CLOSE_DEADLINE).await {
                tracing::error!(target: "quorate", "device {export} was not closed cleanly: {error}");
                clean = false;
            }
            let resource = ResourceId::new(ResourceKind::BlockDevice, export.as_str());
            if let Err(error) = self.node.propose(Request::Detach(resource)).await {
                tracing::error!(target: "quorate", "device {export} is still attached: {error}");
                clean = false;
            }
        }
        clean
    }
}
