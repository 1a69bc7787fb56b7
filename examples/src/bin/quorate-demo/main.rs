//! The main job on one machine: three nodes share a filesystem, one dies, nothing acknowledged is lost.
//!
//! `cargo xtask demo` builds and runs it. Everything it starts is a child of this process, in a process group of its own
//! that dies with it; everything it writes is below one temporary directory.

mod access;
mod children;
mod cluster;
mod late;
mod options;
mod proof;
mod steps;
mod timeline;
mod tree;
mod worker;

use std::process::ExitCode;

fn main() -> ExitCode {
    let options = match options::parse() {
        Ok(options::Parsed::Demo(options)) => options,
        Ok(options::Parsed::Worker(options)) => return worker::main(&options),
        Ok(options::Parsed::Help(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("quorate-demo: {message}");
            return ExitCode::from(2);
        }
    };
    children::die_on_signals();
    steps::run(&options)
}
