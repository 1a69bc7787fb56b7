//! Which times a life of the node runs with, and the wait where its former life had others.

use super::convert::Times;
use crate::settings::NodeSettings;
use quorate_membership::ClusterId;
use quorate_membership::driver::AgreedTimes;
use std::error::Error;
use std::path::Path;
use std::time::Duration;

/// In the node's directory: the times of its newest life.
const FILE: &str = "times.json";

/// No life may have had longer ones: `[timing]` allows a detection time and a kill time of a minute each.
const WAIT_MAX: Duration = Duration::from_secs(120);

/// The times of `[timing]` in the newest configuration on this node's disk; of `node.toml` where there is none yet.
pub(crate) fn of_next_life(
    dir: &Path,
    settings: &NodeSettings,
    cluster: ClusterId,
) -> Result<Times, Box<dyn Error>> {
    let stored = quorate_ccs::driver::load(&dir.join("ccs").join("configuration"), cluster)?;
    let document = stored.history.last().and_then(|entry| quorate_ccs::parse(&entry.text).ok());
    let timing = document.map(|d| d.timing).or_else(|| settings.timing.clone()).unwrap_or_default();
    let times = Times::of(&timing);
    times.membership.check().map_err(|e| format!("node.toml: [timing]: {e}"))?;
    Ok(times)
}

/// Notes the times of this life. Where the last one had others, the lease it may have left is waited for: the others know
/// only the new times (R8).
pub(super) fn settle(dir: &Path, times: AgreedTimes) -> Result<(), Box<dyn Error>> {
    let path = dir.join(FILE);
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    let last = match std::fs::read(&path) {
        Ok(bytes) => Some(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error).into()),
    };
    let wanted = serde_json::to_vec(&times)?;
    if last.as_ref() == Some(&wanted) {
        return Ok(());
    }
    if let Some(last) = last {
        let (wait, last) = lease_left(&last);
        tracing::warn!(target: "quorate", "{}: the times were {last}, now {times}; the former lease is waited for: {wait:?}", path.display());
        wait_for(wait)?;
    }
    let next = path.with_extension("next");
    let mut file = std::fs::File::create(&next).map_err(failed)?;
    std::io::Write::write_all(&mut file, &wanted).and_then(|()| file.sync_all()).map_err(failed)?;
    Ok(std::fs::rename(&next, &path).map_err(failed)?)
}

/// How long a life with the times of the file may act, and those times for people. What nobody can have written is damage: then
/// it may have been anything that is allowed.
fn lease_left(bytes: &[u8]) -> (Duration, String) {
    let times = serde_json::from_slice::<AgreedTimes>(bytes).ok();
    let wait = |t: &AgreedTimes| Duration::from_millis(u64::from(t.detection_ms) + u64::from(t.kill_ms));
    match times.filter(|t| wait(t) <= WAIT_MAX) {
        Some(times) => (wait(&times), times.to_string()),
        None => (WAIT_MAX, "unreadable".to_owned()),
    }
}

/// On the clock of leases, which goes on while the machine sleeps.
fn wait_for(wait: Duration) -> std::io::Result<()> {
    use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
    let timer = rustix::time::timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC)?;
    let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
    let spec = Itimerspec { it_interval: Timespec::default(), it_value };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
    rustix::io::read(&timer, &mut [0_u8; 8][..])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_makes_no_wait_longer_than_any_times_could() {
        let times = AgreedTimes { heartbeat_ms: 10, detection_ms: 100, drift_margin_ms: 5, kill_ms: 100 };
        let sample = serde_json::to_vec(&times).unwrap();
        assert_eq!(lease_left(&sample).0, Duration::from_millis(200));
        for damaged in [
            &b""[..],
            b"{}",
            br#"{"heartbeat_ms":1,"detection_ms":4000000000,"drift_margin_ms":1,"kill_ms":1}"#,
        ] {
            assert_eq!(lease_left(damaged), (WAIT_MAX, "unreadable".to_owned()));
        }
        let verdicts = quorate_membership::sim::hostile(&[sample], 1_000, |bytes| {
            let (wait, last) = lease_left(bytes);
            assert!(wait <= WAIT_MAX);
            last != "unreadable"
        });
        assert!(10 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the wait is what is tested")]
    fn other_times_than_the_last_life_had_are_waited_for_once() {
        let dir = std::env::temp_dir().join(format!("quorate-times-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let first = AgreedTimes { heartbeat_ms: 10, detection_ms: 100, drift_margin_ms: 5, kill_ms: 100 };
        let second = AgreedTimes { detection_ms: 200, ..first };
        let measured = |times| {
            let start = std::time::Instant::now();
            settle(&dir, times).unwrap();
            start.elapsed()
        };
        measured(first);
        assert!(Duration::from_millis(200) <= measured(second), "the former lease was not waited for");
        assert!(measured(second) < Duration::from_millis(200), "nothing has changed");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
