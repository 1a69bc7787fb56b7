//! Carries out the lines of one case.

use quorate_membership::machine::{Bug, RequestId};
use quorate_membership::sim::{Cluster, ClusterConfig, Happening};
use quorate_membership::{NodeId, QuorumOptions, Request, RequestError, Rng, TieBreaker, View, VoterSet};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

/// How long things may settle after each event: several detection times, and less than any window of a case.
const SETTLE: Duration = Duration::from_secs(6);

/// One case under way.
#[derive(Default)]
pub(super) struct Runner {
    voters: u32,
    observers: u32,
    witnesses: u32,
    quorum: QuorumOptions,
    bug: Option<Bug>,
    cluster: Option<Cluster>,
    /// What became of requests.
    done: BTreeMap<RequestId, Result<Arc<View>, RequestError>>,
    last: Option<RequestId>,
    expected: usize,
    differs: bool,
    /// Seen without a process since they were stopped on purpose.
    causes: Vec<String>,
}

type Told = Result<(), String>;

fn nodes(words: &[&str]) -> Result<BTreeSet<NodeId>, String> {
    if words == ["none"] {
        return Ok(BTreeSet::new());
    }
    words.iter().map(|w| w.parse().map(NodeId).map_err(|_| format!("`{w}` is no node"))).collect()
}

fn shown(nodes: &BTreeSet<NodeId>) -> String {
    if nodes.is_empty() {
        return "none".into();
    }
    nodes.iter().map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
}

fn number(word: &str) -> Result<u32, String> {
    word.parse().map_err(|_| format!("`{word}` is no number"))
}

/// One option as it is written in a case and after `set`.
fn option(quorum: &mut QuorumOptions, words: &[&str]) -> Told {
    match words {
        ["votes", pairs @ ..] => {
            for pair in pairs {
                let (node, votes) = pair.split_once('=').ok_or("NODE=VOTES is wanted")?;
                quorum.votes.insert(NodeId(number(node)?), number(votes)?);
            }
        }
        ["expected_votes", n] => quorum.expected_votes = number(n)?,
        ["wait_for_all"] => quorum.wait_for_all = true,
        ["auto_tie_breaker", "off"] => quorum.tie_breaker = None,
        ["auto_tie_breaker", "lowest"] => quorum.tie_breaker = Some(TieBreaker::Lowest),
        ["auto_tie_breaker", "highest"] => quorum.tie_breaker = Some(TieBreaker::Highest),
        ["auto_tie_breaker", list @ ..] => {
            let list: Result<Vec<u32>, String> = list.iter().map(|w| number(w)).collect();
            quorum.tie_breaker = Some(TieBreaker::List(list?.into_iter().map(NodeId).collect()));
        }
        ["last_man_standing", "off"] => quorum.last_man_standing_ms = None,
        ["last_man_standing", ms] => quorum.last_man_standing_ms = Some(number(ms)?),
        ["allow_downscale"] => quorum.allow_downscale = true,
        _ => return Err(format!("unknown: {}", words.join(" "))),
    }
    Ok(())
}

impl Runner {
    pub(super) fn has_expected(&self) -> bool {
        0 < self.expected
    }

    pub(super) fn differs(&self) -> bool {
        self.differs
    }

