//! Certificate checks beyond the signature: the right cluster, the right kind of peer, a key that was not revoked.

use super::live::Live;
use super::{CertificateError, PeerCertificate, Subject};
use crate::ClusterId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Keys that are refused although their certificates are valid: lost, stolen or struck off outside the roster.
///
/// Cloning shares the set. Revoking a key refuses new handshakes at once; the node closes its live connections too.
#[derive(Clone, Default)]
pub struct RevokedKeys(Arc<Mutex<Set>>);

/// Is told every key that is revoked.
pub type Watcher = Arc<dyn Fn(&[u8; 32]) + Send + Sync>;

#[derive(Default)]
struct Set {
    keys: BTreeSet<[u8; 32]>,
    watchers: Vec<Watcher>,
}

impl core::fmt::Debug for RevokedKeys {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "RevokedKeys({})", self.lock().keys.len())
    }
}

impl RevokedKeys {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Set> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses this key (SHA-256 of SubjectPublicKeyInfo) from now on. Whoever watches closes its connections.
    pub fn revoke(&self, key: [u8; 32]) {
        let watchers = {
            let mut set = self.lock();
            set.keys.insert(key);
            set.watchers.clone()
        };
        for watcher in watchers {
            watcher(&key);
        }
    }

    /// Whether the key is refused.
    #[must_use]
    pub fn contains(&self, key: &[u8; 32]) -> bool {
        self.lock().keys.contains(key)
    }

    /// Calls `watcher` with every key revoked from now on, to close its live connections. It must not block.
    pub fn watch(&self, watcher: Watcher) {
        self.lock().watchers.push(watcher);
    }
}

/// Why a certificate with a good signature was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedCertificate {
    /// It says nothing that we understand.
    #[error(transparent)]
    Unknown(#[from] CertificateError),
    /// It is of another cluster.
    #[error("the certificate of {subject} is of cluster {found}, this is cluster {expected}")]
    OtherCluster {
        /// Whom it names.
        subject: Subject,
        /// Its cluster.
        found: ClusterId,
        /// Ours.
        expected: ClusterId,
    },
    /// Its key was revoked.
    #[error("the key of {subject} is revoked")]
    Revoked {
        /// Whom it names.
        subject: Subject,
    },
}

/// The checks on top of WebPKI's.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) cluster: ClusterId,
    pub(super) revoked: RevokedKeys,
}

impl Policy {
    pub(super) fn check(&self, der: &[u8]) -> Result<PeerCertificate, RefusedCertificate> {
        let peer = PeerCertificate::from_der(der)?;
        if peer.cluster != self.cluster {
            let found = peer.cluster;
            return Err(RefusedCertificate::OtherCluster {
                subject: peer.subject,
                found,
                expected: self.cluster,
            });
        }
        if self.revoked.contains(&peer.key) {
            return Err(RefusedCertificate::Revoked { subject: peer.subject });
        }
        Ok(peer)
    }

    fn check_in_handshake(&self, der: &[u8]) -> Result<(), rustls::Error> {
        self.check(der).map(|_| ()).map_err(|refused| {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(OtherError(Arc::new(refused))))
        })
    }
}

/// WebPKI's check of a server's certificate, then ours.
#[derive(Debug)]
pub(super) struct ServerCheck {
    pub(super) live: Arc<Live>,
    pub(super) policy: Policy,
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verified = self.live.current().server.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        )?;
        self.policy.check_in_handshake(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.live.current().server.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.live.current().server.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.live.current().server.supported_verify_schemes()
    }
}

/// WebPKI's check of a client's certificate, then ours.
#[derive(Debug)]
pub(super) struct ClientCheck {
    pub(super) live: Arc<Live>,
    pub(super) policy: Policy,
}

impl ClientCertVerifier for ClientCheck {
    fn offer_client_auth(&self) -> bool {
        self.live.current().client.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.live.current().client.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would name the CAs of one moment; whoever has a certificate of ours sends it without.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.live.current().client.verify_client_cert(end_entity, intermediates, now)?;
        self.policy.check_in_handshake(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.live.current().client.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.live.current().client.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.live.current().client.supported_verify_schemes()
    }
}
