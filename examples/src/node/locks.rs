//! Answers about locks: lists, reasons, the wait-for graph, rates, metrics.

use super::world::World;
use crate::admin::protocol::LockQuery;
use quorate_dlm::explain::{self, ClusterReport};
use quorate_dlm::{LockName, LockspaceStats};
use quorate_membership::Membership;
use quorate_membership::metrics::Exposition;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// The exit code of `quorate lock why` when something waits.
const WAITS: u8 = 14;

/// What a name of one of the system's own lockspaces means.
pub(crate) fn decode(lockspace: &str, name: &LockName) -> Option<String> {
    let text = core::str::from_utf8(name.as_bytes()).ok()?;
    if let Some(filesystem) = lockspace.strip_prefix("gfs:") {
        let (kind, number) = text.split_at_checked(8)?;
        let number = u64::from_str_radix(number.trim_start(), 16).ok()?;
        return Some(match (kind.trim_start(), number) {
            ("1", 1) => format!("{filesystem} is mounted"),
            ("1", 2) => format!("freezing of {filesystem}"),
            ("1", 3) => format!("renames between directories of {filesystem}"),
            ("2", n) => format!("inode {n} of {filesystem}"),
            ("3", n) => format!("resource group at block {n} of {filesystem}"),
            ("5", n) => format!("inode {n} of {filesystem} is open"),
            ("6", n) => format!("flock of inode {n} of {filesystem}"),
            ("7", n) => format!("fcntl locks of inode {n} of {filesystem}"),
            ("9", n) => format!("journal {n} of {filesystem}"),
            _ => return None,
        });
    }
    match lockspace {
        "lvm" => match text.split_once(':')? {
            ("V", group) => Some(format!("volume group {group}")),
            ("L", volume) => Some(format!("logical volume {volume}")),
            ("G", _) => Some("all volume groups".to_owned()),
            _ => None,
        },
        "services" => text.strip_prefix("service/").map(|service| format!("owner of service {service}")),
        _ => None,
    }
}

/// The answer: exit code, text, JSON.
pub(crate) async fn answer(world: &World, query: LockQuery) -> Result<(u8, String, Value), String> {
    let view = world.node.view();
    match query {
        LockQuery::Ls { lockspace } => {
            let report = world.inspector.gather(lockspace.as_deref(), None).await;
            Ok((0, lines(explain::list_lines(&report, &decode)), to_json(&report)?))
        }
        LockQuery::Show { lockspace, resource } => {
            let report = world.inspector.gather(Some(&lockspace), Some(&resource)).await;
            let waits = explain::waits(&report, &view);
            let mut out = explain::list_lines(&report, &decode);
            out.extend(waits.iter().map(|w| explain::sentence(w, &decode)));
            let json = json!({ "report": to_json(&report)?, "waits": to_json(&waits)? });
            Ok((0, lines(out), json))
        }
        LockQuery::Why { resource } => {
            let report = world.inspector.gather(None, resource.as_deref()).await;
            let waits = explain::waits(&report, &view);
            let mut out: Vec<String> = waits.iter().map(|w| explain::sentence(w, &decode)).collect();
            if out.is_empty() {
                out.push("nothing waits for a lock".to_owned());
            }
            out.extend(silent(&report));
            let rows: Vec<Value> = waits
                .iter()
                .map(|w| Ok(json!({ "wait": to_json(w)?, "because": explain::sentence(w, &decode) })))
                .collect::<Result<_, String>>()?;
            let json = json!({ "waits": rows, "silent": to_json(&report.silent)? });
            Ok((if waits.is_empty() { 0 } else { WAITS }, lines(out), json))
        }
        LockQuery::Graph { dot } => {
            let report = world.inspector.gather(None, None).await;
            let waits = explain::waits(&report, &view);
            let text = if dot {
                explain::dot(&waits, &decode)
            } else {
                let mut out = explain::graph_lines(&waits, &decode);
                if out.is_empty() {
                    out.push("nothing waits for a lock".to_owned());
                }
                out.extend(silent(&report));
                lines(out)
            };
            Ok((0, text, json!({ "waits": to_json(&waits)?, "silent": to_json(&report.silent)? })))
        }
        LockQuery::Stats => {
            let report = world.inspector.gather(None, None).await;
            Ok((0, stats(&report), stats_json(&report)?))
        }
    }
}

fn lines(lines: Vec<String>) -> String {
    if lines.is_empty() { "there are no locks".to_owned() } else { lines.join("\n") }
}

fn silent(report: &ClusterReport) -> impl Iterator<Item = String> {
    report.silent.iter().map(|who| format!("node {who} did not answer; what it masters is not looked at"))
}

fn to_json(value: &impl serde::Serialize) -> Result<Value, String> {
    let mut value = serde_json::to_value(value).map_err(|e| e.to_string())?;
    make_readable(&mut value);
    Ok(value)
}

