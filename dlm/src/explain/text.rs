//! The same for people: lists, sentences, and the graph in the language of Graphviz.

use super::{Blocker, ClusterReport, Party, Wait, has_waiters};
use crate::{LockDump, LockName, ResourceDump};
use core::fmt::Write as _;
use core::time::Duration;
use quorate_membership::Identity;
use std::collections::BTreeMap;

/// Says what a name means to those who use the lockspace: `(lockspace, name)` to words, or nothing.
pub type NameDecoder<'a> = &'a dyn Fn(&str, &LockName) -> Option<String>;

/// `3 ms`, `12 s`, `2 h 5 min`: two digits are enough to see what is old.
#[must_use]
pub fn short_age(age: Duration) -> String {
    let (ms, s) = (age.as_millis(), age.as_secs());
    match s {
        0 => format!("{ms} ms"),
        1..120 => format!("{s} s"),
        120..7_200 => format!("{} min", s / 60),
        _ => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
    }
}

fn since(age: Option<Duration>) -> String {
    age.map_or(String::new(), |age| format!(" for {}", short_age(age)))
}

impl core::fmt::Display for Party {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "node {}", self.node.node)?;
        match &self.process {
            Some((pid, command)) => write!(f, " pid {pid} ({command})"),
            None if self.owner & 0xffff_ffff != 0 => write!(f, " pid {}", self.owner & 0xffff_ffff),
            None => Ok(()),
        }
    }
}

fn resource_words(lockspace: &str, name: &LockName, decode: NameDecoder<'_>) -> String {
    match decode(lockspace, name) {
        Some(words) => format!("{lockspace} \"{name}\" ({words})"),
        None => format!("{lockspace} \"{name}\""),
    }
}

fn blocker_words(blocker: &Blocker) -> String {
    match blocker {
        Blocker::Holder { who, mode, age } => format!("{who} has it in {mode}{}", since(*age)),
        Blocker::Queue { who, wants } => format!("{who} came first and wants {wants}"),
        Blocker::Failed { node, mode: Some(mode), until } => {
            format!("the failed node {node} has it in {mode} until {until}")
        }
        Blocker::Failed { node, mode: None, until } => {
            format!("the failed node {node} may have it until {until}")
        }
        Blocker::Master { node: Some(node) } => format!("its master, node {}, has not answered", node.node),
        Blocker::Master { node: None } => "its master is being looked up, or rebuilt".to_owned(),
    }
}

/// What one wait waits for, in a sentence.
#[must_use]
pub fn sentence(wait: &Wait, decode: NameDecoder<'_>) -> String {
    let resource = resource_words(&wait.lockspace, &wait.resource, decode);
    let has = wait.has.map_or(String::new(), |has| format!(", having {has},"));
    let why: Vec<String> = wait.blockers.iter().map(blocker_words).collect();
    let why = if why.is_empty() { "it is about to be granted".to_owned() } else { why.join("; ") };
    let (who, wants) = (&wait.who, wait.wants);
    format!("{who}{has} wants {wants} on {resource} and has waited{}: {why}", since(wait.age))
}

