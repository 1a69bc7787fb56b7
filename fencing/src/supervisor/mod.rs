//! The supervisor (R8): the parent of the node process and, through it, of agents and services, which ends them all when
//! the node dies or its lease has been over for the kill time.
//!
//! ```text
//!  supervisor ──spawns──▶ node ──spawns──▶ agents, services
//!      ▲ └─ kills all, aborts FUSE connections, unmounts        node: death signal from the supervisor
//!      └──── lease end, process groups, mounts (a socket, the node's standard input)
//! ```
//!
//! It is small and does nothing else, so that it goes on when the node hangs. It never starts a new node process before
//! everything of the old one is gone; the new one raises the incarnation (R1).

mod kill;
mod leftovers;
mod link;
mod notify;
mod sys;

pub use leftovers::MARK;
pub use link::{LeaseReport, LinkError, SupervisorLink};
pub use notify::{Notifier, VARIABLES as NOTIFY_VARIABLES};

use kill::Subjects;
use link::{Receiver, Report};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;
use sys::Signals;

/// What to supervise.
#[derive(Clone, Debug)]
pub struct SupervisorConfig {
    /// The node's state directory; it must exist. One supervisor at a time holds the lock in it.
    pub state_dir: PathBuf,
    /// The node program.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// How long after the end of the lease everything is killed. The cluster waits for it before it starts services of
    /// lease safety elsewhere: it must be the `kill_time` of the cluster's configuration.
    pub kill_time: Duration,
    /// How long a clean stop (SIGTERM) may take before everything is killed.
    pub stop_deadline: Duration,
    /// Whether the node is started again after it died or was killed, and after what pause.
    pub restart: Option<Duration>,
    /// Where the node mounts: FUSE mounts below it that an earlier life left are taken away before the first start.
    pub mounts_below: Option<PathBuf>,
}

/// How supervision ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SupervisorExit {
    /// The node ended by itself with this exit code: 0 after a clean stop, another for a wrong configuration and the like.
    Node(u8),
    /// The node died of a signal; everything it had started is gone.
    Died,
    /// The lease had been over for the kill time: everything was killed.
    Lapsed,
    /// A clean stop missed its deadline, or a second signal came: everything was killed.
    Aborted,
}

impl SupervisorExit {
    /// A node ends with this when its life is over and a new one may begin: it was removed, or its state failed.
    pub const CODE_AGAIN: u8 = 75;
    /// A node ends with this after a panic.
    const CODE_PANIC: u8 = 101;
    /// Exit code after the node died of a signal.
    pub const CODE_DIED: u8 = 70;
    /// Exit code after the lease had been over for the kill time.
    pub const CODE_LAPSED: u8 = 71;
    /// Exit code after an aborted stop.
    pub const CODE_ABORTED: u8 = 72;

    /// The exit code for the process: the node's own, or one of the `CODE_` constants.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Node(code) => code,
            Self::Died => Self::CODE_DIED,
            Self::Lapsed => Self::CODE_LAPSED,
            Self::Aborted => Self::CODE_ABORTED,
        }
    }

    /// Whether a node is started again after this, where that is asked for: not after a stop that a person wanted,
    /// nor where the next would fail alike (a wrong configuration).
    fn is_failure(self) -> bool {
        matches!(self, Self::Died | Self::Lapsed | Self::Node(Self::CODE_AGAIN | Self::CODE_PANIC))
    }
}

/// Why nothing was supervised, or supervision could not go on. Whatever had been started is killed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SupervisorError {
    /// Another supervisor runs with this state directory.
    #[error("state directory {0} is in use by another node process")]
    Locked(PathBuf),
    /// A stop was asked for while processes of an earlier life, which must not live beside a new one, did not die.
    #[error("state directory {0}: processes of an earlier life do not die")]
    Leftovers(PathBuf),
    /// The system refused something.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

fn system<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> SupervisorError {
    move |source| SupervisorError::System { what, source: source.into() }
}

/// Supervises one node.
#[derive(Debug)]
pub struct Supervisor {
    config: SupervisorConfig,
    signals: Signals,
    timer: OwnedFd,
    notifier: Notifier,
    _lock: File,
}

/// What woke the supervisor.
enum Woken {
    /// SIGTERM or SIGINT.
    Stop,
    /// A child ended, perhaps.
    Child,
    /// A report of the node can be read.
    Report,
    /// A deadline, or nothing in particular.
    Nothing,
}

