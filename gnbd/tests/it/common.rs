//! What the tests share: temporary directories, servers, tools that may be missing.

use quorate_gnbd::client::{NbdConfig, NbdDevice};
use quorate_gnbd::server::{Export, Listen, Server, ServerConfig};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Nothing in a test takes longer.
pub(crate) const CEILING: Duration = Duration::from_secs(60);

/// Ends the test if it takes longer than anything may.
pub(crate) async fn ceiling<T>(f: impl Future<Output = T>) -> T {
    tokio::time::timeout(CEILING, f).await.expect("it does not take so long")
}

/// A directory that goes away.
pub(crate) struct Temp(pub(crate) PathBuf);

impl Temp {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("gnbd-it-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn local() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

pub(crate) fn file_export(path: &Path, name: &str, cluster: bool) -> Export {
    let device = Device::new(FileDevice::open(path, FileOptions::server()).unwrap());
    Export { name: name.into(), description: "a test disk".into(), device, cluster }
}

/// A server without TLS.
pub(crate) async fn plain_server(exports: Vec<Export>) -> Server {
    plain_server_at(local(), exports).await
}

pub(crate) async fn plain_server_at(address: SocketAddr, exports: Vec<Export>) -> Server {
    let config = ServerConfig {
        listen: vec![Listen { address, tls: false }],
        tls: None,
        exports,
        fence: None,
        connections_max: 64,
    };
    Server::start(config).await.unwrap()
}

pub(crate) async fn plain_client(address: SocketAddr, export: &str) -> NbdDevice {
    let config = NbdConfig {
        address: address.to_string(),
        export: export.into(),
        tls: None,
        member: None,
        connections: 2,
    };
    NbdDevice::connect(config).await.unwrap()
}

/// Whether the tool is there; else says that the test is skipped.
pub(crate) fn has(test: &str, tool: &str) -> bool {
    let dirs = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"];
    if dirs.iter().any(|d| Path::new(d).join(tool).exists()) {
        return true;
    }
    assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{test}: {tool} is not installed");
    println!("SKIP: {test}: {tool} is not installed");
    false
}

/// Runs a tool to its end; returns whether it succeeded, and all it said.
pub(crate) async fn run(tool: &str, args: &[&str]) -> (bool, String) {
    let child = tokio::process::Command::new(tool).args(args).kill_on_drop(true).output();
    let output = tokio::time::timeout(CEILING, child).await.expect("the tool ends").unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

pub(crate) async fn succeeds(tool: &str, args: &[&str]) -> String {
    let (ok, text) = run(tool, args).await;
    assert!(ok, "{tool} {args:?}: {text}");
    text
}

/// Bytes that repeat nowhere near.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = quorate_membership::Rng::new(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&rng.next_u64().to_le_bytes());
    }
    out.truncate(len);
    out
}