/// The wait-for graph, an edge a line.
#[must_use]
pub fn graph_lines(waits: &[Wait], decode: NameDecoder<'_>) -> Vec<String> {
    let mut out = Vec::new();
    for wait in waits {
        let resource = resource_words(&wait.lockspace, &wait.resource, decode);
        for blocker in &wait.blockers {
            let target = match blocker {
                Blocker::Holder { who, mode, .. } => format!("{who} [{mode}]"),
                Blocker::Queue { who, wants } => format!("{who} [before it, wants {wants}]"),
                Blocker::Failed { node, until, .. } => format!("failed node {node} [until {until}]"),
                Blocker::Master { node } => match node {
                    Some(node) => format!("master, node {}", node.node),
                    None => "directory".to_owned(),
                },
            };
            out.push(format!("{} [wants {}] -> {target} on {resource}", wait.who, wait.wants));
        }
    }
    out
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// The wait-for graph for Graphviz: `dot -Tsvg`.
#[must_use]
pub fn dot(waits: &[Wait], decode: NameDecoder<'_>) -> String {
    let mut out = String::from("digraph waits {\n  rankdir=LR;\n  node [shape=box];\n");
    for wait in waits {
        let resource = resource_words(&wait.lockspace, &wait.resource, decode);
        for blocker in &wait.blockers {
            let (target, style) = match blocker {
                Blocker::Holder { who, .. } => (who.to_string(), "solid"),
                Blocker::Queue { who, .. } => (who.to_string(), "dashed"),
                Blocker::Failed { node, .. } => (format!("failed {node}"), "bold"),
                Blocker::Master { node } => {
                    (node.map_or("directory".into(), |n| format!("master {}", n.node)), "dotted")
                }
            };
            let label = format!("{} {resource}", wait.wants);
            // Writing into a string cannot fail.
            let _ = writeln!(
                out,
                "  {} -> {} [label={}, style={style}];",
                quoted(&wait.who.to_string()),
                quoted(&target),
                quoted(&label)
            );
        }
    }
    out.push_str("}\n");
    out
}

fn lock_words(programs: &BTreeMap<(Identity, &str, u64), String>, space: &str, lock: &LockDump) -> String {
    let mode = match (lock.granted, lock.requested) {
        (Some(has), Some(wants)) => format!("{has}>{wants}"),
        (Some(has), None) => has.to_string(),
        (None, wants) => format!(">{}", wants.map_or(String::new(), |w| w.to_string())),
    };
    let process = programs.get(&(lock.node, space, lock.id));
    let process = match (process, lock.owner & 0xffff_ffff) {
        (Some(words), _) => format!(" {words}"),
        (None, 0) => String::new(),
        (None, pid) => format!(" pid {pid}"),
    };
    let dead = if lock.dead { " FAILED" } else { "" };
    format!("{mode} node {}{process}{dead}{}", lock.node.node, since(lock.age))
}

/// All lockspaces: resources with waiters first, each with its queues.
#[must_use]
pub fn list_lines(report: &ClusterReport, decode: NameDecoder<'_>) -> Vec<String> {
    let mut programs: BTreeMap<(Identity, &str, u64), String> = BTreeMap::new();
    for node in &report.nodes {
        for process in &node.processes {
            for (space, id) in &process.locks {
                let words = format!("pid {} ({})", process.pid, process.command);
                programs.insert((node.node, space.as_str(), *id), words);
            }
        }
    }
    let mut spaces: BTreeMap<&str, Vec<&ResourceDump>> = BTreeMap::new();
    let mut notes: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for node in &report.nodes {
        for dump in &node.lockspaces {
            spaces.entry(&dump.name).or_default().extend(&dump.resources);
            let recovery =
                dump.recovery.iter().map(|l| format!("  recovery at node {}: {l}", node.node.node));
            notes.entry(&dump.name).or_default().extend(recovery);
        }
    }
    let mut out = Vec::new();
    for (space, mut resources) in spaces {
        let waiting = resources.iter().filter(|r| has_waiters(r)).count();
        out.push(format!("lockspace {space}: {} resources, {waiting} with waiters", resources.len()));
        out.extend(notes.remove(space).unwrap_or_default());
        resources.sort_by_key(|r| (!has_waiters(r), r.name.clone()));
        for resource in resources {
            let words = decode(space, &resource.name).map_or(String::new(), |w| format!(" ({w})"));
            out.push(format!("  \"{}\"{words}, mastered by node {}", resource.name, resource.master.node));
            let assumed = resource.assumed.iter().map(|who| format!("    failed node {who} may have it"));
            out.extend(assumed);
            let queues = [
                ("waits", &resource.waiting),
                ("converts", &resource.converting),
                ("has", &resource.granted),
            ];
            for (title, locks) in queues {
                for lock in locks {
                    out.push(format!("    {title} {}", lock_words(&programs, space, lock)));
                }
            }
        }
    }
    let left_out: usize = report.nodes.iter().map(|n| n.left_out).sum();
    if left_out != 0 {
        out.push(format!("{left_out} more are not shown; name one with `quorate lock show`"));
    }
    out.extend(
        report.silent.iter().map(|who| format!("node {who} did not answer; what it masters is not shown")),
    );
    out
}
