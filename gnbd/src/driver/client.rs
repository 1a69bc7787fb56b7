//! TLS of the connecting side.

use rustls_pki_types::ServerName;
use std::fmt;
use std::sync::Arc;

/// How a client speaks TLS, and which name the server's certificate must have.
#[derive(Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<rustls::ClientConfig>,
    pub(crate) server_name: ServerName<'static>,
}

/// A text that cannot be the name of a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no name of a TLS server")]
pub struct BadServerName(pub String);

impl ClientTls {
    /// `server_name` is a DNS name or an IP address.
    ///
    /// # Errors
    /// If it is neither.
    pub fn new(config: Arc<rustls::ClientConfig>, server_name: &str) -> Result<Self, BadServerName> {
        let name = ServerName::try_from(server_name.to_owned());
        let server_name = name.map_err(|_| BadServerName(server_name.chars().take(256).collect()))?;
        Ok(Self { config, server_name })
    }

    /// The same towards another server.
    ///
    /// # Errors
    /// If the name is none.
    pub fn towards(&self, server_name: &str) -> Result<Self, BadServerName> {
        Self::new(Arc::clone(&self.config), server_name)
    }

    /// TLS with a cluster's certificates, towards the storage server of this name.
    ///
    /// # Errors
    /// Key and certificate do not fit, or the name is none; in words.
    #[cfg(feature = "pki")]
    pub fn from_credentials(
        credentials: &quorate_membership::driver::pki::Credentials,
        server_name: &str,
    ) -> Result<Self, ClientTlsError> {
        Ok(Self::new(Arc::new(credentials.client_config()?), server_name)?)
    }
}

/// Why there is no TLS for a client.
#[cfg(feature = "pki")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientTlsError {
    /// Key and certificate do not fit.
    #[error(transparent)]
    Tls(#[from] quorate_membership::driver::pki::TlsError),
    /// The server's name is none.
    #[error(transparent)]
    Name(#[from] BadServerName),
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}
