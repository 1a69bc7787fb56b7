//! Reads a document and checks what types cannot say; every error has a line and a column.

use crate::schema::{DOCUMENT_BYTES_MAX, Document, Service, Timing};
use core::fmt;
use std::collections::{BTreeMap, BTreeSet};
use toml::Spanned;

// The limits of the crates that use the document: what is accepted here is accepted there.

/// The most fence devices.
const FENCE_DEVICES_MAX: usize = 1024;
/// The most fence levels of a node.
const FENCE_LEVELS_MAX: usize = 16;
/// The most steps of a fence level.
const FENCE_STEPS_MAX: usize = 16;
/// The longest name or value of a fence agent's parameter, in bytes.
const PARAMETER_BYTES_MAX: usize = 4096;
/// The longest name of a service or resource, in bytes: it becomes part of a lock's name.
const SERVICE_NAME_BYTES_MAX: usize = 48;
/// The most resources of a service.
const RESOURCES_MAX: usize = 64;

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
            if FENCE_LEVELS_MAX < node.fence_levels.len() {
                let message =
                    format!("node {} has more than {FENCE_LEVELS_MAX} fence levels", node.name.get_ref());
                self.fail(&node.name, message)?;
            }
            for level in &node.fence_levels {
                self.turns_off(node, level)?;
                for step in &level.steps {
                    self.options(&step.device, &step.parameters)?;
                }
            }
        }
        if let Some(device) = d.fence_devices.get(FENCE_DEVICES_MAX) {
            self.fail(&device.name, format!("more than {FENCE_DEVICES_MAX} fence devices"))?;
        }
        for device in &d.fence_devices {
            self.options(&device.name, &device.parameters)?;
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
            let supplies = level.steps.iter().take(offs);
            let distinct: BTreeSet<_> =
                supplies.map(|step| (step.device.get_ref(), &step.parameters)).collect();
            return match level.steps.first() {
                Some(step) if distinct.len() < offs => {
                    self.fail(&step.device, format!("fence level {}: the same `off` twice", level.name))
                }
                Some(step) if FENCE_STEPS_MAX < level.steps.len() => {
                    let message = format!("fence level {} has more than {FENCE_STEPS_MAX} steps", level.name);
                    self.fail(&step.device, message)
                }
                _ => Ok(()),
            };
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

    /// Whether each parameter can be a line of a fence agent's input.
    fn options(&self, place: &Spanned<String>, parameters: &BTreeMap<String, String>) -> Checked {
        for (name, value) in parameters {
            let bad_name = name.is_empty() || name.starts_with('#') || name.contains(['=', '\n', ' ', '\0']);
            if bad_name || value.contains(['\n', '\0']) {
                let rule = "a line break, an empty name, or one with `=`, a blank or a leading `#`";
                self.fail(place, format!("parameter {name:?}: {rule} cannot be handed to an agent"))?;
            }
            if PARAMETER_BYTES_MAX < name.len().max(value.len()) {
                let short: String = name.chars().take(32).collect();
                let message = format!("parameter {short:?} has more than {PARAMETER_BYTES_MAX} bytes");
                self.fail(place, message)?;
            }
        }
        Ok(())
    }

    fn resources(&self, service: &Service) -> Checked {
        let name = service.name.get_ref();
        if service.resources.is_empty() {
            self.fail(&service.name, format!("service {name} has no resource"))?;
        }
        if let Some(resource) = service.resources.get(RESOURCES_MAX) {
            self.fail(&resource.name, format!("service {name} has more than {RESOURCES_MAX} resources"))?;
        }
        self.unique("resource in the service", service.resources.iter().map(|r| &r.name))?;
        let mut before = BTreeSet::new();
        for resource in &service.resources {
            self.name("resource", &resource.name, SERVICE_NAME_BYTES_MAX)?;
            if let Some(parent) = resource.parent.as_ref().filter(|p| !before.contains(p.get_ref())) {
                let message = format!("no resource {} stands before it in service {name}", parent.get_ref());
                self.fail(parent, message)?;
            }
            before.insert(resource.name.get_ref());
            let agent = resource.agent.get_ref();
            let is_ocf =
                agent.split_once(':').is_some_and(|(provider, kind)| is_word(provider) && is_word(kind));
            if !agent.starts_with('/') && !is_ocf {
                let message = format!("agent `{agent}`: an absolute path or PROVIDER:TYPE is wanted");
                self.fail(&resource.agent, message)?;
            }
            if let Some(bad) = resource.parameters.keys().find(|key| !is_word(key)) {
                self.fail(
                    &resource.name,
                    format!("parameter {bad:?}: letters, digits, `_`, `-`, `.` are wanted"),
                )?;
            }
            if let Some(bad) = resource.parameters.iter().find(|(_, value)| value.contains('\0')) {
                self.fail(&resource.name, format!("parameter {}: a zero byte", bad.0))?;
            }
            let timeouts = [
                ("start_timeout_s", resource.start_timeout_s),
                ("stop_timeout_s", resource.stop_timeout_s),
                ("monitor_timeout_s", resource.monitor_timeout_s),
            ];
            if let Some((key, found)) = timeouts.iter().find(|(_, t)| !(1..=86_400).contains(t)) {
                self.fail(&resource.name, format!("{key} is {found}, from 1 to 86400 is allowed"))?;
            }
        }
        Ok(())
    }

    fn services(&self, d: &Document, ids: &BTreeMap<&u32, ()>) -> Checked {
        let domains = self.unique("failover domain", d.failover_domains.iter().map(|f| &f.name))?;
        for domain in &d.failover_domains {
            self.unique("node in a failover domain", domain.nodes.iter())?;
            for node in &domain.nodes {
                self.known("node", node, ids)?;
            }
            if domain.restricted && domain.nodes.is_empty() {
                let message = format!("failover domain {} is restricted to no node", domain.name.get_ref());
                self.fail(&domain.name, message)?;
            }
        }
        self.unique("service", d.services.iter().map(|s| &s.name))?;
        for service in &d.services {
            self.name("service", &service.name, SERVICE_NAME_BYTES_MAX)?;
            self.one_of("safety", &service.safety, &["storage", "lease", "power"])?;
            self.one_of("recovery", &service.recovery, &["restart", "relocate", "disable"])?;
            if let Some(domain) = &service.domain {
                self.known("failover domain", domain, &domains)?;
            }
            self.resources(service)?;
        }
        Ok(())
    }
}

