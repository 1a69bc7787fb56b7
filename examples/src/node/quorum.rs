//! `quorate member quorum`, its options, what-if, force-quorum, and keys: commands that change who decides and who is believed.

use super::world::World;
use crate::admin::protocol::QuorumCommand;
use quorate_membership::driver::pki::{Credentials, PeerCertificate, Subject};
use quorate_membership::machine::after_window;
use quorate_membership::{
    Membership, NodeId, Request as Change, Role, RosterEntry, TieBreaker, View, VoterSet,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// Exit code, text, JSON.
type Outcome = Result<(u8, String, Value), String>;

/// No quorum; the same code as `quorate why` has.
const NO_QUORUM: u8 = 10;

/// Between two tries of the roster change that ends a renewal, while connections are made anew.
const AGAIN: std::time::Duration = std::time::Duration::from_millis(100);
/// How often it is tried.
const TRIES: u32 = 50;

fn said(text: String) -> Outcome {
    let json = json!({ "done": text });
    Ok((0, text, json))
}

/// A certificate of a node in PEM, and that it is this node's.
fn node_certificate(pem: &str, id: u32, credentials: &Credentials) -> Result<PeerCertificate, String> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| format!("no certificate: {e}"))?;
    let certificate = PeerCertificate::from_der(&der).map_err(|e| e.to_string())?;
    if certificate.cluster != credentials.cluster() {
        return Err(format!("the certificate is of cluster {}", certificate.cluster));
    }
    if certificate.subject != Subject::Node(NodeId(id)) {
        return Err(format!("the certificate is of {}, not of node {id}", certificate.subject));
    }
    Ok(certificate)
}

impl World {
    pub(super) async fn quorum(&self, command: QuorumCommand) -> Outcome {
        let view = self.node.view();
        match command {
            QuorumCommand::Status => Ok(self.quorum_status(&view)),
            QuorumCommand::WhatIf { down, split } => {
                let rest = view.roster.keys().map(|n| n.0).filter(|n| !down.contains(n)).collect();
                what_if(&view, &if split.is_empty() { vec![rest] } else { split })
            }
            QuorumCommand::Votes { id, votes } => {
                let mut options = view.quorum.clone();
                options.votes.insert(NodeId(id), votes);
                self.change(Change::SetQuorum(options), format!("node {id} has {votes} votes")).await
            }
            QuorumCommand::Expected(votes) => {
                let mut options = view.quorum.clone();
                options.expected_votes = votes;
                self.change(Change::SetQuorum(options), format!("{votes} votes are expected")).await
            }
            QuorumCommand::Options { wait_for_all, tie_breaker, last_man_standing_ms, allow_downscale } => {
                let mut options = view.quorum.clone();
                options.wait_for_all = wait_for_all.unwrap_or(options.wait_for_all);
                options.allow_downscale = allow_downscale.unwrap_or(options.allow_downscale);
                if let Some(ms) = last_man_standing_ms {
                    options.last_man_standing_ms = (ms != 0).then_some(ms);
                }
                if let Some(text) = tie_breaker {
                    options.tie_breaker = tie_breaker_of(&text)?;
                }
                self.change(Change::SetQuorum(options), "the quorum options are changed".into()).await
            }
            QuorumCommand::AddWitness { id, certificate, address } => {
                let certificate = node_certificate(&certificate, id, &self.credentials)?;
                let (name, key) = (certificate.name, certificate.key);
                let entry = RosterEntry { name, key, role: Role::Witness, addresses: vec![address] };
                let change = Change::SetRoster(BTreeMap::from([(NodeId(id), entry)]));
                self.change(change, format!("witness {id} may vote: start `quorate witness` there")).await
            }
            QuorumCommand::Replace { id, certificate, address } => {
                let certificate = node_certificate(&certificate, id, &self.credentials)?;
                let old = view.roster.get(&NodeId(id)).ok_or(format!("node {id} is not in the roster"))?;
                let entry = RosterEntry {
                    name: certificate.name,
                    key: certificate.key,
                    role: old.role,
                    addresses: address.map_or_else(|| old.addresses.clone(), |a| vec![a]),
                };
                let text =
                    format!("node {id} is another machine now; its former state directory votes no more");
                self.change(Change::Replace(NodeId(id), entry), text).await
            }
            QuorumCommand::Force { off, word } => {
                let off: BTreeSet<NodeId> = off.into_iter().map(NodeId).collect();
                let view = self.node.force_quorum(off, word).await.map_err(|e| e.to_string())?;
                said(format!(
                    "FORCED: the record of epoch {} was not decided by a majority. If a node that was declared off still \
                     runs, two clusters work on the same data.",
                    view.epoch
                ))
            }
            QuorumCommand::CancelWaitForAll => {
                self.node.cancel_wait_for_all();
                said("this node waits for all no more, until it is started again".into())
            }
            QuorumCommand::Renew => self.renew().await,
            QuorumCommand::Revoke { id, reason } => {
                let entry = view.roster.get(&NodeId(id)).ok_or(format!("node {id} is not in the roster"))?;
                let change = Change::Revoke { key: entry.key, reason };
                self.change(change, format!("the key of node {id} is refused from now on")).await
            }
            QuorumCommand::Trust { certificates } => {
                let der = |pem: &String| {
                    CertificateDer::from_pem_slice(pem.as_bytes())
                        .map(|d| d.to_vec())
                        .map_err(|e| format!("no certificate: {e}"))
                };
                let cas: BTreeSet<Vec<u8>> = certificates.iter().map(der).collect::<Result<_, _>>()?;
                let count = cas.len();
                self.change(Change::SetCas(cas), format!("{count} CAs are trusted")).await
            }
        }
    }

