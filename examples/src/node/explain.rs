//! `quorate member explain`: why a view followed the one before it, from the records that this node keeps.

use quorate_membership::{Decision, Epoch, Explanation, View};
use serde_json::{Value, json};

/// Text and JSON for the record of `epoch`, the newest one if none is named. `kept` are decisions from the one before it
/// on, oldest first.
pub(super) fn explain(kept: &[Decision], epoch: Epoch) -> Result<(String, Value), String> {
    let at = |epoch: Epoch| kept.iter().find(|d| d.view.epoch == epoch);
    let decision = at(epoch).ok_or_else(|| {
        let newest = kept.last().map_or(Epoch(0), |d| d.view.epoch);
        format!("this node keeps no record of epoch {epoch}; its newest is {newest}")
    })?;
    let before = at(Epoch(epoch.0.saturating_sub(1))).map(|d| &d.view);
    let explanation = Explanation::new(before, decision);
    Ok((explanation.to_string(), as_json(&explanation, decision)))
}

fn as_json(explanation: &Explanation<'_>, decision: &Decision) -> Value {
    let View { epoch, members, evidence, cause, .. } = &decision.view;
    let names = |lives: Vec<quorate_membership::Identity>| {
        lives.iter().map(ToString::to_string).collect::<Vec<String>>()
    };
    let reports: Vec<Value> = evidence
        .observations
        .iter()
        .map(|o| {
            json!({
                "observer": o.observer.to_string(), "subject": o.subject.to_string(),
                "why": o.report.why.to_string(), "at_ns": o.report.at_ns, "silent_ns": o.report.silent_ns,
            })
        })
        .collect();
    let counts: Vec<Value> = evidence
        .counts
        .iter()
        .map(|c| {
            json!({
                "subject": c.subject.to_string(), "observers": c.observers, "reports": c.reports,
                "low": c.low, "high": c.high, "failed": c.failed,
            })
        })
        .collect();
    let pairs: Vec<Value> =
        evidence.pairs.iter().map(|p| json!({ "a": p.a.0, "b": p.b.0, "for_ns": p.for_ns })).collect();
    let votes = explanation.votes_in_halves();
    json!({
        "epoch": epoch.0,
        "cause": format!("{cause:?}"),
        "members": members.iter().map(|(n, i)| format!("{n}#{i}")).collect::<Vec<_>>(),
        "joined": names(explanation.joined()),
        "left": names(explanation.left()),
        "proposed_by": evidence.by.map(|i| i.to_string()),
        "at_ns": evidence.at_ns,
        "note": evidence.note,
        "reports": reports,
        "reports_left_out": evidence.left_out,
        "counts": counts,
        "held_ns": evidence.held_ns,
        "pairs": pairs,
        "accepted_by": decision.accepts.keys().map(|n| n.0).collect::<Vec<_>>(),
        "votes_in_halves": votes.map(|(have, _)| have),
        "all_votes_in_halves": votes.map(|(_, all)| all),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::{ClusterId, Evidence};
    use std::collections::BTreeMap;

    #[test]
    fn a_record_that_is_not_kept_is_named_and_one_that_is_kept_is_explained() {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        view.epoch = Epoch(7);
        view.evidence = Evidence { note: "because of this".into(), ..Evidence::default() };
        let kept = [Decision { view, accepts: BTreeMap::new() }];
        assert!(explain(&kept, Epoch(6)).unwrap_err().contains("newest is 7"));
        let (text, json) = explain(&kept, Epoch(7)).unwrap();
        assert!(text.contains("view 7") && text.contains("because of this"), "{text}");
        assert_eq!(json["epoch"], 7);
    }
}
