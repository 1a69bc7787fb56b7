//! Runs `tests/scenarios/*.txt`: one event per line, results as expected lines. The order of events within one step is
//! free. Rows are those of the table of the kernel's measured behaviour.

use crate::support::Told;
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockError, LockId, LockName, LockRequest, Mode, Range, ResourceDump,
    UnlockRequest,
};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What scenarios are played on.
pub(crate) trait World {
    fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError>;
    fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError>;
    fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError>;
    fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError>;
    /// Lets everything happen that is going to happen.
    fn settle(&mut self);
    /// What locks were told since the last call.
    fn told(&mut self) -> Vec<(u32, LockId, Told)>;
    /// The resource at its master.
    fn show(&self, name: &LockName) -> Option<ResourceDump>;
    /// Takes a node out; `None` if this world has no such thing.
    fn crash(&mut self, node: u32) -> Option<()>;
    fn fence(&mut self, node: u32);
}

const VALUE_BYTES: usize = 32;

fn mode(word: &str) -> Option<Mode> {
    Mode::ALL.into_iter().find(|m| m.to_string() == word)
}

fn flag(word: &str) -> Option<Flags> {
    Some(match word {
        "noqueue" => Flags::NOQUEUE,
        "valblk" => Flags::VALBLK,
        "quecvt" => Flags::QUECVT,
        "ivvalblk" => Flags::IVVALBLK,
        "convdeadlk" => Flags::CONVDEADLK,
        "nodlckwt" => Flags::NODLCKWT,
        "expedite" => Flags::EXPEDITE,
        "noqueuebast" => Flags::NOQUEUEBAST,
        "headque" => Flags::HEADQUE,
        "noorder" => Flags::NOORDER,
        "altpr" => Flags::ALTPR,
        "altcw" => Flags::ALTCW,
        "forceunlock" => Flags::FORCEUNLOCK,
        "recovery" => Flags::RECOVERY,
        "norecoverywait" => Flags::NORECOVERYWAIT,
        _ => return None,
    })
}

fn block(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(VALUE_BYTES, 0);
    bytes
}

fn trim(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

struct Words {
    flags: Flags,
    value: Option<Vec<u8>>,
    range: Range,
}

fn options(words: &[&str]) -> Result<Words, String> {
    let mut out = Words { flags: Flags::NONE, value: None, range: Range::ALL };
    for word in words {
        if let Some(text) = word.strip_prefix("value=") {
            out.value = Some(block(text.trim_matches('"')));
        } else if let Some((start, end)) = word.strip_prefix("range=").and_then(|r| r.split_once('-')) {
            let number = |s: &str| s.parse().map_err(|_| format!("no number: {s}"));
            out.range = Range { start: number(start)?, end: number(end)? };
        } else {
            out.flags = out.flags | flag(word).ok_or_else(|| format!("unknown word: {word}"))?;
        }
    }
    Ok(out)
}

/// An event as scenario files write it, all details given.
fn describe(told: &Told) -> Vec<String> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect();
    match told {
        Told::Blocking(mode) => vec!["bast".to_owned(), mode.to_string()],
        Told::Done(Completion::Granted(grant)) => {
            let mut out = vec!["granted".to_owned(), grant.mode.to_string()];
            if let Some(value) = &grant.value {
                out.push(format!("value=\"{}\"", trim(value)));
            }
            let bits = [
                (grant.value_invalid, "invalid-value"),
                (grant.alt_mode, "altmode"),
                (grant.demoted, "demoted"),
            ];
            out.extend(bits.iter().filter(|(set, _)| *set).map(|(_, word)| (*word).to_owned()));
            out
        }
        Told::Done(Completion::Again) => words("error EAGAIN"),
        Told::Done(Completion::Deadlock) => words("error EDEADLK"),
        Told::Done(Completion::Cancelled) => words("error ECANCEL"),
        Told::Done(Completion::Recovering) => words("error ERECOVERING"),
        Told::Done(Completion::TimedOut) => words("error ETIMEDOUT"),
        Told::Done(Completion::Stopped) => words("error ESTOPPED"),
        Told::Done(Completion::Held(holder)) => {
            vec![format!("held by {} {:?}", holder.node.node, holder.mode)]
        }
        Told::Done(Completion::Unlocked) => vec!["unlocked".to_owned()],
    }
}

fn matches(expected: &[&str], event: &[String]) -> bool {
    let must_be_said = ["invalid-value", "altmode", "demoted"];
    expected.iter().all(|w| event.iter().any(|e| e == w))
        && event.iter().filter(|e| must_be_said.contains(&e.as_str())).all(|e| expected.contains(&e.as_str()))
}

struct Play<'a, W> {
    world: &'a mut W,
    labels: BTreeMap<String, (u32, LockId)>,
    events: Vec<(String, Vec<String>)>,
    shown: Option<LockName>,
}

