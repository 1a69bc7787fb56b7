//! TLS of the listening side.

use quorate_membership::NodeId;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::sync::Arc;

/// Who is at the other end of a TLS connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node, if the certificate is a node's. Others may ask the fence service, but use no cluster export (R10).
    pub node: Option<NodeId>,
    /// The name in the certificate, for people.
    pub name: String,
}

type Identify = dyn Fn(&CertificateDer<'_>) -> Option<Peer> + Send + Sync;

/// How a server speaks TLS, and how it knows its peers.
#[derive(Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<rustls::ServerConfig>,
    pub(crate) identify: Arc<Identify>,
}

impl ServerTls {
    /// `config` should demand client certificates and keep no sessions. `identify` reads a peer's verified certificate;
    /// `None` is a stranger, who gets the exports that are not the cluster's.
    pub fn new(
        config: Arc<rustls::ServerConfig>,
        identify: impl Fn(&CertificateDer<'_>) -> Option<Peer> + Send + Sync + 'static,
    ) -> Self {
        Self { config, identify: Arc::new(identify) }
    }

    /// TLS with a cluster's certificates: every peer must show one of the same cluster.
    ///
    /// # Errors
    /// Key and certificate do not fit.
    #[cfg(feature = "pki")]
    pub fn from_credentials(
        credentials: &quorate_membership::driver::pki::Credentials,
    ) -> Result<Self, quorate_membership::driver::pki::TlsError> {
        let config = Arc::new(credentials.server_config()?);
        let credentials = credentials.clone();
        Ok(Self::new(config, move |der| {
            let peer = credentials.identify(der).ok()?;
            Some(Peer { node: peer.node(), name: peer.name })
        }))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}
