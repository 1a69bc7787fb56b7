//! What happened when: one JSON object a line, so that people, the demo and scripts can follow a node or a storage server.
//!
//! Every line has `t` (nanoseconds of this host's CLOCK_BOOTTIME), `who` (`node 2`, `storage`), and `event`; the other
//! keys depend on the event and are listed in `docs/events.md`.

use serde_json::{Map, Value, json};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Nanoseconds of CLOCK_BOOTTIME: the same for all processes of this host, and it goes on while the host sleeps.
#[must_use]
pub fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Where events go. Cloning shares it; without a file they go to the log alone.
#[derive(Clone, Debug)]
pub struct Events {
    who: Arc<str>,
    file: Option<Arc<Mutex<File>>>,
}

impl Events {
    /// Appends to the file, which is made if it is not there.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(who: &str, path: Option<&Path>) -> io::Result<Self> {
        let open = |path: &Path| OpenOptions::new().create(true).append(true).open(path);
        let file = path.map(open).transpose()?.map(|f| Arc::new(Mutex::new(f)));
        Ok(Self { who: who.into(), file })
    }

    /// Writes one event; `details` must be a JSON object.
    pub fn emit(&self, event: &str, details: Value) {
        let mut line = Map::new();
        line.insert("t".into(), json!(boottime_ns()));
        line.insert("who".into(), json!(&*self.who));
        line.insert("event".into(), json!(event));
        if let Value::Object(details) = details {
            line.extend(details);
        }
        let line = Value::Object(line).to_string();
        tracing::info!(target: "quorate", "{line}");
        if let Some(file) = &self.file {
            // One write a line: lines of several processes do not mix. A full disk must not stop a node.
            let _lost =
                file.lock().unwrap_or_else(PoisonError::into_inner).write_all(format!("{line}\n").as_bytes());
        }
    }
}