/// Names of resources are bytes; in JSON they are shown as `ls` shows them.
fn make_readable(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(make_readable),
        Value::Object(fields) => {
            for (key, value) in fields {
                let bytes = value.as_array().filter(|_| key == "name" || key == "resource").map(|items| {
                    items
                        .iter()
                        .filter_map(|n| n.as_u64().and_then(|n| u8::try_from(n).ok()))
                        .collect::<Vec<u8>>()
                });
                match bytes {
                    Some(bytes) => *value = Value::String(bytes.escape_ascii().to_string()),
                    None => make_readable(value),
                }
            }
        }
        _ => {}
    }
}

/// Counters of each lockspace, node by node, since the node joined it.
fn stats(report: &ClusterReport) -> String {
    let mut spaces: BTreeMap<&str, Vec<(u32, &LockspaceStats)>> = BTreeMap::new();
    for node in &report.nodes {
        for (name, stats) in &node.stats {
            spaces.entry(name).or_default().push((node.node.node.0, stats));
        }
    }
    let mut out = Vec::new();
    for (name, nodes) in spaces {
        out.push(format!("lockspace {name}"));
        out.push(
            "  node      local        out         in    granted      again  deadlock  wait p50   p99"
                .to_owned(),
        );
        for (node, s) in nodes {
            let at = |n| s.waits.quantile(n).map_or("-".to_owned(), limit);
            out.push(format!(
                "  {node:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}  {:>8} {:>5}",
                s.local,
                s.out,
                s.r#in,
                s.granted,
                s.again,
                s.deadlock,
                at(500),
                at(990)
            ));
        }
    }
    out.extend(silent(report));
    lines(out)
}

fn limit(limit: Duration) -> String {
    match limit.as_micros() {
        us @ 0..1_000 => format!("<={us}us"),
        us @ 1_000..1_000_000 => format!("<={}ms", us / 1_000),
        us => format!("<={}s", us / 1_000_000),
    }
}

fn stats_json(report: &ClusterReport) -> Result<Value, String> {
    let nodes: Vec<Value> = report
        .nodes
        .iter()
        .map(|n| Ok(json!({ "node": n.node.node.0, "lockspaces": to_json(&n.stats)? })))
        .collect::<Result<_, String>>()?;
    Ok(json!({ "nodes": nodes, "silent": to_json(&report.silent)? }))
}

/// The node's own metrics: membership and programs; the lock manager writes its own.
pub(crate) fn expose(world: &World, out: &mut Exposition) {
    let view = world.node.view();
    let flag = |is: bool| if is { 1.0 } else { 0.0 };
    out.gauge("quorate_epoch", "The epoch of the installed view.", &[], view.epoch.0 as f64);
    out.gauge("quorate_members", "Members of the installed view.", &[], view.members.len() as f64);
    out.gauge(
        "quorate_quorate",
        "1 while this node has quorum and a lease.",
        &[],
        flag(world.node.is_quorate()),
    );
    let open = |pick: fn(&quorate_membership::DebtItem) -> bool| {
        view.debts.values().flat_map(|d| d.items.values()).filter(|item| pick(item)).count() as f64
    };
    let help = "What failed nodes still owe, by what it waits for.";
    out.gauge("quorate_debts", help, &[("waits_for", "fence")], open(|i| !i.fenced));
    out.gauge("quorate_debts", help, &[("waits_for", "rebuild")], open(|i| i.fenced && !i.rebuilt));
    out.gauge("quorate_debts", help, &[("waits_for", "recovery")], open(|i| i.fenced && i.rebuilt));
    let programs = world.inspector.server.get().map_or(0, |s| s.processes().len());
    out.gauge("quorate_lock_programs", "Programs that lock through this node.", &[], programs as f64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_systems_lockspaces_are_said_in_words() {
        let words = |space: &str, name: &str| decode(space, &LockName::new(name.as_bytes()).unwrap());
        let glock = |kind: u32, number: u64| format!("{kind:8x}{number:16x}");
        assert_eq!(words("gfs:data", &glock(2, 1_234)).as_deref(), Some("inode 1234 of data"));
        assert_eq!(words("gfs:data", &glock(9, 2)).as_deref(), Some("journal 2 of data"));
        assert_eq!(words("gfs:data", "other"), None);
        assert_eq!(words("lvm", "V:vg0").as_deref(), Some("volume group vg0"));
        assert_eq!(words("services", "service/web").as_deref(), Some("owner of service web"));
        assert_eq!(words("user", "service/web"), None);
    }

    /// Names are whatever a program in any node chose.
    #[test]
    fn hostile_names_are_said_in_words_or_not() {
        let names = [b"       2             4d2".to_vec(), b"V:vg0".to_vec(), b"service/web".to_vec()];
        let verdicts = quorate_membership::sim::hostile(&names, 1_000, |bytes| {
            let Ok(name) = LockName::new(bytes) else { return false };
            let words = ["gfs:data", "lvm", "services"].map(|space| decode(space, &name));
            words.iter().any(Option::is_some)
        });
        assert!(100 < verdicts.taken && 100 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    fn names_are_text_in_json() {
        let mut value = json!({ "name": [97, 34, 0], "x": [{ "resource": [98] }], "other": [1] });
        make_readable(&mut value);
        assert_eq!(value, json!({ "name": "a\\\"\\x00", "x": [{ "resource": "b" }], "other": [1] }));
    }
}
