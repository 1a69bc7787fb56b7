//! What a node or a storage server must know before it can ask the cluster: one small TOML file in its directory.

use quorate_ccs::schema::Timing;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// `node.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeSettings {
    /// The node's id, as in its certificate.
    pub id: u32,
    /// Its name, as in its certificate.
    pub name: String,
    /// Where it listens, IP:PORT.
    pub listen: String,
    /// Further addresses to listen on, IP:PORT, one for each further path; the roster must have them in the same order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listen_also: Vec<String>,
    /// Nodes to ask at the first start, ID@IP:PORT; later the roster says where everybody is.
    #[serde(default)]
    pub join: Vec<String>,
    /// Where the metrics can be read over HTTP, a loopback IP:PORT; nowhere if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// For how many microseconds after a message the node looks for the next one before it sleeps, up to 10,000; 0, the
    /// default, is never. It makes locks of other nodes faster where a CPU can be spared.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub busy_poll_us: u32,
    /// `[timing]` as in the configuration, for a node that has no configuration yet: it must be the cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
    /// Who but root and the node's own user may open lockspaces through `lock.sock`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<quorate_dlm::service::AccessRule>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// `storage.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSettings {
    /// The server's name, as in its certificate.
    pub name: String,
    /// Where it listens, IP:PORT.
    pub listen: String,
}

/// Why a settings file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It says something else than it should.
    #[error("{path}: {detail}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong, with line and column.
        detail: String,
    },
}

/// Reads a settings file.
///
/// # Errors
/// See [`SettingsError`].
pub fn load<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, SettingsError> {
    let text =
        fs::read_to_string(path).map_err(|source| SettingsError::File { path: path.into(), source })?;
    toml::from_str(&text).map_err(|e| SettingsError::Content { path: path.into(), detail: e.to_string() })
}

/// Writes a new settings file; never over one that is there.
///
/// # Errors
/// See [`SettingsError`].
pub fn save(path: &Path, settings: &impl Serialize) -> Result<(), SettingsError> {
    let content = |e: toml::ser::Error| SettingsError::Content { path: path.into(), detail: e.to_string() };
    let text = toml::to_string(settings).map_err(content)?;
    let file = |source| SettingsError::File { path: path.into(), source };
    let mut to = fs::File::create_new(path).map_err(file)?;
    std::io::Write::write_all(&mut to, text.as_bytes()).and_then(|()| to.sync_all()).map_err(file)
}