impl<W: World> Play<'_, W> {
    fn settle(&mut self) {
        self.world.settle();
        for (node, id, told) in self.world.told() {
            let label = self.labels.iter().find(|(_, at)| **at == (node, id));
            let label = label.map_or_else(|| format!("{node}:{id:?}"), |(l, _)| l.clone());
            self.events.push((label, describe(&told)));
        }
    }

    fn line(&mut self, words: &[&str]) -> Result<(), String> {
        if let ["expect", rest @ ..] = words {
            return self.expect(rest);
        }
        if let ["expect-queue", rest @ ..] = words {
            return self.expect_queue(&rest.join(" "));
        }
        if !self.events.is_empty() {
            return Err(format!("not expected: {:?}", self.events));
        }
        match words {
            ["show", name] => {
                self.shown = Some(LockName::new(name.as_bytes()).map_err(|e| e.to_string())?);
                return Ok(());
            }
            ["crash", node] => {
                let node = node.parse().map_err(|_| "no node")?;
                self.world.crash(node).ok_or("no crashes here")?;
            }
            ["fence", node, "ok"] => self.world.fence(node.parse().map_err(|_| "no node")?),
            [node, label, rest @ ..] => {
                let node = node.parse().map_err(|_| format!("unknown command: {node}"))?;
                let result = self.operate(node, label, rest)?;
                if let Err(error) = result {
                    let name = match error {
                        LockError::Invalid(_) => "EINVAL",
                        LockError::Busy => "EBUSY",
                        LockError::NotFound => "ENOENT",
                        _ => "ESTOPPED",
                    };
                    self.events.push(((*label).to_owned(), vec!["error".to_owned(), name.to_owned()]));
                }
            }
            _ => return Err("unknown command".to_owned()),
        }
        self.settle();
        Ok(())
    }

    fn operate(&mut self, node: u32, label: &str, words: &[&str]) -> Result<Result<(), LockError>, String> {
        let known = self.labels.get(label).copied();
        let id = move || known.map(|(_, id)| id).ok_or_else(|| format!("no lock {label}"));
        Ok(match words {
            ["lock", m, name, rest @ ..] => {
                let o = options(rest)?;
                let name = LockName::new(name.as_bytes()).map_err(|e| e.to_string())?;
                let mode = mode(m).ok_or("no mode")?;
                let request = LockRequest { range: o.range, ..LockRequest::new(name, mode).flags(o.flags) };
                self.world.request(node, request).map(|id| {
                    self.labels.insert(label.to_owned(), (node, id));
                })
            }
            ["convert", m, rest @ ..] => {
                let o = options(rest)?;
                let mode = mode(m).ok_or("no mode")?;
                self.world.convert(node, id()?, ConvertRequest::new(mode).flags(o.flags).value(o.value))
            }
            ["unlock", rest @ ..] => {
                let o = options(rest)?;
                self.world.unlock(node, id()?, UnlockRequest { flags: o.flags, value: o.value })
            }
            ["cancel"] => self.world.cancel(node, id()?),
            _ => return Err("unknown operation".to_owned()),
        })
    }

    fn expect(&mut self, words: &[&str]) -> Result<(), String> {
        match words {
            ["nothing"] if self.events.is_empty() => Ok(()),
            ["nothing"] => Err(format!("there is {:?}", self.events)),
            [label, "waiting"] => match self.events.iter().find(|(l, e)| l == label && e[0] != "bast") {
                None => Ok(()),
                Some(event) => Err(format!("there is {event:?}")),
            },
            [label, rest @ ..] => {
                let found = self.events.iter().position(|(l, e)| l == label && matches(rest, e));
                let at = found.ok_or_else(|| format!("there is {:?}", self.events))?;
                self.events.remove(at);
                Ok(())
            }
            [] => Err("expect what?".to_owned()),
        }
    }

    fn expect_queue(&self, expected: &str) -> Result<(), String> {
        let name = self.shown.as_ref().ok_or("nothing is shown")?;
        let dump = self.world.show(name).ok_or("no such resource")?;
        let queue = |locks: &[quorate_dlm::LockDump]| {
            let mut out: Vec<String> = locks
                .iter()
                .map(|l| {
                    let label = self.labels.iter().find(|(_, (n, id))| *n == l.node.node.0 && id.0 == l.id);
                    let label = label.map_or("?", |(label, _)| label);
                    let modes: Vec<String> =
                        [l.granted, l.requested].iter().flatten().map(ToString::to_string).collect();
                    format!(" {label}={}", modes.join(">"))
                })
                .collect();
            // The order of granted locks means nothing.
            if locks.iter().all(|l| l.requested.is_none()) {
                out.sort();
            }
            out.concat()
        };
        let found = format!(
            "granted:{} convert:{} wait:{}",
            queue(&dump.granted),
            queue(&dump.converting),
            queue(&dump.waiting)
        );
        if found == expected { Ok(()) } else { Err(format!("found:    {found}")) }
    }
}

