//! Commands that hold a lock themselves, as clients of the node's service for other processes.

use clap::Args;
use quorate_dlm::service::Client;
use quorate_dlm::{Completion, Flags, LockName, LockRequest, Lockspace, Mode, Take, TakeError, Taken};
use std::error::Error;
use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// The exit code when the lock is not to be had, unless another is asked for.
const CONFLICT: u8 = 1;
/// The exit code when the lock was lost while the command ran: it was killed.
const LOST: u8 = 120;
/// How often the command and the lock are looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Which lock.
#[derive(Debug, Args)]
pub(super) struct Wanted {
    /// The resource's name.
    name: String,
    /// NL, CR, CW, PR, PW or EX.
    #[arg(value_parser = mode)]
    mode: Mode,
    /// The lockspace.
    #[arg(long, default_value = "user")]
    lockspace: String,
    /// Fail rather than wait.
    #[arg(long, short = 'n')]
    nonblock: bool,
    /// Wait no longer than so many seconds.
    #[arg(long, short = 'w', value_name = "SECONDS")]
    timeout: Option<f64>,
    /// The exit code when the lock is not to be had.
    #[arg(long, short = 'E', value_name = "CODE", default_value_t = CONFLICT)]
    conflict_exit_code: u8,
}

/// A lock and what to do under it.
#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    wanted: Wanted,
    /// The command to run while the lock is held. It finds the fencing token in `QUORATE_LOCK_TOKEN`.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

fn mode(text: &str) -> Result<Mode, String> {
    let is_it = |m: &Mode| m.to_string().eq_ignore_ascii_case(text);
    Mode::ALL.into_iter().find(is_it).ok_or_else(|| format!("`{text}`: NL, CR, CW, PR, PW or EX is wanted"))
}

type Outcome = Result<Result<(Arc<dyn Lockspace>, Taken), u8>, Box<dyn Error>>;

fn take(node: &Path, wanted: &Wanted) -> Outcome {
    let client = Client::connect(&node.join("lock.sock"))?;
    let space = client.open(&wanted.lockspace, None)?;
    let flags = if wanted.nonblock { Flags::NOQUEUE } else { Flags::NONE };
    let owner = u64::from(std::process::id());
    let name = LockName::new(wanted.name.as_bytes())?;
    let take = Take::new(&space, LockRequest::new(name, wanted.mode).flags(flags).owner(owner));
    let taken = match wanted.timeout {
        None => take.wait(),
        Some(seconds) => take.wait_for(Duration::try_from_secs_f64(seconds)?),
    };
    match taken {
        Ok(taken) => Ok(Ok((space, taken))),
        Err(TakeError::TimedOut(_) | TakeError::NotGranted(Completion::Again | Completion::Deadlock)) => {
            Ok(Err(wanted.conflict_exit_code))
        }
        Err(error) => Err(error.into()),
    }
}

fn token(taken: &Taken) -> String {
    let token = taken.grant().token;
    format!("{}.{}", token.epoch, token.sequence)
}

/// Runs a command under the lock; its exit code, as a shell would say it.
pub(super) fn run(options: &Run, node: &Path) -> Result<u8, Box<dyn Error>> {
    let (_space, taken) = match take(node, &options.wanted)? {
        Ok(taken) => taken,
        Err(code) => return Ok(code),
    };
    let (program, arguments) = options.command.split_first().ok_or("a command is wanted")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("QUORATE_LOCK_TOKEN", token(&taken))
        .spawn()
        .map_err(|e| format!("cannot run {}: {e}", program.display()))?;
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
        if taken.wait_lost(LOOK) {
            // Others may have it now: what runs under it must not go on.
            child.kill()?;
            child.wait()?;
            eprintln!("quorate: the lock is lost, the command was killed");
            return Ok(LOST);
        }
    }
}

/// Holds the lock until the end of the standard input.
pub(super) fn hold(wanted: &Wanted, node: &Path, json: bool) -> Result<u8, Box<dyn Error>> {
    let (_space, taken) = match take(node, wanted)? {
        Ok(taken) => taken,
        Err(code) => return Ok(code),
    };
    if json {
        let grant = taken.grant();
        let token = serde_json::json!({ "epoch": grant.token.epoch, "sequence": grant.token.sequence });
        println!("{}", serde_json::json!({ "mode": grant.mode.to_string(), "token": token }));
    } else {
        println!("{} with token {}; held until the end of the input", taken.grant().mode, token(&taken));
    }
    let (send, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        let _ = std::io::stdin().lock().read_to_end(&mut rest);
        let _ = send.send(());
    });
    loop {
        if ended.try_recv().is_ok() {
            return Ok(0);
        }
        if taken.wait_lost(LOOK) {
            eprintln!("quorate: the lock is lost");
            return Ok(LOST);
        }
    }
}
