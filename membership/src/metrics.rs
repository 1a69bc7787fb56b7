//! Metrics in the text format of Prometheus, through an explicit registry: several nodes live in one process in tests,
//! and nothing is global.
//!
//! A part of the program that has something to count implements [`Collect`] and is added to a [`Registry`]; it is asked
//! when somebody reads. So counting costs what the part's own counters cost, and nothing is kept twice.
//!
//! Source: Prometheus, "Exposition formats", text format 0.0.4.

use core::fmt::Write as _;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Has something to show.
pub trait Collect: Send + Sync {
    /// Writes all of it. Must not block for long.
    fn collect(&self, out: &mut Exposition);
}

impl<F: Fn(&mut Exposition) + Send + Sync> Collect for F {
    fn collect(&self, out: &mut Exposition) {
        self(out);
    }
}

/// Who is asked.
#[derive(Default)]
pub struct Registry(Mutex<Vec<Arc<dyn Collect>>>);

impl core::fmt::Debug for Registry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Adds somebody.
    pub fn add(&self, collector: Arc<dyn Collect>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(collector);
    }

    /// Asks everybody: the whole text.
    #[must_use]
    pub fn text(&self) -> String {
        let collectors = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut out = Exposition::default();
        for collector in collectors {
            collector.collect(&mut out);
        }
        out.text()
    }
}

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

#[derive(Debug)]
struct Family {
    kind: Kind,
    help: &'static str,
    lines: Vec<String>,
}

/// The metrics of one reading, in families by name.
#[derive(Debug, Default)]
pub struct Exposition(BTreeMap<&'static str, Family>);

impl Exposition {
    fn family(&mut self, name: &'static str, kind: Kind, help: &'static str) -> &mut Family {
        self.0.entry(name).or_insert_with(|| Family { kind, help, lines: Vec::new() })
    }

    /// A number that only rises. By convention `name` ends in `_total`.
    pub fn counter(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: u64) {
        let line = format!("{name}{} {value}", braces(labels));
        self.family(name, Kind::Counter, help).lines.push(line);
    }

    /// A number that rises and falls.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: &[(&str, &str)], value: f64) {
        let line = format!("{name}{} {value}", braces(labels));
        self.family(name, Kind::Gauge, help).lines.push(line);
    }

    /// Counts by class, each with its upper limit (`None`: without), smallest first and not yet added up; and the sum of
    /// all that was counted, in the unit of the limits.
    pub fn histogram(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: &[(&str, &str)],
        classes: &[(Option<f64>, u64)],
        sum: f64,
    ) {
        let mut total = 0;
        let family = self.family(name, Kind::Histogram, help);
        for (limit, count) in classes {
            total += count;
            if let Some(limit) = limit {
                let limit = limit.to_string();
                let mut all = labels.to_vec();
                all.push(("le", &limit));
                family.lines.push(format!("{name}_bucket{} {total}", braces(&all)));
            }
        }
        let mut all = labels.to_vec();
        all.push(("le", "+Inf"));
        family.lines.push(format!("{name}_bucket{} {total}", braces(&all)));
        family.lines.push(format!("{name}_sum{} {sum}", braces(labels)));
        family.lines.push(format!("{name}_count{} {total}", braces(labels)));
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for (name, family) in &self.0 {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            // Writing into a string cannot fail.
            let _ = writeln!(out, "# HELP {name} {}", family.help.replace('\\', "\\\\").replace('\n', "\\n"));
            let _ = writeln!(out, "# TYPE {name} {kind}");
            for line in &family.lines {
                out.push_str(line);
                out.push('\n');
            }
        }
        out
    }
}

/// `{a="1",b="2"}`, or nothing without labels.
fn braces(labels: &[(&str, &str)]) -> String {
    if labels.is_empty() {
        return String::new();
    }
    let escape = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let words: Vec<String> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
    format!("{{{}}}", words.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_whole_and_labels_are_escaped() {
        let registry = Registry::default();
        for node in ["1", "2"] {
            registry.add(Arc::new(move |out: &mut Exposition| {
                out.counter("locks_total", "Locks.", &[("node", node)], 3);
                out.gauge("age_seconds", "Age.", &[("name", "a\"b\\c\nd")], 0.5);
            }));
        }
        assert_eq!(
            registry.text(),
            "# HELP age_seconds Age.\n# TYPE age_seconds gauge\n\
             age_seconds{name=\"a\\\"b\\\\c\\nd\"} 0.5\nage_seconds{name=\"a\\\"b\\\\c\\nd\"} 0.5\n\
             # HELP locks_total Locks.\n# TYPE locks_total counter\n\
             locks_total{node=\"1\"} 3\nlocks_total{node=\"2\"} 3\n"
        );
    }

    #[test]
    fn a_histogram_adds_its_classes_up() {
        let mut out = Exposition::default();
        let classes = [(Some(0.001), 2), (Some(0.01), 1), (None, 4)];
        out.histogram("wait_seconds", "Waits.", &[], &classes, 9.5);
        assert_eq!(
            out.text(),
            "# HELP wait_seconds Waits.\n# TYPE wait_seconds histogram\n\
             wait_seconds_bucket{le=\"0.001\"} 2\nwait_seconds_bucket{le=\"0.01\"} 3\n\
             wait_seconds_bucket{le=\"+Inf\"} 7\nwait_seconds_sum 9.5\nwait_seconds_count 7\n"
        );
    }
}
