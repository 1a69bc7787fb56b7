//! Makes the cluster's CA and issues certificates with it.

use super::{node_tls_name, sha256, unix_now};
use crate::{ClusterId, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a CA is valid.
const CA_VALIDITY: Duration = Duration::from_secs(20 * 365 * 86_400);
/// How long an issued certificate is valid, unless said otherwise.
const LEAF_VALIDITY: Duration = Duration::from_secs(3 * 365 * 86_400);
/// Validity starts this much before now, so that a peer whose clock is behind accepts it.
const BACKDATE: Duration = Duration::from_secs(3_600);

/// Why a certificate was not issued, or a CA not made, read or written. No file is left half-written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The name cannot stand in a certificate as a DNS name.
    #[error("`{name}` is no DNS name: letters, digits, hyphens and dots are wanted, at most 63 in a label")]
    Name {
        /// What was given.
        name: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The certificate or key could not be made or read.
    #[error("{what}: {source}")]
    Certificate {
        /// Which step.
        what: &'static str,
        /// Why.
        source: rcgen::Error,
    },
    /// The directory's CA certificate is not one of ours: it does not name a cluster.
    #[error("{path} is not the CA of a quorate cluster")]
    NotACa {
        /// Which file.
        path: PathBuf,
    },
}

fn made(what: &'static str) -> impl Fn(rcgen::Error) -> IssueError {
    move |source| IssueError::Certificate { what, source }
}

/// The cluster's CA with its key.
#[derive(Debug)]
pub struct Ca {
    cluster: ClusterId,
    name: String,
    certificate_pem: String,
    key_pem: String,
}

/// A certificate with its key, not yet written anywhere.
#[derive(Clone)]
pub struct Issued {
    /// The CA's certificate, PEM.
    pub ca_pem: String,
    /// The certificate, PEM.
    pub certificate_pem: String,
    /// Its private key, PKCS#8 PEM.
    pub key_pem: String,
    /// SHA-256 of its public key (SubjectPublicKeyInfo): what the roster holds.
    pub key_sha256: [u8; 32],
    server: bool,
    client: bool,
}

impl core::fmt::Debug for Issued {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Issued").field("certificate_pem", &self.certificate_pem).finish_non_exhaustive()
    }
}

