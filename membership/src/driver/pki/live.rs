//! The certificate, key and CAs in use: replaced while TLS settings made of them stay in use, so that the next handshake
//! has the new ones.

use super::PeerCertificate;
use super::credentials::{TlsError, tls};
use rustls::RootCertStore;
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

/// One set of them, with the verifiers made of its CAs.
#[derive(Debug)]
pub(super) struct Material {
    pub(super) certified: Arc<CertifiedKey>,
    pub(super) me: PeerCertificate,
    /// The CAs of the directory; those of the view record, where it has any, take their place.
    own: Arc<RootCertStore>,
    pub(super) server: Arc<WebPkiServerVerifier>,
    pub(super) client: Arc<dyn ClientCertVerifier>,
}

impl Material {
    pub(super) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        own: Arc<RootCertStore>,
        me: PeerCertificate,
    ) -> Result<Self, TlsError> {
        let provider = rustls::crypto::ring::default_provider();
        // A key that does not fit its certificate is found here, not by the first peer.
        let certified = CertifiedKey::from_der(chain, key, &provider).map_err(tls)?;
        Self::with(Arc::new(certified), me, own, &BTreeSet::new())
    }

    fn with(
        certified: Arc<CertifiedKey>,
        me: PeerCertificate,
        own: Arc<RootCertStore>,
        cas: &BTreeSet<Vec<u8>>,
    ) -> Result<Self, TlsError> {
        let mut roots = own.clone();
        if !cas.is_empty() {
            let mut store = RootCertStore::empty();
            for der in cas {
                store.add(CertificateDer::from(der.clone())).map_err(tls)?;
            }
            roots = Arc::new(store);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let client = WebPkiClientVerifier::builder_with_provider(roots, provider);
        Ok(Self {
            certified,
            me,
            own,
            server: server.build().map_err(tls)?,
            client: client.build().map_err(tls)?,
        })
    }
}

/// Shared by all clones of the credentials and all TLS settings made of them.
#[derive(Debug)]
pub(super) struct Live(RwLock<(Arc<Material>, BTreeSet<Vec<u8>>)>);

impl Live {
    pub(super) fn new(material: Material) -> Self {
        Self(RwLock::new((Arc::new(material), BTreeSet::new())))
    }

    pub(super) fn current(&self) -> Arc<Material> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Takes over certificate, key and the directory's CAs of `fresh`.
    pub(super) fn replace(&self, fresh: &Material) -> Result<(), TlsError> {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let material =
            Material::with(fresh.certified.clone(), fresh.me.clone(), fresh.own.clone(), &state.1)?;
        state.0 = Arc::new(material);
        Ok(())
    }

    /// Believes exactly these CAs, or the directory's if there is none. Nothing changes if one is unusable.
    pub(super) fn set_cas(&self, cas: &BTreeSet<Vec<u8>>) -> Result<bool, TlsError> {
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if state.1 == *cas {
            return Ok(false);
        }
        let old = &state.0;
        let material = Material::with(old.certified.clone(), old.me.clone(), old.own.clone(), cas)?;
        *state = (Arc::new(material), cas.clone());
        Ok(true)
    }
}

impl ResolvesServerCert for Live {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }
}

impl ResolvesClientCert for Live {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
