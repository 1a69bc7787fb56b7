//! Plays scenarios (`docs/scenarios.md`) on the local and on the distributed lock manager.
//!
//! ```text
//!   cargo test -p quorate-dlm --features sim --test scenario -- FILE…      these files; -v prints every event
//!   cargo test -p quorate-dlm --features sim --test scenario               all of tests/scenarios
//! ```

#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for people")]
#![allow(dead_code, reason = "the simulated world is shared with the simulation, which uses more of it")]

mod distributed;
mod format;
mod local;
mod player;
#[path = "../it/sim/world.rs"]
mod world;

use player::{Outcome, play};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// All scenarios of this crate whose name has one of the words in it, or all.
fn ours(words: &[String]) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let entries = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let mut files: Vec<PathBuf> = entries.filter(|f| f.extension().is_some_and(|e| e == "txt")).collect();
    files.retain(|f| words.is_empty() || words.iter().any(|w| f.to_string_lossy().contains(w.as_str())));
    files.sort();
    files
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_verbose = arguments.iter().any(|a| a == "-v");
    // The test runner's own options mean nothing here.
    let words: Vec<String> = arguments.into_iter().filter(|a| !a.starts_with('-')).collect();
    let (given, words): (Vec<String>, Vec<String>) =
        words.into_iter().partition(|a| a.contains('/') || a.ends_with(".txt"));
    let is_given = !given.is_empty();
    let files = if is_given { given.into_iter().map(PathBuf::from).collect() } else { ours(&words) };
    let (mut failed, mut played) = (0, [0, 0]);
    for file in &files {
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) => {
                eprintln!("{}: {error}", file.display());
                failed += 1;
                continue;
            }
        };
        let results = [
            play(&text, local::Local::new, is_verbose),
            play(&text, distributed::Distributed::new, is_verbose),
        ];
        let mut on = Vec::new();
        for (i, (result, name)) in results.into_iter().zip(["local", "distributed"]).enumerate() {
            match result {
                Ok(Outcome::Held) => {
                    played[i] += 1;
                    on.push(name);
                }
                Ok(Outcome::NotHere) => {}
                Err(error) => {
                    failed += 1;
                    eprintln!("{} on the {name} lock manager:\n{error}", file.display());
                }
            }
        }
        if is_given {
            println!(
                "{}: holds on {}",
                file.display(),
                if on.is_empty() { "none".into() } else { on.join(" and ") }
            );
        }
    }
    println!(
        "{} scenarios, {} on the local and {} on the distributed lock manager, {failed} failures",
        files.len(),
        played[0],
        played[1]
    );
    // A run of all that plays nothing proves nothing.
    let is_empty = !is_given && words.is_empty() && (played[0] < 40 || played[1] < 60);
    if failed == 0 && !is_empty { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
