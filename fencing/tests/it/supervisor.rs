//! The supervisor with real processes. This binary plays all parts: `role` is the supervisor or the node, as told by the
//! environment. Everybody shares one pipe as standard output, so its end of file says that nobody is left.

use crate::agent::Dir;
use quorate_fencing::supervisor::{
    LeaseReport, Supervisor, SupervisorConfig, SupervisorExit, SupervisorLink,
};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

const ROLE: &str = "QUORATE_TEST_ROLE";
const NODE: &str = "QUORATE_TEST_NODE";
const DIR: &str = "QUORATE_TEST_DIR";
const STOP_MS: &str = "QUORATE_TEST_STOP_MS";
const RESTART: &str = "QUORATE_TEST_RESTART";

const LEASE: Duration = Duration::from_millis(200);
const KILL_TIME: Duration = Duration::from_millis(300);

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn arguments() -> Vec<std::ffi::OsString> {
    ["--exact", "supervisor::role", "--nocapture", "--test-threads=1"].map(Into::into).into()
}

/// Not a test: what the processes of the tests below run.
#[test]
fn role() {
    match var(ROLE).as_str() {
        "" => {}
        "supervisor" => std::process::exit(supervisor()),
        _ => node(),
    }
}

fn supervisor() -> i32 {
    // The arguments of all roles are the same, so `env` changes the role.
    let program = std::env::current_exe().expect("this program");
    let mut args: Vec<std::ffi::OsString> = vec![format!("{ROLE}=node").into(), program.into()];
    args.extend(arguments());
    let config = SupervisorConfig {
        state_dir: var(DIR).into(),
        program: "/usr/bin/env".into(),
        args,
        kill_time: KILL_TIME,
        stop_deadline: Duration::from_millis(var(STOP_MS).parse().unwrap_or(20_000)),
        restart: (!var(RESTART).is_empty()).then_some(Duration::from_millis(1)),
        mounts_below: None,
    };
    match Supervisor::run(config) {
        Ok(exit) => i32::from(exit.code()),
        Err(error) => {
            println!("error {error}");
            99
        }
    }
}

fn say(what: &str) {
    // The test's end may be gone.
    let _ = writeln!(std::io::stdout(), "{what}");
}

fn node() {
    let link = SupervisorLink::from_env().expect("a supervisor that lives").expect("a supervisor");
    let mut stdin = Vec::new();
    std::io::stdin().read_to_end(&mut stdin).expect("standard input reads nothing");
    let behaviour = var(NODE);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a handler");
        if behaviour == "service" {
            #[expect(clippy::zombie_processes, reason = "the supervisor ends it, which is what is tested")]
            let service = Command::new("sleep").arg("600").process_group(0).spawn().expect("sleep");
            link.add_group(i32::try_from(service.id()).expect("small")).expect("reported");
        }
        if behaviour == "daemon" {
            // Of another session, its parent gone, reported to nobody.
            let daemon = Command::new("sh").args(["-c", "setsid sleep 600 & exit 0"]).status();
            assert!(daemon.expect("sh").success());
        }
        link.report_lease(LeaseReport::Until(until())).expect("reported");
        link.report_ready().expect("reported");
        link.report_status("a member").expect("reported");
        let told = quorate_fencing::supervisor::NOTIFY_VARIABLES.map(std::env::var_os);
        assert_eq!(told, [None, None, None], "the node does not speak for the service");
        say(&format!("node {}", std::process::id()));
        loop {
            tokio::select! {
                _ = terminate.recv() => {
                    say("stopping");
                    if behaviour != "stubborn" {
                        std::process::exit(0);
                    }
                }
                () = tokio::time::sleep(LEASE / 4) => {
                    link.report_lease(LeaseReport::Until(until())).expect("reported");
                }
            }
        }
    });
}

fn until() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now =
        Duration::new(now.tv_sec.try_into().expect("after boot"), now.tv_nsec.try_into().expect("positive"));
    u64::try_from((now + LEASE).as_nanos()).expect("not that far")
}

/// A supervisor under test.
struct Run {
    supervisor: Child,
    lines: BufReader<ChildStdout>,
}

