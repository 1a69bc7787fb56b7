//! Why a view followed another, told for people from what every member keeps: the record, its evidence, its accepts.

use crate::evidence::Observation;
use crate::{Cause, Decision, Evidence, Identity, View};
use core::fmt::{self, Display, Write as _};
use core::time::Duration;
use std::collections::BTreeSet;

/// One record explained. `Display` is the text that `quorate member explain` prints.
#[derive(Clone, Copy, Debug)]
pub struct Explanation<'a> {
    before: Option<&'a View>,
    decision: &'a Decision,
}

impl<'a> Explanation<'a> {
    /// Explains `decision`; `before` is the record before it, where it is still kept: its voters decided.
    #[must_use]
    pub fn new(before: Option<&'a View>, decision: &'a Decision) -> Self {
        let follows = |b: &&View| b.epoch.next() == decision.view.epoch;
        Self { before: before.filter(follows), decision }
    }

    /// Lives that came in with the record.
    #[must_use]
    pub fn joined(&self) -> Vec<Identity> {
        let new = |who: &Identity| self.before.is_some_and(|b| !b.contains(*who));
        self.decision.view.identities().filter(new).collect()
    }

    /// Lives that went with it.
    #[must_use]
    pub fn left(&self) -> Vec<Identity> {
        let gone = |who: &Identity| !self.decision.view.contains(*who);
        self.before.iter().flat_map(|b| b.identities()).filter(gone).collect()
    }

    /// Votes that accepted it, and all votes of the voters that decided, half votes of a tie breaker counted double:
    /// both numbers are in halves.
    #[must_use]
    pub fn votes_in_halves(&self) -> Option<(u64, u64)> {
        let voters = &self.before?.voters;
        let halves = |node| {
            let votes = voters.voters.get(&node).map_or(0, |v| u64::from(v.votes));
            2 * votes + u64::from(voters.tie_breaker == Some(node))
        };
        let counts = |n: &&crate::NodeId| {
            let accept = self.decision.accepts.get(*n);
            voters.voters.get(*n).zip(accept).is_some_and(|(v, a)| v.state == a.state)
        };
        let have = self.decision.accepts.keys().filter(counts).map(|n| halves(*n)).sum();
        Some((have, voters.voters.keys().map(|n| halves(*n)).sum()))
    }
}

/// Names joined by commas, at most a dozen.
fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 12;
    let all: Vec<String> = items.into_iter().map(|i| i.to_string()).collect();
    let mut text = all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if SHOWN < all.len() {
        let _ = write!(text, " and {} more", all.len() - SHOWN);
    }
    text
}

fn ms(ns: u64) -> String {
    format!("{:.0} ms", Duration::from_nanos(ns).as_secs_f64() * 1_000.0)
}

fn halves(n: u64) -> String {
    if n.is_multiple_of(2) { format!("{}", n / 2) } else { format!("{}.5", n / 2) }
}

fn cause(cause: &Cause) -> String {
    match cause {
        Cause::Created => "the cluster was created".into(),
        Cause::Failed(lives) => format!("failed: {}", list(lives)),
        Cause::NoMesh(lives) => format!("removed so that a full mesh is left: {}", list(lives)),
        Cause::MissedStage(lives) => format!("missed the deadline of a recovery stage: {}", list(lives)),
        Cause::Joined(lives) => format!("joined: {}", list(lives)),
        Cause::Voters => "the voter set was fitted to the roster".into(),
        Cause::Request { by, number } => format!("asked for by {by} (its request {number})"),
        other => format!("{other:?}"),
    }
}

impl Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (view, evidence) = (&self.decision.view, &self.decision.view.evidence);
        writeln!(f, "view {}: {}", view.epoch, cause(&view.cause))?;
        writeln!(f, "members  {}: {}", view.members.len(), list(view.identities()))?;
        for (what, lives) in [("came", self.joined()), ("went", self.left())] {
            if !lives.is_empty() {
                writeln!(f, "{what:<8} {}", list(lives))?;
            }
        }
        if let Some(by) = evidence.by {
            writeln!(f, "proposed by {by}, at {} of its clock", ms(evidence.at_ns))?;
        }
        if !evidence.note.is_empty() {
            writeln!(f, "because  {}", evidence.note)?;
        }
        self.reports(f, evidence)?;
        for pair in &evidence.pairs {
            writeln!(f, "no path  between {} and {} for {}", pair.a, pair.b, ms(pair.for_ns))?;
        }
        self.quorum(f)
    }
}

