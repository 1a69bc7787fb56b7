//! Agent programs: the real `fence_dummy`, and small scripts that misbehave.

use quorate_fencing::driver::ProgramAgent;
use quorate_fencing::{Action, AgentError, FenceAgent, FenceDevice, Step};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A directory of its own, removed at the end.
pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new(test: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("quorate-{test}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a fresh directory");
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // A test that failed leaves what it could not remove.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn device(agent: &str, options: &[(&str, &str)], seconds: u64) -> FenceDevice {
    let options = options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    FenceDevice { agent: agent.to_owned(), options, timeout: Duration::from_secs(seconds) }
}

fn step(action: Action) -> Step {
    Step { device: "d".to_owned(), action, options: BTreeMap::new() }
}

fn script(dir: &Path, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join("agent");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    path.to_str().expect("a plain path").to_owned()
}

fn run(device: &FenceDevice, action: Action) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(ProgramAgent::new().run(device, &step(action), "n1"))
}

fn has_fence_dummy() -> bool {
    let found = ["/usr/sbin/fence_dummy", "/sbin/fence_dummy"].iter().any(|p| Path::new(p).exists());
    if !found {
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "fence_dummy is not installed");
        println!("SKIP: agent: fence_dummy is not installed");
    }
    found
}

#[test]
fn the_real_fence_dummy_turns_off_verified_and_on_again() {
    if !has_fence_dummy() {
        return;
    }
    let dir = Dir::new("dummy");
    let file = dir.0.join("status");
    std::fs::write(&file, "on").expect("written");
    let name = file.to_str().expect("a plain path").to_owned();
    let dummy = device("/usr/sbin/fence_dummy", &[("type", "file"), ("status_file", &name)], 60);
    assert_eq!(run(&dummy, Action::Off), Ok(()));
    assert_eq!(std::fs::read_to_string(&file).expect("read").trim(), "off");
    assert_eq!(run(&dummy, Action::Off), Ok(()), "off again is fine");
    assert_eq!(run(&dummy, Action::On), Ok(()));
    assert_eq!(std::fs::read_to_string(&file).expect("read").trim(), "on");
    assert_eq!(run(&dummy, Action::Reboot), Ok(()));
    assert_eq!(std::fs::read_to_string(&file).expect("read").trim(), "on");
}

#[test]
fn options_come_as_lines_and_those_of_the_step_win() {
    let dir = Dir::new("lines");
    let seen = dir.0.join("seen");
    let agent =
        script(&dir.0, &format!("cat > {}; grep -q '^action=status$' {0} && exit 2; exit 0", seen.display()));
    let device = device(&agent, &[("port", "1"), ("ip", "192.0.2.1")], 60);
    let mut step = step(Action::Off);
    step.options.insert("port".to_owned(), "7".to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    assert_eq!(runtime.block_on(ProgramAgent::new().run(&device, &step, "n1")), Ok(()));
    let text = std::fs::read_to_string(&seen).expect("read");
    assert_eq!(text, "action=status\nip=192.0.2.1\nnodename=n1\nport=7\n");
}

#[test]
fn an_agent_that_claims_off_while_its_status_says_on_is_not_believed() {
    let dir = Dir::new("liar");
    let agent = script(&dir.0, "exit 0");
    let error = run(&device(&agent, &[], 60), Action::Off).unwrap_err();
    assert!(matches!(error, AgentError::NotOff { .. }), "{error}");
}

#[test]
fn a_failure_names_the_exit_code() {
    let dir = Dir::new("failure");
    let agent = script(&dir.0, "echo trouble >&2; exit 1");
    let error = run(&device(&agent, &[], 60), Action::Off).unwrap_err();
    assert!(error.to_string().ends_with("Off failed: exit status: 1"), "{error}");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let error = run(&device("/nonexistent/fence_x", &[], 60), Action::Off).unwrap_err();
    assert!(matches!(&error, AgentError::Start { agent, .. } if agent == "/nonexistent/fence_x"), "{error}");
}

/// Nothing that is waited for takes longer, on a busy machine too; what is broken lives for ten minutes.
const CEILING: Duration = Duration::from_secs(60);

/// A fifo that the agent's child holds open: its end of file says that nobody of the group is left.
struct Alive {
    path: PathBuf,
    opened: std::sync::mpsc::Receiver<()>,
    closed: std::sync::mpsc::Receiver<()>,
}

impl Alive {
    fn new(dir: &Dir) -> Self {
        use std::io::Read as _;
        let path = dir.0.join("alive");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("a fifo");
        let (open, opened) = std::sync::mpsc::channel();
        let (close, closed) = std::sync::mpsc::channel();
        let fifo = path.clone();
        std::thread::spawn(move || {
            // Opens when the child has it open for writing. An error says that the test is over.
            let mut file = std::fs::File::open(fifo).expect("a fifo");
            let _ = open.send(());
            file.read_to_end(&mut Vec::new()).expect("read to the end");
            let _ = close.send(());
        });
        Self { path, opened, closed }
    }

    fn script(&self, dir: &Dir) -> String {
        script(&dir.0, &format!("sleep 600 > {} & wait", self.path.display()))
    }

    fn ends(&self) {
        self.closed.recv_timeout(CEILING).expect("nobody of the group lives on");
    }
}

#[test]
fn a_program_that_hangs_is_killed_with_everything_it_started() {
    let dir = Dir::new("hang");
    let alive = Alive::new(&dir);
    let error = run(&device(&alive.script(&dir), &[], 1), Action::Off).unwrap_err();
    assert!(matches!(error, AgentError::Timeout { seconds: 1, .. }), "{error}");
    alive.ends();
}

#[test]
fn a_program_that_nobody_waits_for_any_more_is_killed_with_everything_it_started() {
    let dir = Dir::new("dropped");
    let alive = Alive::new(&dir);
    let hanging = device(&alive.script(&dir), &[], 600);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (agent, step) = (ProgramAgent::new(), step(Action::Off));
        let mut call = std::pin::pin!(agent.run(&hanging, &step, "n1"));
        // Started by the first poll, and given up once its child is there.
        let is_done = std::future::poll_fn(|context| {
            std::task::Poll::Ready(std::future::Future::poll(call.as_mut(), context).is_ready())
        });
        assert!(!is_done.await);
        alive.opened.recv_timeout(CEILING).expect("the child starts");
    });
    alive.ends();
}

