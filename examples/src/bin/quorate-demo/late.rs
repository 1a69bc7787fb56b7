//! What a network holds up: a write in the name of a stopped node, on a path that was open before it was stopped.
//!
//! A stopped process sends nothing, and one that its supervisor kills never will again; but a packet it sent before may
//! arrive at any later time. The demo carries that packet: it opens one more path of the node's present life, with the
//! node's own certificate, and sends on it after the fence.

use quorate_gnbd::client::{ChainSource, Member, NbdConfig, Path};
use quorate_gnbd::driver::ClientTls;
use quorate_gnbd::proto::Errno;
use quorate_membership::driver::pki::Credentials;
use quorate_membership::{Decision, Epoch, Identity};
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

/// How long the server may take to answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// The last block of the device: no logical volume reaches it, so it reads as zeros unless the late write was applied.
pub(crate) const BLOCK_BYTES: u64 = 4096;

/// The packet brings no proofs of views: a path of a living node needs none.
struct NoRecords;

impl ChainSource for NoRecords {
    fn epoch(&self) -> Epoch {
        Epoch(0)
    }
    fn chain_since(&self, _: Epoch) -> Vec<Decision> {
        Vec::new()
    }
}

/// A write that is under way for a long time.
pub(crate) struct LateWrite {
    runtime: tokio::runtime::Runtime,
    path: Path,
    offset: u64,
}

impl LateWrite {
    /// Opens the path while the life is still admitted.
    pub(crate) fn under_way(
        node_dir: &FilePath,
        who: Identity,
        address: &str,
        server: &str,
        export: &str,
        device_bytes: u64,
    ) -> Result<Self, String> {
        let credentials = Credentials::load(&node_dir.join("pki")).map_err(|e| e.to_string())?;
        let tls = ClientTls::from_credentials(&credentials, server).map_err(|e| e.to_string())?;
        let cluster = credentials.cluster();
        let config = NbdConfig {
            address: address.into(),
            export: export.into(),
            tls: Some(tls),
            member: Some(Member { cluster, who, chain: Arc::new(NoRecords) }),
            connections: 1,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| e.to_string())?;
        let joined = runtime.block_on(async { tokio::time::timeout(DEADLINE, Path::join(&config)).await });
        let path = joined.map_err(|_| "no answer in time".to_owned())?.map_err(|e| e.to_string())?;
        Ok(Self { runtime, path, offset: device_bytes - BLOCK_BYTES })
    }

    /// It arrives; what the server says to it.
    pub(crate) fn arrive(self) -> Result<Result<(), Errno>, String> {
        let Self { runtime, mut path, offset } = self;
        runtime.block_on(async {
            let write = path.write(offset, &[0xa5; BLOCK_BYTES as usize]);
            let answer = tokio::time::timeout(DEADLINE, write).await;
            let answer = answer.map_err(|_| "no answer in time".to_owned())?.map_err(|e| e.to_string());
            path.close().await;
            answer
        })
    }
}
