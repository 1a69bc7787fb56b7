//! A peer's own certificate, key and CA, read from a directory, and the TLS settings made of them.
//!
//! TLS 1.3 alone, the provider given explicitly, no resumption and no tickets: with rustls' defaults a resumed
//! connection was let in under a certificate that had been replaced or revoked, because a resumed handshake checks none.

use super::live::{Live, Material};
use super::verify::{ClientCheck, Policy, ServerCheck};
use super::{CertificateError, PeerCertificate, RefusedCertificate, RevokedKeys, Subject, unix_now};
use crate::{ClusterId, Trust};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A certificate that ends sooner than this is warned about, at start and once a day.
pub const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 86_400);

/// Why a directory's certificates cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PkiError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds no PEM of the wanted kind.
    #[error("{path}: no {wanted} in it")]
    Pem {
        /// Which.
        path: PathBuf,
        /// Certificate or private key.
        wanted: &'static str,
    },
    /// The certificate identifies nobody.
    #[error("{path}: {source}")]
    Identity {
        /// Which.
        path: PathBuf,
        /// Why.
        source: CertificateError,
    },
    /// The CA's certificate is not one of ours.
    #[error("{path} is not the CA of a quorate cluster")]
    NotACa {
        /// Which.
        path: PathBuf,
    },
    /// CA and certificate are of different clusters.
    #[error("the certificate of {subject} is of cluster {found}, its CA is of cluster {expected}")]
    OtherCluster {
        /// Whom the certificate names.
        subject: Subject,
        /// The certificate's cluster.
        found: ClusterId,
        /// The CA's.
        expected: ClusterId,
    },
    /// A renewed certificate is somebody else's.
    #[error("the certificate is of {subject}, this is {expected}")]
    OtherSubject {
        /// Whom it names.
        subject: Subject,
        /// Who we are.
        expected: Subject,
    },
    /// The validity is over.
    #[error(
        "the certificate of {subject} expired {days} days ago: issue a new one (or set this machine's clock)"
    )]
    Expired {
        /// Whose.
        subject: Subject,
        /// Since when.
        days: i64,
    },
    /// The validity has not begun.
    #[error(
        "the certificate of {subject} is valid only in {days} days: this machine's clock is probably wrong"
    )]
    NotYetValid {
        /// Whose.
        subject: Subject,
        /// In how many days it begins.
        days: i64,
    },
    /// The TLS library does not take them.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The TLS library refuses a certificate, key or CA.
#[derive(Debug, thiserror::Error)]
#[error("TLS settings: {0}")]
pub struct TlsError(String);

pub(super) fn tls(error: impl core::fmt::Display) -> TlsError {
    TlsError(error.to_string())
}

/// Who we are to our peers, and whom we trust.
///
/// Clones, and the TLS settings made of them, share certificate, key and CAs: [`Credentials::reload`] and
/// [`Credentials::believe`] change them for all, from the next handshake on.
#[derive(Clone, Debug)]
pub struct Credentials {
    live: Arc<Live>,
    me: PeerCertificate,
    revoked: RevokedKeys,
}

impl Credentials {
    /// Reads `ca-cert.pem` and the server's certificate of a directory, or the client's where there is no server's.
    ///
    /// # Errors
    /// See [`PkiError`]; an expired certificate is refused, one about to expire is warned about in the log.
    pub fn load(dir: &Path) -> Result<Self, PkiError> {
        let role = if dir.join("server-cert.pem").exists() { "server" } else { "client" };
        let certificate = dir.join(format!("{role}-cert.pem"));
        Self::from_files(&dir.join("ca-cert.pem"), &certificate, &dir.join(format!("{role}-key.pem")))
    }

    /// Reads the three files.
    ///
    /// # Errors
    /// See [`PkiError`].
    pub fn from_files(ca: &Path, certificate: &Path, key: &Path) -> Result<Self, PkiError> {
        let chain = certificates(certificate)?;
        let authority = certificates(ca)?;
        let text = read(key)?;
        let key = PrivateKeyDer::from_pem_slice(&text)
            .map_err(|_| PkiError::Pem { path: key.to_owned(), wanted: "private key" })?;
        let first =
            chain.first().ok_or(PkiError::Pem { path: certificate.to_owned(), wanted: "certificate" })?;
        let me = PeerCertificate::from_der(first)
            .map_err(|source| PkiError::Identity { path: certificate.to_owned(), source })?;
        let (cluster, _) = authority
            .first()
            .and_then(|der| super::certificate::ca_of_der(der))
            .ok_or_else(|| PkiError::NotACa { path: ca.to_owned() })?;
        if cluster != me.cluster {
            return Err(PkiError::OtherCluster { subject: me.subject, found: me.cluster, expected: cluster });
        }
        let mut roots = RootCertStore::empty();
        for der in authority {
            roots.add(der).map_err(tls)?;
        }
        let live = Arc::new(Live::new(Material::new(chain, key, Arc::new(roots), me.clone())?));
        let credentials = Self { live, me, revoked: RevokedKeys::new() };
        credentials.check_validity()?;
        Ok(credentials)
    }

