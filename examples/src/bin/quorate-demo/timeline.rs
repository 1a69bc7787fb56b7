//! The times of the demo: what was wanted, what was measured, and whether it was met.

use serde_json::{Map, Value, json};

/// One measured time.
#[derive(Debug)]
struct Row {
    key: &'static str,
    what: String,
    milliseconds: f64,
    wanted: Option<f64>,
}

/// All of them, in the order they were measured.
#[derive(Debug, Default)]
pub(crate) struct Timeline {
    rows: Vec<Row>,
}

impl Timeline {
    /// Notes a time and prints it. `wanted` is the most it should be, in milliseconds.
    pub(crate) fn note(&mut self, key: &'static str, what: &str, nanoseconds: u64, wanted: Option<f64>) {
        let milliseconds = nanoseconds as f64 / 1e6;
        let verdict = match wanted {
            Some(limit) if milliseconds <= limit => format!("met, at most {limit:.0} ms wanted"),
            Some(limit) => format!("MISSED, at most {limit:.0} ms wanted"),
            None => String::new(),
        };
        println!("  {milliseconds:>9.1} ms  {what:<58} {verdict}");
        self.rows.push(Row { key, what: what.to_owned(), milliseconds, wanted });
    }

    pub(crate) fn missed(&self) -> usize {
        self.rows.iter().filter(|r| r.wanted.is_some_and(|w| w < r.milliseconds)).count()
    }

    pub(crate) fn json(&self) -> Value {
        let mut all = Map::new();
        for row in &self.rows {
            all.insert(
                row.key.to_owned(),
                json!({
                    "what": row.what,
                    "milliseconds": row.milliseconds,
                    "wanted_milliseconds": row.wanted,
                    "met": row.wanted.map(|w| row.milliseconds <= w),
                }),
            );
        }
        Value::Object(all)
    }
}
