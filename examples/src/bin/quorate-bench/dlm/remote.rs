//! Locks that another node masters, over loopback with mutual TLS: one at a time, and a thousand under way.

use super::member::NAMES;
use super::{etcd, redis};
use crate::Options;
use crate::child::Process;
use crate::echo::round_trips;
use crate::node::{self, TempDir};
use crate::sample::Sample;
use crate::table::{Bar, Better, Row, Table};
use std::error::Error;
use std::time::Duration;

const ROUNDS: u32 = 20_000;
/// Operations under way in the throughput rows.
pub(crate) const FLIGHT: u64 = 1_000;
/// How long one throughput run lasts.
pub(crate) const RUN_MS: u64 = 1_000;

/// Both processes on one CPU.
const PINNED: [&str; 2] = ["0", "0"];
/// One CPU each.
const APART: [&str; 2] = ["0", "1"];

/// Two nodes: the first masters the names, the second asks.
pub(crate) struct Pair {
    _dir: TempDir,
    _master: Process,
    pub(crate) user: Process,
}

impl Pair {
    pub(crate) fn start(cpus: [&str; 2], transport: &str) -> Result<Self, Box<dyn Error>> {
        let dir = TempDir::new()?;
        node::create(dir.path(), 2)?;
        let path = dir.path().to_string_lossy().into_owned();
        let args = |id: &str, cpu: &str| vec![path.clone(), id.into(), cpu.into(), transport.to_owned()];
        let mut master = Process::start("member", &args("1", cpus[0]))?;
        let address = master.expect("ready")?;
        let mut words = args("2", cpus[1]);
        words.push(format!("1@{address}"));
        let mut user = Process::start("member", &words)?;
        user.expect("ready")?;
        for process in [&mut master, &mut user] {
            process.order("join 2")?;
        }
        for process in [&mut master, &mut user] {
            process.answer()?;
        }
        // Kept at NL, so that the names stay mastered there.
        master.ask(&format!("hold 0 {NAMES} NL"))?;
        Ok(Self { _dir: dir, _master: master, user })
    }
}

fn micros(ns: f64) -> f64 {
    ns / 1e3
}

pub(crate) fn measure(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    for (key, what, cpus, kind, bar) in [
        ("remote-pinned", "both nodes on one CPU", PINNED, "tcp", Bar::Within(1.2)),
        ("remote-apart", "a CPU each, asleep between messages", APART, "tcp", Bar::None),
        ("remote-busy", "a CPU each, both busy-polling", APART, "tcp-busy", Bar::None),
    ] {
        if options.wants(key) {
            round_trip(options, table, (key, what, bar), cpus, kind)?;
        }
    }
    if options.wants("flight") {
        flight(options, table)?;
    }
    if options.wants("parts") {
        parts(options, table)?;
    }
    Ok(())
}

