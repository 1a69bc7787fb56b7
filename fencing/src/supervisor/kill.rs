//! What dies with the node: its process group, registered groups, every orphan, FUSE connections and mounts.

use super::link::Report;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How often processes that do not die are looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Everything one life of the node started, as far as it said so.
#[derive(Debug)]
pub(super) struct Subjects {
    node: Pid,
    groups: BTreeSet<i32>,
    mounts: BTreeMap<PathBuf, u64>,
}

impl Subjects {
    pub(super) fn new(node: Pid) -> Self {
        Self { node, groups: BTreeSet::new(), mounts: BTreeMap::new() }
    }

    /// Notes a report; only those of what has to end matter here.
    pub(super) fn take(&mut self, report: Report) {
        match report {
            Report::Lease(_) | Report::Ready | Report::Status(_) => {}
            Report::Group { id, is_gone: false } => {
                self.groups.insert(id);
            }
            Report::Group { id, is_gone: true } => {
                self.groups.remove(&id);
            }
            Report::Mount { connection, point, is_gone: false } => {
                self.mounts.insert(point, connection);
            }
            Report::Mount { point, is_gone: true, .. } => {
                self.mounts.remove(&point);
            }
        }
    }

    fn all_groups(&self) -> impl Iterator<Item = Pid> {
        self.groups.iter().copied().filter_map(Pid::from_raw).chain([self.node])
    }

    /// Kills once. Errors say that something is gone already, or will be seen by [`Subjects::are_gone`].
    pub(super) fn kill(&self) {
        for group in self.all_groups() {
            let _ = kill_process_group(group, Signal::KILL);
        }
        // Orphans come to the supervisor, whatever group or session they have put themselves in.
        for child in children() {
            let _ = kill_process(child, Signal::KILL);
        }
        // Frees processes that wait in the kernel for an answer of the dead filesystem.
        for connection in self.mounts.values() {
            let _ = std::fs::write(format!("/sys/fs/fuse/connections/{connection}/abort"), "1");
        }
    }

    /// Whether no process is left. Zombies of the supervisor's own must have been waited for before.
    pub(super) fn are_gone(&self) -> bool {
        children().is_empty() && self.all_groups().all(|g| test_kill_process_group(g).is_err())
    }

    /// Takes the mounts away, lazily: whoever still stands in one keeps standing, on a dead filesystem.
    pub(super) fn unmount(&self) {
        self.mounts.keys().for_each(|point| detach(point));
    }
}

/// Takes one mount away, lazily.
pub(super) fn detach(point: &Path) {
    if unmount(point, UnmountFlags::DETACH).is_ok() {
        return;
    }
    // Without the right to unmount, the set-uid helper of FUSE has it. Its failure is for the log: a mount whose
    // connection is aborted answers every access with an error.
    let helper = Command::new("fusermount3").arg("-uzq").arg(point).stdin(Stdio::null()).status();
    if !helper.is_ok_and(|s| s.success()) {
        tracing::warn!(target: "quorate_supervisor", ?point, "cannot be unmounted");
    }
}

/// The supervisor's children now, of all its threads.
fn children() -> Vec<Pid> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<i32> =
        lists.flat_map(|l| l.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    pids.into_iter().filter_map(Pid::from_raw).collect()
}