    pub(super) fn line(&mut self, line: &str) -> Told {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["source" | "because", ..] => Ok(()),
            ["nodes", n] => self.set_up(|r| r.voters = number(n).unwrap_or(0)),
            ["observers", n] => self.set_up(|r| r.observers = number(n).unwrap_or(0)),
            ["witness", n] => self.set_up(|r| r.witnesses = number(n).unwrap_or(0)),
            ["up", rest @ ..] => self.up(&nodes(rest)?),
            ["expect", rest @ ..] => {
                self.expected += 1;
                self.expect(rest)
            }
            ["votequorum", "quorate", rest @ ..] => {
                self.differs = true;
                let theirs = nodes(rest)?;
                if theirs == self.quorate()? {
                    return Err("votequorum says the same: this is no difference".into());
                }
                Ok(())
            }
            _ if self.cluster.is_none() => option(&mut self.quorum, &words),
            _ => self.event(&words),
        }
    }

    fn set_up(&mut self, change: impl FnOnce(&mut Self)) -> Told {
        if self.cluster.is_some() {
            return Err("the cluster is up already".into());
        }
        change(self);
        Ok(())
    }

    fn cluster(&mut self) -> Result<&mut Cluster, String> {
        self.cluster.as_mut().ok_or_else(|| "`up` comes first".into())
    }

    /// All nodes, or these alone, start.
    fn up(&mut self, only: &BTreeSet<NodeId>) -> Told {
        let config = ClusterConfig {
            voters: self.voters,
            observers: self.observers,
            witnesses: self.witnesses,
            quorum: self.quorum.clone(),
            bug: self.bug,
            ..ClusterConfig::three()
        };
        let mut cluster = Cluster::new(config, Rng::new(11));
        let all: Vec<NodeId> = cluster.nodes().map(|(n, _)| n).collect();
        for node in all.into_iter().filter(|n| only.is_empty() || only.contains(n)) {
            cluster.start(node);
        }
        self.cluster = Some(cluster);
        self.run(SETTLE)
    }

    fn run(&mut self, time: Duration) -> Told {
        let mut done = Vec::new();
        let mut causes = Vec::new();
        let cluster = self.cluster()?;
        let until = cluster.now() + time;
        cluster.run_until(until, |c| {
            for happening in c.take_happenings() {
                match happening {
                    Happening::Done { id, result, .. } => done.push((id, result)),
                    Happening::Installed { view, .. } => causes.push(format!("{:?}", view.cause)),
                    _ => (),
                }
            }
        });
        cluster.advance_to(until);
        self.done.extend(done);
        self.causes.extend(causes);
        Ok(())
    }

    fn event(&mut self, words: &[&str]) -> Told {
        let cluster = self.cluster()?;
        match words {
            ["crash", rest @ ..] => nodes(rest)?.into_iter().for_each(|n| cluster.crash(n)),
            ["start", rest @ ..] => nodes(rest)?.into_iter().for_each(|n| cluster.start(n)),
            ["lose-state", rest @ ..] => nodes(rest)?.into_iter().for_each(|n| cluster.lose_state(n)),
            ["split", rest @ ..] => {
                let sides: Vec<&[&str]> = rest.split(|w| *w == "|").collect();
                for (i, a) in sides.iter().enumerate() {
                    for b in sides.iter().skip(i + 1) {
                        let left: Vec<NodeId> = nodes(a)?.into_iter().collect();
                        let right: Vec<NodeId> = nodes(b)?.into_iter().collect();
                        cluster.network.partition(&left, &right);
                    }
                }
            }
            ["heal"] => cluster.network.heal(),
            ["cancel-wait", node] => cluster.cancel_wait_for_all(NodeId(number(node)?)),
            ["wait", time] => {
                let seconds = time.strip_suffix('s').ok_or("a time like 12s is wanted")?;
                return self.run(Duration::from_secs(u64::from(number(seconds)?)));
            }
            ["leave", node, rest @ ..] => {
                let node = NodeId(number(node)?);
                self.ask(node, Request::Leave { give_up_vote: rest == ["give-up-vote"] })?;
                // It stops when it is out; its supervisor, which would start it again, stops with it.
                for _ in 0..2_000 {
                    if self.cluster()?.member(node).is_none() {
                        break;
                    }
                    self.run(Duration::from_millis(1))?;
                }
                self.cluster()?.crash(node);
            }
            ["set", rest @ ..] => {
                let at = self.any_quorate()?;
                let mut quorum = self.newest()?.quorum.clone();
                option(&mut quorum, rest)?;
                self.ask(at, Request::SetQuorum(quorum))?;
            }
            ["remove", node] => {
                let at = self.any_quorate()?;
                self.ask(at, Request::RemoveNode(NodeId(number(node)?)))?;
            }
            ["replace", node] => {
                let at = self.any_quorate()?;
                let node = NodeId(number(node)?);
                let mut entry = self.newest()?.roster.get(&node).ok_or("not in the roster")?.clone();
                entry.key = [200; 32];
                self.ask(at, Request::Replace(node, entry))?;
            }
            ["force", node, "off", rest @ ..] => {
                let off = nodes(rest)?;
                let node = NodeId(number(node)?);
                self.last = self.cluster()?.force(node, off, "the case's operator");
            }
            _ => return Err(format!("unknown: {}", words.join(" "))),
        }
        self.run(SETTLE)
    }

    fn ask(&mut self, node: NodeId, request: Request) -> Told {
        self.last = self.cluster()?.propose(node, request);
        self.last.map(|_| ()).ok_or_else(|| format!("node {node} does not run"))
    }

    fn quorate(&self) -> Result<BTreeSet<NodeId>, String> {
        let cluster = self.cluster.as_ref().ok_or("`up` comes first")?;
        Ok(cluster.nodes().map(|(n, _)| n).filter(|n| cluster.is_quorate(*n)).collect())
    }

    fn any_quorate(&self) -> Result<NodeId, String> {
        self.quorate()?.first().copied().ok_or_else(|| "no node is quorate".into())
    }

    /// The newest record among the processes that run, of quorate ones if there are any.
    fn newest(&self) -> Result<Arc<View>, String> {
        let cluster = self.cluster.as_ref().ok_or("`up` comes first")?;
        let views = cluster.nodes().filter_map(|(n, h)| {
            h.member().and_then(|m| m.view()).map(|v| (cluster.is_quorate(n), v.epoch, Arc::clone(v)))
        });
        let newest = views.max_by_key(|(quorate, epoch, _)| (*quorate, *epoch));
        newest.map(|(_, _, v)| v).ok_or_else(|| "nobody has a record".into())
    }

    fn expect(&mut self, words: &[&str]) -> Told {
        let wrong = |what: &str, found: String| Err(format!("{what}: {found}"));
        match words {
            ["quorate", rest @ ..] => {
                let quorate = self.quorate()?;
                if quorate != nodes(rest)? {
                    let votes = self.newest().map(|v| describe(&v.voters)).unwrap_or_default();
                    return wrong("quorate", format!("{}; {votes}", shown(&quorate)));
                }
            }
            ["voters", rest @ ..] => {
                let voters: BTreeSet<NodeId> = self.newest()?.voters.voters.keys().copied().collect();
                if voters != nodes(rest)? {
                    return wrong("voters", shown(&voters));
                }
            }
            ["members", rest @ ..] => {
                let members: BTreeSet<NodeId> = self.newest()?.members.keys().copied().collect();
                if members != nodes(rest)? {
                    return wrong("members", shown(&members));
                }
            }
            // As the node counts that has the newest record, a quorate one if there is any.
            ["votes", have, "of", all, "needed", needed] => {
                let view = self.newest()?;
                let cluster = self.cluster()?;
                let holders = cluster.nodes().filter_map(|(n, h)| h.member().map(|m| (n, m)));
                let holder = holders.filter(|(_, m)| m.view().is_some_and(|v| v.epoch == view.epoch));
                let hears = holder.max_by_key(|(n, _)| cluster.is_quorate(*n)).map(|(_, m)| m.hears());
                let tally = view.voters.tally_nodes(&hears.unwrap_or_default());
                let found = (tally.have, tally.all, tally.needed());
                if found != (number(have)?, number(all)?, number(needed)?) {
                    return wrong("votes", tally.to_string());
                }
            }
            ["tie-breaker", node] => {
                let tie = self.newest()?.voters.tie_breaker;
                let wanted = if *node == "none" { None } else { Some(NodeId(number(node)?)) };
                if tie != wanted {
                    return wrong("tie breaker", format!("{tie:?}"));
                }
            }
            ["done"] => match self.last.and_then(|id| self.done.get(&id)) {
                Some(Ok(_)) => (),
                other => return wrong("the request", format!("{:?}", other.map(|r| r.as_ref().err()))),
            },
            ["refused", rest @ ..] => match self.last.and_then(|id| self.done.get(&id)) {
                Some(Err(error)) if error.to_string().contains(&rest.join(" ")) => (),
                Some(other) => return wrong("the request", format!("{:?}", other.as_ref().err())),
                None => return Err("no request ended".into()),
            },
            ["cause", text] => {
                if !self.causes.iter().any(|c| c.contains(text)) {
                    return wrong("causes", self.causes.join("; "));
                }
            }
            _ => return Err(format!("unknown expectation: {}", words.join(" "))),
        }
        Ok(())
    }
}

fn describe(set: &VoterSet) -> String {
    let votes: Vec<String> = set.voters.iter().map(|(n, v)| format!("{n}={}", v.votes)).collect();
    format!("votes {} of {}, tie breaker {:?}", votes.join(" "), set.all_votes(), set.tie_breaker)
}
