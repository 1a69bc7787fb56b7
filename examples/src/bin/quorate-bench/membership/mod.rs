//! Membership's rows: messages between two nodes, ordered messages among three, bulk, forming and the loss of a node.

mod peer;

use crate::Options;
use crate::child::Process;
use crate::echo::round_trips;
use crate::node::{self, TempDir};
use crate::sample::Sample;
use crate::table::{Bar, Better, Row, Table};
use quorate_membership::driver::boottime;
use std::error::Error;

pub(crate) use peer::run as peer;

const ROUNDS: u32 = 10_000;
const BULK_MS: u64 = 1_000;
const FLIGHT: u64 = 128;

/// Nodes in processes of their own, all members.
struct Cluster {
    dir: TempDir,
    nodes: Vec<Process>,
    /// From the start of the first process to the lease of the last node with all as members, in milliseconds.
    formed_ms: f64,
}

impl Cluster {
    fn start(cpus: &[&str]) -> Result<Self, Box<dyn Error>> {
        let dir = TempDir::new()?;
        let count = u32::try_from(cpus.len())?;
        node::create(dir.path(), count)?;
        let path = dir.path().to_string_lossy().into_owned();
        let begin = boottime().0 as f64;
        let (mut nodes, mut contacts): (Vec<Process>, Vec<String>) = (Vec::new(), Vec::new());
        for (id, cpu) in (1..=count).zip(cpus) {
            let mut args = vec![path.clone(), id.to_string(), (*cpu).to_owned()];
            args.extend(contacts.iter().cloned());
            let mut process = Process::start("peer", &args)?;
            contacts.push(format!("{id}@{}", process.expect("ready")?));
            nodes.push(process);
        }
        for process in &mut nodes {
            process.order(&format!("join {count}"))?;
        }
        let mut last = begin;
        for process in &mut nodes {
            last = last.max(figure(&process.answer()?, 0)?);
        }
        Ok(Self { dir, nodes, formed_ms: (last - begin) / 1e6 })
    }

    fn node(&mut self, id: usize) -> Result<&mut Process, Box<dyn Error>> {
        Ok(self.nodes.get_mut(id - 1).ok_or("no such node")?)
    }
}

fn figure(figures: &[f64], at: usize) -> Result<f64, Box<dyn Error>> {
    Ok(*figures.get(at).ok_or("a figure is missing")?)
}

/// Measures the rows that are wanted.
pub(crate) fn measure(options: &Options) -> Result<Table, Box<dyn Error>> {
    let mut table = Table::default();
    messages(options, &mut table)?;
    bulk(options, &mut table)?;
    groups(options, &mut table)?;
    views(options, &mut table)?;
    Ok(table)
}

struct Line<'a> {
    key: &'static str,
    what: String,
    unit: &'static str,
    better: Better,
    peer: Option<&'a str>,
}

fn add(table: &mut Table, line: Line<'_>, ours: Sample, peer: Sample, bar: Bar) {
    let Line { key, what, unit, better, peer: name } = line;
    table.add(Row { key, what, unit, better, ours, peer: name.map(|n| (n.to_owned(), peer)), bar });
}

/// One message there and one back, over a session.
fn messages(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    if !options.wants("message") {
        return Ok(());
    }
    for (cpus, at) in [(["0", "0"], "one CPU"), (["0", "1"], "a CPU each")] {
        let mut cluster = Cluster::start(&cpus)?;
        let (mut ours, mut echo) =
            ([Sample::default(), Sample::default()], [Sample::default(), Sample::default()]);
        cluster.node(2)?.ask("ping 2000")?;
        for _ in 0..options.runs {
            let (p50, p99) = round_trips(cluster.dir.path(), "tcp", cpus, ROUNDS)?;
            echo[0].add(p50 / 1e3);
            echo[1].add(p99 / 1e3);
            let figures = cluster.node(2)?.ask(&format!("ping {ROUNDS}"))?;
            ours[0].add(figure(&figures, 0)? / 1e3);
            ours[1].add(figure(&figures, 1)? / 1e3);
        }
        let [echo50, echo99] = echo;
        let [p50, p99] = ours;
        for (percent, ours, echo) in [("p50", p50, echo50), ("p99", p99, echo99)] {
            let what = format!("message and answer over a session, {percent}, {at}");
            let peer = Some("echo of a message of that size over TCP with TLS");
            add(
                table,
                Line { key: "message", what, unit: "us", better: Better::Less, peer },
                ours,
                echo,
                Bar::None,
            );
        }
    }
    Ok(())
}

