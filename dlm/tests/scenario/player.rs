//! Plays one scenario on one lock manager.

use crate::format::{Options, Told, describe, duration, matches, mode, options, words};
use quorate_dlm::{
    ConvertRequest, LockDump, LockError, LockId, LockName, LockRequest, Mode, Range, ResourceDump,
    UnlockRequest,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// Something this lock manager has not; the scenario is for others.
#[derive(Debug)]
pub(crate) struct NotHere;

/// What scenarios are played on.
pub(crate) trait World {
    fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError>;
    fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError>;
    fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError>;
    fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError>;
    fn exit(&mut self, node: u32, owner: u64);
    fn purge(&mut self, node: u32, of: u32, pid: u32);
    /// Whether there is such a node.
    fn has(&self, node: u32) -> bool;
    /// Lets everything happen that follows at once; nothing that time alone brings.
    fn settle(&mut self);
    /// Lets time pass.
    fn advance(&mut self, time: Duration);
    /// What locks were told since the last call.
    fn told(&mut self) -> Vec<(u32, LockId, Told)>;
    /// Deadlocks that were found and that nobody may end, since the last call.
    fn undecided(&mut self) -> Vec<Vec<(u32, LockId)>>;
    /// The resource at its master.
    /// Whether resources have masters, and mastery moves.
    const HAS_MASTERS: bool;
    fn show(&self, name: &LockName) -> Option<ResourceDump>;
    /// A failure, or the end of one.
    fn fault(&mut self, fault: Fault) -> Result<(), NotHere>;
}

/// What befalls nodes.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    Crash(u32),
    Restart(u32),
    Pause(u32),
    Resume(u32),
    Partition(Vec<Vec<u32>>),
    Heal,
    Fence(u32, bool),
    Replay(u32),
}

/// How a world is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) nodes: u32,
    /// The weakest mode that becomes a hold.
    pub(crate) holds: Option<Mode>,
    /// After how many uses in a row by another node mastery moves there; 0: never.
    pub(crate) moves: u16,
}

/// How a scenario went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Held,
    /// This lock manager has no such failures.
    NotHere,
}

enum Stop {
    Failed(String),
    NotHere,
}

impl From<String> for Stop {
    fn from(text: String) -> Self {
        Self::Failed(text)
    }
}

impl From<&str> for Stop {
    fn from(text: &str) -> Self {
        Self::Failed(text.to_owned())
    }
}

impl From<NotHere> for Stop {
    fn from(_: NotHere) -> Self {
        Self::NotHere
    }
}

struct Play<W> {
    world: W,
    labels: BTreeMap<String, (u32, LockId)>,
    events: Vec<(String, Vec<String>)>,
    shown: Option<LockName>,
    is_verbose: bool,
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, Stop> {
    word.parse().map_err(|_| Stop::Failed(format!("no number: {word}")))
}

impl<W: World> Play<W> {
    fn label(&self, at: (u32, LockId)) -> String {
        let label = self.labels.iter().find(|(_, found)| **found == at);
        label.map_or_else(|| format!("{}:{}", at.0, at.1.0), |(l, _)| l.clone())
    }

    fn listen(&mut self) {
        for (node, id, told) in self.world.told() {
            self.events.push((self.label((node, id)), describe(&told)));
        }
        for cycle in self.world.undecided() {
            let mut labels: Vec<String> = cycle.into_iter().map(|at| self.label(at)).collect();
            labels.sort();
            self.events.push(("undecided".to_owned(), labels));
        }
    }

    /// The events that came and were not expected, as lines of a diff.
    fn found(&self) -> String {
        let lines: Vec<String> =
            self.events.iter().map(|(l, e)| format!("+ expect {l} {}", e.join(" "))).collect();
        if lines.is_empty() { "+ expect nothing".to_owned() } else { lines.join("\n") }
    }

    fn line(&mut self, words: &[&str]) -> Result<(), Stop> {
        match words {
            ["expect", rest @ ..] => return self.expect(rest).map_err(Stop::Failed),
            ["expect-queue", rest @ ..] => return self.expect_queue(&rest.join(" ")).map_err(Stop::Failed),
            ["expect-master", node] => return self.expect_master(number(node)?),
            ["kernel", "expect", rest @ ..] => {
                // What Linux does; here it must be otherwise, or the line is no deviation any more.
                let before = self.events.clone();
                let same = self.expect(rest).is_ok();
                self.events = before;
                return if same { Err("this is what happens here too".into()) } else { Ok(()) };
            }
            ["show", name] => {
                let name = LockName::new(name.as_bytes()).map_err(|e| e.to_string())?;
                self.shown = Some(name);
                println!("{} {}", words[1], self.queues()?);
                return Ok(());
            }
            // What is to come may come meanwhile, or have come already.
            ["advance", time] => {
                self.world.advance(duration(time)?);
                self.listen();
                return Ok(());
            }
            _ => {}
        }
        if !self.events.is_empty() {
            return Err(Stop::Failed(format!("- expect nothing\n{}", self.found())));
        }
        self.act(words)?;
        self.world.settle();
        self.listen();
        Ok(())
    }

