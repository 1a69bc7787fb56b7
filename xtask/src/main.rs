//! The workspace's own commands: `cargo xtask demo | test | check | tidy | sim | model | scenario | interop | bench`.
//!
//! The standard library alone, so that it builds in a second; the work is done by cargo and by the programs it builds.

mod check;
mod demo;
mod run;
mod sim;
mod test;
mod tidy;

use std::process::ExitCode;

const HELP: &str = "\
usage: cargo xtask COMMAND

  demo [OPTIONS]        build in release mode and run the main job on this machine; `demo --help` lists the options
  test [--install]      run every test; --install first installs the Debian packages the interop tests need (as root)
  check                 formatting, clippy and documentation without warnings, each crate alone, dependency bans
  tidy                  the rules on files: headers, sizes, links
  sim NAME [--seeds A..B | --seed N]
                        simulate membership | dlm | fencing | ccs | gnbd | failover | stack (1,000 seeds by default)
  sim scale [--nodes N] a cluster of 1,000 nodes in one process; prints views, messages and bytes per node
  campaign suspicion [--minutes N]
                        real nodes on a machine with all cores busy, for 60 minutes: counts false suspicions
  scenario dlm FILE…    play scenarios of the lock manager (docs/scenarios.md); -v prints every event
  model membership|dlm [--states N]
                        explore every behaviour of a small cluster; prints the states, and the way to a broken invariant
  interop               the tests against real tools alone
  bench [NAME]          measure; prints a table with the peer's or the limit's figure beside each of ours
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let outcome = match args.first().map(String::as_str) {
        Some("demo") => demo::demo(rest),
        Some("test") => test::test(rest),
        Some("check") => check::check(),
        Some("tidy") => tidy::tidy(),
        Some("sim") => sim::sim(rest),
        Some("campaign") => sim::campaign(rest),
        Some("scenario") => sim::scenario(rest),
        Some("model") => sim::model(rest),
        Some("interop") => test::interop(),
        Some("bench") => sim::bench(rest),
        Some("help" | "--help" | "-h") | None => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(other) => Err(format!("there is no command `{other}`\n\n{HELP}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
