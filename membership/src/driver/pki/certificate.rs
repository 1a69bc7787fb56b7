//! What a peer's certificate says: the one source of a peer's identity (R1).

use super::sha256;
use crate::{ClusterId, NodeId};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Whom a certificate was issued to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A node of the cluster.
    Node(NodeId),
    /// A storage server, by name.
    Server(String),
    /// A client that is no node, by name.
    Client(String),
    /// An administrator, by name.
    Admin(String),
}

impl core::fmt::Display for Subject {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Node(id) => write!(f, "node {id}"),
            Self::Server(name) => write!(f, "storage server `{name}`"),
            Self::Client(name) => write!(f, "client `{name}`"),
            Self::Admin(name) => write!(f, "administrator `{name}`"),
        }
    }
}

/// What is read from a certificate whose signature was checked elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The cluster that issued it.
    pub cluster: ClusterId,
    /// To whom.
    pub subject: Subject,
    /// The common name, for people.
    pub name: String,
    /// SHA-256 of its public key (SubjectPublicKeyInfo), compared with the roster's.
    pub key: [u8; 32],
    /// First second of its validity, since 1970.
    pub not_before: i64,
    /// Last second of its validity, since 1970.
    pub not_after: i64,
    /// As it was presented, DER: it is checked again when other CAs are trusted.
    pub der: Vec<u8>,
}

/// Why a certificate identifies nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateError {
    /// It is no certificate at all.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It carries no identity of ours, several, or one that is malformed.
    #[error("the certificate names no member of a quorate cluster")]
    NoIdentity,
}

impl PeerCertificate {
    /// Reads the identity from a certificate in DER.
    ///
    /// # Errors
    /// See [`CertificateError`].
    pub fn from_der(der: &[u8]) -> Result<Self, CertificateError> {
        let (_, x509) = X509Certificate::from_der(der).map_err(|_| CertificateError::Unreadable)?;
        let (cluster, role) = identity(&x509).ok_or(CertificateError::NoIdentity)?;
        let subject = subject(&role).ok_or(CertificateError::NoIdentity)?;
        Ok(Self {
            cluster,
            subject,
            name: common_name(&x509),
            key: sha256(x509.tbs_certificate.subject_pki.raw),
            not_before: x509.validity().not_before.timestamp(),
            not_after: x509.validity().not_after.timestamp(),
            der: der.to_vec(),
        })
    }

    /// The node it was issued to, if it was issued to one.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        match self.subject {
            Subject::Node(id) => Some(id),
            _ => None,
        }
    }
}

/// The cluster and common name of a CA's certificate.
pub(super) fn ca_of_pem(pem: &str) -> Option<(ClusterId, String)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    ca_of_der(&der)
}

pub(super) fn ca_of_der(der: &[u8]) -> Option<(ClusterId, String)> {
    let (_, x509) = X509Certificate::from_der(der).ok()?;
    let (cluster, role) = identity(&x509)?;
    (role == "ca" && x509.is_ca()).then(|| (cluster, common_name(&x509)))
}

/// The one `quorate:` URI of a certificate, split. None if there is not exactly one.
fn identity(x509: &X509Certificate<'_>) -> Option<(ClusterId, String)> {
    let san = x509.subject_alternative_name().ok()??;
    let mut ours = san.value.general_names.iter().filter_map(|n| match n {
        GeneralName::URI(uri) => uri.strip_prefix("quorate:"),
        _ => None,
    });
    let (cluster, role) = ours.next()?.split_once('/')?;
    if ours.next().is_some() {
        return None;
    }
    Some((cluster.parse().ok()?, role.to_owned()))
}

fn subject(role: &str) -> Option<Subject> {
    let (kind, name) = role.split_once('/')?;
    match kind {
        "node" => {
            let id: u32 = name.parse().ok()?;
            // One spelling per node, so that no two certificates differ in text and agree in meaning.
            (id.to_string() == name).then_some(Subject::Node(NodeId(id)))
        }
        _ if name.is_empty() => None,
        "server" => Some(Subject::Server(name.to_owned())),
        "client" => Some(Subject::Client(name.to_owned())),
        "admin" => Some(Subject::Admin(name.to_owned())),
        _ => None,
    }
}

fn common_name(x509: &X509Certificate<'_>) -> String {
    x509.subject().iter_common_name().next().and_then(|n| n.as_str().ok()).unwrap_or_default().to_owned()
}
