//! What can be chosen on the command line.

use crate::worker::WorkerOptions;
use std::path::PathBuf;

const HELP: &str = "\
usage: cargo xtask demo [OPTIONS]

  --nodes N        3 to 5 nodes (default 3)
  --input DIR      the tree that is copied in (default: what cargo has downloaded; else one is generated)
  --seed N         the order of the workload, and of a generated tree (default 1)
  --keep           leave the cluster up and print the commands to play with it, until Ctrl-C
  --json FILE      write every step's time and every proof's result (keys: docs/demo.md)
  --no-fuse        go through each node's file API even where FUSE could be used
  --network A.B.C  the loopback network to use, such as 127.80.1 (default: chosen by process number)
  --strict-times   a missed time makes the exit code 3
";

/// How the demo runs.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) nodes: u32,
    pub(crate) input: Option<PathBuf>,
    pub(crate) seed: u64,
    pub(crate) keep: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) no_fuse: bool,
    pub(crate) strict_times: bool,
    pub(crate) network: Option<String>,
}

/// What was asked for.
#[derive(Debug)]
pub(crate) enum Parsed {
    Demo(Options),
    Worker(WorkerOptions),
    Help(String),
}

pub(crate) fn parse() -> Result<Parsed, String> {
    let mut args = std::env::args().skip(1).peekable();
    if args.peek().is_some_and(|a| a == "worker") {
        return WorkerOptions::parse(args.skip(1)).map(Parsed::Worker);
    }
    let mut options = Options {
        nodes: 3,
        input: None,
        seed: 1,
        keep: false,
        json: None,
        no_fuse: false,
        strict_times: false,
        network: None,
    };
    while let Some(word) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--help" | "-h" => return Ok(Parsed::Help(HELP.into())),
            "--keep" => options.keep = true,
            "--no-fuse" => options.no_fuse = true,
            "--strict-times" => options.strict_times = true,
            "--nodes" => options.nodes = number(&value()?)?,
            "--network" => options.network = Some(network(&value()?)?),
            "--seed" => options.seed = number(&value()?)?,
            "--input" => options.input = Some(value()?.into()),
            "--json" => options.json = Some(value()?.into()),
            _ => return Err(format!("unknown option `{word}`\n\n{HELP}")),
        }
    }
    if !(3..=5).contains(&options.nodes) {
        return Err(format!("--nodes {}: 3 to 5 nodes can be shown", options.nodes));
    }
    Ok(Parsed::Demo(options))
}

/// The first three numbers of a loopback network.
fn network(text: &str) -> Result<String, String> {
    match format!("{text}.0").parse::<std::net::Ipv4Addr>() {
        Ok(address) if address.is_loopback() => Ok(text.to_owned()),
        _ => Err(format!("--network {text}: the first three numbers of a loopback address are wanted")),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("`{text}` is not a number in range"))
}
