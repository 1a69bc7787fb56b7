//! An export: a device with its sync gate, shared by all connections to it.

use crate::fence::{SyncGate, SyncTicket};
use crate::proto::{ExportDescription, Verifier};
use crate::{BlockDevice, Device, IoError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

/// What a server offers under a name.
#[derive(Clone, Debug)]
pub struct Export {
    /// What clients ask for; at most 4096 bytes, better below 256.
    pub name: String,
    /// For people.
    pub description: String,
    /// The device. It is closed, and its lock released, when the server has ended.
    pub device: Device,
    /// Whether only admitted members of the cluster may use it (R10).
    pub cluster: bool,
}

type Waiter = (SyncTicket, oneshot::Sender<(Result<(), IoError>, Verifier)>);

/// An export while it is served.
#[derive(Debug)]
pub(crate) struct OpenExport {
    pub(crate) name: String,
    pub(crate) cluster: bool,
    pub(crate) device: Device,
    description: String,
    sync: Mutex<Syncs>,
}

#[derive(Debug)]
struct Syncs {
    gate: SyncGate,
    waiting: Vec<Waiter>,
}

impl OpenExport {
    pub(crate) fn new(export: Export, seed: [u8; 16]) -> Self {
        let Export { name, description, device, cluster } = export;
        let sync = Mutex::new(Syncs { gate: SyncGate::new(seed), waiting: Vec::new() });
        Self { name, cluster, device, description, sync }
    }

    pub(crate) fn describe(&self) -> ExportDescription {
        let geometry = self.device.geometry();
        // Every connection goes to the one device, so a flush on one is a flush for all.
        ExportDescription { geometry, description: self.description.clone(), multi_conn: true }
    }

    pub(crate) fn summary(&self) -> (String, String) {
        (self.name.clone(), self.description.clone())
    }

    pub(crate) fn verifier(&self) -> Verifier {
        self.lock().gate.verifier()
    }

    fn lock(&self) -> MutexGuard<'_, Syncs> {
        self.sync.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything written before this call durable. The verifier is the one to answer with (R12).
    pub(crate) async fn sync(self: &Arc<Self>) -> (Result<(), IoError>, Verifier) {
        let told = {
            let mut sync = self.lock();
            let ticket = sync.gate.request();
            let (tell, told) = oneshot::channel();
            sync.waiting.push((ticket, tell));
            if sync.gate.begin() {
                // A task of its own: it must end also if whoever asked first goes away.
                tokio::spawn(run(Arc::clone(self)));
            }
            told
        };
        told.await.unwrap_or_else(|_| (Err(IoError::Stopped), self.verifier()))
    }
}

async fn run(mut export: Arc<OpenExport>) {
    loop {
        let result = export.device.flush().await;
        if let Err(error) = &result {
            tracing::error!(target: "quorate_gnbd", export = export.name, %error, "sync failed");
        }
        let mut sync = export.lock();
        let answered = sync.gate.end(result.is_ok());
        let verifier = sync.gate.verifier();
        let told: Vec<Waiter> = sync.waiting.extract_if(.., |(ticket, _)| *ticket <= answered).collect();
        let again = sync.gate.is_wanted(answered);
        if again {
            assert!(sync.gate.begin(), "only one task syncs an export");
        }
        drop(sync);
        let kept = again.then(|| Arc::clone(&export));
        // Before anybody hears of it: whoever waits for the last sync may rely on the device being free.
        drop(export);
        for (_, tell) in told {
            // A connection that has ended does not wait.
            let _ = tell.send((result.clone(), verifier));
        }
        match kept {
            Some(kept) => export = kept,
            None => return,
        }
    }
}