impl Run {
    fn start(dir: &Path, behaviour: &str, more: &[(&str, &str)]) -> Self {
        let mut supervisor = Command::new(std::env::current_exe().expect("this program"))
            .args(arguments())
            .env(ROLE, "supervisor")
            .env(NODE, behaviour)
            .env(DIR, dir)
            .envs(more.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let lines = BufReader::new(supervisor.stdout.take().expect("piped"));
        Self { supervisor, lines }
    }

    /// The rest of the first line that starts with `word`.
    fn expect(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(0 < self.lines.read_line(&mut line).expect("read"), "{word} never came");
            // The test harness of the processes writes into the same pipe, and not always whole lines.
            if let Some((_, rest)) = line.split_once(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn node(&mut self) -> Pid {
        Pid::from_raw(self.expect("node ").parse().expect("a number")).expect("not zero")
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.supervisor.id()).expect("small")).expect("not zero");
        kill_process(pid, signal).expect("signalled");
    }

    /// Waits until nobody holds the pipe any more; returns the supervisor's exit code.
    fn end(mut self) -> Option<i32> {
        let mut rest = Vec::new();
        self.lines.read_to_end(&mut rest).expect("read to the end");
        let status = self.supervisor.wait().expect("waited");
        status.code().or(status.signal().map(|s| -s))
    }
}

#[test]
fn a_killed_node_takes_its_services_with_it() {
    let dir = Dir::new("killed");
    let mut run = Run::start(&dir.0, "service", &[]);
    kill_process(run.node(), Signal::KILL).expect("killed");
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_DIED)));
}

#[test]
fn a_daemon_that_nobody_reported_dies_too() {
    let dir = Dir::new("daemon");
    let mut run = Run::start(&dir.0, "daemon", &[]);
    kill_process(run.node(), Signal::KILL).expect("killed");
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_DIED)));
}

#[test]
fn a_stopped_node_is_killed_the_kill_time_after_its_lease() {
    let dir = Dir::new("stopped");
    let mut run = Run::start(&dir.0, "service", &[]);
    let node = run.node();
    let lease = until();
    kill_process(node, Signal::STOP).expect("stopped");
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_LAPSED)));
    // The last report was made at most a quarter of a lease before the stop, and one more may have been on its way.
    let now = until() - u64::try_from(LEASE.as_nanos()).expect("short");
    let earliest = lease - u64::try_from((LEASE / 2).as_nanos()).expect("short");
    assert!(earliest + u64::try_from(KILL_TIME.as_nanos()).expect("short") <= now, "killed too early");
}

#[test]
fn a_node_and_its_supervisor_stopped_together_are_out_when_they_go_on() {
    let dir = Dir::new("both");
    let mut run = Run::start(&dir.0, "service", &[]);
    let node = run.node();
    run.signal(Signal::STOP);
    kill_process(node, Signal::STOP).expect("stopped");
    // Both sleep past lease and kill time; a timer, not a guess: the clock of leases itself says when.
    let timer = rustix::time::timerfd_create(
        rustix::time::TimerfdClockId::Boottime,
        rustix::time::TimerfdFlags::CLOEXEC,
    )
    .expect("a timer");
    let span = LEASE + KILL_TIME + LEASE;
    let it_value = rustix::time::Timespec { tv_sec: 0, tv_nsec: span.subsec_nanos().into() };
    let spec = rustix::time::Itimerspec { it_interval: rustix::time::Timespec::default(), it_value };
    rustix::time::timerfd_settime(&timer, rustix::time::TimerfdTimerFlags::empty(), &spec).expect("set");
    rustix::io::read(&timer, &mut [0_u8; 8][..]).expect("the time has come");
    run.signal(Signal::CONT);
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_LAPSED)));
}

#[test]
fn sigterm_is_a_clean_stop() {
    let dir = Dir::new("clean");
    let mut run = Run::start(&dir.0, "service", &[]);
    run.node();
    run.signal(Signal::TERM);
    run.expect("stopping");
    assert_eq!(run.end(), Some(0));
}

