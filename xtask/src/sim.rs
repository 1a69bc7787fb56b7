//! `cargo xtask sim`, `model` and `bench`: the simulations by seed, the exhaustive explorations, the measurements.

use crate::run::{cargo, root, run, show};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Simulations: the name people use, the package, the test in it.
pub(crate) const SIMULATIONS: [(&str, &str, &str); 9] = [
    ("membership", "quorate-membership", "sim"),
    ("sessions", "quorate-membership", "session::"),
    ("groups", "quorate-membership", "groups::"),
    ("dlm", "quorate-dlm", "sim"),
    ("fencing", "quorate-fencing", "sim"),
    ("ccs", "quorate-ccs", "sim"),
    ("gnbd", "quorate-gnbd", "sim"),
    ("failover", "quorate-failover", "sim"),
    ("stack", "quorate-failover", "stack"),
];

/// Seeds of one run, unless told otherwise.
const SEEDS_DEFAULT: &str = "0..1000";

pub(crate) fn sim(args: &[String]) -> Result<(), String> {
    let name = args.first().ok_or_else(|| format!("which simulation? {}", names()))?;
    if name == "scale" {
        return scale(args.get(1..).unwrap_or_default());
    }
    let mut seeds = ("QUORATE_SEEDS", SEEDS_DEFAULT.to_owned());
    let mut rest = args.get(1..).unwrap_or_default().iter();
    while let Some(word) = rest.next() {
        let value = rest.next().ok_or_else(|| format!("{word} wants a value"))?;
        seeds = match word.as_str() {
            "--seeds" if value.contains("..") => ("QUORATE_SEEDS", value.clone()),
            "--seed" => ("QUORATE_SEED", value.clone()),
            _ => return Err(format!("`{word} {value}`: --seeds A..B or --seed N is wanted")),
        };
    }
    run(&mut command(name, seeds.0, &seeds.1)?)
}

/// `sim scale [--nodes N]`: a large cluster in one process, with a table of views, messages and bytes.
fn scale(args: &[String]) -> Result<(), String> {
    let nodes = match args {
        [] => "1000",
        [word, nodes] if word == "--nodes" && nodes.parse::<u32>().is_ok_and(|n| 40 <= n) => nodes,
        _ => return Err(format!("`{}`: --nodes N is wanted, at least 40", args.join(" "))),
    };
    let mut command = cargo();
    command.args(["test", "--release", "--package", "quorate-membership", "--test", "it"]);
    command.args(["--no-default-features", "--features", "sim", "--", "--nocapture", "scale"]);
    run(command.env("QUORATE_SCALE", nodes))
}

/// `campaign suspicion [--minutes N]`: real processes on a machine that has other things to do.
pub(crate) fn campaign(args: &[String]) -> Result<(), String> {
    let minutes = match args {
        [name] if name == "suspicion" => "60",
        [name, word, minutes] if name == "suspicion" && word == "--minutes" => minutes,
        _ => return Err("campaign: `suspicion [--minutes N]` is wanted".into()),
    };
    let mut command = cargo();
    command.args([
        "run",
        "--release",
        "--quiet",
        "--package",
        "quorate-membership",
        "--example",
        "suspicion",
    ]);
    run(command.args(["--", "--minutes", minutes]))
}

/// The command that runs one simulation.
pub(crate) fn command(name: &str, variable: &str, value: &str) -> Result<Command, String> {
    let (_, package, test) = SIMULATIONS
        .iter()
        .find(|(n, _, _)| *n == name)
        .ok_or_else(|| format!("there is no simulation `{name}`: {}", names()))?;
    let mut command = cargo();
    command.args(["test", "--release", "--package", package, "--test", "it"]);
    command.args(["--no-default-features", "--features"]);
    command.arg(if *package == "quorate-gnbd" { "sim,server,client,pki" } else { "sim" });
    command.args(["--", "--nocapture", test]).env(variable, value);
    Ok(command)
}

/// Builds all simulations in one go, in release mode, and gives the test program of each package.
///
/// One build for all: with one for each, the crates they share would be compiled again for every set of features.
pub(crate) fn build_all() -> Result<BTreeMap<String, PathBuf>, String> {
    let mut command = cargo();
    command.args(["test", "--release", "--no-run", "--test", "it", "--no-default-features"]);
    let mut features = Vec::new();
    for (name, package, _) in SIMULATIONS {
        if exists(name) && !features.contains(&format!("{package}/sim")) {
            command.args(["--package", package]);
            features.push(format!("{package}/sim"));
            if package == "quorate-gnbd" {
                features.extend(["server", "client", "pki"].map(|f| format!("{package}/{f}")));
            }
        }
    }
    command.args(["--features", &features.join(","), "--message-format", "json-render-diagnostics"]);
    command.stdout(Stdio::piped());
    let output = command.output().map_err(|e| format!("cannot run {}: {e}", show(&command)))?;
    if !output.status.success() {
        return Err(format!("{} failed: {}", show(&command), output.status));
    }
    let programs: BTreeMap<String, PathBuf> =
        String::from_utf8_lossy(&output.stdout).lines().filter_map(program).collect();
    Ok(programs)
}