impl Explanation<'_> {
    fn reports(&self, f: &mut fmt::Formatter<'_>, evidence: &Evidence) -> fmt::Result {
        let subjects: BTreeSet<Identity> = evidence.counts.iter().map(|c| c.subject).collect();
        let others = evidence.observations.iter().map(|o| o.subject).filter(|s| !subjects.contains(s));
        let others: BTreeSet<Identity> = others.collect();
        for count in &evidence.counts {
            let verdict = if count.failed {
                "failed"
            } else if count.low <= count.reports {
                "unstable, not removed"
            } else {
                "stays"
            };
            writeln!(
                f,
                "{}: {} of {} observers report it (low {}, high {}): {verdict}",
                count.subject, count.reports, count.observers, count.low, count.high
            )?;
            observations(f, evidence, count.subject)?;
        }
        for subject in others {
            writeln!(f, "{subject}:")?;
            observations(f, evidence, subject)?;
        }
        if 0 < evidence.left_out {
            writeln!(f, "and {} reports more", evidence.left_out)?;
        }
        if 0 < evidence.held_ns {
            writeln!(f, "the cut waited {} for others of the same incident", ms(evidence.held_ns))?;
        }
        Ok(())
    }

    fn quorum(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = list(self.decision.accepts.keys());
        let Some((have, all)) = self.votes_in_halves() else {
            return write!(
                f,
                "accepted by {by}; the record before it is not kept, so its votes are not known"
            );
        };
        let (have, all) = (halves(have), halves(all));
        write!(f, "accepted by {by}: {have} of {all} votes, more than half are needed")?;
        let ballot = self.decision.accepts.values().next().map(|a| a.ballot);
        match ballot {
            Some(b) if Some(b.node) != self.decision.view.evidence.by.map(|i| i.node.0) => {
                write!(f, " (ballot {} of node {}, which finished what another had begun)", b.round, b.node)
            }
            Some(b) => write!(f, " (ballot {} of node {})", b.round, b.node),
            None => Ok(()),
        }
    }
}

fn observations(f: &mut fmt::Formatter<'_>, evidence: &Evidence, subject: Identity) -> fmt::Result {
    for Observation { observer, report, .. } in evidence.observations.iter().filter(|o| o.subject == subject)
    {
        writeln!(
            f,
            "  {observer} at {} of its clock: {}; nothing heard for {} then",
            ms(report.at_ns),
            report.why,
            ms(report.silent_ns)
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evidence::{Count, Report, Why};
    use crate::proof::{Accept, Ballot};
    use crate::{ClusterId, Epoch, Incarnation, NodeId, StateId, Voter};
    use std::collections::BTreeMap;

    fn who(n: u32) -> Identity {
        Identity::new(NodeId(n), Incarnation(1))
    }

    fn before() -> View {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        view.epoch = Epoch(4);
        for n in 1..=3_u32 {
            view.members.insert(NodeId(n), Incarnation(1));
            let state = StateId::from_bytes([n as u8; 16]);
            view.voters.voters.insert(NodeId(n), Voter { state, votes: 1 });
        }
        view
    }

    #[test]
    fn a_removal_is_told_with_its_observers_counts_and_votes() {
        let before = before();
        let mut view = before.clone();
        view.epoch = Epoch(5);
        view.members.remove(&NodeId(3));
        view.cause = Cause::Failed(BTreeSet::from([who(3)]));
        let report = |at_ns| Report { why: Why::Silence, at_ns, silent_ns: 812_000_000 };
        let seen = |n, at| Observation { observer: who(n), subject: who(3), report: report(at) };
        let count = Count { subject: who(3), observers: 2, reports: 2, low: 1, high: 2, failed: true };
        view.evidence = Evidence {
            by: Some(who(1)),
            at_ns: 9_000_000,
            observations: vec![seen(1, 7_000_000), seen(2, 8_000_000)],
            counts: vec![count],
            held_ns: 3_000_000,
            ..Evidence::default()
        };
        let accept = |n: u32| Accept {
            state: StateId::from_bytes([n as u8; 16]),
            ballot: Ballot { round: 2, node: 1 },
            acknowledged_ns_ago: BTreeMap::new(),
        };
        let accepts = BTreeMap::from([(NodeId(1), accept(1)), (NodeId(2), accept(2))]);
        let decision = Decision { view, accepts };
        let text = Explanation::new(Some(&before), &decision).to_string();
        let wanted = "view 5: failed: 3#1
members  2: 1#1, 2#1
went     3#1
proposed by 1#1, at 9 ms of its clock
3#1: 2 of 2 observers report it (low 1, high 2): failed
  1#1 at 7 ms of its clock: silence for the detection time; nothing heard for 812 ms then
  2#1 at 8 ms of its clock: silence for the detection time; nothing heard for 812 ms then
the cut waited 3 ms for others of the same incident
accepted by 1, 2: 2 of 3 votes, more than half are needed (ballot 2 of node 1)";
        assert_eq!(text, wanted);
    }

    #[test]
    fn without_the_record_before_the_votes_are_said_to_be_unknown() {
        let decision = Decision { view: before(), accepts: BTreeMap::new() };
        let text = Explanation::new(None, &decision).to_string();
        assert!(text.contains("votes are not known"), "{text}");
        assert_eq!(
            Explanation::new(Some(&decision.view), &decision).votes_in_halves(),
            None,
            "not the one before"
        );
    }
}
