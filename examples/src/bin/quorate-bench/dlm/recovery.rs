//! A node of three is killed: how long its locks take to be everybody's again, and what others notice of it.
//!
//! | names | locks | mastered by |
//! |---|---|---|
//! | A: 20,000 | one by the victim, one by a survivor | the victim |
//! | B: 20,000 | one by a survivor, one by the victim | that survivor |
//! | C: 20,000 | one by the other survivor | that one |
//!
//! which makes 100,000. The victim has another 200 in EX, which a survivor waits for. Meanwhile the other survivor locks and
//! unlocks names of the first that the victim never had.

use crate::Options;
use crate::child::Process;
use crate::node::{self, TempDir};
use crate::sample::Sample;
use crate::table::{Bar, Better, Row, Table};
use std::error::Error;

const PART: u64 = 20_000;
const WAITED: u64 = 200;
/// Names apart from all others.
const UNTOUCHED: u64 = 1_000_000;

struct Figures {
    recovered_ms: f64,
    p999_ms: f64,
    longest_ms: f64,
    turn_ms: f64,
    detected_ms: f64,
}

pub(crate) fn measure(options: &Options, table: &mut Table) -> Result<(), Box<dyn Error>> {
    if !options.wants("recovery") {
        return Ok(());
    }
    let mut samples: [Sample; 5] = Default::default();
    for _ in 0..options.runs {
        let f = once()?;
        let figures = [f.recovered_ms, f.p999_ms, f.longest_ms, f.turn_ms, f.detected_ms];
        samples.iter_mut().zip(figures).for_each(|(s, f)| s.add(f));
    }
    let rows = [
        (
            "100,000 locks, one node of three killed: fence's confirmation to the last grant",
            Bar::AtMost(300.0),
        ),
        ("untouched names meanwhile, p99.9", Bar::AtMost(5.0)),
        ("untouched names meanwhile, longest", Bar::AtMost(25.0)),
        ("longest turn of recovery in a shard", Bar::AtMost(1.0)),
        ("from the kill to the fence's confirmation", Bar::None),
    ];
    for ((what, bar), ours) in rows.into_iter().zip(samples) {
        let (what, better) = (what.to_owned(), Better::Less);
        table.add(Row { key: "recovery", what, unit: "ms", better, ours, peer: None, bar });
    }
    Ok(())
}

fn once() -> Result<Figures, Box<dyn Error>> {
    let dir = TempDir::new()?;
    node::create(dir.path(), 3)?;
    let path = dir.path().to_string_lossy().into_owned();
    let mut nodes: Vec<Process> = Vec::new();
    let mut contacts: Vec<String> = Vec::new();
    for id in 1..=3 {
        let mut args = vec![path.clone(), id.to_string(), "-".into(), "tcp".into()];
        args.extend(contacts.iter().cloned());
        let mut process = Process::start("member", &args)?;
        contacts.push(format!("{id}@{}", process.expect("ready")?));
        nodes.push(process);
    }
    for process in &mut nodes {
        process.order("join 3")?;
    }
    for process in &mut nodes {
        process.answer()?;
    }
    let [first, second, victim] = &mut nodes[..] else { return Err("three were started".into()) };
    let (a, b, c, waited) = (0, PART, 2 * PART, 3 * PART);
    let order = |process: &mut Process, from: u64, count: u64, mode: &str| {
        process.ask(&format!("hold {from} {} {mode}", from + count))
    };
    order(victim, a, PART, "PR")?;
    order(first, a, PART, "PR")?;
    order(first, b, PART, "PR")?;
    order(victim, b, PART, "PR")?;
    order(second, c, PART, "EX")?;
    order(victim, waited, WAITED, "EX")?;
    order(first, UNTOUCHED, 1_000, "NL")?;
    first.ask(&format!("wait {waited} {}", waited + WAITED))?;
    // Once before, so that it knows where the masters are: whom the directory has to be asked for may be the victim.
    second.ask(&format!("watch {UNTOUCHED} {} 500", UNTOUCHED + 1_000))?;
    second.order(&format!("watch {UNTOUCHED} {} 3000", UNTOUCHED + 1_000))?;
    let killed_at = quorate_membership::driver::boottime().0 as f64;
    victim.kill()?;
    let waits = first.answer()?;
    let watched = second.answer()?;
    let ([granted_at, first_turn], [_, fenced_at, closed_at, second_turn, _, p999, longest, _]) =
        (&waits[..], &watched[..])
    else {
        return Err(format!("figures are missing: {waits:?} {watched:?}").into());
    };
    if *fenced_at == 0.0 || *closed_at == 0.0 {
        return Err("the victim's debt was not closed within three seconds".into());
    }
    Ok(Figures {
        recovered_ms: (granted_at.max(*closed_at) - fenced_at) / 1e6,
        p999_ms: p999 / 1e6,
        longest_ms: longest / 1e6,
        turn_ms: first_turn.max(*second_turn) / 1e6,
        detected_ms: (fenced_at - killed_at) / 1e6,
    })
}
