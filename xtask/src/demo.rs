//! `cargo xtask demo`: builds the programs in release mode and lets `quorate-demo` run the main job.

use crate::run::{cargo, run, target_dir};
use std::os::unix::process::CommandExt;
use std::process::Command;

pub(crate) fn demo(args: &[String]) -> Result<(), String> {
    println!("building the programs in release mode");
    run(cargo().args(["build", "--release", "--package", "quorate", "--bins"]))?;
    let programs = target_dir().join("release");
    // The demo takes our place, so that Ctrl-C reaches it alone and its exit code is ours.
    let error = Command::new(programs.join("quorate-demo")).args(args).exec();
    Err(format!("cannot run {}: {error}", programs.join("quorate-demo").display()))
}