#[test]
fn a_stop_that_misses_its_deadline_is_an_abort() {
    let dir = Dir::new("deadline");
    let mut run = Run::start(&dir.0, "stubborn", &[(STOP_MS, "200")]);
    run.node();
    run.signal(Signal::TERM);
    run.expect("stopping");
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_ABORTED)));
}

#[test]
fn a_second_sigterm_aborts_at_once() {
    let dir = Dir::new("second");
    let mut run = Run::start(&dir.0, "stubborn", &[]);
    run.node();
    run.signal(Signal::TERM);
    run.expect("stopping");
    run.signal(Signal::TERM);
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_ABORTED)));
}

#[test]
fn the_node_dies_with_its_supervisor() {
    let dir = Dir::new("orphan");
    let mut run = Run::start(&dir.0, "plain", &[]);
    run.node();
    run.signal(Signal::KILL);
    assert_eq!(run.end(), Some(-9), "and nobody is left to hold the pipe");
}

/// A killed supervisor takes the node along, but not a daemon of another session: the next supervisor ends that one.
#[test]
fn what_a_killed_supervisor_left_ends_before_the_next_life_begins() {
    let dir = Dir::new("leftover");
    let mut run = Run::start(&dir.0, "daemon", &[]);
    run.node();
    run.signal(Signal::KILL);
    assert_eq!(run.supervisor.wait().expect("waited").signal(), Some(9));
    // The daemon still holds the first run's pipe: its end of file is the daemon's end.
    let mut next = Run::start(&dir.0, "plain", &[]);
    next.node();
    let mut rest = Vec::new();
    run.lines.read_to_end(&mut rest).expect("read to the end");
    next.signal(Signal::TERM);
    assert_eq!(next.end(), Some(0));
}

#[test]
fn the_service_manager_hears_of_ready_alive_and_stopping() {
    let dir = Dir::new("notify");
    let path = dir.0.join("notify.sock");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("bound");
    socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a ceiling");
    let path = path.to_str().expect("text");
    let mut run = Run::start(
        &dir.0,
        "stubborn",
        &[("NOTIFY_SOCKET", path), ("WATCHDOG_USEC", "100000"), (STOP_MS, "500")],
    );
    let node = run.node();
    let heard = |wanted: &str| loop {
        let mut bytes = [0; 512];
        let len = socket.recv(&mut bytes).unwrap_or_else(|e| panic!("{wanted} never came: {e}"));
        if bytes[..len] == *wanted.as_bytes() {
            return;
        }
    };
    heard("READY=1");
    heard("STATUS=a member");
    heard("WATCHDOG=1");
    heard("WATCHDOG=1");
    run.signal(Signal::TERM);
    heard("STOPPING=1\nEXTEND_TIMEOUT_USEC=500000");
    // A node that is silent is not vouched for: at most the one that was due already.
    kill_process(node, Signal::STOP).expect("stopped");
    assert_eq!(run.end(), Some(i32::from(SupervisorExit::CODE_LAPSED)));
    let mut alive = 0;
    socket.set_nonblocking(true).expect("set");
    let mut bytes = [0; 512];
    while let Ok(len) = socket.recv(&mut bytes) {
        alive += usize::from(bytes[..len] == *b"WATCHDOG=1");
    }
    assert!(alive <= 2, "{alive} times alive in the {KILL_TIME:?} and more of a stopped node");
}

#[test]
fn a_node_is_started_again_where_that_is_wanted() {
    let dir = Dir::new("again");
    let mut run = Run::start(&dir.0, "service", &[(RESTART, "1")]);
    let first = run.node();
    kill_process(first, Signal::KILL).expect("killed");
    let second = run.node();
    assert_ne!(first, second);
    run.signal(Signal::TERM);
    assert_eq!(run.end(), Some(0));
}

#[test]
fn one_state_directory_has_one_supervisor() {
    let dir = Dir::new("locked");
    let mut run = Run::start(&dir.0, "plain", &[]);
    run.node();
    let mut other = Run::start(&dir.0, "plain", &[]);
    let error = other.expect("error ");
    assert_eq!(error, format!("state directory {} is in use by another node process", dir.0.display()));
    assert_eq!(other.end(), Some(99));
    run.signal(Signal::TERM);
    assert_eq!(run.end(), Some(0));
}
