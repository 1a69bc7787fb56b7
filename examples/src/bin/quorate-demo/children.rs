//! Starting and ending processes so that none is left behind, whatever happens.

use rustix::process::{Pid, Signal, kill_process, kill_process_group, set_parent_process_death_signal};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// A child in a process group of its own; the group is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts the command.
    pub(crate) fn start(command: &mut Command) -> io::Result<Self> {
        with_death_signal(command);
        let child = command.process_group(0).spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("cannot start {}: {e}", command.get_program().to_string_lossy()))
        })?;
        Ok(Self { child, ended: None })
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended, and how.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended
    }

    /// Sends a signal to the process alone.
    pub(crate) fn signal(&self, signal: Signal) {
        signal_pid(self.child.id(), signal);
    }

    /// Waits for the end even when the demo is being ended, at most so long.
    #[expect(clippy::disallowed_methods, reason = "the demo watches other processes on the wall clock")]
    pub(crate) fn wait_for_quietly(&mut self, ceiling: Duration) {
        let end = std::time::Instant::now() + ceiling;
        while self.ended().is_none() && std::time::Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end, at most so long.
    pub(crate) fn wait_for(&mut self, ceiling: Duration) -> Option<ExitStatus> {
        crate::cluster::poll(ceiling, || self.ended())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            // A stopped process takes no SIGTERM; the group is killed outright, mounts were ended before.
            if let Some(group) = Pid::from_raw(self.child.id() as i32) {
                let _gone = kill_process_group(group, Signal::KILL);
            }
            let _reaped = self.child.wait();
        }
    }
}

/// Signals one process by number.
pub(crate) fn signal_pid(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _gone = kill_process(pid, signal);
    }
}

/// The child is killed when the thread that started it ends, so when we do.
#[expect(unsafe_code, reason = "the death signal can only be set between fork and exec")]
fn with_death_signal(command: &mut Command) {
    // SAFETY: the closure makes one system call and touches no memory shared with the parent.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?));
    }
}

/// Makes Ctrl-C and SIGTERM end the demo in an orderly way: everything on the stack of the main thread is dropped.
pub(crate) fn die_on_signals() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    std::thread::spawn(move || {
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
            tokio::select! {
                _ = tokio::signal::ctrl_c() => (),
                () = async { match &mut term { Some(t) => { t.recv().await; } None => std::future::pending().await } } => (),
            }
        });
        INTERRUPTED.store(true, std::sync::atomic::Ordering::SeqCst);
    });
}

static INTERRUPTED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Whether somebody wants us to stop. Every wait of the demo looks at it.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(std::sync::atomic::Ordering::SeqCst)
}
