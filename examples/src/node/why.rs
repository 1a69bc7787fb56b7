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
    use quorate_membership::{
        Attachment, ClusterId, Debt, DebtItem, Epoch, Incarnation, NodeId, ResourceId, Safety,
    };
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn a_healthy_view_waits_for_nothing_and_a_lost_quorum_has_its_own_code() {
        let view = View::empty(ClusterId::from_bytes([1; 16]));
        assert_eq!(why(&view, true).0, NOTHING);
        assert_eq!(why(&view, false).0, QUORUM);
    }

    /// Node 2 died with a lockspace that nodes 1 and 3 share, and with its device.
    fn after_a_death() -> View {
        let mut view = View::empty(ClusterId::from_bytes([1; 16]));
        let life = |node: u32| Identity { node: NodeId(node), incarnation: Incarnation(7) };
        let attachment = |owner: Identity, resource: &ResourceId| Attachment {
            owner,
            resource: resource.clone(),
            safety: Safety::Storage,
            servers: BTreeSet::new(),
            journal: None,
            lockspace: None,
            exclusive: false,
        };
        let item = |resource: &ResourceId| DebtItem {
            attachment: attachment(life(2), resource),
            fenced: false,
            rebuilt: false,
            rebuilt_by: BTreeMap::new(),
        };
        let space = ResourceId { kind: ResourceKind::Lockspace, name: "gfs:data".into() };
        let device = ResourceId { kind: ResourceKind::BlockDevice, name: "s/shared".into() };
        for node in [1, 3] {
            view.attachments.insert(attachment(life(node), &space));
        }
        let items = [(space.clone(), item(&space)), (device.clone(), item(&device))].into();
        view.debts.insert(life(2), Debt { removed: Epoch(4), items });
        view
    }

    #[test]
    fn what_a_recovery_waits_for_has_a_code_each_and_the_most_basic_one_counts() {
        let mut view = after_a_death();
        let space = ResourceId { kind: ResourceKind::Lockspace, name: "gfs:data".into() };
        let (code, text, json) = why(&view, true);
        assert_eq!(code, FENCE);
        assert!(text.contains("fence: 2#7 is not yet proven harmless for lockspace gfs:data"), "{text}");
        assert_eq!(json["waits"].as_array().unwrap().len(), 2, "{json}");
        assert_eq!(why(&view, false).0, QUORUM, "without a majority nobody is fenced");

        let debt = view.debts.values_mut().next().unwrap();
        debt.items.retain(|resource, _| resource.kind == ResourceKind::Lockspace);
        let item = debt.items.get_mut(&space).unwrap();
        item.fenced = true;
        item.rebuilt_by = [(Identity { node: NodeId(1), incarnation: Incarnation(7) }, Epoch(4))].into();
        let (code, text, _) = why(&view, true);
        assert_eq!((code, &text[..]), (MEMBER, "member: 3#7 still rebuild lockspace gfs:data after 2#7"));

        let item = view.debts.values_mut().next().unwrap().items.get_mut(&space).unwrap();
        item.rebuilt = true;
        let (code, text, _) = why(&view, true);
        assert_eq!(
            (code, &text[..]),
            (STAGE, "stage: lockspace gfs:data of 2#7 is fenced, not yet recovered")
        );
    }
}
