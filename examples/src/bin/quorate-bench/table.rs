//! The table that is printed, row by row as it is measured, and its JSON.

use crate::sample::Sample;
use serde_json::{Value, json};

/// What a figure must reach.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    /// The figure itself, at most.
    AtMost(f64),
    /// The figure itself, at least.
    AtLeast(f64),
    /// So many times as fast as the peer, at least.
    Faster(f64),
    /// At most so many times the peer's time.
    Within(f64),
    /// None: the figure explains others.
    None,
}

/// Whether more or less of a unit is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Less,
    More,
}

/// One measured figure.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) key: &'static str,
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
    pub(crate) ours: Sample,
    /// The peer or the limit, from the same runs.
    pub(crate) peer: Option<(String, Sample)>,
    pub(crate) bar: Bar,
}

impl Row {
    /// How many times better than the peer: above one is ours.
    pub(crate) fn ratio(&self) -> Option<f64> {
        let (_, peer) = self.peer.as_ref()?;
        let (ours, theirs) = (self.ours.median(), peer.median());
        Some(if self.better == Better::More { ours / theirs } else { theirs / ours })
    }

    /// Whether the bar is reached; `None` without one.
    pub(crate) fn is_met(&self) -> Option<bool> {
        match self.bar {
            Bar::AtMost(limit) => Some(self.ours.median() <= limit),
            Bar::AtLeast(limit) => Some(limit <= self.ours.median()),
            Bar::Faster(times) => self.ratio().map(|r| times <= r),
            Bar::Within(times) => self.ratio().map(|r| 1.0 / r <= times),
            Bar::None => None,
        }
    }

    fn bar_text(&self) -> String {
        match self.bar {
            Bar::AtMost(limit) => format!("<= {}", number(limit)),
            Bar::AtLeast(limit) => format!(">= {}", number(limit)),
            Bar::Faster(times) => format!(">= {times}x as fast"),
            Bar::Within(times) => format!("<= {times}x the time"),
            Bar::None => String::new(),
        }
    }

    fn ratio_text(&self) -> String {
        let Some(ratio) = self.ratio() else { return String::new() };
        match self.bar {
            Bar::Within(_) => format!("{:.2}x the time", 1.0 / ratio),
            _ => format!("{ratio:.2}x as fast"),
        }
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Row>,
    skipped: Vec<(String, String)>,
}

impl Table {
    /// Takes a row in, and prints it.
    pub(crate) fn add(&mut self, row: Row) {
        if self.rows.is_empty() {
            println!("{}", machine());
            println!("{:<20} {:<62} {:<36} bar", "row", "what", "median (min - max)");
        }
        let figure = |s: &Sample| {
            format!("{} ({} - {}) {}", number(s.median()), number(s.min()), number(s.max()), row.unit)
        };
        let verdict = match row.is_met() {
            Some(true) => "reached",
            Some(false) => "MISSED",
            None => "",
        };
        let (ours, bar) = (figure(&row.ours), row.bar_text());
        println!("{:<20} {:<62} {:<36} {bar} {verdict}", row.key, row.what, ours);
        if let Some((name, peer)) = &row.peer {
            println!("{:<20}   beside: {:<52} {:<36} {}", "", name, figure(peer), row.ratio_text());
        }
        self.rows.push(row);
    }

    /// A row that cannot be measured here, and why.
    pub(crate) fn skip(&mut self, key: &str, why: &str) {
        println!("{key:<20} not measured: {why}");
        self.skipped.push((key.to_owned(), why.to_owned()));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.skipped.is_empty()
    }

    /// The same as JSON.
    pub(crate) fn json(&self, name: &str) -> Result<String, serde_json::Error> {
        let sample =
            |s: &Sample| json!({ "median": s.median(), "min": s.min(), "max": s.max(), "runs": s.0 });
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                json!({
                    "row": row.key,
                    "what": row.what,
                    "unit": row.unit,
                    "ours": sample(&row.ours),
                    "peer": row.peer.as_ref().map(|(name, s)| json!({ "name": name, "figure": sample(s) })),
                    "times_as_good_as_peer": row.ratio(),
                    "bar": row.bar_text(),
                    "reached": row.is_met(),
                })
            })
            .collect();
        let skipped: Vec<Value> =
            self.skipped.iter().map(|(row, why)| json!({ "row": row, "why": why })).collect();
        let all = json!({ "bench": name, "machine": machine(), "rows": rows, "not_measured": skipped });
        serde_json::to_string_pretty(&all)
    }
}

/// Three digits that matter.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        v if 1_000_000.0 <= v => format!("{:.2}M", value / 1e6),
        v if 10_000.0 <= v => format!("{:.0}k", value / 1e3),
        v if 100.0 <= v => format!("{value:.0}"),
        v if 10.0 <= v => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown CPU");
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{cpus} CPUs, {}, Linux {}", model.trim_matches([' ', '\t', ':']), kernel.trim())
}