impl Supervisor {
    /// Runs the node until it ends for good. Blocks.
    ///
    /// Takes over the whole process: every child of it is ended with the node, SIGTERM, SIGINT and SIGCHLD are handled
    /// here, and the calling thread must live on (the node gets its death signal when this thread ends). Call it from
    /// `main`, before other threads start.
    ///
    /// # Errors
    /// See [`SupervisorError`].
    pub fn run(config: SupervisorConfig) -> Result<SupervisorExit, SupervisorError> {
        let lock = lock(&config)?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(system("cannot become the parent of orphans"))?;
        let timer = timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
            .map_err(system("cannot make a timer"))?;
        let signals = Signals::install().map_err(system("cannot handle signals"))?;
        let mut supervisor = Self { config, signals, timer, notifier: Notifier::from_env(), _lock: lock };
        // The next life must not begin beside what an earlier supervisor, killed itself, could not end (R1).
        supervisor.end_leftovers()?;
        loop {
            let exit = supervisor.run_once()?;
            let Some(pause) = supervisor.config.restart.filter(|_| exit.is_failure()) else {
                return Ok(exit);
            };
            tracing::warn!(target: "quorate_supervisor", ?exit, ?pause, "the node is started again");
            supervisor.notifier.status("the node ended and is started again");
            if supervisor.pause(pause)? {
                return Ok(exit);
            }
        }
    }

    /// One life of the node.
    fn run_once(&mut self) -> Result<SupervisorExit, SupervisorError> {
        let (receiver, theirs) = link::pair().map_err(system("cannot make a socket"))?;
        let mut command = Command::new(&self.config.program);
        for variable in notify::VARIABLES {
            command.env_remove(variable);
        }
        let child = command
            .args(&self.config.args)
            .env(link::ENV, std::process::id().to_string())
            .env(MARK, &self.config.state_dir)
            .stdin(Stdio::from(theirs))
            // Of its own, so that a terminal's ^C reaches the supervisor alone, which stops the node cleanly.
            .process_group(0)
            .spawn()
            .map_err(system("cannot start the node"))?;
        let node =
            i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a started process has a number");
        let mut subjects = Subjects::new(node);
        let end = self.watch(node, &receiver, &mut subjects);
        // Also what the node said just before it died: it may have started something.
        while let Some(report) = receiver.next() {
            subjects.take(report);
        }
        self.end_all(&subjects)?;
        end
    }

    /// Waits until the node ended or must end.
    fn watch(
        &mut self,
        node: Pid,
        receiver: &Receiver,
        subjects: &mut Subjects,
    ) -> Result<SupervisorExit, SupervisorError> {
        let mut lease_ns: Option<u64> = None;
        let mut stop_at: Option<u64> = None;
        let every = self.notifier.watchdog_interval().map(nanoseconds);
        // The first is due at once; later ones only after the node was heard of since.
        let mut alive_at = every.map(|_| boottime_ns());
        let mut heard = true;
        loop {
            let kill_at = lease_ns.map(|l| l.saturating_add(nanoseconds(self.config.kill_time)));
            match self.wait(Some(receiver), kill_at.into_iter().chain(stop_at).chain(alive_at).min())? {
                Woken::Report => {
                    while let Some(report) = receiver.next() {
                        heard = true;
                        match report {
                            Report::Lease(LeaseReport::Until(ns)) => lease_ns = Some(ns),
                            Report::Lease(LeaseReport::Idle) => lease_ns = None,
                            Report::Ready => self.notifier.ready(),
                            Report::Status(line) => self.notifier.status(&line),
                            other => subjects.take(other),
                        }
                    }
                }
                Woken::Child => {
                    if let Some(exit) = reap(node)? {
                        return Ok(exit);
                    }
                }
                Woken::Stop if stop_at.is_some() => return Ok(SupervisorExit::Aborted),
                Woken::Stop => {
                    self.notifier.stopping(self.config.stop_deadline);
                    stop_at = Some(boottime_ns() + nanoseconds(self.config.stop_deadline));
                    // An error says that it has just ended, which the next turn sees.
                    let _ = rustix::process::kill_process(node, Signal::TERM);
                }
                Woken::Nothing => {}
            }
            // Reports were read before this: what counts is the newest lease the node told of, also after both slept.
            let now = boottime_ns();
            let kill_at = lease_ns.map(|l| l.saturating_add(nanoseconds(self.config.kill_time)));
            if kill_at.is_some_and(|at| at <= now) && !receiver.has_more() {
                tracing::error!(target: "quorate_supervisor", "the lease is over by the kill time: everything is killed");
                return Ok(SupervisorExit::Lapsed);
            }
            if let (Some(at), Some(every)) = (alive_at, every)
                && at <= now
            {
                if std::mem::take(&mut heard) {
                    self.notifier.alive();
                }
                alive_at = Some(now + every);
            }
            if stop_at.is_some_and(|at| at <= now) {
                tracing::error!(target: "quorate_supervisor", "the stop missed its deadline: everything is killed");
                return Ok(SupervisorExit::Aborted);
            }
        }
    }

