//! `cargo xtask check`: everything about the code that can be judged without running it.

use crate::run::{cargo, run};
use std::time::Instant;

/// Our crates, without the programs.
pub(crate) const CRATES: [&str; 8] =
    ["membership", "fencing", "dlm", "ccs", "gnbd", "clvm", "gfs", "failover"];

/// What a crate without its default features must not pull in.
const BANNED_WITHOUT_DEFAULTS: [&str; 7] =
    ["tokio", "quinn", "rustls", "tokio-rustls", "fuser", "rcgen", "rustix"];

pub(crate) fn check() -> Result<(), String> {
    part("format", || run(cargo().args(["fmt", "--all", "--check"])))?;
    part("clippy", || {
        run(cargo().args([
            "clippy",
            "--workspace",
            "--all-features",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ]))
    })?;
    part("documentation", || {
        run(cargo()
            .args(["doc", "--workspace", "--all-features", "--no-deps"])
            .env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    for name in CRATES {
        let package = format!("quorate-{name}");
        part(&format!("{package} alone, without default features"), || {
            run(cargo().args(["check", "--package", &package, "--no-default-features"]))
        })?;
        part(&format!("{package} alone, with default features"), || {
            run(cargo().args(["check", "--package", &package]))
        })?;
        part(&format!("{package}: dependency ban"), || banned(&package))?;
    }
    part("packages", || {
        let mut command = cargo();
        command.args([
            "package",
            "--workspace",
            "--no-verify",
            "--allow-dirty",
            "--quiet",
            "--exclude",
            "xtask",
        ]);
        run(&mut command)
    })?;
    crate::tidy::tidy()
}

#[expect(clippy::disallowed_methods, reason = "a command for people prints how long its parts took")]
fn part(name: &str, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let start = Instant::now();
    println!("== {name}");
    work()?;
    println!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Fails if the package pulls in a runtime, a transport or the system's interface without its default features.
fn banned(package: &str) -> Result<(), String> {
    let mut command = cargo();
    command.args([
        "tree",
        "--package",
        package,
        "--no-default-features",
        "--edges",
        "normal",
        "--prefix",
        "none",
    ]);
    let output = command.output().map_err(|e| format!("cannot run cargo tree: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let tree = String::from_utf8_lossy(&output.stdout);
    let found: Vec<&str> = tree
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| BANNED_WITHOUT_DEFAULTS.contains(name))
        .collect();
    if found.is_empty() {
        Ok(())
    } else {
        Err(format!("{package} pulls in {} without its default features", found.join(", ")))
    }
}
