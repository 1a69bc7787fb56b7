//! What a server offers, asked without using any of it: LIST and INFO.

use super::connect::{ConnectError, Opened, open};
use super::device::geometry_of;
use crate::Geometry;
use crate::driver::ClientTls;
use crate::proto::consts::{INFO_DESCRIPTION, INFO_NAME, TX_CAN_MULTI_CONN};
use std::time::Duration;

/// An answer is there by then, or not at all.
const ASK_DEADLINE: Duration = Duration::from_secs(15);

/// An export in a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What to ask for.
    pub name: String,
    /// For people; often empty.
    pub description: String,
}

/// What a server says of one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The device.
    pub geometry: Geometry,
    /// A flush on one connection covers what was answered on others, so several may be used.
    pub can_multi_conn: bool,
    /// The export's name as the server has it, where it says so.
    pub name: Option<String>,
    /// For people, where the server says so.
    pub description: Option<String>,
}

/// The exports that a server lists, in its order. It may serve others too.
///
/// # Errors
/// See [`ConnectError`]; `Refused` where the server lists nothing to anybody.
pub async fn list_exports(address: &str, tls: Option<&ClientTls>) -> Result<Vec<Listed>, ConnectError> {
    timed(address, async {
        let mut opened = open(address, tls).await?;
        let listed = opened.list().await?;
        opened.abort().await;
        Ok(listed)
    })
    .await
}

/// What a server says of an export; the empty name is its default one. Cluster exports are told to admitted members only.
///
/// # Errors
/// See [`ConnectError`]; `Refused` where there is no such export for this client.
pub async fn export_info(
    address: &str,
    tls: Option<&ClientTls>,
    export: &str,
) -> Result<ExportInfo, ConnectError> {
    timed(address, async {
        let mut opened: Opened = open(address, tls).await?;
        let (negotiated, texts) = opened.info(export).await?;
        opened.abort().await;
        let text = |kind: u16| texts.iter().find(|(k, _)| *k == kind).map(|(_, text)| text.clone());
        Ok(ExportInfo {
            geometry: geometry_of(&negotiated)?,
            can_multi_conn: negotiated.flags & TX_CAN_MULTI_CONN != 0,
            name: text(INFO_NAME),
            description: text(INFO_DESCRIPTION),
        })
    })
    .await
}

async fn timed<T>(
    address: &str,
    call: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let timeout = |_| ConnectError::Timeout { address: address.into() };
    tokio::time::timeout(ASK_DEADLINE, call).await.map_err(timeout)?
}
