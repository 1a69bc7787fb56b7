//! `quorate cluster`: makes a cluster, and the directories and certificates of its nodes and storage servers.
//!
//! | path in a node's directory | content |
//! |---|---|
//! | `node.toml` | id, name, addresses |
//! | `pki/` | its certificates, in the names libnbd and qemu use too |
//! | `state/` | its promises, the view records, the incarnation counter |
//! | `ccs/` | the cluster configuration and its history |
//! | `admin.sock` | where commands reach the running node |
//! | `mnt/` | mounts |

use crate::settings::{NodeSettings, StorageSettings, save};
use clap::Subcommand;
use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::{ClusterId, NodeId, QuorumOptions, TieBreaker};
use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// What can be made.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// A new cluster: its CA, its first record, and its first node.
    Create {
        /// Where the CA is put. Keep it off the nodes.
        #[arg(long)]
        ca: PathBuf,
        /// The first node's directory.
        #[arg(long, default_value = "/var/lib/quorate")]
        dir: PathBuf,
        /// The cluster's name.
        #[arg(long)]
        name: String,
        /// The first node's id.
        #[arg(long, default_value_t = 1)]
        id: u32,
        /// The first node's name.
        #[arg(long)]
        node_name: String,
        /// Where the first node listens, IP:PORT.
        #[arg(long)]
        listen: SocketAddr,
        /// After everybody was gone, wait until every vote is present (docs/quorum.md).
        #[arg(long)]
        wait_for_all: bool,
        /// Who has half a vote more.
        #[arg(long, value_name = "lowest|highest", value_parser = ["lowest", "highest"])]
        auto_tie_breaker: Option<String>,
        /// Go on without votes that were away for so many milliseconds.
        #[arg(long, value_name = "MS")]
        last_man_standing: Option<u32>,
        /// A node that leaves cleanly takes its vote along.
        #[arg(long)]
        allow_downscale: bool,
    },
    /// The directory of another node.
    Node {
        /// The CA's directory.
        #[arg(long)]
        ca: PathBuf,
        /// The node's directory; copy it to the node.
        #[arg(long)]
        dir: PathBuf,
        /// Its id.
        #[arg(long)]
        id: u32,
        /// Its name.
        #[arg(long)]
        name: String,
        /// Where it listens, IP:PORT.
        #[arg(long)]
        listen: SocketAddr,
        /// Nodes to ask at its first start, ID@IP:PORT.
        #[arg(long)]
        join: Vec<String>,
    },
    /// The directory of a storage server.
    Server {
        /// The CA's directory.
        #[arg(long)]
        ca: PathBuf,
        /// The server's directory; copy it to the server.
        #[arg(long)]
        dir: PathBuf,
        /// Its name.
        #[arg(long)]
        name: String,
        /// Where it listens, IP:PORT.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// A new certificate with a new key. A node's is put beside the one in use, and `quorate member renew` takes it into use; a
    /// storage server's takes the place of the former one, and is in use from the server's next start on.
    Renew {
        /// The CA's directory: the present one, or the next.
        #[arg(long)]
        ca: PathBuf,
        /// The directory of the node or storage server, or a copy of its `node.toml` or `storage.toml`.
        #[arg(long)]
        dir: PathBuf,
    },
    /// The next CA of the same cluster. Trust both with `quorate member trust`, renew every certificate, then trust it alone.
    NextCa {
        /// The present CA's directory.
        #[arg(long)]
        ca: PathBuf,
        /// Where the next one is put. Keep it off the nodes.
        #[arg(long)]
        into: PathBuf,
    },
    /// A certificate for a person's tools (libnbd, qemu) that use exports outside the cluster.
    Client {
        /// The CA's directory.
        #[arg(long)]
        ca: PathBuf,
        /// Where the certificate is put.
        #[arg(long)]
        dir: PathBuf,
        /// The client's name.
        #[arg(long)]
        name: String,
    },
}

