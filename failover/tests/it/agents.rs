//! Real agents: those of resource-agents where they are installed, and one of the test's own.

use quorate_failover::driver::{AgentCall, AgentRunner, OcfRunner};
use quorate_failover::{Action, Agent, Exit, Found, Outcome, ResourceConfig, Timeouts};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub(crate) struct TempDir(pub(crate) PathBuf);

impl TempDir {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("quorate-failover-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether an agent is installed; says so if not.
fn missing(test: &str, kind: &str) -> bool {
    if Path::new("/usr/lib/ocf/resource.d/heartbeat").join(kind).exists() {
        return false;
    }
    assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{test}: ocf:heartbeat:{kind} is not installed");
    println!("SKIP: {test}: ocf:heartbeat:{kind} is not installed");
    true
}

pub(crate) fn resource(agent: Agent, params: &[(&str, &str)]) -> ResourceConfig {
    ResourceConfig {
        name: "r".into(),
        agent,
        params: params.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>(),
        timeouts: Timeouts::ordinary(),
        monitor_interval: Duration::from_secs(1),
        children: vec![],
    }
}

fn ocf(kind: &str) -> Agent {
    Agent::Ocf { provider: "heartbeat".into(), kind: kind.into() }
}

/// Writes an agent; its text comes after the shell's first line.
pub(crate) fn script(dir: &Path, text: &str) -> Agent {
    let path = dir.join("agent");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Agent::Program(path)
}

fn run(resource: &ResourceConfig, action: Action) -> Outcome {
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let call = AgentCall { service: "s".into(), resource: resource.clone(), action };
    tokio.block_on(OcfRunner::new("node-a").run(call))
}

const PROBE: Action = Action::Monitor { probe: true };
const MONITOR: Action = Action::Monitor { probe: false };

#[test]
fn the_dummy_agent_starts_stops_and_is_monitored() {
    if missing("the_dummy_agent_starts_stops_and_is_monitored", "Dummy") {
        return;
    }
    let dir = TempDir::new();
    let state = dir.0.join("state");
    let dummy = resource(ocf("Dummy"), &[("state", state.to_str().unwrap())]);
    assert_eq!(run(&dummy, PROBE).found(true), Found::NotRunning);
    for _ in 0..2 {
        assert!(run(&dummy, Action::Start).is_success());
    }
    assert_eq!(run(&dummy, MONITOR).found(false), Found::Running);
    for _ in 0..2 {
        assert!(run(&dummy, Action::Stop).is_success());
    }
    assert_eq!(run(&dummy, MONITOR).found(false), Found::NotRunning);
}

#[test]
fn the_anything_agent_runs_a_program_that_outlives_the_call() {
    if missing("the_anything_agent_runs_a_program_that_outlives_the_call", "anything") {
        return;
    }
    let dir = TempDir::new();
    let pidfile = dir.0.join("pid");
    let params =
        [("binfile", "/bin/sleep"), ("cmdline_options", "600"), ("pidfile", pidfile.to_str().unwrap())];
    let sleep = resource(ocf("anything"), &params);
    assert_eq!(run(&sleep, PROBE).found(true), Found::NotRunning);
    assert!(run(&sleep, Action::Start).is_success());
    assert_eq!(run(&sleep, MONITOR).found(false), Found::Running);
    assert!(run(&sleep, Action::Stop).is_success());
    assert_eq!(run(&sleep, PROBE).found(true), Found::NotRunning);
}

#[test]
fn a_missing_parameter_is_told_in_the_agents_own_words() {
    if missing("a_missing_parameter_is_told_in_the_agents_own_words", "symlink") {
        return;
    }
    let outcome = run(&resource(ocf("symlink"), &[]), Action::Start);
    assert!(matches!(outcome.exit, Exit::Code(2..=6)), "{outcome:?}");
    assert!(outcome.reason.is_some(), "{outcome:?}");
}

#[test]
fn an_agent_that_is_not_there_is_no_running_resource() {
    let outcome = run(&resource(ocf("no-such-agent"), &[]), PROBE);
    assert!(matches!(outcome.exit, Exit::NotStarted(_)), "{outcome:?}");
    assert_eq!(outcome.found(true), Found::NotRunning);
    assert_eq!(outcome.found(false), Found::Broken);
}

#[test]
fn an_agent_finds_its_environment_and_nothing_of_ours() {
    let dir = TempDir::new();
    let out = dir.0.join("env");
    let agent = script(&dir.0, "env > \"$OCF_RESKEY_out\"; echo \"ocf-exit-reason: as asked\" >&2; exit 3");
    let outcome = run(&resource(agent, &[("out", out.to_str().unwrap())]), Action::Start);
    assert_eq!(outcome, Outcome { exit: Exit::Code(3), reason: Some("as asked".into()) });
    let env = std::fs::read_to_string(out).unwrap();
    for line in [
        "OCF_ROOT=/usr/lib/ocf",
        "OCF_RA_VERSION_MAJOR=1",
        "OCF_RESOURCE_INSTANCE=s-r",
        "OCF_RESOURCE_TYPE=agent",
        "OCF_RESKEY_CRM_meta_timeout=20000",
        "OCF_RESKEY_CRM_meta_on_node=node-a",
    ] {
        assert!(env.lines().any(|l| l == line), "{line} is not in\n{env}");
    }
    assert!(!env.contains("CARGO"), "{env}");
}

#[test]
fn a_late_agent_is_killed_with_everything_it_started() {
    let dir = TempDir::new();
    let pid = dir.0.join("pid");
    let agent = script(&dir.0, "sleep 600 & echo $! > \"$OCF_RESKEY_pid\"; wait");
    let mut late = resource(agent, &[("pid", pid.to_str().unwrap())]);
    late.timeouts.start = Duration::from_secs(2);
    assert_eq!(run(&late, Action::Start).exit, Exit::TimedOut);
    let child = std::fs::read_to_string(pid).unwrap();
    // The signal was sent to all at once; only the leader's end was waited for. Gone, or a zombie that waits for init.
    let stat = format!("/proc/{}/stat", child.trim());
    for _ in 0..1_000_000 {
        let stat = std::fs::read_to_string(&stat).unwrap_or_default();
        let state = stat.rsplit(") ").next().and_then(|s| s.chars().next());
        if matches!(state, None | Some('Z' | 'X')) {
            return;
        }
        std::thread::yield_now();
    }
    panic!("process {child} lives on");
}

#[test]
fn a_daemon_that_keeps_the_output_open_does_not_hold_the_call() {
    let dir = TempDir::new();
    let pid = dir.0.join("pid");
    let agent =
        script(&dir.0, "sleep 600 & echo $! > \"$OCF_RESKEY_pid\"; echo 'ocf-exit-reason:up' >&2; exit 0");
    let outcome = run(&resource(agent, &[("pid", pid.to_str().unwrap())]), Action::Start);
    assert_eq!(outcome, Outcome { exit: Exit::Code(0), reason: Some("up".into()) });
    let daemon = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    let daemon = rustix::process::Pid::from_raw(daemon).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn an_agent_that_nobody_waits_for_any_more_is_killed_with_everything_it_started() {
    use std::io::Read;
    // On a busy machine too; what is broken lives for ten minutes.
    const CEILING: Duration = Duration::from_secs(60);
    let dir = TempDir::new();
    // The agent's child holds a fifo open: its end of file says that nobody of the group is left.
    let alive = dir.0.join("alive");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &alive, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let agent = script(&dir.0, "sleep 600 > \"$OCF_RESKEY_alive\" & wait");
    let resource = resource(agent, &[("alive", alive.to_str().unwrap())]);
    let (open, opened) = std::sync::mpsc::channel();
    let (close, closed) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut file = std::fs::File::open(alive).unwrap();
        let _ = open.send(());
        file.read_to_end(&mut Vec::new()).unwrap();
        let _ = close.send(());
    });
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let runner = OcfRunner::new("node-a");
        let mut call = runner.run(AgentCall { service: "s".into(), resource, action: Action::Start });
        // Started by the first poll, and given up once its child is there.
        let is_done =
            std::future::poll_fn(|context| std::task::Poll::Ready(call.as_mut().poll(context).is_ready()));
        assert!(!is_done.await);
        opened.recv_timeout(CEILING).expect("the child starts");
    });
    closed.recv_timeout(CEILING).expect("nobody of the group lives on");
}