/// As much as a session takes, and what a small message waits for beside it.
fn bulk(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    if !options.wants("bulk") {
        return Ok(());
    }
    let mut cluster = Cluster::start(&["0", "1"])?;
    let mut samples: [Sample; 5] = Default::default();
    cluster.node(2)?.ask("bulk 300")?;
    for _ in 0..options.runs {
        samples[0].add(figure(&cluster.node(2)?.ask(&format!("bulk {BULK_MS}"))?, 0)? / 1e6);
        samples[1].add(stream_rate(cluster.dir.path())? / 1e6);
        samples[2].add(figure(&cluster.node(2)?.ask("ping 2000")?, 1)? / 1e3);
        let beside = cluster.node(2)?.ask(&format!("beside {BULK_MS}"))?;
        samples[3].add(figure(&beside, 1)? / 1e3);
        samples[4].add(figure(&beside, 2)? / 1e6);
    }
    let [rate, stream, idle, beside, lease] = samples;
    let mut whole = Sample::default();
    whole.add(quorate_membership::machine::Config::lan().lease().as_secs_f64() * 1e3);
    let line =
        |what: &str, unit, better, peer| Line { key: "bulk", what: what.to_owned(), unit, better, peer };
    let what = "messages of 64 KiB over a session, a CPU each";
    add(
        table,
        line(what, "MB/s", Better::More, Some("the same bytes over TCP with TLS")),
        rate,
        stream,
        Bar::None,
    );
    let what = "a small message and its answer beside that, p99";
    add(table, line(what, "us", Better::Less, Some("without the bulk")), beside, idle, Bar::None);
    let what = "the least that was left of the lease beside that";
    add(table, line(what, "ms", Better::More, Some("the whole lease")), lease, whole, Bar::None);
    Ok(())
}

fn stream_rate(dir: &std::path::Path) -> Result<f64, Box<dyn Error>> {
    let dir = dir.to_string_lossy().into_owned();
    let mut sink = Process::start("stream-sink", &[dir.clone(), "1".into(), "0".into()])?;
    let address = sink.expect("ready")?;
    let mut source =
        Process::start("stream-source", &[dir, "2".into(), "1".into(), address, BULK_MS.to_string()])?;
    figure(&source.answer()?, 0)
}

/// Ordered messages among three processes of three nodes.
fn groups(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    if !options.wants("group") {
        return Ok(());
    }
    let mut cluster = Cluster::start(&["-", "-", "-"])?;
    for node in &mut cluster.nodes {
        node.order("group 3")?;
    }
    for node in &mut cluster.nodes {
        node.answer()?;
    }
    let mut samples: [Sample; 4] = Default::default();
    for node in 2..=3 {
        cluster.node(node)?.ask("cast 500")?;
    }
    for _ in 0..options.runs {
        samples[0].add(figure(&cluster.node(3)?.ask(&format!("cast {}", ROUNDS / 4))?, 0)? / 1e3);
        samples[1].add(figure(&cluster.node(3)?.ask(&format!("ping {}", ROUNDS / 4))?, 0)? / 1e3);
        samples[2].add(figure(&cluster.node(3)?.ask(&format!("flood {FLIGHT} {BULK_MS}"))?, 0)?);
        samples[3].add(figure(&cluster.node(3)?.ask(&format!("many {FLIGHT} {BULK_MS}"))?, 0)?);
    }
    let [cast, ping, flood, many] = samples;
    let line = |what: String, unit, better, peer| Line { key: "group", what, unit, better, peer: Some(peer) };
    let what = "totally ordered among three nodes, sent to own delivery, p50".to_owned();
    let peer = "a message and its answer over a session";
    add(table, line(what, "us", Better::Less, peer), cast, ping, Bar::None);
    let what = format!("totally ordered among three nodes, {FLIGHT} under way");
    let peer = "messages and answers of two, as many under way";
    add(table, line(what, "/s", Better::More, peer), flood, many, Bar::None);
    Ok(())
}

/// Forming, and what a SIGKILL of a member costs.
fn views(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    if !options.wants("view") {
        return Ok(());
    }
    let (mut formed, mut removed, mut limit) = (Sample::default(), Sample::default(), Sample::default());
    for _ in 0..options.runs {
        let mut cluster = Cluster::start(&["-", "-", "-"])?;
        formed.add(cluster.formed_ms);
        // A connection that is not there yet cannot be found lost.
        for node in 1..=3 {
            cluster.node(node)?.ask("meet")?;
        }
        for node in 1..=2 {
            cluster.node(node)?.order("loss 2")?;
        }
        let at = boottime().0 as f64;
        cluster.node(3)?.kill()?;
        let mut last = at;
        for node in 1..=2 {
            last = last.max(figure(&cluster.node(node)?.answer()?, 0)?);
        }
        limit.add(quorate_membership::machine::Config::lan().detection.as_secs_f64() * 1e3);
        removed.add((last - at) / 1e6);
    }
    let line = |what: &str, peer| Line {
        key: "view",
        what: what.to_owned(),
        unit: "ms",
        better: Better::Less,
        peer,
    };
    let what = "three processes started to three members with their leases";
    add(table, line(what, None), formed, Sample::default(), Bar::AtMost(1_000.0));
    let what = "SIGKILL of a member to the view without it at both others";
    let peer = Some("the detection time that is set");
    add(table, line(what, peer), removed, limit, Bar::AtMost(1_000.0));
    Ok(())
}
