//! `quorate witness`: an acceptor that votes and is never a member: the arbiter of two nodes, or of two halves.
//!
//! It keeps its promises and accepts in its state directory as every voter does, and nothing else runs in it.

use crate::events::Events;
use crate::node::times;
use crate::settings::{NodeSettings, load};
use clap::Args;
use quorate_membership::driver::pki::Credentials;
use quorate_membership::driver::{Node, NodeConfig, NodeEnd};
use quorate_membership::machine::StopReason;
use quorate_membership::{Membership, NodeId};
use serde_json::json;
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

/// Between two lives of the witness in one process.
const PAUSE: Duration = Duration::from_millis(200);

/// How a witness runs.
#[derive(Debug, Args)]
pub struct WitnessOptions {
    /// Its directory, made with `quorate cluster node`.
    #[arg(long, default_value = "/var/lib/quorate-witness")]
    dir: PathBuf,
    /// Append events to this file, one JSON object a line.
    #[arg(long)]
    events: Option<PathBuf>,
}

/// Runs until SIGTERM or Ctrl-C.
///
/// # Errors
/// It cannot start, or its disk failed.
pub fn run(options: WitnessOptions) -> Result<u8, Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: WitnessOptions) -> Result<u8, Box<dyn Error>> {
    let settings: NodeSettings = load(&options.dir.join("node.toml"))?;
    let credentials = Credentials::load(&options.dir.join("pki"))?;
    let events = Events::open(&format!("witness {}", settings.id), options.events.as_deref())?;
    loop {
        let times = times::of_next_life(&options.dir, &settings, credentials.cluster())?;
        let address = settings.listen.parse().map_err(|e| format!("node.toml: listen: {e}"))?;
        let mut config = NodeConfig::lan(options.dir.join("state"), credentials.clone(), address);
        config.timing = times.membership.clone();
        config.kill_time = times.kill_time();
        for contact in &settings.join {
            let (id, address) = contact.split_once('@').ok_or("node.toml: join: ID@IP:PORT is wanted")?;
            let id: u32 = id.parse().map_err(|_| format!("node.toml: join: `{id}` is no node id"))?;
            let address = address.parse().map_err(|e| format!("node.toml: join: {e}"))?;
            config.peers.entry(NodeId(id)).or_default().push(address);
        }
        let node = Node::start(config)?;
        events.emit("started", json!({ "pid": std::process::id(), "incarnation": node.me().incarnation.0 }));
        node.join();
        tokio::select! {
            signal = crate::node::stop_signal() => {
                signal?;
                node.abort();
                node.ended().await;
                return Ok(0);
            }
            end = node.ended() => {
                events.emit("over", json!({ "reason": end.to_string() }));
                match end {
                    // The directory is another acceptor now, and its next life may be admitted (R4).
                    NodeEnd::Life(StopReason::RolledBack { .. } | StopReason::Removed { .. }) => (),
                    other => return Err(other.to_string().into()),
                }
            }
        }
        drop(node);
        tokio::time::sleep(PAUSE).await;
    }
}