/// Package and program of a line in which cargo tells of a test program it built.
fn program(line: &str) -> Option<(String, PathBuf)> {
    let text = |key: &str| {
        let rest = line.split_once(&format!("\"{key}\":\""))?.1;
        rest.split('"').next().map(str::to_owned)
    };
    if text("reason")? != "compiler-artifact" {
        return None;
    }
    // `path+file:///…/dlm#quorate-dlm@0.1.0`
    let package = text("package_id")?.rsplit('#').next()?.split('@').next()?.to_owned();
    Some((package, PathBuf::from(text("executable")?)))
}

/// One simulation as a program that [`build_all`] built.
pub(crate) fn built(
    programs: &BTreeMap<String, PathBuf>,
    name: &str,
    seeds: &str,
) -> Result<Command, String> {
    let found = SIMULATIONS.iter().find(|(n, _, _)| *n == name);
    let (_, package, test) = found.ok_or_else(|| format!("there is no simulation `{name}`: {}", names()))?;
    let program =
        programs.get(*package).ok_or_else(|| format!("{package}: cargo told of no test program"))?;
    let mut command = Command::new(program);
    let folder = package.trim_start_matches("quorate-");
    command.args(["--nocapture", test]).env("QUORATE_SEEDS", seeds).current_dir(root().join(folder));
    Ok(command)
}

/// Whether the crate has its simulation in the tree.
pub(crate) fn exists(name: &str) -> bool {
    // The whole stack is simulated where everything it is made of is below.
    let (folder, files) = match name {
        "stack" => ("failover", &["stack"][..]),
        "sessions" => ("membership", &["session"][..]),
        "groups" => ("membership", &["groups"][..]),
        _ => (name, &["sim", "simulation"][..]),
    };
    let tests = root().join(folder).join("tests/it");
    files.iter().any(|f| tests.join(format!("{f}.rs")).is_file() || tests.join(f).join("mod.rs").is_file())
}

fn names() -> String {
    SIMULATIONS.map(|(n, _, _)| n).join(" | ")
}

/// Explorations: the name people use, and the package.
const MODELS: [(&str, &str); 2] = [("membership", "quorate-membership"), ("dlm", "quorate-dlm")];

/// States that an exploration looks at, unless told otherwise.
const STATES_DEFAULT: &str = "20000000";

pub(crate) fn model(args: &[String]) -> Result<(), String> {
    let wanted = "`model membership|dlm [--states N]` is wanted";
    let (name, states) = match args {
        [name] => (name, STATES_DEFAULT),
        [name, option, states] if option == "--states" => (name, states.as_str()),
        _ => return Err(wanted.into()),
    };
    let (_, package) = MODELS.iter().find(|(n, _)| n == name).ok_or(wanted)?;
    let mut command = cargo();
    command.args(["test", "--release", "--package", package, "--test", "model"]);
    command.args(["--no-default-features", "--features", "model", "--", "--nocapture", "--test-threads=1"]);
    run(command.env("QUORATE_MODEL_STATES", states))
}

pub(crate) fn bench(args: &[String]) -> Result<(), String> {
    let mut command = cargo();
    command
        .args(["run", "--release", "--quiet", "--package", "quorate", "--bin", "quorate-bench", "--"])
        .args(args);
    run(&mut command)
}

/// `cargo xtask scenario dlm FILE…`: plays scenario files; without files all that are in the tree.
pub(crate) fn scenario(args: &[String]) -> Result<(), String> {
    let Some(("dlm", files)) = args.split_first().map(|(name, rest)| (name.as_str(), rest)) else {
        return Err("which scenarios? dlm FILE…; the format is in docs/scenarios.md".to_owned());
    };
    let mut command = cargo();
    command.args([
        "test",
        "--quiet",
        "--package",
        "quorate-dlm",
        "--no-default-features",
        "--features",
        "sim",
    ]);
    command.args(["--test", "scenario", "--"]);
    for file in files {
        if file.starts_with('-') {
            command.arg(file);
        } else {
            // The program runs in its package's folder.
            let path = std::path::absolute(file).map_err(|e| format!("{file}: {e}"))?;
            command.arg(path);
        }
    }
    let status = command.stderr(std::process::Stdio::inherit()).status();
    let status = status.map_err(|e| format!("cannot run cargo: {e}"))?;
    if status.success() { Ok(()) } else { Err("a scenario does not hold".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_lines_name_package_and_program() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/dlm#quorate-dlm@0.1.0","target":{"kind":["test"]},"executable":"/w/target/release/deps/it-1f","fresh":true}"#;
        assert_eq!(program(line), Some(("quorate-dlm".into(), "/w/target/release/deps/it-1f".into())));
        let library = r#"{"reason":"compiler-artifact","package_id":"path+file:///w/dlm#quorate-dlm@0.1.0","executable":null,"fresh":true}"#;
        assert_eq!(program(library), None);
        assert_eq!(program(r#"{"reason":"build-finished","success":true}"#), None);
    }

    #[test]
    fn every_simulation_is_there() {
        for (name, _, _) in SIMULATIONS {
            assert!(exists(name), "{name}");
        }
    }
}
