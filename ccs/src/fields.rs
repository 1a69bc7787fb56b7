//! Every key of the document with unit, default, range and meaning: what `docs/config.md` is made from.

use std::fmt::Write as _;

/// One key of the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Table and key, such as `node.fence.name`.
    pub path: &'static str,
    /// What it is counted in, or which values there are.
    pub unit: &'static str,
    /// What it is when left out; `None` if it must be there.
    pub default: Option<&'static str>,
    /// What is allowed, where more is to be said than the unit.
    pub range: &'static str,
    /// What it is for.
    pub text: &'static str,
}

const fn must(path: &'static str, unit: &'static str, range: &'static str, text: &'static str) -> Field {
    Field { path, unit, default: None, range, text }
}

const fn may(
    path: &'static str,
    unit: &'static str,
    default: &'static str,
    range: &'static str,
    text: &'static str,
) -> Field {
    Field { path, unit, default: Some(default), range, text }
}

/// All keys, in the order of the document.
pub const FIELDS: &[Field] = &[
    must(
        "name",
        "name",
        "1 to 32 bytes",
        "The cluster's name; the part of a filesystem's lock table before the colon.",
    ),
    may(
        "timing.heartbeat_ms",
        "ms",
        "100",
        "10 to 1000; at most a quarter of `detection_ms`",
        "Between two heartbeats. `[timing]` holds from the next start of all nodes on: nodes that differ do not connect.",
    ),
    may(
        "timing.detection_ms",
        "ms",
        "800",
        "100 to 60000",
        "Silence after which a member is removed. Raise it where a busy host or network is silent for longer.",
    ),
    may(
        "timing.drift_margin_ms",
        "ms",
        "100",
        "1 to half of `detection_ms`, and at least 5 % of it",
        "By how much a lease is shorter than `detection_ms`: for different clock rates. The lease is the difference.",
    ),
    may(
        "timing.kill_ms",
        "ms",
        "500",
        "100 to 60000",
        "How long after the end of its lease a node's processes live at most; services of lease safety wait for it too.",
    ),
    may(
        "timing.request_deadline_ms",
        "ms",
        "10000",
        "twice `detection_ms` to 600000",
        "How long a request to the membership is tried before its outcome is unknown.",
    ),
    may(
        "timing.stage_deadline_ms",
        "ms",
        "30000",
        "four times `detection_ms` to 600000",
        "How long a recovery stage waits for a participant that reports nothing, before it is removed.",
    ),
    may(
        "timing.storage_patience_ms",
        "ms",
        "5000",
        "100 to 600000",
        "How long storage servers may fail to confirm a fence before the node's own fence levels run.",
    ),
    may(
        "timing.fence_retry_max_ms",
        "ms",
        "5000",
        "100 to 600000",
        "The longest pause between two tries to fence; tries never end.",
    ),
    must("node.id", "number", "1 to 4294967295", "The node's number, as in its certificate."),
    must("node.name", "name", "", "The node's name, as in its certificate."),
    must("node.address", "IP:PORT", "", "Where it listens."),
    may(
        "node.votes",
        "votes",
        "1",
        "0 to 4294967295",
        "Its votes. A mirror: the view record decides who votes.",
    ),
    must(
        "node.fence.name",
        "name",
        "",
        "One way to fence the node beside storage servers, best first; for the history.",
    ),
    must(
        "node.fence.steps.device",
        "name",
        "a fence device",
        "Which device. All steps of a level must succeed, in order.",
    ),
    may(
        "node.fence.steps.action",
        "off, on, reboot",
        "off",
        "",
        "What it does. Two power supplies: off, off, on, on.",
    ),
    may(
        "node.fence.steps.parameters",
        "table",
        "{}",
        "",
        "For this node, such as `port`; they win over the device's.",
    ),
    must("fence_device.name", "name", "", "The device."),
    must(
        "fence_device.agent",
        "program",
        "",
        "A FenceAgentAPI program: a path, or a name in the search path.",
    ),
    may("fence_device.parameters", "table", "{}", "", "Of every call, given on standard input."),
    may(
        "fence_device.timeout_s",
        "s",
        "60",
        "1 to 600",
        "How long one call may take before it is killed and counts as failed.",
    ),
    must(
        "export.name",
        "name",
        "1 to 64 bytes",
        "A block device that a storage server exports, here and at the server.",
    ),
    must("export.server", "name", "", "The storage server, as in its certificate."),
    must("export.address", "IP:PORT", "", "Where the server listens."),
    must("volume_group.name", "name", "1 to 127 bytes", "A volume group."),
    must("volume_group.devices", "names", "exports", "The exports its physical volumes are on."),
    must(
        "filesystem.name",
        "name",
        "1 to 30 bytes",
        "A filesystem: the part of its lock table after the colon.",
    ),
    must("filesystem.volume", "GROUP/NAME", "a group of the document", "The logical volume it is on."),
    may("filesystem.journals", "journals", "3", "1 to 128", "How many nodes can mount it; for mkfs."),
    may("filesystem.journal_mib", "MiB", "8", "8 to 1024", "The size of a journal; for mkfs."),
    may(
        "filesystem.remount",
        "true, false",
        "true",
        "",
        "Whether a node mounts it again after a restart, once it was mounted by hand.",
    ),
    must("failover_domain.name", "name", "", "Nodes that services prefer."),
    may(
        "failover_domain.ordered",
        "true, false",
        "false",
        "",
        "Whether the order of nodes is one of preference.",
    ),
    may(
        "failover_domain.restricted",
        "true, false",
        "false",
        "",
        "Whether its services run on its nodes alone.",
    ),
    may(
        "failover_domain.nofailback",
        "true, false",
        "false",
        "",
        "Whether a service stays when a better node comes back.",
    ),
    must("failover_domain.nodes", "node ids", "nodes of the document", "Its nodes, best first."),
    must("service.name", "name", "1 to 48 bytes", "A service."),
    may(
        "service.safety",
        "lease, storage, power",
        "lease",
        "",
        "What must be proven of a failed owner before it starts elsewhere. `storage` only where it acts on fenced storage alone.",
    ),
    may("service.autostart", "true, false", "true", "", "Whether it is started without being told."),
    may("service.domain", "name", "anywhere", "a failover domain", "Where it may run."),
    may(
        "service.recovery",
        "restart, relocate, disable",
        "restart",
        "",
        "What is done when a resource fails.",
    ),
    may(
        "service.max_restarts",
        "count",
        "0",
        "0: no limit",
        "Restarts in place within `restart_expire_s` before it is moved.",
    ),
    may("service.restart_expire_s", "s", "0", "0: no limit", "Restarts longer ago do not count."),
    must(
        "service.resource.name",
        "name",
        "1 to 48 bytes, unique in the service",
        "A resource: started after those before it, stopped before them.",
    ),
    may(
        "service.resource.parent",
        "name",
        "none",
        "a resource before it",
        "What it needs. Children start after their parent, before its next sibling, and stop in the reverse order.",
    ),
    must("service.resource.agent", "absolute path or PROVIDER:TYPE", "", "The OCF agent that runs it."),
    may("service.resource.parameters", "table", "{}", "", "Given to it as OCF_RESKEY_NAME."),
    may("service.resource.start_timeout_s", "s", "20", "1 to 86400", "How long starting may take."),
    may("service.resource.stop_timeout_s", "s", "20", "1 to 86400", "How long stopping may take."),
    may("service.resource.monitor_timeout_s", "s", "10", "1 to 86400", "How long a monitor may take."),
    may("service.resource.monitor_interval_ms", "ms", "1000", "", "How often it is monitored."),
];