/// Carries out the command; the exit code.
///
/// # Errors
/// Something cannot be made; what was made before stays.
pub fn run(command: &ClusterCommand) -> Result<u8, Box<dyn Error>> {
    match command {
        ClusterCommand::Create {
            ca,
            dir,
            name,
            id,
            node_name,
            listen,
            wait_for_all,
            auto_tie_breaker,
            last_man_standing,
            allow_downscale,
        } => {
            let quorum = QuorumOptions {
                wait_for_all: *wait_for_all,
                tie_breaker: auto_tie_breaker.as_deref().map(|word| match word {
                    "highest" => TieBreaker::Highest,
                    _ => TieBreaker::Lowest,
                }),
                last_man_standing_ms: *last_man_standing,
                allow_downscale: *allow_downscale,
                ..QuorumOptions::default()
            };
            if let Some(fault) = quorum.fault() {
                return Err(fault.into());
            }
            create(ca, dir, name, (*id, node_name), *listen, quorum)
        }
        ClusterCommand::Node { ca, dir, id, name, listen, join } => {
            let authority = Ca::load(ca)?;
            node_directory(&authority, dir, *id, name, *listen, join)?;
            println!(
                "node {id} ({name}): {}; add it with `quorate member add` and start `quorate node`",
                dir.display()
            );
            Ok(0)
        }
        ClusterCommand::Server { ca, dir, name, listen } => {
            let authority = Ca::load(ca)?;
            make_dir(dir)?;
            authority.issue_server(name, &addresses(*listen))?.save(&dir.join("pki"))?;
            save(
                &dir.join("storage.toml"),
                &StorageSettings { name: name.clone(), listen: listen.to_string() },
            )?;
            println!(
                "storage server {name}: {}; start `quorate storage`, then `quorate member enrol`",
                dir.display()
            );
            Ok(0)
        }
        ClusterCommand::Renew { ca, dir } => {
            if dir.join("storage.toml").exists() {
                return renew_server(&Ca::load(ca)?, dir);
            }
            let settings: NodeSettings = crate::settings::load(&dir.join("node.toml"))?;
            let listen: SocketAddr =
                settings.listen.parse().map_err(|e| format!("node.toml: listen: {e}"))?;
            let into = dir.join("pki.next");
            let issued = Ca::load(ca)?.issue_node(&settings.name, NodeId(settings.id), &addresses(listen))?;
            issued.save(&into)?;
            println!("node {}: {}; now run `quorate member renew` there", settings.id, into.display());
            Ok(0)
        }
        ClusterCommand::NextCa { ca, into } => {
            let present = Ca::load(ca)?;
            Ca::create(present.name(), present.cluster())?.save(into)?;
            println!("the next CA of {}: {}", present.name(), into.display());
            println!(
                "next: quorate member trust {0}/ca-cert.pem {1}/ca-cert.pem",
                ca.display(),
                into.display()
            );
            Ok(0)
        }
        ClusterCommand::Client { ca, dir, name } => {
            Ca::load(ca)?.issue_client(name)?.save(dir)?;
            println!("client {name}: {}", dir.display());
            Ok(0)
        }
    }
}

fn create(
    ca: &Path,
    dir: &Path,
    name: &str,
    (id, node_name): (u32, &str),
    listen: SocketAddr,
    quorum: QuorumOptions,
) -> Result<u8, Box<dyn Error>> {
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).map_err(|e| format!("no randomness: {e}"))?;
    let cluster = ClusterId::from_bytes(uuid);
    let authority = Ca::create(name, cluster)?;
    authority.save(ca)?;
    node_directory(&authority, dir, id, node_name, listen, &[])?;
    crate::node::create_first_record(dir, quorum)?;
    println!("cluster {name}, {cluster}: CA in {}, first node in {}", ca.display(), dir.display());
    println!("start the node with: quorate node --dir {}", dir.display());
    Ok(0)
}

/// A storage server has no life that would have to be told: it is started again under the new certificate.
fn renew_server(authority: &Ca, dir: &Path) -> Result<u8, Box<dyn Error>> {
    let settings: StorageSettings = crate::settings::load(&dir.join("storage.toml"))?;
    let listen: SocketAddr = settings.listen.parse().map_err(|e| format!("storage.toml: listen: {e}"))?;
    let (now, next) = (dir.join("pki"), dir.join("pki.next"));
    authority.issue_server(&settings.name, &addresses(listen))?.save(&next)?;
    let former = match Credentials::load(&now) {
        Ok(old) => dir.join(format!("pki.until-{}", old.certificate().not_after)),
        Err(_) => dir.join("pki.former"),
    };
    if now.exists() {
        std::fs::rename(&now, &former).map_err(|e| format!("cannot keep {}: {e}", now.display()))?;
    }
    std::fs::rename(&next, &now).map_err(|e| format!("cannot put {} in its place: {e}", next.display()))?;
    println!("storage server {}: {}; start it again now", settings.name, now.display());
    Ok(0)
}

fn node_directory(
    authority: &Ca,
    dir: &Path,
    id: u32,
    name: &str,
    listen: SocketAddr,
    join: &[String],
) -> Result<(), Box<dyn Error>> {
    if id == 0 {
        return Err("node ids start at 1".into());
    }
    make_dir(dir)?;
    authority.issue_node(name, NodeId(id), &addresses(listen))?.save(&dir.join("pki"))?;
    let settings = NodeSettings {
        id,
        name: name.to_owned(),
        listen: listen.to_string(),
        listen_also: Vec::new(),
        join: join.to_vec(),
        busy_poll_us: 0,
        timing: None,
        metrics: None,
        locks: Vec::new(),
    };
    save(&dir.join("node.toml"), &settings)?;
    Ok(())
}

fn make_dir(dir: &Path) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()).into())
}

fn addresses(listen: SocketAddr) -> Vec<IpAddr> {
    if listen.ip().is_unspecified() { Vec::new() } else { vec![listen.ip()] }
}
