//! Redis as a lock service: `SET name value NX PX` takes, a script that compares and deletes gives back.
//!
//! What it guarantees: one server's word. The lock is in memory and lost with the server; there is no fencing token; a
//! replica that takes over may give the same lock again.

use super::remote::FLIGHT;
use crate::node::TempDir;
use crate::sample::Stopwatch;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const RELEASE: &str =
    "if redis.call('get',KEYS[1])==ARGV[1] then return redis.call('del',KEYS[1]) else return 0 end";

/// A process that ends with this.
pub(crate) struct Server {
    child: Child,
    _dir: TempDir,
}

impl Server {
    pub(crate) fn new(command: &mut Command, dir: TempDir) -> Result<Self, Box<dyn Error>> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Self { child, _dir: dir })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that the system chose and nobody uses at this moment.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Connects once the server listens.
#[expect(clippy::disallowed_methods, reason = "a foreign server tells nobody when it listens")]
pub(crate) fn connect(port: u16) -> Result<TcpStream, Box<dyn Error>> {
    for _ in 0..500 {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
            stream.set_nodelay(true)?;
            return Ok(stream);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(format!("nobody listens on port {port}").into())
}

/// `redis-server` without durability, on a directory of tmpfs; `None` if it is not installed.
pub(crate) fn start() -> Result<Option<(Server, TcpStream)>, Box<dyn Error>> {
    let (dir, port) = (TempDir::new()?, free_port()?);
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.args(["--dir".as_ref(), dir.path().as_os_str()]);
    match Server::new(&mut command, dir) {
        Ok(server) => Ok(Some((server, connect(port)?))),
        Err(_) => Ok(None),
    }
}

fn command(out: &mut Vec<u8>, words: &[&str]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n{word}\r\n", word.len()).as_bytes());
    }
}

/// Lock and unlock pairs a second, [`FLIGHT`] commands under way on the one connection.
pub(crate) fn rate(stream: &mut TcpStream, time: Duration) -> Result<f64, Box<dyn Error>> {
    let mut out = Vec::new();
    command(&mut out, &["SCRIPT", "LOAD", RELEASE]);
    stream.write_all(&out)?;
    let mut bytes = vec![0; 1 << 16];
    let count = stream.read(&mut bytes)?;
    let answer = String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()).into_owned();
    let script = answer.lines().nth(1).ok_or("redis does not load the script")?.to_owned();
    let names: Vec<String> = (0..FLIGHT).map(|n| format!("{:8x}{n:16x}", 2)).collect();
    let take = |out: &mut Vec<u8>, at: usize| {
        command(out, &["SET", names[at].as_str(), "me", "NX", "PX", "30000"]);
    };
    let give = |out: &mut Vec<u8>, at: usize| {
        command(out, &["EVALSHA", script.as_str(), "1", names[at].as_str(), "me"]);
    };
    out.clear();
    (0..names.len()).for_each(|at| take(&mut out, at));
    let mut pending: std::collections::VecDeque<(usize, bool)> =
        (0..names.len()).map(|at| (at, true)).collect();
    let (watch, mut pairs, mut rest) = (Stopwatch::start(), 0u64, 0usize);
    while !pending.is_empty() {
        stream.write_all(&out)?;
        out.clear();
        let count = stream.read(&mut bytes[rest..])?;
        let all = rest + count;
        let mut from = 0;
        // Every answer is one line: `+OK` to a lock, `:1` to an unlock.
        while let Some(length) = bytes[from..all].iter().position(|b| *b == b'\n') {
            let line = &bytes[from..from + length];
            let (at, is_take) = pending.pop_front().ok_or("an answer too many")?;
            let wanted: &[u8] = if is_take { b"+OK\r" } else { b":1\r" };
            if line != wanted {
                return Err(format!("redis: {}", String::from_utf8_lossy(line)).into());
            }
            from += length + 1;
            if is_take {
                give(&mut out, at);
                pending.push_back((at, false));
            } else {
                pairs += 1;
                if watch.nanos() < time.as_nanos() as f64 {
                    take(&mut out, at);
                    pending.push_back((at, true));
                }
            }
        }
        bytes.copy_within(from..all, 0);
        rest = all - from;
    }
    Ok(pairs as f64 / watch.nanos() * 1e9)
}