/// A word that can be part of the name of a file or of a variable.
fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
        && !text.starts_with('.')
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
        let twice = error(&level(&format!("{}, {}", step("off"), step("off"))));
        assert!(twice.ends_with("fence level power: the same `off` twice"), "{twice}");
        for steps in [step("on"), format!("{}, {}", step("reboot"), step("off")), String::new()] {
            assert!(error(&level(&steps)).contains("else the node is never off"), "{steps}");
        }
        let slow = format!("{GOOD}{device}timeout_s = 601\n");
        assert_eq!(error(&slow), "7:8: timeout_s is 601, from 1 to 600 is allowed");
    }

    /// `GOOD` and a service of these resources.
    fn service(resources: &[&str]) -> String {
        let resources: Vec<String> =
            resources.iter().map(|lines| format!("[[service.resource]]\n{lines}\n")).collect();
        format!("{GOOD}[[service]]\nname = \"web\"\n{}", resources.concat())
    }

    #[test]
    fn a_services_resources_are_a_tree_whose_parents_come_first() {
        let (fs, db) =
            ("name = \"fs\"\nagent = \"heartbeat:Filesystem\"", "name = \"db\"\nagent = \"/opt/db\"");
        let child = format!("{db}\nparent = \"fs\"");
        let document = parse(&service(&[fs, &child])).unwrap();
        let parents: Vec<Option<&str>> = document.services[0]
            .resources
            .iter()
            .map(|r| r.parent.as_ref().map(|p| p.get_ref().as_str()))
            .collect();
        assert_eq!(parents, [None, Some("fs")]);
        let wanted = "no resource fs stands before it in service web";
        assert_eq!(error(&service(&[&child, fs])), format!("11:10: {wanted}"));
        let own = format!("{fs}\nparent = \"fs\"");
        assert_eq!(error(&service(&[&own])), format!("11:10: {wanted}"));
        assert_eq!(error(&service(&[fs, fs])), "12:8: resource in the service fs is there twice");
        assert_eq!(error(&service(&[])), "7:8: service web has no resource");
    }

    #[test]
    fn what_no_agent_could_be_given_is_refused() {
        let with = |lines: &str| error(&service(&[&format!("name = \"r\"\n{lines}")]));
        for agent in ["x", "../x", "a:", ":b", "a:../b", "./x", ""] {
            let wanted = format!("10:9: agent `{agent}`: an absolute path or PROVIDER:TYPE is wanted");
            assert_eq!(with(&format!("agent = \"{agent}\"")), wanted);
        }
        assert_eq!(
            with("agent = \"/x\"\nstop_timeout_s = 0"),
            "9:8: stop_timeout_s is 0, from 1 to 86400 is allowed"
        );
        assert!(
            with("agent = \"/x\"\nparameters = { \"a=b\" = \"\" }").starts_with("9:8: parameter \"a=b\"")
        );
        let many: Vec<String> = (0..65).map(|n| format!("name = \"r{n}\"\nagent = \"/x\"")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(parse(&service(&many[..64])).is_ok());
        assert!(error(&service(&many)).ends_with("service web has more than 64 resources"));
        let nowhere = format!("{GOOD}[[failover_domain]]\nname = \"d\"\nnodes = []\nrestricted = true\n");
        assert_eq!(error(&nowhere), "7:8: failover domain d is restricted to no node");
        let smuggled = format!(
            "{GOOD}[[fence_device]]\nname = \"p\"\nagent = \"x\"\nparameters = {{ port = \"1\\naction=on\" }}\n"
        );
        assert!(error(&smuggled).starts_with("7:8: parameter \"port\""), "{}", error(&smuggled));
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
