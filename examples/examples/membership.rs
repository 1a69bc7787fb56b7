//! A cluster of one node in this process: a CA, a certificate, the first record, and the node's views.
//!
//! `cargo run --example membership` prints the views and leaves cleanly.

use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::driver::{Node, NodeConfig, create_cluster, random};
use quorate_membership::{ClusterId, Membership, NodeId, Role, RosterEntry, View, ViewListener};
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

struct Printer(mpsc::UnboundedSender<bool>);

impl ViewListener for Printer {
    fn on_view(&self, view: &Arc<View>) {
        let members: Vec<String> = view.identities().map(|i| i.to_string()).collect();
        println!("view {}: members [{}], because of {:?}", view.epoch, members.join(" "), view.cause);
    }
    fn on_quorum(&self, quorate: bool) {
        println!("quorate: {quorate}");
        // Nobody listens any more when the example ends.
        let _ended = self.0.send(quorate);
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::temp_dir().join(format!("quorate-membership-example-{}", std::process::id()));
    let ca = Ca::create("example", ClusterId::from_bytes(random()?))?;
    ca.issue_node("alpha", NodeId(1), &["127.0.0.1".parse()?])?.save(&dir.join("pki"))?;
    let credentials = Credentials::load(&dir.join("pki"))?;
    let entry = RosterEntry {
        name: "alpha".into(),
        key: credentials.me().key,
        role: Role::Voter,
        addresses: vec!["127.0.0.1:0".into()],
    };
    create_cluster(&dir.join("state"), &credentials, BTreeMap::from([(NodeId(1), entry)]))?;

    let node = Node::start(NodeConfig::lan(dir.join("state"), credentials, "127.0.0.1:0".parse()?))?;
    let (sender, mut quorum) = mpsc::unbounded_channel();
    node.subscribe(Arc::new(Printer(sender)));
    node.join();
    while quorum.recv().await == Some(false) {}
    println!("{} leads, its lease holds: {}", node.me(), node.is_quorate());
    node.shutdown(Duration::from_secs(5)).await?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}
