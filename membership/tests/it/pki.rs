//! Certificates: what they say, how they are kept, and who is refused with which words.

use quorate_membership::driver::pki::{Ca, Credentials, IssueError, PeerCertificate, PkiError, Subject};
use quorate_membership::{ClusterId, NodeId};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::os::unix::fs::PermissionsExt;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::temp::TempDir;

const CLUSTER: ClusterId = ClusterId::from_bytes([7; 16]);

fn ca() -> Ca {
    Ca::create("test", CLUSTER).unwrap()
}

#[test]
fn a_node_is_read_from_its_certificate_alone() {
    let issued = ca().issue_node("alpha", NodeId(3), &[]).unwrap();
    let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
    let peer = PeerCertificate::from_der(&der).unwrap();
    assert_eq!(peer.subject, Subject::Node(NodeId(3)));
    assert_eq!((peer.cluster, peer.name.as_str(), peer.key), (CLUSTER, "alpha", issued.key_sha256));
}

#[test]
fn a_ca_is_saved_and_issues_again_after_loading_and_is_never_overwritten() {
    let dir = TempDir::new("ca");
    ca().save(dir.path()).unwrap();
    let mode = std::fs::metadata(dir.path().join("ca-key.pem")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let again = Ca::load(dir.path()).unwrap();
    assert_eq!((again.cluster(), again.name()), (CLUSTER, "test"));
    let node = dir.path().join("node");
    again.issue_node("alpha", NodeId(1), &["127.0.0.1".parse().unwrap()]).unwrap().save(&node).unwrap();
    let credentials = Credentials::load(&node).unwrap();
    assert_eq!(credentials.me().node(), Some(NodeId(1)));
    let error = ca().save(dir.path()).unwrap_err();
    assert!(matches!(error, IssueError::File { .. }), "{error}");
    assert!(error.to_string().contains("File exists"), "{error}");
}

#[test]
fn every_kind_of_certificate_names_its_kind() {
    let ca = ca();
    for (issued, subject) in [
        (ca.issue_server("store", &[]).unwrap(), Subject::Server("store".into())),
        (ca.issue_client("laptop").unwrap(), Subject::Client("laptop".into())),
        (ca.issue_admin("root").unwrap(), Subject::Admin("root".into())),
    ] {
        let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
        assert_eq!(PeerCertificate::from_der(&der).unwrap().subject, subject);
    }
}

#[test]
fn a_name_that_is_no_dns_name_is_refused() {
    let error = ca().issue_node("a b", NodeId(1), &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`a b` is no DNS name: letters, digits, hyphens and dots are wanted, at most 63 in a label"
    );
}

#[test]
fn expired_early_and_foreign_certificates_are_refused_with_the_reason() {
    const DAY: u64 = 86_400;
    #[expect(clippy::disallowed_methods, reason = "certificates are valid by the wall clock")]
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let dir = TempDir::new("validity");
    let ca = ca();
    let load = |name: &str, start, end| {
        let path = dir.path().join(name);
        ca.issue_node_valid("alpha", NodeId(1), start, end).unwrap().save(&path).unwrap();
        Credentials::load(&path)
    };
    let error = load("old", now - 20 * DAY, now - 10 * DAY - 60).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the certificate of node 1 expired 10 days ago: issue a new one (or set this machine's clock)"
    );
    let error = load("early", now + 10 * DAY - 60, now + 20 * DAY).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the certificate of node 1 is valid only in 10 days: this machine's clock is probably wrong"
    );
    let soon = load("soon", now - DAY, now + 3 * DAY).unwrap();
    assert!(soon.expires_in().as_secs() <= 3 * DAY);
    let other = Ca::create("other", ClusterId::from_bytes([8; 16])).unwrap();
    let foreign = dir.path().join("soon").join("ca-cert.pem");
    std::fs::write(&foreign, other.certificate_pem()).unwrap();
    assert!(matches!(Credentials::load(&dir.path().join("soon")), Err(PkiError::OtherCluster { .. })));
}

#[test]
fn a_directory_without_files_or_with_another_key_is_refused() {
    let dir = TempDir::new("missing");
    let error = Credentials::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("client-cert.pem: No such file"), "{error}");
    let ca = ca();
    let path = dir.path().join("mixed");
    ca.issue_node("alpha", NodeId(1), &[]).unwrap().save(&path).unwrap();
    std::fs::write(path.join("server-key.pem"), ca.issue_client("x").unwrap().key_pem).unwrap();
    assert!(matches!(Credentials::load(&path), Err(PkiError::Tls(_))));
}

#[test]
fn garbage_is_no_certificate() {
    let issued = ca().issue_node("alpha", NodeId(3), &[]).unwrap();
    let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap().to_vec();
    let mut rng = quorate_membership::Rng::new(1);
    for _ in 0..2_000 {
        let mut bad = der.clone();
        let at = rng.below(bad.len() as u64) as usize;
        bad[at] ^= 1 << rng.below(8);
        bad.truncate(bad.len() - rng.below(3) as usize * 20);
        let _ = PeerCertificate::from_der(&bad);
    }
}
