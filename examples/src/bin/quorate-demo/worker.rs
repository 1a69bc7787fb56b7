//! One node's share of the work, as a process of its own: it appends numbered records with fsync, increments the shared
//! counter, and tells the demo of each acknowledged step over its standard output.
//!
//! | line | meaning |
//! |---|---|
//! | `A n` | record n is acknowledged as durable |
//! | `T n` | the n-th increment is about to be tried |
//! | `C v` | it is acknowledged; the counter was v |
//! | `W n` | block n of the overwritten file is acknowledged |
//! | `L ns us` | a write that began at ns (CLOCK_BOOTTIME) took us microseconds |
//! | `P ns` | the probe asked for on standard input was done at ns |
//! | `E text` | an operation failed; the worker ends |

use crate::access::Access;
use quorate::events::boottime_ns;
use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

/// How a worker runs.
#[derive(Debug, Default)]
pub(crate) struct WorkerOptions {
    pub(crate) access: String,
    pub(crate) name: String,
    pub(crate) seed: u64,
}

impl WorkerOptions {
    pub(crate) fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut next = || args.next().ok_or_else(|| "worker ACCESS NAME SEED".to_owned());
        let (access, name, seed) = (next()?, next()?, next()?);
        Ok(Self { access, name, seed: seed.parse().map_err(|_| format!("`{seed}` is no seed"))? })
    }
}

/// The record with this number: fixed length, so that a torn one is seen.
pub(crate) fn record(name: &str, number: u64) -> String {
    format!("{:<63}\n", format!("record {number} of {name}"))
}

/// The shared counter.
pub(crate) const COUNTER: &str = "/counter";

/// The file whose blocks this worker overwrites again and again.
pub(crate) fn hot_file(node: &str) -> String {
    format!("/hot-{node}")
}

/// The file this worker appends to.
pub(crate) fn log_file(name: &str) -> String {
    format!("/log-{name}")
}

pub(crate) fn main(options: &WorkerOptions) -> ExitCode {
    let (sender, commands) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    match work(options, &commands) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("E {error}"));
            ExitCode::FAILURE
        }
    }
}

fn say(line: &str) {
    let mut out = io::stdout().lock();
    // The demo is gone if this fails; the death signal ends us.
    let _gone = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// Works until standard input says `stop` or ends.
fn work(options: &WorkerOptions, commands: &Receiver<String>) -> io::Result<()> {
    let mut access = Access::open(&options.access)?;
    let node = options.name.split('-').next().unwrap_or_default();
    let (log, hot) = (log_file(&options.name), hot_file(node));
    let mut random = quorate_membership::Rng::new(options.seed);
    let (mut records, mut increments, mut blocks) = (0, 0, 0);
    loop {
        match commands.try_recv() {
            Ok(command) if command == "stop" => return Ok(()),
            Ok(command) => {
                // `probe PATH`: a write that needs a lock another node holds or held.
                if let Some(path) = command.strip_prefix("probe ") {
                    access.overwrite_sync(path, format!("probed by {}\n", options.name).as_bytes())?;
                    say(&format!("P {}", boottime_ns()));
                }
            }
            Err(TryRecvError::Disconnected) => return Ok(()),
            Err(TryRecvError::Empty) => (),
        }
        match random.below(8) {
            0 => {
                increments += 1;
                say(&format!("T {increments}"));
                say(&format!("C {}", access.increment(COUNTER)?));
            }
            1 | 2 => {
                blocks += 1;
                access.overwrite_sync(&hot, record(&options.name, blocks).repeat(64).as_bytes())?;
                say(&format!("W {blocks}"));
            }
            _ => {
                records += 1;
                let start = boottime_ns();
                access.append_sync(&log, record(&options.name, records).as_bytes())?;
                say(&format!("A {records}"));
                say(&format!("L {start} {}", boottime_ns().saturating_sub(start) / 1000));
            }
        }
    }
}
