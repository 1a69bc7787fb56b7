//! `quorate why`: what a stuck cluster waits for, from the newest view alone, with an exit code for each kind.

use quorate_membership::{Identity, ResourceKind, View};
use serde_json::{Value, json};

/// Nothing is waited for.
const NOTHING: u8 = 0;
/// A majority of votes.
const QUORUM: u8 = 10;
/// A fence.
const FENCE: u8 = 11;
/// A stage of a recovery: locks to be rebuilt, a journal to be replayed, a service to be recovered.
const STAGE: u8 = 12;
/// A member that has not done its part of a stage.
const MEMBER: u8 = 13;

/// The answer: exit code, text, JSON. The most basic cause gives the code.
pub(crate) fn why(view: &View, quorate: bool) -> (u8, String, Value) {
    let mut waits: Vec<(u8, String)> = Vec::new();
    if !quorate {
        let voters: Vec<String> = view.voters.voters.keys().map(ToString::to_string).collect();
        waits.push((QUORUM, format!("quorum: no majority of the voters {} answers", voters.join(", "))));
    }
    for (who, debt) in &view.debts {
        for (resource, item) in &debt.items {
            if !item.fenced {
                waits.push((FENCE, format!("fence: {who} is not yet proven harmless for {resource}")));
                continue;
            }
            let late: Vec<Identity> = match resource.kind {
                ResourceKind::Lockspace if !item.rebuilt => view
                    .attached(resource)
                    .map(|a| a.owner)
                    .filter(|owner| !item.rebuilt_by.contains_key(owner))
                    .collect(),
                _ => Vec::new(),
            };
            if late.is_empty() {
                waits.push((STAGE, format!("stage: {resource} of {who} is fenced, not yet recovered")));
            } else {
                let names: Vec<String> = late.iter().map(ToString::to_string).collect();
                waits.push((
                    MEMBER,
                    format!("member: {} still rebuild {resource} after {who}", names.join(", ")),
                ));
            }
        }
    }
    waits.sort();
    let code = waits.first().map_or(NOTHING, |w| w.0);
    let lines: Vec<String> = waits.into_iter().map(|w| w.1).collect();
    let json = json!({ "waits": lines });
    let text = if lines.is_empty() { "nothing is waited for".to_owned() } else { lines.join("\n") };
    (code, text, json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorate_membership::ClusterId;

    #[test]
    fn a_healthy_view_waits_for_nothing_and_a_lost_quorum_has_its_own_code() {
        let view = View::empty(ClusterId::from_bytes([1; 16]));
        assert_eq!(why(&view, true).0, NOTHING);
        assert_eq!(why(&view, false).0, QUORUM);
    }
}