    fn act(&mut self, words: &[&str]) -> Result<(), Stop> {
        match words {
            ["crash", node] => self.world.fault(Fault::Crash(number(node)?))?,
            ["restart", node] => self.world.fault(Fault::Restart(number(node)?))?,
            ["pause", node] => self.world.fault(Fault::Pause(number(node)?))?,
            ["resume", node] => self.world.fault(Fault::Resume(number(node)?))?,
            ["heal"] => self.world.fault(Fault::Heal)?,
            ["replay", node] => self.world.fault(Fault::Replay(number(node)?))?,
            ["fence", node, how @ ("ok" | "fail")] => {
                self.world.fault(Fault::Fence(number(node)?, *how == "ok"))?;
            }
            ["partition", rest @ ..] => {
                let sides = rest.split(|w| *w == "|");
                let sides: Result<Vec<Vec<u32>>, Stop> =
                    sides.map(|s| s.iter().map(|n| number(n)).collect()).collect();
                self.world.fault(Fault::Partition(sides?))?;
            }
            ["exit", node, owner @ ..] => {
                let owner = owner.first().map_or(Ok(1), |o| number(o))?;
                self.world.exit(number(node)?, owner);
            }
            ["purge", by, of, rest @ ..] => {
                let pid = rest.first().map_or(Ok(0), |p| number(p))?;
                self.world.purge(number(by)?, number(of)?, pid);
            }
            [node, label, rest @ ..] => {
                let node: u32 = node.parse().map_err(|_| Stop::Failed(format!("unknown command: {node}")))?;
                if !self.world.has(node) {
                    return Err(Stop::Failed(format!("node {node} does not run")));
                }
                if let Err(error) = self.operate(node, label, rest)? {
                    let name = match error {
                        LockError::Invalid(_) => "EINVAL",
                        LockError::Busy => "EBUSY",
                        LockError::NotFound => "ENOENT",
                        LockError::OtherMode => "EAGAIN",
                        _ => "ESTOPPED",
                    };
                    self.events.push(((*label).to_owned(), vec!["error".to_owned(), name.to_owned()]));
                }
            }
            _ => return Err("unknown command".into()),
        }
        Ok(())
    }

    fn operate(&mut self, node: u32, label: &str, words: &[&str]) -> Result<Result<(), LockError>, Stop> {
        let known = self.labels.get(label).copied();
        let id = move || known.map(|(_, id)| id).ok_or_else(|| Stop::Failed(format!("no lock {label}")));
        let wanted = |m: &str| mode(m).ok_or_else(|| Stop::Failed(format!("no mode: {m}")));
        Ok(match words {
            ["lock", m, name, rest @ ..] => {
                let Options { flags, range, owner, timeout, priority, .. } = options(rest)?;
                let name = match LockName::new(name.as_bytes()) {
                    Ok(name) => name,
                    Err(_) => return Ok(Err(LockError::Invalid("the name is too long"))),
                };
                let request = LockRequest {
                    range: range.unwrap_or(Range::ALL),
                    flags,
                    // One process per node, unless told otherwise.
                    owner: owner.unwrap_or(1),
                    timeout,
                    priority,
                    ..LockRequest::new(name, wanted(m)?)
                };
                self.world.request(node, request).map(|id| {
                    // An adopted orphan has a new label.
                    self.labels.retain(|_, at| *at != (node, id));
                    self.labels.insert(label.to_owned(), (node, id));
                })
            }
            ["convert", m, rest @ ..] => {
                let Options { flags, value, range, timeout, priority, .. } = options(rest)?;
                let request = ConvertRequest { mode: wanted(m)?, range, flags, value, timeout, priority };
                self.world.convert(node, id()?, request)
            }
            ["unlock", rest @ ..] => {
                let Options { flags, value, .. } = options(rest)?;
                self.world.unlock(node, id()?, UnlockRequest { flags, value })
            }
            ["cancel"] => self.world.cancel(node, id()?),
            _ => return Err("unknown operation".into()),
        })
    }

