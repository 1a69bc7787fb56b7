//! Runs OCF agents as programs: environment, exit code, time limit, and the whole process group ended with it.

use crate::ocf::{environment, exit_reason, program};
use crate::{Action, Exit, Outcome, ResourceConfig};
use quorate_membership::BoxFuture;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process_group};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// How much of an agent's words is kept, in bytes. The rest is read and dropped.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// How long after an agent's end its last words are waited for. What it started may hold its output open for ever.
const LAST_WORDS_TIME: Duration = Duration::from_millis(100);

/// One call of an agent.
#[derive(Clone, Debug)]
pub struct AgentCall {
    /// The service.
    pub service: String,
    /// The resource.
    pub resource: ResourceConfig,
    /// What to do.
    pub action: Action,
}

/// Runs agents.
pub trait AgentRunner: Send + Sync {
    /// Runs one action within its time limit. Dropping the future ends the agent and whatever it started in that call.
    fn run(&self, call: AgentCall) -> BoxFuture<'_, Outcome>;
}

/// The real thing. What agents leave running (the services) are orphans of this node; its supervisor ends them with it.
#[derive(Clone, Debug)]
pub struct OcfRunner {
    ocf_root: PathBuf,
    node: String,
    path: String,
    mark: Option<(String, OsString)>,
}

impl OcfRunner {
    /// Agents below `/usr/lib/ocf`, told that they run on `node` (the node's name).
    #[must_use]
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            ocf_root: "/usr/lib/ocf".into(),
            node: node.into(),
            path: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            mark: None,
        }
    }

    /// One variable more in the environment of every agent and of what it starts: the mark by which a later supervisor
    /// knows the processes of this node.
    #[must_use]
    pub fn mark(mut self, name: impl Into<String>, value: impl Into<OsString>) -> Self {
        self.mark = Some((name.into(), value.into()));
        self
    }

    /// Agents below another directory.
    #[must_use]
    pub fn ocf_root(mut self, root: impl Into<PathBuf>) -> Self {
        self.ocf_root = root.into();
        self
    }

    async fn call(&self, call: AgentCall) -> Outcome {
        let program = program(&self.ocf_root, &call.resource.agent);
        let instance = format!("{}-{}", call.service, call.resource.name);
        let mut command = Command::new(&program);
        command
            .arg(call.action.name())
            .env_clear()
            .env("PATH", &self.path)
            .env("LC_ALL", "C.UTF-8")
            .envs(environment(&self.ocf_root, &instance, &self.node, &call.resource, call.action))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        if let Some(mark) = &self.mark {
            command.env(&mark.0, &mark.1);
        }
        as_ordinary_process(&mut command);
        let failed = |why: String| Outcome { exit: Exit::NotStarted(why), reason: None };
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => return failed(format!("{}: {error}", program.display())),
        };
        let Some(group) = child.id().and_then(|id| i32::try_from(id).ok()) else {
            return failed("it has no process id".into());
        };
        let mut guard = Group { id: group, is_done: false };
        let said = Words::of(child.stderr.take());
        let noise = Words::of(child.stdout.take());
        let limit = call.action.timeout(&call.resource);
        let exit = match tokio::time::timeout(limit, child.wait()).await {
            Err(_) => {
                guard.kill();
                let _ = child.wait().await;
                Exit::TimedOut
            }
            Ok(Err(error)) => Exit::NotStarted(error.to_string()),
            Ok(Ok(status)) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or(0)),
            },
        };
        guard.is_done = true;
        let stderr = said.last().await;
        let stdout = noise.last().await;
        tracing::debug!(target: "quorate_failover", resource = instance, action = call.action.name(), ?exit, stdout, stderr);
        Outcome { exit, reason: exit_reason(&stderr) }
    }
}

impl AgentRunner for OcfRunner {
    fn run(&self, call: AgentCall) -> BoxFuture<'_, Outcome> {
        Box::pin(self.call(call))
    }
}

/// Undoes for agents and services what the node asks of the kernel for itself, which children would inherit: they are
/// no I/O flushers, and when memory is short they may be killed.
#[expect(unsafe_code, reason = "it can only be undone between fork and exec")]
fn as_ordinary_process(command: &mut Command) {
    let ordinary = || {
        // A failure leaves the child as the node is, which is no reason not to start a service.
        let _ = rustix::process::configure_io_flusher_behavior(false);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        if let Ok(file) = rustix::fs::open(c"/proc/self/oom_score_adj", flags, Mode::empty()) {
            let _ = rustix::io::write(&file, b"0");
        }
        Ok(())
    };
    // SAFETY: the closure makes four system calls, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(ordinary);
    }
}

/// The process group of an agent. Dropped before the agent has ended, it ends the group.
struct Group {
    id: i32,
    is_done: bool,
}

impl Group {
    fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.id) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.is_done {
            self.kill();
        }
    }
}

/// What an agent says.
struct Words {
    kept: Arc<Mutex<Vec<u8>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Words {
    fn of(from: Option<impl AsyncRead + Unpin + Send + 'static>) -> Self {
        let kept = Arc::<Mutex<Vec<u8>>>::default();
        let out = Arc::clone(&kept);
        let task = tokio::spawn(async move {
            let Some(mut from) = from else { return };
            let mut buffer = [0; 4096];
            while let Ok(count) = from.read(&mut buffer).await
                && 0 < count
            {
                let mut kept = out.lock().unwrap_or_else(PoisonError::into_inner);
                let room = OUTPUT_BYTES_MAX - kept.len();
                kept.extend(buffer.iter().take(count.min(room)));
            }
        });
        Self { kept, task }
    }

    async fn last(mut self) -> String {
        if tokio::time::timeout(LAST_WORDS_TIME, &mut self.task).await.is_err() {
            self.task.abort();
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept).into_owned()
    }
}