    async fn change(&self, change: Change, text: String) -> Outcome {
        let view = self.node.propose(change).await.map_err(|e| e.to_string())?;
        let json = json!({ "done": text, "epoch": view.epoch.0 });
        Ok((0, text, json))
    }

    fn quorum_status(&self, view: &View) -> (u8, String, Value) {
        let quorate = self.node.is_quorate();
        let hears = self.node.hears();
        let tally = self.node.tally();
        let sum = tally.map_or_else(|| "no record is known".into(), |t| t.to_string());
        let why = match (quorate, tally.is_some_and(|t| t.is_majority())) {
            (true, _) => "a majority of the voter set acknowledges this node".to_owned(),
            (false, true) if view.members.is_empty() && view.quorum.wait_for_all => {
                "wait_for_all: after everybody was gone, every vote has to be present".into()
            }
            (false, true) => {
                "a majority answers; this node is not a member yet, or its lease has to begin".into()
            }
            (false, false) => "too few votes answer here".into(),
        };
        let mut lines = vec![
            format!("quorate  {}", if quorate { "yes" } else { "NO" }),
            format!("votes    {sum}"),
            format!("why      {why}"),
            format!("epoch    {}, protocol version {}", view.epoch, view.version),
        ];
        let mut voters = Vec::new();
        for (node, voter) in &view.voters.voters {
            let role = view.roster.get(node).map_or(Role::Voter, |e| e.role);
            let kind = if role == Role::Witness { "witness" } else { "node" };
            let here = if hears.contains(node) { "answers" } else { "silent" };
            let member = view.members.contains_key(node);
            let tie = view.voters.tie_breaker == Some(*node);
            lines.push(format!(
                "voter    {node:>3} {kind:<7} {:>4} votes, {here}{}{}",
                voter.votes,
                if member { ", member" } else { "" },
                if tie { ", tie breaker" } else { "" }
            ));
            voters.push(json!({
                "id": node.0, "kind": kind, "votes": voter.votes, "answers": hears.contains(node),
                "member": member, "tie_breaker": tie,
            }));
        }
        lines.push(format!("options  {}", options(view)));
        let expires = self.credentials.expires_in().as_secs() / 86_400;
        lines.push(format!("key      this node's certificate is valid for {expires} days more"));
        let tally = tally.map(
            |t| json!({ "have": t.have, "all": t.all, "needed": t.needed(), "majority": t.is_majority() }),
        );
        let json = json!({
            "quorate": quorate, "why": why, "epoch": view.epoch.0, "version": view.version, "tally": tally,
            "voters": voters, "expected_votes": view.quorum.expected_votes,
            "wait_for_all": view.quorum.wait_for_all, "allow_downscale": view.quorum.allow_downscale,
            "last_man_standing_ms": view.quorum.last_man_standing_ms,
            "tie_breaker": view.voters.tie_breaker.map(|n| n.0), "certificate_days": expires,
        });
        (if quorate { 0 } else { NO_QUORUM }, lines.join("\n"), json)
    }

