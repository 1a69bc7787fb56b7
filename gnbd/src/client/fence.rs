//! The other side of the fence service: installs views at storage servers, and asks them how they are (R9).

use super::connect::{ConnectError, Opened, open};
use crate::driver::ClientTls;
use crate::fence::wire::{ControlAnswer, ControlRequest, FenceStatus, InstallError};
use crate::proto::PRIVATE_BYTES_MAX;
use quorate_fencing::{StorageFence, StorageFenceError};
use quorate_membership::{BoxFuture, Decision, Epoch, ServerEntry, ServerId};
use std::time::Duration;

/// A call is over by then: longer than the server waits for its connections to drain.
const CALL_DEADLINE: Duration = Duration::from_secs(8);
/// A chain is sent in parts of about this size.
const PART_BYTES: usize = PRIVATE_BYTES_MAX / 2;

/// Talks to the fence services of storage servers, one connection per call.
#[derive(Clone, Debug)]
pub struct FenceClient {
    tls: ClientTls,
}

/// Why a storage server did not answer a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceClientError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server's name cannot be one.
    #[error(transparent)]
    Name(#[from] crate::driver::BadServerName),
    /// It did not install the chain.
    #[error(transparent)]
    Install(InstallError),
    /// It answered something else.
    #[error("the storage server's answer is not to what was asked")]
    Answer,
}

/// Sends a chain in parts; the answer is that to the last one.
pub(super) async fn push(opened: &mut Opened, chain: Vec<Decision>) -> Result<ControlAnswer, ConnectError> {
    let mut parts: Vec<Vec<Decision>> = vec![Vec::new()];
    let mut bytes = 0;
    for decision in chain {
        let size = postcard::to_allocvec(&decision).map_or(PART_BYTES, |b| b.len());
        if PART_BYTES < bytes + size && 0 < bytes {
            parts.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        if let Some(part) = parts.last_mut() {
            part.push(decision);
        }
    }
    let mut answer = ControlAnswer::Malformed;
    for chain in parts {
        answer = opened.control(&ControlRequest::Install { chain }).await?;
        match &answer {
            // A new server takes the first part that enrols it; the parts before are of no use to it.
            ControlAnswer::Installed { .. }
            | ControlAnswer::InstallFailed(InstallError::DoesNotEnrol { .. }) => {}
            _ => break,
        }
    }
    Ok(answer)
}

impl FenceClient {
    /// `tls` must show a certificate of the cluster; its server name is replaced by that of each server.
    #[must_use]
    pub fn new(tls: ClientTls) -> Self {
        Self { tls }
    }

    async fn open(&self, entry: &ServerEntry) -> Result<Opened, FenceClientError> {
        let tls = self.tls.towards(&entry.name)?;
        Ok(open(&entry.address, Some(&tls)).await?)
    }

    /// Asks a server who it is and how it is. `entry` names its certificate and address.
    ///
    /// # Errors
    /// See [`FenceClientError`].
    pub async fn status(&self, entry: &ServerEntry) -> Result<FenceStatus, FenceClientError> {
        let call = async {
            let mut opened = self.open(entry).await?;
            match opened.control(&ControlRequest::Status).await? {
                ControlAnswer::Status(status) => Ok(status),
                _ => Err(FenceClientError::Answer),
            }
        };
        timed(entry, call).await
    }

    /// Installs the newest record of `chain` (oldest first); what the server has already is not sent.
    ///
    /// # Errors
    /// See [`FenceClientError`]. The server may have installed it in any case but `Install`, and there too.
    pub async fn install(
        &self,
        entry: &ServerEntry,
        mut chain: Vec<Decision>,
    ) -> Result<(ServerId, Epoch), FenceClientError> {
        let call = async {
            let mut opened = self.open(entry).await?;
            let ControlAnswer::Status(status) = opened.control(&ControlRequest::Status).await? else {
                return Err(FenceClientError::Answer);
            };
            if let Some(installed) = status.epoch {
                // The last one goes along in any case: it asks for confirmation.
                let last = chain.last().map(|d| d.view.epoch);
                chain.retain(|d| installed < d.view.epoch || Some(d.view.epoch) == last);
            }
            match push(&mut opened, chain).await? {
                ControlAnswer::Installed { server, epoch } => Ok((server, epoch)),
                ControlAnswer::InstallFailed(e) => Err(FenceClientError::Install(e)),
                _ => Err(FenceClientError::Answer),
            }
        };
        timed(entry, call).await
    }
}

async fn timed<T>(
    entry: &ServerEntry,
    call: impl Future<Output = Result<T, FenceClientError>>,
) -> Result<T, FenceClientError> {
    let timeout = || ConnectError::Timeout { address: entry.address.clone() };
    tokio::time::timeout(CALL_DEADLINE, call).await.unwrap_or_else(|_| Err(timeout().into()))
}

impl StorageFence for FenceClient {
    fn install(
        &self,
        server: ServerId,
        entry: &ServerEntry,
        chain: Vec<Decision>,
    ) -> BoxFuture<'_, Result<Epoch, StorageFenceError>> {
        let entry = entry.clone();
        Box::pin(async move {
            match FenceClient::install(self, &entry, chain).await {
                Ok((found, epoch)) if found == server => Ok(epoch),
                Ok((found, _)) => Err(StorageFenceError::OtherServer { found, expected: server }),
                Err(e) => Err(translate(e, server, &entry)),
            }
        })
    }
}

fn translate(e: FenceClientError, expected: ServerId, entry: &ServerEntry) -> StorageFenceError {
    let FenceClientError::Install(e) = e else {
        return StorageFenceError::Unreachable { address: entry.address.clone(), detail: e.to_string() };
    };
    match e {
        InstallError::Older { installed, .. } => StorageFenceError::Newer { installed },
        InstallError::NotDrained { connections } => StorageFenceError::Undrained { connections },
        InstallError::DoesNotEnrol { server } | InstallError::Retired { server } if server != expected => {
            StorageFenceError::OtherServer { found: server, expected }
        }
        other => StorageFenceError::Failed(other.to_string()),
    }
}
