//! What an earlier life left because its supervisor was killed itself: processes that carry the mark of the state
//! directory in their environment, and dead FUSE mounts.
//!
//! While a supervisor lives it is the parent of every orphan and needs no mark. Killed with SIGKILL, it takes the node along
//! (the death signal), but a daemon that an agent left becomes somebody else's child. Under systemd the service's cgroup
//! ends it at once; elsewhere the next supervisor of the same state directory does, before the next life begins.

use rustix::process::Pid;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

/// The environment variable that the node and everything it starts carry: the state directory, as the supervisor has it.
/// Whoever starts a program with an environment of its own hands it on.
pub const MARK: &str = "QUORATE_SUPERVISED";

/// How often a process without an environment is looked at: some milliseconds, an exec takes less than one.
const EXEC_LOOKS: u32 = 200;

/// The processes with the mark of this state directory, ourselves excepted. Those of other users are not seen.
pub(super) fn processes(state_dir: &Path) -> Vec<Pid> {
    let mark = [MARK.as_bytes(), b"=", state_dir.as_os_str().as_bytes()].concat();
    let is_marked = |environment: Vec<u8>| environment.split(|b| *b == 0).any(|v| v == mark);
    let me = std::process::id();
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()))
        .filter(|pid| *pid != me)
        .filter(|pid| environment(*pid).is_some_and(is_marked))
        .filter_map(|pid| i32::try_from(pid).ok().and_then(Pid::from_raw))
        .collect()
}

/// What a process was started with; nothing of a zombie, a kernel thread, or one that may not be looked at.
///
/// In the middle of an exec the old environment is gone and the new one not there yet, while the program's file is: then it is
/// looked at again. A process that was started with none looks the same, so not for ever.
fn environment(pid: u32) -> Option<Vec<u8>> {
    for _ in 0..EXEC_LOOKS {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
        if !environment.is_empty() {
            return Some(environment);
        }
        std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        std::thread::yield_now();
    }
    None
}

/// Takes away every FUSE mount below the directory, the newest first.
pub(super) fn unmount_below(dir: &Path) {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    for point in fuse_mounts(&text).into_iter().rev().filter(|point| point.starts_with(dir)) {
        tracing::warn!(target: "quorate_supervisor", ?point, "an earlier life left this mount: it is taken away");
        super::kill::detach(&point);
    }
}

/// The mount points of type `fuse…`: the fifth field, and the one after the separator `-`.
fn fuse_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|b| *b == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|b| *b == b' ');
            let point = fields.nth(4)?;
            let kind = fields.skip_while(|f| *f != b"-").nth(1)?;
            kind.starts_with(b"fuse").then(|| PathBuf::from(std::ffi::OsString::from_vec(unescape(point))))
        })
        .collect()
}

/// Blank, tab, line feed and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| *first == b'\\' && d.iter().all(u8::is_ascii_digit));
        let octal =
            digits.and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuse_mounts_are_found_whatever_their_names() {
        let text = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n\
            40 22 0:33 / /a\\040b/mnt rw,nosuid shared:2 master:1 - fuse.quorate x rw\n\
            41 22 0:34 / /plain rw - fuse y rw\n42 22 0:35 / /sys/fs/fuse rw - fusectl z rw\nbroken line\n";
        let found = fuse_mounts(text);
        assert_eq!(found, ["/a b/mnt", "/plain", "/sys/fs/fuse"].map(PathBuf::from));
    }

    #[test]
    fn a_marked_process_is_found_and_others_are_not() {
        let dir = std::env::temp_dir().join(format!("quorate-mark-{}", std::process::id()));
        let mut child = std::process::Command::new("sleep").arg("600").env(MARK, &dir).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let found = processes(&dir);
        let other = processes(&dir.join("other"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.into_iter().map(Some).collect::<Vec<_>>(), [pid]);
        assert!(other.is_empty());
        assert!(processes(&dir).is_empty(), "it is gone");
    }
}
