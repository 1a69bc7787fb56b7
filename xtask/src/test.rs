//! `cargo xtask test`: installs what the tests need if asked to, runs all of them, and says what was left out.

use crate::run::{cargo, has_program, root, run, show, target_dir};
use crate::sim;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Debian packages of the interop tests, with a program by which each is recognised.
const PACKAGES: [(&str, &str); 10] = [
    ("gfs2-utils", "fsck.gfs2"),
    ("lvm2", "vgs"),
    ("libnbd-bin", "nbdinfo"),
    ("nbdkit", "nbdkit"),
    ("qemu-utils", "qemu-img"),
    ("fuse3", "fusermount3"),
    ("user-mode-linux", "linux.uml"),
    ("resource-agents", "ocf-tester"),
    ("fence-agents", "fence_dummy"),
    ("fio", "fio"),
];

/// What one part of the run came to.
#[derive(Default)]
struct Outcome {
    passed: usize,
    failed: usize,
    skipped: Vec<String>,
    error: Option<String>,
}

pub(crate) fn test(args: &[String]) -> Result<(), String> {
    let install = match args {
        [] => false,
        [one] if one == "--install" => true,
        _ => return Err(format!("test: `{}`: only --install is known", args.join(" "))),
    };
    packages(install)?;
    let ci = std::env::var_os("CI").is_some();
    let mut parts: Vec<(String, Part)> = Vec::new();
    let mut all = cargo();
    all.args([
        "test",
        "--workspace",
        "--all-features",
        "--no-fail-fast",
        "--",
        "--show-output",
        "--test-threads=2",
    ]);
    // The simulations come below, in release mode and with more seeds.
    for module in ["sim::", "simulation::", "stack::"] {
        all.args(["--skip", module]);
    }
    parts.push(("unit, property, scenario, process and interop tests".into(), Part::Command(all)));
    for name in examples()? {
        // Built by the part above, as cargo builds examples with the tests.
        let example = Command::new(target_dir().join("debug/examples").join(&name));
        parts.push((format!("example {name}"), Part::Command(example)));
    }
    parts.push(("all simulations, built".into(), Part::BuildSimulations));
    for (name, _, _) in sim::SIMULATIONS {
        parts.push((format!("simulation of {name}, 1,000 seeds"), Part::Simulation(name)));
    }
    let mut demo = cargo();
    demo.args(["run", "--quiet", "--package", "xtask", "--", "demo"]);
    parts.push(("the demo, with its build".into(), Part::Command(demo)));
    let mut programs = BTreeMap::new();
    let mut rows = Vec::new();
    let mut total = Outcome::default();
    for (name, part) in parts {
        let (outcome, seconds) = match part {
            Part::Command(command) => run_part(&name, Ok(command), ci),
            Part::Simulation(sim) => run_part(&name, sim::built(&programs, sim, "0..1000"), ci),
            Part::BuildSimulations => {
                println!("\n== {name}");
                let start = now();
                let mut outcome = Outcome::default();
                match sim::build_all() {
                    Ok(built) => programs = built,
                    Err(error) => outcome.error = Some(error),
                }
                (outcome, start.elapsed().as_secs_f64())
            }
        };
        let failed = outcome.failed + usize::from(outcome.error.is_some() && outcome.failed == 0);
        rows.push(format!("{:>7.1} s  {:>5} passed  {failed:>3} failed  {name}", seconds, outcome.passed));
        total.passed += outcome.passed;
        total.failed += failed;
        total.skipped.extend(outcome.skipped);
    }
    println!("\n{}", rows.join("\n"));
    for skip in &total.skipped {
        println!("{skip}");
    }
    println!("{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped.len());
    if total.failed == 0 { Ok(()) } else { Err(format!("{} tests failed", total.failed)) }
}

/// One part of the run.
enum Part {
    Command(Command),
    BuildSimulations,
    Simulation(&'static str),
}

#[expect(clippy::disallowed_methods, reason = "a command for people prints how long its parts took")]
fn now() -> Instant {
    Instant::now()
}

fn run_part(name: &str, command: Result<Command, String>, ci: bool) -> (Outcome, f64) {
    match command {
        Ok(mut command) => {
            if ci {
                command.env("QUORATE_NO_SKIP", "1");
            }
            println!("\n== {name}: {}", show(&command));
            timed(&mut command)
        }
        Err(error) => {
            println!("\n== {name}: {error}");
            (Outcome { error: Some(error), ..Outcome::default() }, 0.0)
        }
    }
}

/// The examples, one for each crate.
fn examples() -> Result<Vec<String>, String> {
    let folder = root().join("examples/examples");
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

pub(crate) fn interop() -> Result<(), String> {
    packages(false)?;
    let mut command = cargo();
    command.args(["test", "--workspace", "--all-features", "--", "--show-output", "--test-threads=1"]);
    // Where the tests against the field's own tools are.
    command.args(["interop", "tools", "agents", "agent::", "fsck", "rescue"]);
    run(&mut command)
}

/// Lists the packages and what is there of them; installs the missing ones if asked to.
fn packages(install: bool) -> Result<(), String> {
    let missing: Vec<&str> =
        PACKAGES.iter().filter(|(_, program)| !has_program(program)).map(|(package, _)| *package).collect();
    println!("Debian packages of the interop tests: {}", PACKAGES.map(|(p, _)| p).join(" "));
    if missing.is_empty() {
        println!("all are installed");
        return Ok(());
    }
    println!("not installed: {}", missing.join(" "));
    if !install {
        println!(
            "tests that need them are skipped by name; `cargo xtask test --install` installs them (root, Debian)"
        );
        return Ok(());
    }
    if !has_program("apt-get") {
        return Err("--install needs Debian's apt-get, which is not here".into());
    }
    run(Command::new("apt-get").args(["update", "-q"]))?;
    run(Command::new("apt-get")
        .args(["install", "-q", "-y", "--no-install-recommends"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Runs one part, passing on its output and counting what the test runner says in it.
fn timed(command: &mut Command) -> (Outcome, f64) {
    let start = now();
    let mut outcome = Outcome::default();
    match command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn() {
        Ok(mut child) => {
            if let Some(stdout) = child.stdout.take() {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    count(&line, &mut outcome);
                    println!("{line}");
                }
            }
            match child.wait() {
                Ok(status) if status.success() => (),
                Ok(status) => outcome.error = Some(status.to_string()),
                Err(error) => outcome.error = Some(error.to_string()),
            }
        }
        Err(error) => outcome.error = Some(error.to_string()),
    }
    if let Some(error) = &outcome.error {
        println!("== {}: {error}", show(command));
    }
    (outcome, start.elapsed().as_secs_f64())
}

/// Reads `test result: ok. 3 passed; 0 failed; …`, `proof …` lines of the demo, and `SKIP: …`.
fn count(line: &str, outcome: &mut Outcome) {
    if let Some(rest) = line.strip_prefix("test result: ") {
        let number = |what: &str| {
            rest.split(what)
                .next()
                .and_then(|b| b.split_whitespace().last())
                .and_then(|n| n.parse().ok())
                .unwrap_or(0)
        };
        outcome.passed += number(" passed");
        outcome.failed += number(" failed");
    } else if line.trim_start().starts_with("SKIP: ") {
        outcome.skipped.push(line.trim_start().to_owned());
    }
}
