//! What a process that stands below a mount asks of its host: memory that stays, writeback that does not wait for itself,
//! and to be the last one that is killed when memory is short.
//!
//! When memory is short the kernel writes pages back, also those of our own mounts, and waits for it. If the process that
//! serves the mount has to wait for memory then, both wait for ever. Each protection needs a right; without it the node
//! works, and says in a warning what may happen.

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{Resource, configure_io_flusher_behavior, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use serde_json::{Value, json};

/// The score of a process that the kernel's out-of-memory killer does not choose (`proc(5)`, `oom_score_adj`).
const OOM_SCORE: &str = "-1000";

/// What was asked for, and why it was not given.
#[derive(Debug, Default)]
pub(crate) struct Protection {
    memory: Option<String>,
    io_flusher: Option<String>,
    oom: Option<String>,
}

impl Protection {
    /// Asks for everything. Call it before other threads start: the mark as a flusher is each thread's own and inherited.
    pub(crate) fn ask() -> Self {
        Self {
            memory: lock_memory().err(),
            io_flusher: configure_io_flusher_behavior(true).err().map(|e| e.to_string()),
            oom: std::fs::write("/proc/self/oom_score_adj", OOM_SCORE).err().map(|e| e.to_string()),
        }
    }

    /// One warning for each protection that is missing.
    pub(crate) fn warn(&self) {
        let missing = [
            (
                &self.memory,
                "its memory is not locked: a page of it may have to be read from a disk that waits for this node (CAP_IPC_LOCK, or LimitMEMLOCK=infinity)",
            ),
            (
                &self.io_flusher,
                "it is not marked as an I/O flusher: short of memory, it may wait for its own mount (CAP_SYS_RESOURCE)",
            ),
            (
                &self.oom,
                "the kernel may kill it when memory is short (OOMScoreAdjust=-1000, or CAP_SYS_RESOURCE)",
            ),
        ];
        for (reason, meaning) in missing {
            if let Some(reason) = reason {
                tracing::warn!(target: "quorate", "{meaning}: {reason}");
            }
        }
    }

    /// For the event of the start.
    pub(crate) fn json(&self) -> Value {
        json!({
            "memory_locked": self.memory.is_none(),
            "io_flusher": self.io_flusher.is_none(),
            "oom_protected": self.oom.is_none(),
        })
    }
}

/// Locks what is there and what comes, each page when it is first used: without that, a thread's whole stack would be
/// taken at once.
fn lock_memory() -> Result<(), String> {
    // With a finite limit the call may succeed, and a later allocation fail instead: worse than no lock.
    let may = capabilities(None).is_ok_and(|c| c.effective.contains(CapabilitySet::IPC_LOCK));
    if !may && getrlimit(Resource::Memlock).current.is_some() {
        return Err("neither the right nor an unlimited limit".into());
    }
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    mlockall(flags).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_told() {
        let protection = Protection { oom: Some("Permission denied".into()), ..Protection::default() };
        let json = protection.json();
        assert_eq!(json["memory_locked"], true);
        assert_eq!(json["oom_protected"], false);
    }
}
