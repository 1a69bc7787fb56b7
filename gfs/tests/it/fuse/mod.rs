//! Real mounts: each in a process and mount namespace of its own, with a watchdog that aborts the connection.
//!
//! ```text
//!  test ── spawns ──▶ server: own mount namespace, mounts MemFs ── spawns ──▶ client: works in the mount,
//!                        ▲                                                      asks over its standard output
//!                        └────────── "write_elsewhere a b" / "ok" ──────────────┘
//! ```
//! All three are this test binary; the process that serves the mount never touches it.

mod client;
mod locks;
mod memfs;
mod server;

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const ROLE: &str = "QUORATE_FUSE_TEST_ROLE";
pub(crate) const SCENARIO: &str = "QUORATE_FUSE_TEST_SCENARIO";
pub(crate) const MOUNTPOINT: &str = "QUORATE_FUSE_TEST_MOUNTPOINT";

/// A directory of its own for a test, removed at the end.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("quorate-fuse-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// This binary in another role. Only the function [`role`] runs there.
pub(crate) fn in_role(role: &str, scenario: &str) -> Command {
    in_role_from(std::env::current_exe().unwrap(), role, scenario)
}

fn in_role_from(program: PathBuf, role: &str, scenario: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["--exact", "fuse::role", "--nocapture"]).env(ROLE, role).env(SCENARIO, scenario);
    command
}

/// Not a test by itself: what the processes of the tests run.
#[test]
fn role() {
    let scenario = std::env::var(SCENARIO).unwrap_or_default();
    match std::env::var(ROLE).as_deref() {
        Ok("server") => server::run(&scenario),
        Ok("client") if scenario.starts_with("locks_") => locks::run(&scenario),
        Ok("client") => client::run(&scenario),
        Ok("helper") if scenario.starts_with("locker ") => locks::work(&scenario[7..]),
        Ok("helper") => client::help(&scenario),
        _ => {}
    }
}

fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{test}: {why}");
    println!("SKIP: {test}: {why}");
}

fn run(scenario: &str) {
    if !rustix::process::geteuid().is_root() {
        return skip(scenario, "only root can make a mount namespace");
    }
    if !std::path::Path::new("/dev/fuse").exists() {
        return skip(scenario, "there is no /dev/fuse");
    }
    let dir = TempDir::new();
    finish(scenario, in_role("server", scenario).env(MOUNTPOINT, &dir.0));
}

fn finish(scenario: &str, server: &mut Command) {
    let mut server = server.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut err) = (server.stdout.take().unwrap(), server.stderr.take().unwrap());
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = err.read_to_string(&mut text);
        text
    });
    let mut text = String::new();
    let _ = out.read_to_string(&mut text);
    let status = server.wait().unwrap();
    let errors = errors.join().unwrap();
    assert!(status.success(), "{scenario}: {status}\n{text}\n{errors}");
    assert!(text.contains("served to the end"), "{scenario}: the server did nothing:\n{text}\n{errors}");
    for line in text.lines().filter(|l| l.starts_with("figure:")) {
        println!("{line}");
    }
}

#[test]
fn files_directories_links_and_attributes_work() {
    run("everything");
}

#[test]
fn thousands_of_entries_are_listed_once_each() {
    run("listing");
}

#[test]
fn flock_and_fcntl_locks_are_two_worlds() {
    run("two_worlds");
}

#[test]
fn a_process_killed_while_it_waits_for_a_lock_is_gone_and_the_mount_unmounts() {
    run("kill_lock_waiter");
}

#[test]
fn a_process_killed_while_it_waits_for_a_read_is_gone_and_the_mount_unmounts() {
    run("kill_reader");
}

#[test]
fn a_signal_that_does_not_kill_ends_a_wait_for_a_lock_and_no_read() {
    run("signals");
}

#[test]
fn what_another_node_changed_is_seen_at_once() {
    run("invalidation");
}

#[test]
fn dropping_pages_does_not_wait_for_a_read_that_waits_for_us() {
    run("invalidation_under_read");
}

#[test]
fn appends_land_at_the_end_whatever_the_kernel_believes() {
    run("append");
}

#[test]
fn a_busy_mount_says_so_and_can_be_taken_away_lazily() {
    run("busy");
}

#[test]
fn an_aborted_mount_lets_everybody_go() {
    run("abort");
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    let test = "an_ordinary_user_mounts_through_fusermount";
    if !rustix::process::geteuid().is_root() {
        return skip(test, "only root can become another user");
    }
    if !std::path::Path::new("/usr/bin/fusermount3").exists() {
        return skip(test, "fusermount3 is not installed");
    }
    // The binary may stand where only root can reach it.
    let dir = TempDir::new();
    let program = dir.0.join("it");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mountpoint = dir.0.join("mnt");
    std::fs::create_dir(&mountpoint).unwrap();
    std::os::unix::fs::chown(&mountpoint, Some(65534), Some(65534)).unwrap();
    let mut server = in_role_from(program, "server", "as_user");
    finish("as_user", server.env(MOUNTPOINT, &mountpoint));
}

#[test]
fn fcntl_locks_of_two_nodes_answer_as_the_kernel_on_tmpfs() {
    run("locks_as_tmpfs");
}

#[test]
fn fcntl_waits_across_nodes_end_with_the_lock_or_the_process() {
    run("locks_wait");
}

/// Figures, printed with `--nocapture`; nothing is demanded of them.
#[test]
fn round_trips_are_measured() {
    run("figures");
}

#[test]
fn fcntl_deadlocks_across_nodes_are_refused_and_a_signal_ends_a_wait() {
    run("locks_and_deadlocks");
}

#[test]
fn holes_are_found_by_lseek_on_every_node() {
    run("locks_and_holes");
}