    /// Kills everything and returns once it is gone. A second stop signal gives up waiting, never killing.
    fn end_all(&mut self, subjects: &Subjects) -> Result<(), SupervisorError> {
        let mut stops = 0;
        loop {
            subjects.kill();
            while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
            if subjects.are_gone() {
                subjects.unmount();
                return Ok(());
            }
            // A process that cannot die yet (in the kernel, on a device) is looked at again with every dead child, and
            // now and then, for grandchildren come up only when their parents are gone.
            let again = boottime_ns() + nanoseconds(kill::LOOK_AGAIN);
            if matches!(self.wait(None, Some(again))?, Woken::Stop) {
                stops += 1;
                if 2 <= stops {
                    tracing::error!(target: "quorate_supervisor", "left with processes that do not die");
                    return Ok(());
                }
            }
        }
    }

    /// Ends what earlier lives of this state directory left, and takes their mounts away.
    fn end_leftovers(&mut self) -> Result<(), SupervisorError> {
        let dir = self.config.state_dir.clone();
        loop {
            let left = leftovers::processes(&dir);
            if left.is_empty() {
                break;
            }
            tracing::warn!(target: "quorate_supervisor", ?left, "an earlier life left these processes: they are killed");
            for pid in left {
                // An error says that it has just ended.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            let again = boottime_ns() + nanoseconds(kill::LOOK_AGAIN);
            if matches!(self.wait(None, Some(again))?, Woken::Stop) {
                return Err(SupervisorError::Leftovers(dir));
            }
        }
        if let Some(below) = &self.config.mounts_below {
            leftovers::unmount_below(below);
        }
        Ok(())
    }

    /// Waits before a restart; true if a stop signal came.
    fn pause(&mut self, pause: Duration) -> Result<bool, SupervisorError> {
        let until = boottime_ns() + nanoseconds(pause);
        while boottime_ns() < until {
            if matches!(self.wait(None, Some(until))?, Woken::Stop) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for a signal, a report, or the instant `until` on CLOCK_BOOTTIME.
    fn wait(&mut self, receiver: Option<&Receiver>, until: Option<u64>) -> Result<Woken, SupervisorError> {
        use rustix::event::{PollFd, PollFlags, poll};
        // A timer of the clock that counts suspended time too; poll's own timeout does not.
        let at = until.map_or(Timespec::default(), timespec);
        let spec = Itimerspec { it_interval: Timespec::default(), it_value: at };
        timerfd_settime(&self.timer, TimerfdTimerFlags::ABSTIME, &spec)
            .map_err(system("cannot set a timer"))?;
        let mut fds =
            vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.timer, PollFlags::IN)];
        if let Some(receiver) = receiver.filter(|r| !r.is_closed()) {
            fds.push(PollFd::from_borrowed_fd(receiver.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(system("cannot wait")(error)),
        }
        let has_report = fds.get(2).is_some_and(|f| !f.revents().is_empty());
        drop(fds);
        Ok(match self.signals.next() {
            Some(sys::STOP) => Woken::Stop,
            Some(_) => Woken::Child,
            None if has_report => Woken::Report,
            None => Woken::Nothing,
        })
    }
}

fn lock(config: &SupervisorConfig) -> Result<File, SupervisorError> {
    let path = config.state_dir.join("supervisor.lock");
    let open = File::options().create(true).write(true).truncate(false).open(path);
    let file = open.map_err(system("cannot open the lock of the state directory"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SupervisorError::Locked(config.state_dir.clone())),
        Err(error) => Err(system("cannot lock the state directory")(error)),
    }
}

/// Takes dead children off the process table; says how the node ended if it is among them.
fn reap(node: Pid) -> Result<Option<SupervisorExit>, SupervisorError> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == node => {
                let code = status.exit_status().and_then(|code| u8::try_from(code).ok());
                return Ok(Some(code.map_or(SupervisorExit::Died, SupervisorExit::Node)));
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(system("cannot wait for children")(error)),
        }
    }
}

/// Nanoseconds on CLOCK_BOOTTIME, the clock of leases.
fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

fn nanoseconds(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

fn timespec(ns: u64) -> Timespec {
    // Zero would disarm the timer; a nanosecond after boot is over just as well.
    let ns = ns.max(1);
    let seconds = i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX);
    Timespec { tv_sec: seconds, tv_nsec: (ns % 1_000_000_000) as _ }
}
