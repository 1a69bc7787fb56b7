//! The words of scenario files: modes, flags, options, and events as lines.

use quorate_dlm::{Completion, Flags, Mode, Range};
use std::time::Duration;

/// The size of value blocks: texts are padded with zeros.
pub(crate) const VALUE_BYTES: usize = 32;

/// What a lock was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Done(Completion),
    Blocking(Mode),
}

pub(crate) fn mode(word: &str) -> Option<Mode> {
    Mode::ALL.into_iter().find(|m| m.to_string() == word)
}

const FLAGS: [(&str, Flags); 20] = [
    ("noqueue", Flags::NOQUEUE),
    ("valblk", Flags::VALBLK),
    ("quecvt", Flags::QUECVT),
    ("ivvalblk", Flags::IVVALBLK),
    ("convdeadlk", Flags::CONVDEADLK),
    ("persistent", Flags::PERSISTENT),
    ("nodlckwt", Flags::NODLCKWT),
    ("nodlckblk", Flags::NODLCKBLK),
    ("expedite", Flags::EXPEDITE),
    ("noqueuebast", Flags::NOQUEUEBAST),
    ("headque", Flags::HEADQUE),
    ("noorder", Flags::NOORDER),
    ("orphan", Flags::ORPHAN),
    ("altpr", Flags::ALTPR),
    ("altcw", Flags::ALTCW),
    ("forceunlock", Flags::FORCEUNLOCK),
    ("timeout", Flags::TIMEOUT),
    ("recovery", Flags::RECOVERY),
    ("norecoverywait", Flags::NORECOVERYWAIT),
    ("wait", Flags::NONE),
];

/// A value block from its text.
pub(crate) fn block(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(VALUE_BYTES, 0);
    bytes
}

/// Splits a line at spaces outside quotes; a `#` outside quotes begins a comment.
pub(crate) fn words(line: &str) -> Vec<String> {
    let (mut out, mut word, mut is_quoted) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        match c {
            '#' if !is_quoted => break,
            c if c.is_whitespace() && !is_quoted => {
                if !word.is_empty() {
                    out.push(std::mem::take(&mut word));
                }
            }
            c => {
                is_quoted ^= c == '"';
                word.push(c);
            }
        }
    }
    if !word.is_empty() {
        out.push(word);
    }
    out
}

/// `500ms`, `2s`.
pub(crate) fn duration(word: &str) -> Result<Duration, String> {
    let number = |s: &str| s.parse::<u64>().ok();
    let found = match word.strip_suffix("ms") {
        Some(ms) => number(ms).map(Duration::from_millis),
        None => word.strip_suffix('s').and_then(number).map(Duration::from_secs),
    };
    found.ok_or_else(|| format!("no length of time: {word}"))
}

/// What follows an operation.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) flags: Flags,
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) range: Option<Range>,
    pub(crate) owner: Option<u64>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) priority: i8,
}

pub(crate) fn options(words: &[&str]) -> Result<Options, String> {
    let mut out = Options::default();
    for word in words {
        let number = |s: &str| s.parse().map_err(|_| format!("no number: {s}"));
        match word.split_once('=') {
            Some(("value", text)) => out.value = Some(block(text.trim_matches('"'))),
            Some(("range", text)) => {
                let (start, end) = text.split_once('-').ok_or_else(|| format!("no range: {text}"))?;
                let end = if end == "end" { u64::MAX } else { number(end)? };
                out.range = Some(Range { start: number(start)?, end });
            }
            Some(("owner", text)) => out.owner = Some(number(text)?),
            Some(("timeout", text)) => out.timeout = Some(duration(text)?),
            Some(("priority", text)) => {
                out.priority = text.parse().map_err(|_| format!("no priority: {text}"))?;
            }
            _ => {
                let flag = FLAGS.iter().find(|(name, _)| name == word);
                out.flags = out.flags | flag.ok_or_else(|| format!("unknown word: {word}"))?.1;
            }
        }
    }
    Ok(out)
}

/// An event as files write it, all details given.
pub(crate) fn describe(told: &Told) -> Vec<String> {
    let words = |text: &str| text.split(' ').map(str::to_owned).collect();
    match told {
        Told::Blocking(mode) => vec!["bast".to_owned(), mode.to_string()],
        Told::Done(Completion::Granted(grant)) => {
            let mut out = vec!["granted".to_owned(), grant.mode.to_string()];
            if let Some(value) = &grant.value {
                let text = String::from_utf8_lossy(value);
                out.push(format!("value=\"{}\"", text.trim_end_matches('\0')));
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
            vec!["held".to_owned(), holder.node.node.to_string(), holder.mode.to_string()]
        }
        Told::Done(Completion::Unlocked) => vec!["unlocked".to_owned()],
    }
}

/// Whether an event is the expected one: every expected word is in it, and what must not be overlooked is expected.
pub(crate) fn matches(expected: &[&str], event: &[String]) -> bool {
    let must_be_said = ["invalid-value", "altmode", "demoted"];
    expected.iter().all(|w| event.iter().any(|e| e == w))
        && event.iter().filter(|e| must_be_said.contains(&e.as_str())).all(|e| expected.contains(&e.as_str()))
}
