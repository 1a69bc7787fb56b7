//! What an observer outside the cluster has seen: every record, every proof, every request.

use super::Report;
use quorate_membership::machine::RequestId;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, Decision, Epoch, Identity, Instant, Request, RequestError, Role, View};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The observer's book.
#[derive(Default)]
pub(crate) struct History {
    /// The record of each epoch that was installed anywhere, as first seen.
    pub(crate) views: BTreeMap<Epoch, Arc<View>>,
    /// When it was first seen.
    pub(crate) seen: BTreeMap<Epoch, Instant>,
    /// With its proof.
    pub(crate) decisions: BTreeMap<Epoch, Decision>,
    /// The machine's own number of each request that it took.
    pub(crate) numbers: BTreeMap<RequestId, u64>,
    counts: BTreeMap<Identity, u64>,
    /// How often a person forced the quorum.
    pub(crate) forces: usize,
    pub(crate) open: BTreeMap<RequestId, (Identity, Request)>,
    applied: usize,
    refused: usize,
}

impl History {
    /// A user asked; `news` came at once.
    pub(crate) fn asked(&mut self, life: Identity, id: RequestId, request: Request, news: &[Happening]) {
        let turned_away = news.iter().any(|h| {
            matches!(h, Happening::Done { id: done, result: Err(e), .. } if *done == id && matches!(
                e,
                RequestError::NotMember(_) | RequestError::NotQuorate { .. } | RequestError::Full(_)
            ))
        });
        if !turned_away {
            let count = self.counts.entry(life).or_default();
            *count += 1;
            self.numbers.insert(id, *count);
            self.open.insert(id, (life, request));
        }
    }

    pub(crate) fn take_up(&mut self, cluster: &Cluster, news: &[Happening]) {
        // Nobody is told the outcome of what a dead process asked for.
        self.open.retain(|_, (life, _)| cluster.member(life.node).is_some_and(|m| m.me() == *life));
        for happening in news {
            match happening {
                Happening::Installed { node, view, .. } => {
                    self.views.entry(view.epoch).or_insert_with(|| Arc::clone(view));
                    self.seen.entry(view.epoch).or_insert(cluster.now());
                    if !self.decisions.contains_key(&view.epoch)
                        && let Some(d) = cluster.decision(*node, view.epoch)
                    {
                        self.decisions.insert(view.epoch, d);
                    }
                }
                Happening::Done { id, result, .. } => {
                    self.open.remove(id);
                    match result {
                        Ok(_) => self.applied += 1,
                        Err(RequestError::Refused(_)) => self.refused += 1,
                        Err(_) => (),
                    }
                }
                _ => (),
            }
        }
    }

    pub(crate) fn newest(&self) -> Option<&Arc<View>> {
        self.views.last_key_value().map(|(_, v)| v)
    }

    /// Whether all run, agree, are quorate members, vote as the roster means it, and nothing is owed.
    pub(crate) fn is_healed(&self, cluster: &Cluster) -> bool {
        let Some(newest) = self.newest() else { return false };
        let together = cluster.nodes().all(|(node, host)| {
            let is_witness = newest.roster.get(&node).is_some_and(|e| e.role == Role::Witness);
            let well = host.member().is_some_and(|m| m.view() == Some(newest));
            (is_witness && well)
                || cluster.is_quorate(node)
                    && host.member().is_some_and(|m| newest.contains(m.me()) && m.view() == Some(newest))
        });
        together && newest.debts.is_empty() && self.open.is_empty()
    }

    pub(crate) fn state_of(&self, cluster: &Cluster) -> String {
        let mut text = format!("newest {:?}\nopen {:?}", self.newest(), self.open);
        for (node, host) in cluster.nodes() {
            let m = host.member();
            text += &format!(
                "\nnode {node}: {:?} state {} epoch {:?} quorate {} leader {:?} hears {:?} stopped {:?} paused {}",
                m.map(|m| m.me()),
                host.disk.state,
                m.and_then(|m| m.view()).map(|v| v.epoch),
                cluster.is_quorate(node),
                m.and_then(|m| m.leader()),
                m.map(|m| m.hears()),
                m.and_then(|m| m.stopped()),
                host.is_paused(),
            );
        }
        text
    }

    pub(crate) fn report(&self) -> Report {
        let removed = |v: &View| match &v.cause {
            Cause::Failed(l) | Cause::NoMesh(l) | Cause::MissedStage(l) => l.len(),
            _ => 0,
        };
        let items = |v: &View| v.debts.values().map(|d| d.items.len()).sum::<usize>();
        let pairs = self.views.values().zip(self.views.values().skip(1));
        let fenced = |v: &View| v.debts.values().flat_map(|d| d.items.values()).filter(|i| i.fenced).count();
        Report {
            views: self.views.len(),
            removals: self.views.values().map(|v| removed(v)).sum(),
            applied: self.applied,
            refused: self.refused,
            fenced: pairs.clone().map(|(a, b)| fenced(b).saturating_sub(fenced(a))).sum(),
            closed: pairs.map(|(a, b)| items(a).saturating_sub(items(b))).sum(),
            trace: 0,
        }
    }
}