    /// Takes the certificate of `pki.next` into use: the cluster admits its key first, then this node uses it, then the
    /// former key is given up.
    async fn renew(&self) -> Outcome {
        let (next, now) = (self.dir.join("pki.next"), self.dir.join("pki"));
        let me = self.node.me().node;
        let fresh = Credentials::load(&next)
            .map_err(|e| format!("{e}\nput the new certificate there with `quorate cluster renew`"))?;
        let (old, new) = (self.credentials.certificate(), fresh.certificate());
        if new.subject != old.subject || new.cluster != old.cluster {
            return Err(format!("the certificate in {} is of {}", next.display(), new.subject));
        }
        let decide = |change: Change| async { self.node.propose(change).await.map_err(|e| e.to_string()) };
        if new.key != old.key {
            decide(Change::Renew { node: me, key: new.key }).await?;
        }
        self.credentials.take_over(&fresh).map_err(|e| e.to_string())?;
        let file = |e: std::io::Error| format!("the new certificate is in use, but not in its place: {e}");
        let former = self.dir.join(format!("pki.until-{}", old.not_after));
        std::fs::rename(&now, &former).map_err(file)?;
        std::fs::rename(&next, &now).map_err(file)?;
        let mut tries = 0;
        if new.key != old.key {
            loop {
                let view = self.node.view();
                let entry = view.roster.get(&me).ok_or("this node is not in the roster any more")?;
                let entry = RosterEntry { key: new.key, ..entry.clone() };
                match decide(Change::SetRoster(BTreeMap::from([(me, entry)]))).await {
                    Ok(_) => break,
                    Err(error) if TRIES <= tries => return Err(error),
                    // Connections under the former key are being replaced.
                    Err(_) => tries += 1,
                }
                tokio::time::sleep(AGAIN).await;
            }
        }
        let days = fresh.expires_in().as_secs() / 86_400;
        said(format!(
            "the new certificate is in use, valid for {days} days; the former one is in {}",
            former.display()
        ))
    }
}

fn tie_breaker_of(text: &str) -> Result<Option<TieBreaker>, String> {
    Ok(match text {
        "off" => None,
        "lowest" => Some(TieBreaker::Lowest),
        "highest" => Some(TieBreaker::Highest),
        list => {
            let node = |w: &str| w.trim().parse().map(NodeId).map_err(|_| format!("`{w}` is no node id"));
            Some(TieBreaker::List(list.split(',').map(node).collect::<Result<_, _>>()?))
        }
    })
}

fn options(view: &View) -> String {
    let q = &view.quorum;
    let mut on = Vec::new();
    if 0 < q.expected_votes {
        on.push(format!("expected_votes {}", q.expected_votes));
    }
    if q.wait_for_all {
        on.push("wait_for_all".into());
    }
    match &q.tie_breaker {
        Some(TieBreaker::Lowest) => on.push("auto_tie_breaker lowest".into()),
        Some(TieBreaker::Highest) => on.push("auto_tie_breaker highest".into()),
        Some(TieBreaker::List(nodes)) => {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            on.push(format!("auto_tie_breaker {}", nodes.join(",")));
        }
        None => (),
    }
    if let Some(ms) = q.last_man_standing_ms {
        on.push(format!("last_man_standing {ms} ms"));
    }
    if q.allow_downscale {
        on.push("allow_downscale".into());
    }
    if on.is_empty() { "none".into() } else { on.join(", ") }
}

/// Who would be quorate if the voters were on these sides: the same count that decides in earnest.
fn what_if(view: &View, sides: &[Vec<u32>]) -> Outcome {
    let (mut lines, mut rows) = (Vec::new(), Vec::new());
    for side in sides {
        let nodes: BTreeSet<NodeId> = side.iter().copied().map(NodeId).collect();
        if let Some(node) = nodes.iter().find(|n| !view.roster.contains_key(n)) {
            return Err(format!("node {node} is not in the roster"));
        }
        let tally = view.voters.tally_nodes(&nodes);
        let names: Vec<String> = side.iter().map(ToString::to_string).collect();
        let names = if names.is_empty() { "nobody".into() } else { names.join(" ") };
        let verdict = if tally.is_majority() { "quorate" } else { "not quorate" };
        lines.push(format!("{names}: {verdict}: {tally}"));
        let after: Option<VoterSet> = (tally.is_majority() && view.quorum.last_man_standing_ms.is_some())
            .then(|| after_window(view, &nodes));
        if let Some(set) = &after {
            let then = set.tally_nodes(&nodes);
            lines.push(format!("  after the last-man-standing window: {then}"));
        }
        rows.push(json!({
            "nodes": side, "quorate": tally.is_majority(), "have": tally.have, "all": tally.all,
            "needed": tally.needed(), "tie": tally.is_tie(),
            "all_after_window": after.map(|s| s.all_votes()),
        }));
    }
    Ok((0, lines.join("\n"), json!({ "sides": rows })))
}