    fn expect(&mut self, expected: &[&str]) -> Result<(), String> {
        let differs = |play: &Self| Err(format!("- expect {}\n{}", expected.join(" "), play.found()));
        match expected {
            ["nothing"] if self.events.is_empty() => Ok(()),
            ["nothing"] => differs(self),
            [label, "waiting"] => {
                if self.events.iter().any(|(l, e)| l == label && e[0] != "bast") {
                    differs(self)
                } else {
                    Ok(())
                }
            }
            [label, rest @ ..] => {
                let Some(at) = self.events.iter().position(|(l, e)| l == label && matches(rest, e)) else {
                    return differs(self);
                };
                self.events.remove(at);
                Ok(())
            }
            [] => Err("expect what?".to_owned()),
        }
    }

    fn queues(&self) -> Result<String, String> {
        let name = self.shown.as_ref().ok_or("nothing is shown")?;
        let Some(dump) = self.world.show(name) else { return Ok("granted: convert: wait:".to_owned()) };
        let queue = |locks: &[LockDump]| {
            let show = |l: &LockDump| {
                let modes: Vec<String> =
                    [l.granted, l.requested].iter().flatten().map(ToString::to_string).collect();
                format!(" {}={}", self.label((l.node.node.0, LockId(l.id))), modes.join(">"))
            };
            let mut out: Vec<String> = locks.iter().map(show).collect();
            // The order of granted locks means nothing.
            if locks.iter().all(|l| l.requested.is_none()) {
                out.sort();
            }
            out.concat()
        };
        let (granted, converting, waiting) =
            (queue(&dump.granted), queue(&dump.converting), queue(&dump.waiting));
        Ok(format!("granted:{granted} convert:{converting} wait:{waiting}"))
    }

    /// Where there are no masters, nothing moves.
    fn expect_master(&self, expected: u32) -> Result<(), Stop> {
        if !W::HAS_MASTERS {
            return Err(Stop::NotHere);
        }
        let name = self.shown.as_ref().ok_or("nothing is shown")?;
        let found = self.world.show(name).map_or(0, |d| d.master.node.0);
        if found == expected { Ok(()) } else { Err(format!("+ expect-master {found}").into()) }
    }

    fn expect_queue(&self, expected: &str) -> Result<(), String> {
        let found = self.queues()?;
        if found == expected {
            Ok(())
        } else {
            Err(format!("- expect-queue {expected}\n+ expect-queue {found}"))
        }
    }
}

/// Plays one scenario.
///
/// # Errors
/// The line that does not hold, and the difference.
pub(crate) fn play<W: World>(
    text: &str,
    world: impl FnOnce(Setup) -> W,
    is_verbose: bool,
) -> Result<Outcome, String> {
    let lines: Vec<(usize, Vec<String>)> =
        text.lines().enumerate().map(|(n, l)| (n + 1, words(l))).filter(|(_, w)| !w.is_empty()).collect();
    let header = |name: &str| lines.iter().find(|(_, w)| w[0] == name).and_then(|(_, w)| w.get(1));
    let nodes = match header("nodes").map(|n| n.parse::<u32>()) {
        None => 1,
        Some(Ok(nodes @ 1..=16)) => nodes,
        Some(_) => return Err("nodes: 1 to 16".to_owned()),
    };
    let holds = header("holds").map(|m| mode(m).ok_or_else(|| format!("no mode: {m}"))).transpose()?;
    let moves = header("moves").map_or(Ok(0), |n| n.parse().map_err(|_| format!("no number: {n}")))?;
    let world = world(Setup { nodes, holds, moves });
    let mut play = Play { world, labels: BTreeMap::new(), events: Vec::new(), shown: None, is_verbose };
    for (number, line) in lines.iter().filter(|(_, w)| !["nodes", "holds", "moves"].contains(&w[0].as_str()))
    {
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        let result = play.line(&line);
        if play.is_verbose {
            println!("{number:4}  {:40} {}", line.join(" "), play.found().replace('\n', " "));
        }
        match result {
            Ok(()) => {}
            Err(Stop::NotHere) => return Ok(Outcome::NotHere),
            Err(Stop::Failed(error)) => return Err(format!("line {number}: {}\n{error}", line.join(" "))),
        }
    }
    if play.events.is_empty() {
        Ok(Outcome::Held)
    } else {
        Err(format!("at the end:\n- expect nothing\n{}", play.found()))
    }
}