    /// Refuses an expired certificate and one whose time has not come; warns of one that ends within [`EXPIRY_WARNING`].
    ///
    /// # Errors
    /// [`PkiError::Expired`], [`PkiError::NotYetValid`].
    pub fn check_validity(&self) -> Result<(), PkiError> {
        const DAY: i64 = 86_400;
        let now = unix_now();
        let me = self.certificate();
        let subject = me.subject.clone();
        if now < me.not_before {
            return Err(PkiError::NotYetValid { subject, days: (me.not_before - now + DAY - 1) / DAY });
        }
        if me.not_after < now {
            return Err(PkiError::Expired { subject, days: (now - me.not_after) / DAY });
        }
        if self.expires_in() < EXPIRY_WARNING {
            let days = (me.not_after - now) / DAY;
            tracing::warn!(target: "quorate_membership", %subject, days, "the certificate is about to expire");
        }
        Ok(())
    }

    /// How long our certificate is still valid; zero if it is over.
    #[must_use]
    pub fn expires_in(&self) -> Duration {
        Duration::from_secs(u64::try_from(self.certificate().not_after - unix_now()).unwrap_or(0))
    }

    /// Shares a set of revoked keys: peers with such a key are refused.
    #[must_use]
    pub fn with_revoked(mut self, revoked: RevokedKeys) -> Self {
        self.revoked = revoked;
        self
    }

    /// The set of revoked keys in use.
    #[must_use]
    pub fn revoked(&self) -> &RevokedKeys {
        &self.revoked
    }

    /// Takes over the certificate, key and CA that a directory has now, for all clones: a renewal. Who we are must stay.
    ///
    /// # Errors
    /// See [`PkiError`]; what was in use stays in use.
    pub fn reload(&self, dir: &Path) -> Result<PeerCertificate, PkiError> {
        let fresh = Self::load(dir)?;
        self.take_over(&fresh)?;
        Ok(self.certificate())
    }

    /// As [`Credentials::reload`], with credentials that were read already.
    ///
    /// # Errors
    /// They are somebody else's; what was in use stays in use.
    pub fn take_over(&self, fresh: &Self) -> Result<(), PkiError> {
        if fresh.me.cluster != self.me.cluster {
            let (subject, found, expected) = (fresh.me.subject.clone(), fresh.me.cluster, self.me.cluster);
            return Err(PkiError::OtherCluster { subject, found, expected });
        }
        if fresh.me.subject != self.me.subject {
            let (subject, expected) = (fresh.me.subject.clone(), self.me.subject.clone());
            return Err(PkiError::OtherSubject { subject, expected });
        }
        Ok(self.live.replace(&fresh.live.current())?)
    }

    /// Believes what a view record says: its CAs, where it has any, instead of the directory's; its revoked keys not.
    ///
    /// Returns whether other CAs are believed than before: then connections of peers that are not
    /// [believed any more](Credentials::still_believes) are to be closed.
    ///
    /// # Errors
    /// A CA's certificate is unusable; the CAs stay as they were, the keys are refused all the same.
    pub fn believe(&self, trust: &Trust) -> Result<bool, TlsError> {
        for key in trust.revoked.iter().filter(|k| !self.revoked.contains(k)) {
            self.revoked.revoke(*key);
        }
        let changed = self.live.set_cas(&trust.cas)?;
        if changed {
            tracing::info!(target: "quorate_membership", cas = trust.cas.len(), "the trusted CAs changed");
        }
        Ok(changed)
    }

    /// Whether a peer with this certificate, which was accepted once, would be accepted in a handshake now.
    #[must_use]
    pub fn still_believes(&self, peer: &PeerCertificate) -> bool {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(unix_now()).unwrap_or(0)));
        let der = CertificateDer::from(peer.der.as_slice());
        self.policy().check(&der).is_ok()
            && self.live.current().client.verify_client_cert(&der, &[], now).is_ok()
    }

    /// The certificate in use now.
    #[must_use]
    pub fn certificate(&self) -> PeerCertificate {
        self.live.current().me.clone()
    }

    /// The content of the certificate that was read first: cluster, subject and name never change, key and validity may
    /// ([`Credentials::certificate`] has them as they are).
    #[must_use]
    pub fn me(&self) -> &PeerCertificate {
        &self.me
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.me.cluster
    }

    /// Identifies a peer by the certificate of a finished handshake.
    ///
    /// # Errors
    /// The certificate is of another cluster, revoked since the handshake, or none of ours.
    pub fn identify(&self, der: &[u8]) -> Result<PeerCertificate, RefusedCertificate> {
        self.policy().check(der)
    }

    fn policy(&self) -> Policy {
        Policy { cluster: self.me.cluster, revoked: self.revoked.clone() }
    }

    /// The settings of a connecting side: presents our certificate, checks the server's name, cluster and key.
    ///
    /// # Errors
    /// Key and certificate do not fit.
    pub fn client_config(&self) -> Result<ClientConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let check = ServerCheck { live: self.live.clone(), policy: self.policy() };
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(check))
            .with_client_cert_resolver(self.live.clone());
        config.resumption = Resumption::disabled();
        Ok(config)
    }

    /// The settings of a listening side that demands a certificate of this cluster.
    ///
    /// # Errors
    /// Key and certificate do not fit.
    pub fn server_config(&self) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let check = ClientCheck { live: self.live.clone(), policy: self.policy() };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(Arc::new(check))
            .with_cert_resolver(self.live.clone());
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(config)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, PkiError> {
    std::fs::read(path).map_err(|source| PkiError::File { path: path.to_owned(), source })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let missing = || PkiError::Pem { path: path.to_owned(), wanted: "certificate" };
    let text = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(missing)
}
