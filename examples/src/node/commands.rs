//! Answers to commands on the admin socket.

use super::observer::fence_row;
use super::why::why;
use super::world::World;
use super::{file_api, locks, services};
use crate::admin::protocol::{Command, FileOperation, QuorumCommand, Reply, Request};
use crate::admin::server::{Handler, Peer};
use quorate_ccs::{ConfigStore, Entry, diff};
use quorate_fencing::Fencer;
use quorate_gfs::face::Credentials;
use quorate_membership::driver::pki::{PeerCertificate, Subject};
use quorate_membership::{
    Epoch, Membership, NodeId, Request as Change, Role, RosterEntry, ServerEntry, ServerId, Voter, VoterSet,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// What a command comes to: text for people, JSON for scripts.
type Outcome = Result<(String, Value), String>;

impl Handler for World {
    async fn answer(self: Arc<Self>, peer: Peer, request: Request) -> Reply {
        match request {
            Request::File { filesystem, operation } => self.file(peer, &filesystem, operation).await,
            Request::Command(Command::Why) => {
                let (code, text, json) = why(&self.node.view(), self.node.is_quorate());
                Reply::Done { text, json: json.to_string(), code }
            }
            Request::Command(Command::Locks(query)) => match locks::answer(&self, query).await {
                Ok((code, text, json)) => Reply::Done { text, json: json.to_string(), code },
                Err(text) => failed(text),
            },
            Request::Command(Command::Fsck(name)) => match self.check_filesystem(&name).await {
                Ok((clean, text)) => {
                    let json = json!({ "clean": clean, "text": text });
                    Reply::Done { text, json: json.to_string(), code: u8::from(!clean) * 4 }
                }
                Err(text) => failed(text),
            },
            Request::Command(Command::Quorum(mut command)) => {
                if let QuorumCommand::Force { word, .. } = &mut command {
                    *word = format!("{}: {word}", author(peer));
                }
                match self.quorum(command).await {
                    Ok((code, text, json)) => Reply::Done { text, json: json.to_string(), code },
                    Err(text) => failed(text),
                }
            }
            Request::Command(command) => match self.command(peer, command).await {
                Ok((text, json)) => Reply::Done { text, json: json.to_string(), code: 0 },
                Err(text) => failed(text),
            },
        }
    }
}

fn failed(text: String) -> Reply {
    let json = json!({ "error": text });
    Reply::Done { text, json: json.to_string(), code: 1 }
}

/// The same for people and scripts.
fn said(text: String) -> (String, Value) {
    let json = json!({ "done": text });
    (text, json)
}

impl World {
    async fn file(&self, peer: Peer, filesystem: &str, operation: FileOperation) -> Reply {
        let Some(mounted) = self.mounted(filesystem).await else {
            return Reply::FileError {
                errno: libc::ENODEV,
                text: format!("{filesystem} is not mounted here"),
            };
        };
        let cred = Credentials { uid: peer.uid, gid: peer.gid, groups: Vec::new(), pid: peer.pid };
        file_api::carry_out(&mounted.gfs, &cred, operation).await
    }

    async fn command(&self, peer: Peer, command: Command) -> Outcome {
        match command {
            Command::Status => self.status().await,
            Command::Members => Ok(self.members()),
            Command::Links => Ok(self.links()),
            Command::Explain(epoch) => {
                let epoch = epoch.map_or(self.node.view().epoch, Epoch);
                // With the record before it, whose voters decided.
                let kept = self.node.decisions_since(Epoch(epoch.0.saturating_sub(2)));
                super::explain::explain(&kept, epoch)
            }
            Command::AddNode { id, certificate, address } => self.add_node(id, &certificate, address).await,
            Command::AdmitVoters => self.admit_voters().await,
            Command::RemoveNode(id) => {
                self.decide(Change::RemoveNode(NodeId(id))).await?;
                Ok(said(format!("node {id} is struck from the roster")))
            }
            Command::Enrol { name, address } => self.enrol(name, address).await,
            Command::Retire(server) => {
                let server: ServerId = server.parse().map_err(|e| format!("{e}"))?;
                self.decide(Change::Retire(server)).await?;
                Ok(said(format!("storage server {server} is given up")))
            }
            Command::Leave { give_up_vote } => {
                self.gives_up_vote.store(give_up_vote, Ordering::Relaxed);
                // The signal handler leaves in order; the answer comes before the end.
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
                    .map_err(|e| e.to_string())?;
                Ok(said("leaving".into()))
            }
            Command::ConfigShow => self.config_show(),
            Command::ConfigApply { expected, document } => {
                let version =
                    self.ccs.update(expected, author(peer), document).await.map_err(|e| e.to_string())?;
                Ok((format!("version {version}"), json!({ "version": version })))
            }
            Command::ConfigHistory => Ok(history(&self.ccs.history())),
            Command::ConfigDiff(from, to) => {
                let history = self.ccs.history();
                let text = |v: u64| {
                    history
                        .iter()
                        .find(|e| e.version == v)
                        .map(|e| e.text.clone())
                        .ok_or(format!("no version {v}"))
                };
                let diff = diff(&text(from)?, &text(to)?);
                Ok((diff.clone(), json!({ "diff": diff })))
            }
            Command::ConfigRollback(to) => {
                let version = self.ccs.rollback(to, author(peer)).await.map_err(|e| e.to_string())?;
                Ok((format!("version {version} says what version {to} said"), json!({ "version": version })))
            }
            Command::FenceHistory => Ok(self.fence_history()),
            Command::FenceConfirm(node) => {
                let by = author(peer);
                self.fencing.confirm(NodeId(node), &by).await.map_err(|e| e.to_string())?;
                Ok(said(format!("{by} confirms that node {node} is off")))
            }
            Command::Metrics => {
                let text = self.metrics.text();
                Ok((text.clone(), json!({ "metrics": text })))
            }
            Command::PvCreate(device) => self.pv_create(&device).await.map(said),
            Command::VgCreate { name, devices } => self.vg_create(&name, &devices).await.map(said),
            Command::LvCreate { group, name, bytes } => self.lv_create(&group, &name, bytes).await.map(said),
            Command::LvExtend { group, name, bytes } => self.lv_extend(&group, &name, bytes).await.map(said),
            Command::LvRemove { group, name } => self.lv_remove(&group, &name).await.map(said),
            Command::Volumes => self.volumes_shown().await,
            Command::Mkfs { name } => {
                let json = self.make_filesystem(&name).await?;
                Ok((format!("filesystem {name} is made"), json))
            }
            Command::Mount(name) => {
                let json = self.mount(&name).await?;
                Ok((format!("{name} is mounted"), json))
            }
            Command::Unmount(name) => {
                self.unmount(&name).await?;
                Ok(said(format!("{name} is unmounted")))
            }
            Command::Services => services::shown(self),
            Command::ServiceEnable(name) => services::enable(self, &name).await.map(said),
            Command::ServiceDisable(name) => services::disable(self, &name).await.map(said),
            Command::ServiceRelocate { name, node } => services::relocate(self, &name, node).await.map(said),
            Command::Why | Command::Fsck(_) | Command::Quorum(_) | Command::Locks(_) => {
                Err("answered elsewhere".into())
            }
        }
    }

    async fn decide(&self, change: Change) -> Result<Arc<quorate_membership::View>, String> {
        self.node.propose(change).await.map_err(|e| e.to_string())
    }

    async fn status(&self) -> Outcome {
        let (view, me) = (self.node.view(), self.node.me());
        let members: Vec<String> = view.identities().map(|i| i.to_string()).collect();
        let debts: Vec<String> = view.debts.keys().map(ToString::to_string).collect();
        let mounts = self.mounts().await;
        let quorate = self.node.is_quorate();
        let text = format!(
            "node     {} ({})\ncluster  {}\nepoch    {}, {}\nmembers  {}\ndebts    {}\nconfig   version {}\nmounts   {}",
            me,
            self.settings.name,
            view.cluster,
            view.epoch,
            if quorate { "quorate" } else { "NOT quorate" },
            members.join(" "),
            if debts.is_empty() { "none".into() } else { debts.join(" ") },
            self.ccs.get().map_or(0, |e| e.version),
            mounts.iter().filter_map(|m| m["filesystem"].as_str()).collect::<Vec<_>>().join(" "),
        );
        let json = json!({
            "node": me.node.0, "incarnation": me.incarnation.0, "name": self.settings.name,
            "pid": std::process::id(), "cluster": view.cluster.to_string(), "epoch": view.epoch.0,
            "quorate": quorate, "members": view.members.keys().map(|n| n.0).collect::<Vec<_>>(),
            "debts": debts, "config_version": self.ccs.get().map_or(0, |e| e.version), "mounts": mounts,
            "detection_ms": self.times.agreed().detection_ms, "kill_ms": self.times.agreed().kill_ms,
        });
        Ok((text, json))
    }

    fn members(&self) -> (String, Value) {
        let view = self.node.view();
        let mut lines = vec!["  id  state     votes  name".to_owned()];
        let mut rows = Vec::new();
        for (id, entry) in &view.roster {
            let incarnation = view.members.get(id);
            let votes = view.voters.voters.get(id).map_or(0, |v| v.votes);
            let state = incarnation.map_or("absent".into(), |i| format!("member#{i}"));
            lines.push(format!(
                "{:>4}  {state:<9} {votes:>5}  {} {}",
                id.0,
                entry.name,
                entry.addresses.join(" ")
            ));
            rows.push(json!({
                "id": id.0, "name": entry.name, "addresses": entry.addresses, "votes": votes,
                "incarnation": incarnation.map(|i| i.0),
            }));
        }
        for (server, entry) in &view.servers {
            lines.push(format!("storage server {} {} {server}", entry.name, entry.address));
        }
        let servers: Vec<Value> = view
            .servers
            .iter()
            .map(|(id, s)| json!({ "server": id.to_string(), "name": s.name, "address": s.address }))
            .collect();
        (lines.join("\n"), json!({ "epoch": view.epoch.0, "nodes": rows, "servers": servers }))
    }

    /// One line for each path to each node.
    fn links(&self) -> (String, Value) {
        let mut lines =
            vec!["peer  path  state  sessions  failures  received      sent    rtt us  lost".to_owned()];
        let mut rows = Vec::new();
        for link in self.node.links() {
            let rtt = link.rtt.map(|r| r.as_micros());
            let dash = || "-".to_owned();
            lines.push(format!(
                "{:>4}  {:>4}  {:<5}  {:<8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>4}",
                link.peer.0,
                link.path,
                if link.up { "up" } else { "down" },
                if link.carries_sessions { "here" } else { "-" },
                link.downs,
                link.received,
                link.sent,
                rtt.map_or_else(dash, |r| r.to_string()),
                link.lost_packets.map_or_else(dash, |l| l.to_string()),
            ));
            rows.push(json!({
                "peer": link.peer.0, "path": link.path, "up": link.up, "sessions": link.carries_sessions,
                "silence_ms": link.silence.map(|s| s.as_millis()), "failures": link.downs,
                "received": link.received, "sent": link.sent, "rtt_us": rtt, "lost_packets": link.lost_packets,
            }));
        }
        (lines.join("\n"), json!({ "links": rows }))
    }

    async fn add_node(&self, id: u32, pem: &str, address: String) -> Outcome {
        let certificate = {
            let der =
                CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| format!("no certificate: {e}"))?;
            PeerCertificate::from_der(&der).map_err(|e| e.to_string())?
        };
        if certificate.cluster != self.credentials.cluster() {
            return Err(format!("the certificate is of cluster {}", certificate.cluster));
        }
        if certificate.subject != Subject::Node(NodeId(id)) {
            return Err(format!("the certificate is of {}, not of node {id}", certificate.subject));
        }
        let entry = RosterEntry {
            name: certificate.name,
            key: certificate.key,
            role: Role::Voter,
            addresses: address.split(',').map(|a| a.trim().to_owned()).collect(),
        };
        self.decide(Change::SetRoster(BTreeMap::from([(NodeId(id), entry)]))).await?;
        Ok(said(format!("node {id} may join")))
    }

    /// The leader does so by itself where it may; this waits until it has, or asks for it.
    async fn admit_voters(&self) -> Outcome {
        let mut views = self.observer.views();
        let wait = async {
            loop {
                let view = views.borrow_and_update().clone();
                let done = view.is_some_and(|v| {
                    let meant = |n: &NodeId| v.roster.get(n).is_some_and(|r| r.role == Role::Voter);
                    v.members.keys().filter(|n| meant(n)).all(|n| v.voters.voters.contains_key(n))
                });
                if done || views.changed().await.is_err() {
                    return;
                }
            }
        };
        let limit = std::time::Duration::from_secs(15);
        tokio::time::timeout(limit, wait).await.map_err(|_| "some members are not voters yet".to_owned())?;
        let voters: &VoterSet = &self.node.view().voters;
        let names: Vec<String> =
            voters.voters.iter().map(|(n, v): (_, &Voter)| format!("{n} ({})", v.votes)).collect();
        Ok(said(format!("voters: {}", names.join(", "))))
    }

    async fn enrol(&self, name: String, address: String) -> Outcome {
        let entry = ServerEntry { name: name.clone(), address };
        let status =
            self.fence_client.status(&entry).await.map_err(|e| format!("storage server {name}: {e}"))?;
        let server = status.server;
        self.decide(Change::Enrol(server, entry.clone())).await?;
        let chain = self.node.decisions_since(quorate_membership::Epoch(0));
        self.fence_client.install(&entry, chain).await.map_err(|e| format!("storage server {name}: {e}"))?;
        Ok((
            format!("storage server {name} ({server}) is a fence"),
            json!({ "server": server.to_string(), "name": name }),
        ))
    }

    fn config_show(&self) -> Outcome {
        let entry = self.ccs.get().ok_or("there is no configuration yet")?;
        let json = json!({ "version": entry.version, "document": entry.text });
        Ok((format!("# version {}\n{}", entry.version, entry.text), json))
    }

    fn fence_history(&self) -> (String, Value) {
        let records = self.fencing.history();
        let lines: Vec<String> = records
            .iter()
            .map(|r| {
                let by = r.by.map_or("others".into(), |b| b.to_string());
                let result = r.result.as_ref().map_or_else(|e| format!("failed: {e}"), |()| "done".into());
                let (at, after) = (utc(i128::from(r.unix_ms) * 1_000_000), r.after.as_millis());
                format!("{at} {} by {by}: {}: {result}, after {after} ms", r.victim, r.how)
            })
            .collect();
        let rows: Vec<Value> = records.iter().map(fence_row).collect();
        let open: Vec<String> = self.fencing.status().iter().map(ToString::to_string).collect();
        let text = if lines.is_empty() { "nothing was fenced".to_owned() } else { lines.join("\n") };
        let text = open.iter().fold(text, |text, open| text + "\n" + open);
        (text, json!({ "history": rows, "open": open }))
    }
}

fn author(peer: Peer) -> String {
    format!("uid {}", peer.uid)
}

/// A time of the wall clock for people.
fn utc(unix_ns: i128) -> String {
    let whole = unix_ns - unix_ns.rem_euclid(1_000_000);
    let time = OffsetDateTime::from_unix_timestamp_nanos(whole).ok();
    time.and_then(|t| t.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{unix_ns} ns"))
}

fn history(entries: &[Entry]) -> (String, Value) {
    let lines: Vec<String> = entries
        .iter()
        .map(|e| {
            format!(
                "version {} by {}, at {}",
                e.version,
                e.author,
                utc(i128::from(e.written_at) * 1_000_000_000)
            )
        })
        .collect();
    let rows: Vec<Value> = entries
        .iter()
        .map(|e| json!({ "version": e.version, "author": e.author, "written_at": e.written_at }))
        .collect();
    (lines.join("\n"), json!({ "versions": rows }))
}