/// The reference of the document in Markdown: the contents of `docs/config.md`.
#[must_use]
pub fn reference() -> String {
    let mut out = String::from(
        "# The cluster configuration\n\n\
         Made from the schema by `quorate_ccs::fields::reference()`; a test compares this file with it.\n\n\
         One TOML document of at most 256 KiB. What can be there several times is written `[[node]]`, `[[node.fence]]`,\n\
         `[[service.resource]]` and so on. Unknown keys, duplicates and references to nothing are refused with line and\n\
         column. A key without a default must be there wherever its table is.\n\n\
         | key | unit or values | default | range | meaning |\n|---|---|---|---|---|\n",
    );
    for f in FIELDS {
        let range = if f.range.is_empty() { "—" } else { f.range };
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {range} | {} |",
            f.path,
            f.unit,
            f.default.unwrap_or("—"),
            f.text
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// One of everything, with nothing that has a default.
    const LEAST: &str = "name = \"c\"\n[timing]\n\
        [[node]]\nid = 1\nname = \"a\"\naddress = \"192.0.2.1:1\"\n\
        [[node.fence]]\nname = \"power\"\nsteps = [{ device = \"pdu\" }]\n\
        [[fence_device]]\nname = \"pdu\"\nagent = \"fence_x\"\n\
        [[export]]\nname = \"e\"\nserver = \"s\"\naddress = \"192.0.2.9:1\"\n\
        [[volume_group]]\nname = \"vg\"\ndevices = [\"e\"]\n\
        [[filesystem]]\nname = \"f\"\nvolume = \"vg/lv\"\n\
        [[failover_domain]]\nname = \"d\"\nnodes = [1]\n\
        [[service]]\nname = \"s\"\n\
        [[service.resource]]\nname = \"r\"\nagent = \"/x\"\n";

    /// Every key below a value with what it holds, arrays of tables looked into.
    fn keys(path: &str, value: &toml::Value, found: &mut BTreeMap<String, String>) {
        match value {
            toml::Value::Table(table) if !table.is_empty() => {
                for (key, value) in table {
                    keys(&if path.is_empty() { key.clone() } else { format!("{path}.{key}") }, value, found);
                }
            }
            toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
                items.iter().for_each(|item| keys(path, item, found));
            }
            toml::Value::Table(_) => drop(found.insert(path.to_owned(), "{}".to_owned())),
            toml::Value::String(text) => drop(found.insert(path.to_owned(), text.clone())),
            other => drop(found.insert(path.to_owned(), other.to_string())),
        }
    }

    #[test]
    fn every_key_is_documented_with_the_default_it_has() {
        let document = crate::parse(LEAST).unwrap();
        let mut found = BTreeMap::new();
        keys("", &toml::Value::try_from(&document).unwrap(), &mut found);
        let written = {
            let mut written = BTreeMap::new();
            keys("", &toml::from_str(LEAST).unwrap(), &mut written);
            written
        };
        // Left out where it is nothing.
        found.entry("service.domain".to_owned()).or_insert_with(|| "anywhere".to_owned());
        found.entry("service.resource.parent".to_owned()).or_insert_with(|| "none".to_owned());
        let documented: BTreeSet<&str> = FIELDS.iter().map(|f| f.path).collect();
        assert_eq!(documented, found.keys().map(String::as_str).collect());
        for field in FIELDS {
            let is_written = written.contains_key(field.path);
            assert_eq!(field.default.is_none(), is_written, "{} must be there, or has a default", field.path);
            if let Some(default) = field.default {
                assert_eq!(default, found[field.path], "{}", field.path);
            }
        }
    }

    #[test]
    fn the_document_in_docs_is_the_present_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/config.md");
        if std::env::var_os("QUORATE_WRITE_DOCS").is_some() {
            std::fs::write(path, reference()).unwrap();
        }
        // A packaged crate comes without the workspace's documents.
        if let Ok(text) = std::fs::read_to_string(path) {
            assert!(text == reference(), "docs/config.md is old: run this test with QUORATE_WRITE_DOCS=1");
        }
    }
}
