//! `cargo xtask bench dlm | membership`: measurements that print their peer or limit beside them, from the same run.

mod child;
mod dlm;
mod echo;
mod membership;
mod node;
mod sample;
mod table;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

/// What a run was asked for.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Rows to measure; all if empty. A row is chosen by its key or the start of it.
    pub(crate) only: Vec<String>,
    /// Where the JSON goes.
    pub(crate) json: Option<PathBuf>,
    /// Runs per figure.
    pub(crate) runs: usize,
}

impl Options {
    /// Whether a row is wanted.
    pub(crate) fn wants(&self, key: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| key.starts_with(o.as_str()))
    }
}

const HELP: &str = "\
usage: cargo xtask bench dlm|membership [--only ROW]... [--runs N] [--json FILE]

Each figure is the median of N runs (5 by default) with the smallest and the largest, beside its peer's or limit's
figure from the same runs. It wants a quiet machine: what else runs is measured too.
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<(), Box<dyn Error>> {
    let Some((name, rest)) = args.split_first() else {
        print!("{HELP}");
        return Ok(());
    };
    if name == "child" {
        return child(rest);
    }
    if matches!(name.as_str(), "-h" | "--help" | "help") {
        print!("{HELP}");
        return Ok(());
    }
    let options = parse(rest)?;
    let table = match name.as_str() {
        "dlm" => dlm::measure(&options)?,
        "membership" => membership::measure(&options)?,
        other => return Err(format!("there is no benchmark `{other}`: dlm | membership\n\n{HELP}").into()),
    };
    if table.is_empty() {
        return Err("no row of that name".into());
    }
    if let Some(path) = &options.json {
        std::fs::write(path, table.json(name)?)?;
    }
    Ok(())
}

/// A process that a measurement started.
fn child(args: &[String]) -> Result<(), Box<dyn Error>> {
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("echo-server") => echo::server(rest),
        Some("echo-client") => echo::client(rest),
        Some("stream-sink") => echo::sink(rest),
        Some("stream-source") => echo::source(rest),
        Some("peer") => membership::peer(rest),
        _ => dlm::child(args),
    }
}

fn parse(args: &[String]) -> Result<Options, Box<dyn Error>> {
    let mut options = Options { runs: 5, ..Options::default() };
    let mut words = args.iter();
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} wants a value\n\n{HELP}"))?;
        match word.as_str() {
            "--only" => options.only.push(value.clone()),
            "--json" => options.json = Some(value.into()),
            "--runs" => {
                options.runs = value.parse().map_err(|_| format!("--runs: `{value}` is no number"))?
            }
            other => return Err(format!("`{other}` is not known\n\n{HELP}").into()),
        }
    }
    options.runs = options.runs.max(1);
    Ok(options)
}