/// FenceAgentAPI: `off` ends with 0, and `status` with 2 where the port is off. Nothing else is a proof.
#[test]
fn only_an_off_that_ends_with_0_and_a_status_that_ends_with_2_are_a_fence() {
    let dir = Dir::new("codes");
    let agent = script(
        &dir.0,
        "while read -r line; do export \"$line\"; done\n\
        if [ \"$action\" = off ]; then exit \"$off\"; fi\n\
        if [ \"$action\" = on ]; then exit \"$on\"; fi\n\
        if [ \"$action\" = status ]; then exit \"$status\"; fi\nexit 99",
    );
    let ends = |off: &str, status: &str, on: &str, action| {
        run(&device(&agent, &[("off", off), ("status", status), ("on", on)], 60), action)
    };
    assert_eq!(ends("0", "2", "1", Action::Off), Ok(()));
    for off in ["1", "2", "5", "255"] {
        let error = ends(off, "2", "0", Action::Off).unwrap_err();
        assert!(matches!(&error, AgentError::Failed { action: Action::Off, .. }), "off {off}: {error}");
    }
    for status in ["0", "1", "3", "255"] {
        let error = ends("0", status, "0", Action::Off).unwrap_err();
        assert!(matches!(error, AgentError::NotOff { .. }), "status {status}: {error}");
        let error = ends("0", status, "0", Action::Reboot).unwrap_err();
        assert!(matches!(error, AgentError::NotOff { .. }), "reboot, status {status}: {error}");
    }
    assert_eq!(ends("1", "0", "0", Action::On), Ok(()));
    let error = ends("0", "2", "1", Action::On).unwrap_err();
    assert!(matches!(error, AgentError::Failed { action: Action::On, .. }), "{error}");
    assert_eq!(ends("0", "2", "1", Action::Reboot), Ok(()), "off is what counts");
}

#[test]
fn a_program_that_a_signal_ends_is_a_failure() {
    let dir = Dir::new("signal");
    let error = run(&device(&script(&dir.0, "kill -9 $$"), &[], 60), Action::Off).unwrap_err();
    assert!(matches!(error, AgentError::Failed { .. }), "{error}");
}

#[test]
fn a_program_that_talks_without_end_does_not_fill_memory_or_block() {
    let dir = Dir::new("talk");
    let agent = script(&dir.0, "head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero; exit 2");
    let error = run(&device(&agent, &[], 60), Action::Off).unwrap_err();
    assert!(matches!(error, AgentError::Failed { .. }), "{error}");
}