impl Ca {
    /// Makes a new CA. `name` is for people.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn create(name: &str, cluster: ClusterId) -> Result<Self, IssueError> {
        let key = KeyPair::generate().map_err(made("making the CA's key"))?;
        let mut params = params(CA_VALIDITY);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, format!("quorate CA of {name}"));
        params.subject_alt_names = vec![uri(&format!("quorate:{cluster}/ca"))?];
        let certificate = params.self_signed(&key).map_err(made("signing the CA's certificate"))?;
        Ok(Self {
            cluster,
            name: name.to_owned(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Reads `ca-cert.pem` and `ca-key.pem` of a directory.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn load(dir: &Path) -> Result<Self, IssueError> {
        let path = dir.join("ca-cert.pem");
        let certificate_pem = read(&path)?;
        let key_pem = read(&dir.join("ca-key.pem"))?;
        let (cluster, common_name) = super::certificate::ca_of_pem(&certificate_pem)
            .ok_or_else(|| IssueError::NotACa { path: path.clone() })?;
        let name = common_name.trim_start_matches("quorate CA of ").to_owned();
        Ok(Self { cluster, name, certificate_pem, key_pem })
    }

    /// Writes `ca-cert.pem` and `ca-key.pem` (readable by the owner alone) to a directory, made if missing.
    ///
    /// # Errors
    /// A file cannot be written, or is there already: a CA is never overwritten.
    pub fn save(&self, dir: &Path) -> Result<(), IssueError> {
        make_dir(dir)?;
        write_new(&dir.join("ca-key.pem"), &self.key_pem, 0o600)?;
        write_new(&dir.join("ca-cert.pem"), &self.certificate_pem, 0o644)
    }

    /// The cluster whose CA it is.
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// The cluster's name, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The CA's certificate, DER, as a view record holds it.
    ///
    /// # Errors
    /// [`IssueError::NotACa`] if the PEM is damaged.
    pub fn certificate_der(&self) -> Result<Vec<u8>, IssueError> {
        let der = CertificateDer::from_pem_slice(self.certificate_pem.as_bytes());
        der.map(|d| d.to_vec()).map_err(|_| IssueError::NotACa { path: "ca-cert.pem".into() })
    }

    /// The CA's certificate, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A certificate for a node, good for both sides of a connection. `addresses` are for tools that dial it by IP.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn issue_node(&self, name: &str, node: NodeId, addresses: &[IpAddr]) -> Result<Issued, IssueError> {
        let dns = [name.to_owned(), node_tls_name(self.cluster, node)];
        self.issue(name, &format!("node/{node}"), &dns, addresses, true, true, LEAF_VALIDITY)
    }

    /// A certificate for a storage server. libnbd and qemu check the host they dial against the name and `addresses`.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn issue_server(&self, name: &str, addresses: &[IpAddr]) -> Result<Issued, IssueError> {
        self.issue(name, &format!("server/{name}"), &[name.to_owned()], addresses, true, true, LEAF_VALIDITY)
    }

    /// A certificate for a client of storage servers that is no node.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn issue_client(&self, name: &str) -> Result<Issued, IssueError> {
        self.issue(name, &format!("client/{name}"), &[name.to_owned()], &[], false, true, LEAF_VALIDITY)
    }

    /// A certificate for an administrator's remote tools.
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn issue_admin(&self, name: &str) -> Result<Issued, IssueError> {
        self.issue(name, &format!("admin/{name}"), &[name.to_owned()], &[], false, true, LEAF_VALIDITY)
    }

    /// As [`Ca::issue_node`], with a validity from `start` to `end` (seconds since 1970).
    ///
    /// # Errors
    /// See [`IssueError`].
    pub fn issue_node_valid(
        &self,
        name: &str,
        node: NodeId,
        start: u64,
        end: u64,
    ) -> Result<Issued, IssueError> {
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        let mut params = CertificateParams::default();
        params.not_before = epoch + Duration::from_secs(start);
        params.not_after = epoch + Duration::from_secs(end);
        let dns = [name.to_owned(), node_tls_name(self.cluster, node)];
        self.sign(params, name, &format!("node/{node}"), &dns, &[], true, true)
    }

    #[expect(clippy::too_many_arguments, reason = "private, and each caller is one line")]
    fn issue(
        &self,
        name: &str,
        role: &str,
        dns: &[String],
        addresses: &[IpAddr],
        server: bool,
        client: bool,
        validity: Duration,
    ) -> Result<Issued, IssueError> {
        self.sign(params(validity), name, role, dns, addresses, server, client)
    }

    #[expect(clippy::too_many_arguments, reason = "private, and each caller is one line")]
    fn sign(
        &self,
        mut params: CertificateParams,
        name: &str,
        role: &str,
        dns: &[String],
        addresses: &[IpAddr],
        server: bool,
        client: bool,
    ) -> Result<Issued, IssueError> {
        check_name(name)?;
        let key = KeyPair::generate().map_err(made("making a key"))?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        if server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.use_authority_key_identifier_extension = true;
        for d in dns {
            let text = d.as_str().try_into().map_err(|_| IssueError::Name { name: d.clone() })?;
            params.subject_alt_names.push(SanType::DnsName(text));
        }
        params.subject_alt_names.extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
        params.subject_alt_names.push(uri(&format!("quorate:{}/{role}", self.cluster))?);
        let ca_key = KeyPair::from_pem(&self.key_pem).map_err(made("reading the CA's key"))?;
        let issuer = Issuer::from_ca_cert_pem(&self.certificate_pem, ca_key)
            .map_err(made("reading the CA's certificate"))?;
        let certificate = params.signed_by(&key, &issuer).map_err(made("signing a certificate"))?;
        Ok(Issued {
            ca_pem: self.certificate_pem.clone(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            key_sha256: sha256(&key.subject_public_key_info()),
            server,
            client,
        })
    }
}

impl Issued {
    /// Writes the certificate and its key under the names of the table above to a directory, made if missing. The key
    /// is readable by the owner alone.
    ///
    /// # Errors
    /// A file cannot be written, or is there already.
    pub fn save(&self, dir: &Path) -> Result<(), IssueError> {
        make_dir(dir)?;
        for (wanted, role) in [(self.server, "server"), (self.client, "client")] {
            if wanted {
                write_new(&dir.join(format!("{role}-key.pem")), &self.key_pem, 0o600)?;
                write_new(&dir.join(format!("{role}-cert.pem")), &self.certificate_pem, 0o644)?;
            }
        }
        write_new(&dir.join("ca-cert.pem"), &self.ca_pem, 0o644)
    }
}

fn params(validity: Duration) -> CertificateParams {
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(unix_now()).unwrap_or(0));
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = now - BACKDATE;
    params.not_after = now + validity;
    params
}

fn uri(text: &str) -> Result<SanType, IssueError> {
    text.try_into().map(SanType::URI).map_err(|_| IssueError::Name { name: text.to_owned() })
}

fn check_name(name: &str) -> Result<(), IssueError> {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    if name.len() <= 200 && name.split('.').all(label) {
        return Ok(());
    }
    Err(IssueError::Name { name: name.chars().take(200).collect() })
}

fn read(path: &Path) -> Result<String, IssueError> {
    std::fs::read_to_string(path).map_err(|source| IssueError::File { path: path.to_owned(), source })
}

fn make_dir(dir: &Path) -> Result<(), IssueError> {
    std::fs::create_dir_all(dir).map_err(|source| IssueError::File { path: dir.to_owned(), source })
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), IssueError> {
    let failed = |source| IssueError::File { path: path.to_owned(), source };
    let mut file =
        std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(failed)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}
