//! Any FenceAgentAPI program as a fence agent: options as `name=value` lines on standard input, exit codes, a deadline.
//!
//! An "off" counts only when the program's own `status` then says off (exit code 2). Output is never parsed: agents are
//! Python programs that print warnings of their libraries there.

use crate::{Action, AgentError, FenceAgent, FenceDevice, Step};
use quorate_membership::BoxFuture;
use rustix::process::{Pid, Signal, kill_process_group};
use std::collections::BTreeMap;
use std::process::{ExitStatus, Stdio};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

/// Exit code of `status` for a node that is off (FenceAgentAPI).
const STATUS_OFF: i32 = 2;

/// How much of a failed program's standard error goes to the log, in bytes.
const STDERR_BYTES_MAX: u64 = 2048;

/// Runs agent programs, each in a process group of its own. They die with the future that waits for them.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProgramAgent {
    _private: (),
}

impl ProgramAgent {
    /// The agent.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    async fn off(device: &FenceDevice, step: &Step, node: &str) -> Result<(), AgentError> {
        let status = call(device, step, node, "off").await?;
        if !status.success() {
            return Err(failed(device, Action::Off, &status));
        }
        let status = call(device, step, node, "status").await?;
        if status.code() == Some(STATUS_OFF) {
            Ok(())
        } else {
            Err(AgentError::NotOff { agent: device.agent.clone(), detail: status.to_string() })
        }
    }

    async fn on(device: &FenceDevice, step: &Step, node: &str) -> Result<(), AgentError> {
        let status = call(device, step, node, "on").await?;
        if status.success() { Ok(()) } else { Err(failed(device, Action::On, &status)) }
    }
}

impl FenceAgent for ProgramAgent {
    fn run<'a>(
        &'a self,
        device: &'a FenceDevice,
        step: &'a Step,
        node: &'a str,
    ) -> BoxFuture<'a, Result<(), AgentError>> {
        Box::pin(async move {
            match step.action {
                Action::Off => Self::off(device, step, node).await,
                Action::On => Self::on(device, step, node).await,
                Action::Reboot => {
                    // Not the agent's own `reboot`: between its off and its on nobody could see that the node was off.
                    Self::off(device, step, node).await?;
                    if let Err(error) = Self::on(device, step, node).await {
                        tracing::warn!(target: "quorate_fencing", node, %error, "fenced, but not turned on again");
                    }
                    Ok(())
                }
            }
        })
    }
}

fn failed(device: &FenceDevice, action: Action, status: &ExitStatus) -> AgentError {
    AgentError::Failed { agent: device.agent.clone(), action, detail: status.to_string() }
}

/// The lines an agent reads: the device's options, those of the step over them, who is meant, and what to do.
fn input(device: &FenceDevice, step: &Step, node: &str, action: &str) -> String {
    let mut options: BTreeMap<&str, &str> = BTreeMap::new();
    options.insert("nodename", node);
    for (name, value) in device.options.iter().chain(&step.options) {
        options.insert(name, value);
    }
    options.insert("action", action);
    options.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
}

/// Kills the whole group of a program when it is not waited for any more.
struct Group(Option<Pid>);

impl Group {
    fn kill(&self) {
        if let Some(pid) = self.0 {
            // An error says that the group is gone already.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn call(device: &FenceDevice, step: &Step, node: &str, action: &str) -> Result<ExitStatus, AgentError> {
    let start = |e: std::io::Error| AgentError::Start { agent: device.agent.clone(), detail: e.to_string() };
    let mut child = Command::new(&device.agent)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    let lines = input(device, step, node, action);
    match tokio::time::timeout(device.timeout, talk(&mut child, lines)).await {
        Ok(Ok((status, stderr))) => {
            // It is off the process table: its number may be another's by now.
            group.0 = None;
            if !stderr.is_empty() {
                tracing::debug!(target: "quorate_fencing", agent = device.agent, action, %status, stderr, "agent");
            }
            Ok(status)
        }
        Ok(Err(error)) => Err(start(error)),
        Err(_) => {
            group.kill();
            // It is dead; this takes it off the process table.
            let _ = child.wait().await;
            let seconds = device.timeout.as_secs();
            Err(AgentError::Timeout { agent: device.agent.clone(), action: step.action, seconds })
        }
    }
}

async fn talk(child: &mut Child, lines: String) -> std::io::Result<(ExitStatus, String)> {
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading breaks the pipe; its exit code says what that means.
        let _ = stdin.write_all(lines.as_bytes()).await;
    }
    let stderr = child.stderr.take();
    let read = async {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            let _ = (&mut stderr).take(STDERR_BYTES_MAX).read_to_end(&mut text).await;
            // The rest is thrown away, or a talkative program would block on a full pipe.
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
        }
        text
    };
    // A daemon the program left behind may hold standard error open: the program's own end is what counts.
    let mut read = std::pin::pin!(read);
    tokio::select! {
        status = child.wait() => Ok((status?, String::new())),
        text = &mut read => {
            let status = child.wait().await?;
            Ok((status, String::from_utf8_lossy(&text).trim().to_owned()))
        }
    }
}
