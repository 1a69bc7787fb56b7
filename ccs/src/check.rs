//! Reads a document and checks what types cannot say; every error has a line and a column.

use crate::schema::{DOCUMENT_BYTES_MAX, Document, Timing};
use core::fmt;
use std::collections::BTreeMap;
use toml::Spanned;

/// What is wrong with a document, and where.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DocumentError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for DocumentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

impl std::error::Error for DocumentError {}

/// Reads and checks a document.
///
/// # Errors
/// The first thing that is wrong, in the order of the document's tables.
pub fn parse(text: &str) -> Result<Document, DocumentError> {
    if DOCUMENT_BYTES_MAX < text.len() {
        let message =
            format!("the document has {} bytes, at most {DOCUMENT_BYTES_MAX} are allowed", text.len());
        return Err(DocumentError { line: 1, column: 1, message });
    }
    let document: Document = toml::from_str(text)
        .map_err(|e| at(text, e.span().map_or(0, |s| s.start), e.message().to_owned()))?;
    Checker { text }.document(&document)?;
    Ok(document)
}

fn at(text: &str, offset: usize, message: String) -> DocumentError {
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    DocumentError { line, column, message }
}

struct Checker<'a> {
    text: &'a str,
}

type Checked = Result<(), DocumentError>;

impl Checker<'_> {
    fn fail<T>(&self, place: &Spanned<T>, message: String) -> Checked {
        Err(at(self.text, place.span().start, message))
    }

    /// Every name once; the set of names.
    fn unique<'d, T: Ord + fmt::Display>(
        &self,
        what: &str,
        names: impl Iterator<Item = &'d Spanned<T>>,
    ) -> Result<BTreeMap<&'d T, ()>, DocumentError> {
        let mut seen = BTreeMap::new();
        for name in names {
            if seen.insert(name.get_ref(), ()).is_some() {
                self.fail(name, format!("{what} {} is there twice", name.get_ref()))?;
            }
        }
        Ok(seen)
    }

    fn name(&self, what: &str, name: &Spanned<String>, limit: usize) -> Checked {
        let text = name.get_ref();
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '+');
        if text.is_empty() || limit < text.len() || !text.chars().all(good) || text.starts_with('-') {
            let rule = format!("1 to {limit} letters, digits, `_`, `-`, `.`, `+`, not beginning with `-`");
            return self.fail(name, format!("{what} `{text}`: {rule} are wanted"));
        }
        Ok(())
    }

    fn one_of(&self, what: &str, word: &Spanned<String>, words: &[&str]) -> Checked {
        if words.contains(&word.get_ref().as_str()) {
            return Ok(());
        }
        self.fail(word, format!("{what} `{}`: one of {} is wanted", word.get_ref(), words.join(", ")))
    }

    fn known<T: Ord + fmt::Display>(
        &self,
        what: &str,
        name: &Spanned<T>,
        names: &BTreeMap<&T, ()>,
    ) -> Checked {
        if names.contains_key(name.get_ref()) {
            return Ok(());
        }
        self.fail(name, format!("there is no {what} {}", name.get_ref()))
    }

    fn range(&self, what: &str, value: &Spanned<u32>, low: u32, high: u32) -> Checked {
        if (low..=high).contains(value.get_ref()) {
            return Ok(());
        }
        self.fail(value, format!("{what} is {}, from {low} to {high} is allowed", value.get_ref()))
    }

    fn address(&self, address: &Spanned<String>) -> Checked {
        match address.get_ref().parse::<std::net::SocketAddr>() {
            Ok(_) => Ok(()),
            Err(_) => self.fail(address, format!("`{}` is no IP:PORT", address.get_ref())),
        }
    }

    fn document(&self, d: &Document) -> Checked {
        // 15 characters leave room for 16 of the filesystem in GFS2's lock table, as in the original stack.
        self.name("cluster name", &d.name, 32)?;
        self.timing(&d.timing)?;
        let ids = self.unique("node id", d.nodes.iter().map(|n| &n.id))?;
        self.unique("node name", d.nodes.iter().map(|n| &n.name))?;
        let devices = self.unique("fence device", d.fence_devices.iter().map(|f| &f.name))?;
        for node in &d.nodes {
            self.range("node id", &node.id, 1, u32::MAX)?;
            self.address(&node.address)?;
            for step in node.fence_levels.iter().flat_map(|l| &l.steps) {
                self.known("fence device", &step.device, &devices)?;
                self.one_of("action", &step.action, &["off", "on", "reboot"])?;
            }
            for level in &node.fence_levels {
                self.turns_off(node, level)?;
            }
        }
        for device in &d.fence_devices {
            if !(1..=600).contains(&device.timeout_s) {
                let message = format!("timeout_s is {}, from 1 to 600 is allowed", device.timeout_s);
                self.fail(&device.name, message)?;
            }
        }
        if let Some(first) = d.nodes.first()
            && d.nodes.iter().all(|n| n.votes == 0)
        {
            self.fail(&first.id, "no node has a vote".into())?;
        }
        let exports = self.unique("export", d.exports.iter().map(|e| &e.name))?;
        for export in &d.exports {
            self.name("export", &export.name, 64)?;
            self.address(&export.address)?;
        }
        let groups = self.unique("volume group", d.volume_groups.iter().map(|g| &g.name))?;
        for group in &d.volume_groups {
            self.name("volume group", &group.name, 127)?;
            for device in &group.devices {
                self.known("export", device, &exports)?;
            }
        }
        self.unique("device in volume groups", d.volume_groups.iter().flat_map(|g| &g.devices))?;
        self.unique("filesystem", d.filesystems.iter().map(|f| &f.name))?;
        self.unique("volume in filesystems", d.filesystems.iter().map(|f| &f.volume))?;
        for filesystem in &d.filesystems {
            self.name("filesystem", &filesystem.name, 30)?;
            self.range("journals", &filesystem.journals, 1, 128)?;
            self.range("journal_mib", &filesystem.journal_mib, 8, 1024)?;
            let volume = filesystem.volume.get_ref();
            let known = volume
                .split_once('/')
                .is_some_and(|(g, l)| !l.is_empty() && groups.contains_key(&g.to_owned()));
            if !known {
                self.fail(
                    &filesystem.volume,
                    format!("`{volume}`: GROUP/NAME with a group of this document is wanted"),
                )?;
            }
        }
        self.services(d, &ids)
    }

    /// The same relations as the membership's own check; there they are asserted, here they have a place.
    fn timing(&self, t: &Timing) -> Checked {
        self.range("heartbeat_ms", &t.heartbeat_ms, 10, 1_000)?;
        self.range("detection_ms", &t.detection_ms, 100, 60_000)?;
        self.range("kill_ms", &t.kill_ms, 100, 60_000)?;
        self.range("storage_patience_ms", &t.storage_patience_ms, 100, 600_000)?;
        self.range("fence_retry_max_ms", &t.fence_retry_max_ms, 100, 600_000)?;
        let detection = *t.detection_ms.get_ref();
        let related = |what: &str, value: &Spanned<u32>, low: u32, high: u32| {
            let found = *value.get_ref();
            if (low..=high).contains(&found) {
                return Ok(());
            }
            // What was left out has no place; what it does not fit has.
            let place = if value.span().is_empty() { &t.detection_ms } else { value };
            let why = format!("detection_ms is {detection}");
            self.fail(place, format!("{what} is {found}, from {low} to {high} is allowed: {why}"))
        };
        related("heartbeat_ms", &t.heartbeat_ms, 10, detection / 4)?;
        related("drift_margin_ms", &t.drift_margin_ms, detection.div_ceil(20), detection / 2)?;
        related("request_deadline_ms", &t.request_deadline_ms, detection * 2, 600_000)?;
        related("stage_deadline_ms", &t.stage_deadline_ms, detection * 4, 600_000)
    }

    /// Whether a level that succeeds had all power off at one moment: fencing would refuse the document otherwise.
    fn turns_off(&self, node: &crate::schema::Node, level: &crate::schema::FenceLevel) -> Checked {
        let actions: Vec<&str> = level.steps.iter().map(|s| s.action.get_ref().as_str()).collect();
        let offs = actions.iter().take_while(|a| **a == "off").count();
        let good = actions == ["reboot"] || (0 < offs && actions.iter().skip(offs).all(|a| *a == "on"));
        if good {
            return Ok(());
        }
        let message = format!(
            "fence level {}: each `off` and then each `on`, or one `reboot`, is wanted: else the node is never off",
            level.name
        );
        match level.steps.first() {
            Some(step) => self.fail(&step.device, message),
            None => self.fail(&node.name, message),
        }
    }

    fn services(&self, d: &Document, ids: &BTreeMap<&u32, ()>) -> Checked {
        let domains = self.unique("failover domain", d.failover_domains.iter().map(|f| &f.name))?;
        for domain in &d.failover_domains {
            self.unique("node in a failover domain", domain.nodes.iter())?;
            for node in &domain.nodes {
                self.known("node", node, ids)?;
            }
        }
        self.unique("service", d.services.iter().map(|s| &s.name))?;
        for service in &d.services {
            self.name("service", &service.name, 64)?;
            self.one_of("safety", &service.safety, &["storage", "lease", "power"])?;
            self.one_of("recovery", &service.recovery, &["restart", "relocate", "disable"])?;
            if let Some(domain) = &service.domain {
                self.known("failover domain", domain, &domains)?;
            }
            self.unique("resource in the service", service.resources.iter().map(|r| &r.name))?;
            if service.resources.is_empty() {
                self.fail(&service.name, format!("service {} has no resource", service.name.get_ref()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "name = \"demo\"\n[[node]]\nid = 1\nname = \"a\"\naddress = \"127.0.0.1:1\"\n";

    fn error(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_small_document_is_read_with_its_defaults() {
        let document = parse(GOOD).unwrap();
        assert_eq!(document.nodes[0].votes, 1);
    }

    #[test]
    fn two_nodes_with_one_id_are_refused_at_the_second() {
        let text = format!("{GOOD}[[node]]\nid = 1\nname = \"b\"\naddress = \"127.0.0.1:2\"\n");
        assert_eq!(error(&text), "7:6: node id 1 is there twice");
    }

    #[test]
    fn an_unknown_key_is_refused_where_it_stands() {
        let text = format!("{GOOD}vote = 2\n");
        assert!(error(&text).starts_with("6:1: unknown field `vote`"), "{}", error(&text));
    }

    #[test]
    fn a_volume_of_no_group_and_an_address_that_is_none_are_refused() {
        let text = format!("{GOOD}[[filesystem]]\nname = \"d\"\nvolume = \"vg/lv\"\n");
        assert!(error(&text).starts_with("8:10: `vg/lv`"), "{}", error(&text));
        let text = GOOD.replace("127.0.0.1:1", "here");
        assert_eq!(error(&text), "5:11: `here` is no IP:PORT");
    }

    #[test]
    fn a_fence_level_that_never_turns_off_is_refused() {
        let device = "[[fence_device]]\nname = \"pdu\"\nagent = \"fence_x\"\n";
        let level =
            |steps: &str| format!("{GOOD}[[node.fence]]\nname = \"power\"\nsteps = [{steps}]\n{device}");
        let step = |action: &str| format!("{{ device = \"pdu\", action = \"{action}\" }}");
        assert!(parse(&level(&format!("{}, {}", step("off"), step("on")))).is_ok());
        for steps in [step("on"), format!("{}, {}", step("reboot"), step("off")), String::new()] {
            assert!(error(&level(&steps)).contains("else the node is never off"), "{steps}");
        }
        let slow = format!("{GOOD}{device}timeout_s = 601\n");
        assert_eq!(error(&slow), "7:8: timeout_s is 601, from 1 to 600 is allowed");
    }

    #[test]
    fn times_that_contradict_each_other_are_refused_where_they_stand() {
        let timing = |lines: &str| format!("{GOOD}[timing]\n{lines}");
        let document = parse(&timing("detection_ms = 2000\n")).unwrap();
        assert_eq!(document.timing.lease_ms(), 1900);
        let cases = [
            ("heartbeat_ms = 5\n", "7:16: heartbeat_ms is 5, from 10 to 1000 is allowed"),
            (
                "detection_ms = 300\n",
                "7:16: heartbeat_ms is 100, from 10 to 75 is allowed: detection_ms is 300",
            ),
            (
                "detection_ms = 60000\ndrift_margin_ms = 2000\n",
                "8:19: drift_margin_ms is 2000, from 3000 to 30000 is allowed: detection_ms is 60000",
            ),
            (
                "detection_ms = 5000\ndrift_margin_ms = 500\nrequest_deadline_ms = 9999\n",
                "9:23: request_deadline_ms is 9999, from 10000 to 600000 is allowed: detection_ms is 5000",
            ),
            (
                "stage_deadline_ms = 3199\n",
                "7:21: stage_deadline_ms is 3199, from 3200 to 600000 is allowed: detection_ms is 800",
            ),
            ("kill_ms = 0\n", "7:11: kill_ms is 0, from 100 to 60000 is allowed"),
        ];
        for (lines, wanted) in cases {
            assert_eq!(error(&timing(lines)), wanted);
        }
    }

    #[test]
    fn bad_toml_names_its_place() {
        assert!(error("name = \n").starts_with("1:"), "{}", error("name = \n"));
    }

    #[test]
    fn a_document_without_votes_is_refused() {
        assert!(error(&format!("{GOOD}votes = 0\n")).contains("no node has a vote"));
    }

    /// Lines of documents, right and wrong ones.
    const LINES: &[&str] = &[
        "name = \"demo\"",
        "[[node]]",
        "[[node.fence]]",
        "[[export]]",
        "[[volume_group]]",
        "[[filesystem]]",
        "[[failover_domain]]",
        "[[service]]",
        "[[service.resource]]",
        "[service.resource.parameters]",
        "[[fence_device]]",
        "[timing]",
        "id = 1",
        "id = 4294967296",
        "name = \"a\"",
        "name = \"\"",
        "address = \"127.0.0.1:1\"",
        "address = \"x\"",
        "votes = 0",
        "votes = 99999999999999999999",
        "volume = \"vg/lv\"",
        "volume = \"/\"",
        "devices = [\"a\"]",
        "devices = [[]]",
        "journals = 0",
        "heartbeat_ms = -1",
        "server = \"s\"",
        "agent = \"a\"",
        "steps = [{ device = \"a\" }]",
        "x = 1979-05-27",
        "nodes = [1, 1]",
        "= ",
        "\"\u{0}",
        "é = [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "'''",
    ];

    proptest::proptest! {
        #[test]
        fn hostile_documents_are_refused_at_a_place_inside_them(
            lines in proptest::collection::vec(0..LINES.len(), 0..24),
            junk in ".{0,12}",
            at in 0_usize..400,
        ) {
            let mut text: String = lines.iter().map(|line| format!("{}\n", LINES[*line])).collect();
            if text.is_char_boundary(at) {
                text.insert_str(at, &junk);
            }
            for text in [text.clone(), format!("{GOOD}{text}")] {
                if let Err(error) = parse(&text) {
                    let lines: Vec<&str> = text.split('\n').collect();
                    assert!(0 < error.line && error.line <= lines.len() && 0 < error.column, "{error} of {text}");
                    assert!(error.column <= lines[error.line - 1].chars().count() + 1, "{error} of {text}");
                }
            }
        }

        #[test]
        fn a_document_with_a_letter_changed_never_panics(at in 0..GOOD.len(), letter in proptest::char::any()) {
            let changed: String = GOOD.char_indices().map(|(i, c)| if i == at { letter } else { c }).collect();
            let _ = parse(&changed);
        }
    }

    #[test]
    fn a_deeply_nested_or_a_huge_document_is_refused() {
        let deep = format!("{GOOD}x = {}", "[".repeat(100_000));
        assert!(parse(&deep).is_err());
        let huge = format!("{GOOD}# {}", "x".repeat(DOCUMENT_BYTES_MAX));
        assert!(error(&huge).contains("at most"), "{}", error(&huge));
    }
}