/// Plays one scenario. `Ok(false)`: this world cannot.
fn play<W: World>(text: &str, world: impl FnOnce(u32) -> W, crashes: bool) -> Result<bool, String> {
    if !crashes && text.lines().any(|l| l.starts_with("crash")) {
        return Ok(false);
    }
    let nodes = text.lines().find_map(|l| l.strip_prefix("nodes ")?.trim().parse().ok()).unwrap_or(1);
    let mut world = world(nodes);
    let mut play = Play { world: &mut world, labels: BTreeMap::new(), events: Vec::new(), shown: None };
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() || words[0] == "nodes" {
            continue;
        }
        play.line(&words).map_err(|e| format!("line {}: {line}\n  {e}", number + 1))?;
    }
    if play.events.is_empty() { Ok(true) } else { Err(format!("left over: {:?}", play.events)) }
}

/// Plays all files; a failure names the file and the line.
pub(crate) fn play_all<W: World>(world: impl Fn(u32) -> W, crashes: bool) -> usize {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let mut files: Vec<_> = std::fs::read_dir(directory).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    let mut failures = Vec::new();
    let mut played = 0;
    for file in files.iter().filter(|f| f.extension().is_some_and(|e| e == "txt")) {
        let text = std::fs::read_to_string(file).unwrap();
        match play(&text, &world, crashes) {
            Ok(done) => played += usize::from(done),
            Err(error) => failures.push(format!("{}: {error}", file.display())),
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    played
}

mod local {
    use super::*;
    use crate::support::Recorder;
    use quorate_dlm::local::LocalManager;
    use quorate_dlm::{LockManager, Lockspace, LockspaceOptions};
    use std::sync::Arc;

    struct Local {
        managers: Vec<LocalManager>,
        nodes: Vec<(Arc<dyn Lockspace>, Arc<Recorder>)>,
    }

    impl Local {
        fn new(count: u32) -> Self {
            let managers = LocalManager::shared(count);
            let options = LockspaceOptions::plain("test");
            let nodes = managers
                .iter()
                .map(|m| {
                    let join = m.join(&options);
                    let space = futures_util::future::FutureExt::now_or_never(join).unwrap().unwrap();
                    (space, Arc::new(Recorder::default()))
                })
                .collect();
            Self { managers, nodes }
        }
        fn node(&self, node: u32) -> &(Arc<dyn Lockspace>, Arc<Recorder>) {
            &self.nodes[node as usize - 1]
        }
    }

    impl World for Local {
        fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError> {
            let (space, recorder) = self.node(node);
            space.request(request, recorder.clone())
        }
        fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
            self.node(node).0.convert(id, request)
        }
        fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
            self.node(node).0.unlock(id, request)
        }
        fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError> {
            self.node(node).0.cancel(id)
        }
        fn settle(&mut self) {}
        fn told(&mut self) -> Vec<(u32, LockId, Told)> {
            let all = self.nodes.iter().enumerate();
            all.flat_map(|(n, (_, r))| r.take().into_iter().map(move |(id, t)| (n as u32 + 1, id, t)))
                .collect()
        }
        fn show(&self, name: &LockName) -> Option<ResourceDump> {
            let dump = self.managers[0].dump();
            dump.into_iter().flat_map(|d| d.resources).find(|r| r.name == *name)
        }
        fn crash(&mut self, _: u32) -> Option<()> {
            None
        }
        fn fence(&mut self, _: u32) {}
    }

    #[test]
    fn the_scenarios_hold_on_the_local_lock_manager() {
        let played = play_all(Local::new, false);
        assert!(40 <= played, "{played}");
    }

    #[test]
    fn a_process_that_ends_as_writer_makes_the_value_block_invalid() {
        // Row 51.
        let mut world = Local::new(2);
        let name = LockName::new(b"r").unwrap();
        let request = |mode| LockRequest::new(name.clone(), mode).flags(Flags::VALBLK);
        let k = world.request(1, request(Mode::NL)).unwrap();
        world.convert(1, k, ConvertRequest::new(Mode::EX).flags(Flags::VALBLK)).unwrap();
        let down = ConvertRequest::new(Mode::NL).flags(Flags::VALBLK).value(block("V1"));
        world.convert(1, k, down).unwrap();
        world.request(2, request(Mode::EX)).unwrap();
        world.told();
        world.managers[1].crash();
        world.request(1, request(Mode::PR)).unwrap();
        let told = world.told();
        assert_eq!(describe(&told[0].2), ["granted", "PR", "value=\"V1\"", "invalid-value"]);
    }
}