fn round_trip(
    options: &Options,
    table: &mut Table,
    (key, what, bar): (&'static str, &str, Bar),
    cpus: [&str; 2],
    kind: &str,
) -> Result<(), Box<dyn Error>> {
    let (mut ours, mut echo) = (Sample::default(), Sample::default());
    let certificates = TempDir::new()?;
    node::create(certificates.path(), 2)?;
    let mut pair = Pair::start(cpus, kind)?;
    pair.user.ask("ping 2000")?;
    for _ in 0..options.runs {
        echo.add(micros(round_trips(certificates.path(), "tcp", cpus, ROUNDS)?.0));
        ours.add(micros(*pair.user.ask(&format!("ping {ROUNDS}"))?.first().ok_or("no figure")?));
    }
    table.add(Row {
        key,
        what: format!("lock mastered on another node, mutual TLS, p50: {what}"),
        unit: "us",
        better: Better::Less,
        ours,
        peer: Some(("echo of a message of that size over TCP with TLS".into(), echo)),
        bar,
    });
    Ok(())
}

fn flight(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    let (mut queue, mut plain) = (Sample::default(), Sample::default());
    let (mut beside_redis, mut beside_etcd) = (Sample::default(), Sample::default());
    let (mut redis_rate, mut etcd_rate) = (Sample::default(), Sample::default());
    let run = Duration::from_millis(RUN_MS);
    let mut pair = Pair::start(["-", "-"], "tcp")?;
    pair.user.ask(&format!("queue {FLIGHT} 300"))?;
    let ours = |pair: &mut Pair, kind: &str| -> Result<f64, Box<dyn Error>> {
        Ok(*pair.user.ask(&format!("{kind} {FLIGHT} {RUN_MS}"))?.first().ok_or("no figure")?)
    };
    for _ in 0..options.runs {
        queue.add(ours(&mut pair, "queue")?);
        plain.add(ours(&mut pair, "plain")?);
    }
    let row = |what: String, ours, peer: Option<(&str, Sample)>, bar| {
        let peer = peer.map(|(name, sample)| (name.to_owned(), sample));
        Row { key: "flight", what, unit: "pairs/s", better: Better::More, ours, peer, bar }
    };
    let what = format!("{FLIGHT} under way, one connection, completion queue, released without reply");
    let peer = Some(("the plain interface: a callback and a message for each", plain));
    table.add(row(what, queue, peer, Bar::AtLeast(500_000.0)));
    if let Some((_server, mut stream)) = redis::start()? {
        for _ in 0..options.runs {
            redis_rate.add(redis::rate(&mut stream, run)?);
            beside_redis.add(ours(&mut pair, "queue")?);
        }
        let peer = Some(("Redis, one connection, as many under way; lost in a crash, no token", redis_rate));
        table.add(row("the same beside Redis".into(), beside_redis, peer, Bar::Faster(2.0)));
    } else {
        table.skip("flight", "redis-server is not installed");
    }
    if let Some((_servers, mut client)) = etcd::start()? {
        let mut best = (0.0, 0);
        for flight in [16, 64, 256] {
            let rate = client.rate(flight, run / 2)?;
            if best.0 < rate {
                best = (rate, flight);
            }
        }
        for _ in 0..options.runs {
            etcd_rate.add(client.rate(best.1, run)?);
        }
        for _ in 0..options.runs {
            beside_etcd.add(ours(&mut pair, "queue")?);
        }
        let name = format!("etcd, 3 members on tmpfs, {} under way, its best; durable, with a token", best.1);
        let peer = Some((name.as_str(), etcd_rate));
        table.add(row("the same beside etcd".into(), beside_etcd, peer, Bar::Faster(100.0)));
    } else {
        table.skip("flight", "etcd is not installed");
    }
    Ok(())
}

/// The price of the parts: the same lock operation through more and more of them.
fn parts(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    in_one_host(options, table)?;
    let certificates = TempDir::new()?;
    node::create(certificates.path(), 2)?;
    for (kind, cpus, name, where_) in [
        ("raw", PINNED, "TCP", "pinned"),
        ("tcp", PINNED, "TCP with TLS", "pinned"),
        ("quic", PINNED, "QUIC", "pinned"),
        ("tcp", APART, "TCP with TLS", "a CPU each"),
        ("quic", APART, "QUIC", "a CPU each"),
    ] {
        let mut echo = [Sample::default(), Sample::default()];
        let mut ours = [Sample::default(), Sample::default()];
        // A lock never goes over TCP without TLS: there the echo alone is shown.
        let mut pair = if kind == "raw" { None } else { Some(Pair::start(cpus, kind)?) };
        for _ in 0..options.runs {
            let (p50, p99) = round_trips(certificates.path(), kind, cpus, ROUNDS / 4)?;
            echo[0].add(micros(p50));
            echo[1].add(micros(p99));
            if let Some(pair) = &mut pair {
                let figures = pair.user.ask(&format!("ping {}", ROUNDS / 4))?;
                for (sample, figure) in ours.iter_mut().zip(&figures) {
                    sample.add(micros(*figure));
                }
            }
        }
        if pair.is_some() {
            part(table, &format!("lock over {name}, {where_}"), ours, Some(echo));
        } else {
            part(table, &format!("echo over {name}, {where_}"), echo, None);
        }
    }
    Ok(())
}

fn part(table: &mut Table, what: &str, ours: [Sample; 2], peer: Option<[Sample; 2]>) {
    let mut peers = peer.into_iter().flatten();
    for (ours, percent) in ours.into_iter().zip(["p50", "p99"]) {
        let peer = peers.next().map(|p| ("echo of a message of that size".to_owned(), p));
        let (what, better) = (format!("{what}, {percent}"), Better::Less);
        table.add(Row { key: "parts", what, unit: "us", better, ours, peer, bar: Bar::None });
    }
}

/// Within the node's process, and from a program of the same host through the node's lock service.
fn in_one_host(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    let dir = TempDir::new()?;
    node::create(dir.path(), 1)?;
    let path = dir.path().to_string_lossy().into_owned();
    let args = |cpu: &str| vec![path.clone(), "1".into(), cpu.to_owned(), "tcp".to_owned()];
    for (cpus, where_) in [(PINNED, "pinned"), (APART, "a CPU each")] {
        let mut node = Process::start("member", &args(cpus[0]))?;
        node.expect("ready")?;
        node.ask("join 1")?;
        node.ask("serve")?;
        let (mut inside, mut outside): ([Sample; 2], [Sample; 2]) = Default::default();
        let mut echo: [Sample; 2] = Default::default();
        let add = |to: &mut [Sample; 2], figures: &[f64]| {
            to.iter_mut().zip(figures).for_each(|(s, f)| s.add(micros(*f)));
        };
        for _ in 0..options.runs {
            add(&mut inside, &node.ask(&format!("ping {ROUNDS}"))?);
            let count = (ROUNDS / 4).to_string();
            let mut program = Process::start("program", &[path.clone(), cpus[1].to_owned(), count])?;
            add(&mut outside, &program.answer()?);
            let (p50, p99) = round_trips(TempDir::new()?.path(), "unix", cpus, ROUNDS / 4)?;
            add(&mut echo, &[p50, p99]);
        }
        if cpus == PINNED {
            part(table, "lock within the process", inside, None);
        }
        part(table, &format!("lock over a Unix socket, {where_}"), outside, Some(echo));
    }
    Ok(())
}
