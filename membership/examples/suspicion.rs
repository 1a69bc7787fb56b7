//! Counts false suspicions: real node processes on loopback while every core of the machine is kept busy.
//!
//! ```text
//! cargo xtask campaign suspicion --minutes 60        # or: cargo run --release --example suspicion -- --minutes 1
//! ```
//!
//! It makes a cluster of five voters in a temporary directory, starts each as a process of its own with the default
//! settings, starts two busy threads for each core, and reports every suspicion and every view after the bring-up. Nobody fails, so each
//! of them is a false one. Exit code 0: none. The busy threads have the ordinary priority.

#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a command that measures by the clock")]

use quorate_membership::driver::pki::{Ca, Credentials};
use quorate_membership::driver::{Node, NodeConfig, create_cluster, random};
use quorate_membership::machine::Event;
use quorate_membership::{ClusterId, Membership, NodeId, Role, RosterEntry};
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

const NODES: u32 = 5;
const BRING_UP_MAX: Duration = Duration::from_secs(60);
/// How often a node process looks at what its machine noticed.
const LOOK: Duration = Duration::from_millis(200);

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["node", id, dir, ref ports @ ..] => {
            node(id.parse()?, Path::new(dir), ports)?;
            Ok(ExitCode::SUCCESS)
        }
        ["--minutes", minutes] => campaign(minutes.parse()?),
        _ => Err("usage: suspicion --minutes N".into()),
    }
}

/// Removes its directory and ends its processes, however the campaign ends.
struct Cluster {
    dir: PathBuf,
    children: Vec<Child>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
        drop(std::fs::remove_dir_all(&self.dir));
    }
}

fn campaign(minutes: f64) -> Outcome<ExitCode> {
    let dir = std::env::temp_dir().join(format!("quorate-suspicion-{}", std::process::id()));
    let ports = prepare(&dir)?;
    let mut cluster = Cluster { dir: dir.clone(), children: Vec::new() };
    let (lines, heard) = mpsc::channel();
    for id in 1..=NODES {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("node").arg(id.to_string()).arg(&dir).args(&ports).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        if let Some(stdout) = child.stdout.take() {
            let lines = lines.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    drop(lines.send((id, line)));
                }
            });
        }
        cluster.children.push(child);
    }
    let begin = Instant::now();
    let mut up = [false; NODES as usize];
    while up.iter().any(|u| !u) {
        let left = BRING_UP_MAX.saturating_sub(begin.elapsed());
        let (id, line) = heard.recv_timeout(left).map_err(|_| "the cluster did not come up")?;
        if line == "up"
            && let Some(up) = up.get_mut(id as usize - 1)
        {
            *up = true;
        }
    }
    println!(
        "{NODES} nodes are up after {:.1} s; every core gets two busy threads",
        begin.elapsed().as_secs_f64()
    );
    let stop = Arc::new(AtomicBool::new(false));
    let cores = std::thread::available_parallelism()?.get();
    for _ in 0..cores * 2 {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                n = std::hint::black_box(n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
        });
    }
    let begin = Instant::now();
    let whole = Duration::from_secs_f64(minutes * 60.0);
    let (mut suspicions, mut views, mut lapses) = (0_u32, 0_u32, 0_u32);
    while let Ok((id, line)) = heard.recv_timeout(whole.saturating_sub(begin.elapsed())) {
        suspicions += u32::from(line.starts_with("suspected"));
        views += u32::from(line.starts_with("view"));
        lapses += u32::from(line.starts_with("lapse"));
        if line != "up" {
            println!("{:>8.1} s  node {id}: {line}", begin.elapsed().as_secs_f64());
        }
    }
    stop.store(true, Ordering::Relaxed);
    println!(
        "{minutes} minutes, {NODES} nodes, {cores} cores with {} busy threads: {suspicions} suspicions by single observers, {views} views, {lapses} lapsed leases",
        cores * 2
    );
    Ok(if views == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Certificates, the first node's state, and a port for each node.
fn prepare(dir: &Path) -> Outcome<Vec<String>> {
    std::fs::create_dir_all(dir)?;
    let ca = Ca::create("suspicion", ClusterId::from_bytes(random()?))?;
    let mut roster = BTreeMap::new();
    let mut ports = Vec::new();
    let mut held = Vec::new();
    for id in 1..=NODES {
        let name = format!("node{id}");
        let issued = ca.issue_node(&name, NodeId(id), &[])?;
        issued.save(&dir.join(format!("pki{id}")))?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        held.push(listener);
        ports.push(address.port().to_string());
        let addresses = vec![address.to_string()];
        roster.insert(NodeId(id), RosterEntry { name, key: issued.key_sha256, role: Role::Voter, addresses });
    }
    create_cluster(&dir.join("state1"), &Credentials::load(&dir.join("pki1"))?, roster)?;
    Ok(ports)
}

/// One node process: says when it is up, and everything that should not happen after that.
fn node(id: u32, dir: &Path, ports: &[&str]) -> Outcome<()> {
    let mut peers = BTreeMap::new();
    for (other, port) in (1..).zip(ports) {
        let address: SocketAddr = format!("127.0.0.1:{port}").parse()?;
        peers.insert(NodeId(other), vec![address]);
    }
    let listen = peers.remove(&NodeId(id)).and_then(|a| a.first().copied()).ok_or("no port for this node")?;
    let credentials = Credentials::load(&dir.join(format!("pki{id}")))?;
    let mut config = NodeConfig::lan(dir.join(format!("state{id}")), credentials, listen);
    config.peers = peers;
    let node = Node::start(config)?;
    node.join();
    let mut up = None;
    let mut quorate = false;
    let mut told = quorate_membership::Instant(0);
    loop {
        std::thread::sleep(LOOK);
        if let Some(end) = node.end() {
            println!("view: this life ended: {end}");
            return Ok(());
        }
        let view = node.view();
        let whole = view.members.len() == NODES as usize && view.voters.voters.len() == NODES as usize;
        let now_quorate = node.is_quorate();
        let newest = node.events().last().map_or(told, |(at, _)| *at);
        match up {
            None if whole && now_quorate => {
                println!("up");
                (up, quorate, told) = (Some(view.epoch), true, newest);
            }
            None => {}
            Some(epoch) => {
                if view.epoch != epoch {
                    println!("view {} of {:?}: {:?}", view.epoch, view.cause, view.evidence);
                    up = Some(view.epoch);
                }
                for (_, event) in node.events().iter().filter(|(at, _)| told < *at) {
                    if let Event::Suspected(who) = event {
                        println!("suspected {who}");
                    }
                }
                told = newest;
                if quorate && !now_quorate {
                    println!("lapse of the lease");
                }
                quorate = now_quorate;
            }
        }
    }
}
