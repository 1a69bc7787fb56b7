//! etcd as a lock service: three members on tmpfs, its own Lock and Unlock calls over gRPC.
//!
//! What it guarantees: a lock survives the loss of a minority, written by a majority before the answer; its revision is a
//! fencing token. The client is the least that speaks gRPC: HTTP/2 frames on one connection, one thread.

use super::redis::{Server, connect, free_port};
use crate::node::TempDir;
use crate::sample::Stopwatch;
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

/// What a step of a peer came to.
type Outcome<T> = Result<T, Box<dyn Error>>;

/// Three members and a connection to the first; `None` if etcd is not installed.
pub(crate) fn start() -> Outcome<Option<(Vec<Server>, Client)>> {
    let mut ports = Vec::new();
    for _ in 0..3 {
        ports.push((free_port()?, free_port()?));
    }
    let urls: Vec<String> =
        ports.iter().enumerate().map(|(n, (_, peer))| format!("m{n}=http://127.0.0.1:{peer}")).collect();
    let mut servers = Vec::new();
    for (n, (client, peer)) in ports.iter().enumerate() {
        let dir = TempDir::new()?;
        let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let mut command = Command::new("etcd");
        command.args(["--name", &format!("m{n}"), "--log-level", "error"]);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &urls.join(","), "--data-dir"]).arg(dir.path().join("data"));
        match Server::new(&mut command, dir) {
            Ok(server) => servers.push(server),
            Err(_) => return Ok(None),
        }
    }
    let port = ports.first().ok_or("no member")?.0;
    let mut client = Client::new(connect(port)?)?;
    // LeaseGrant { TTL: 60 }; answered once there is a leader.
    client.call("/etcdserverpb.Lease/LeaseGrant", &[0x08, 60])?;
    let (_, answer) = client.wait()?;
    client.lease = field(&answer, 2).and_then(|f| f.1).ok_or("no lease")?;
    Ok(Some((servers, client)))
}

/// The first field of that number in a protobuf message: its bytes, or its number.
fn field(mut bytes: &[u8], wanted: u64) -> Option<(Vec<u8>, Option<u64>)> {
    while !bytes.is_empty() {
        let (tag, rest) = varint(bytes)?;
        let (value, rest) = varint(rest)?;
        if tag & 7 == 0 {
            if tag >> 3 == wanted {
                return Some((Vec::new(), Some(value)));
            }
            bytes = rest;
        } else {
            let length = usize::try_from(value).ok()?;
            if tag >> 3 == wanted {
                return Some((rest.get(..length)?.to_vec(), None));
            }
            bytes = rest.get(length..)?;
        }
    }
    None
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((value, bytes.get(at + 1..)?));
        }
    }
    None
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while 0x7f < value {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
    out.push(number << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Just enough of HTTP/2 and gRPC.
pub(crate) struct Client {
    stream: TcpStream,
    out: Vec<u8>,
    bytes: Vec<u8>,
    next: u32,
    answers: BTreeMap<u32, Vec<u8>>,
    lease: u64,
}

impl Client {
    fn new(mut stream: TcpStream) -> Result<Self, Box<dyn Error>> {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
        let (out, bytes, answers) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut client = Self { stream, out, bytes, next: 1, answers, lease: 0 };
        client.frame(4, 0, 0, &[]);
        // As much as the server likes to send.
        client.frame(8, 0, 0, &0x3fff_0000u32.to_be_bytes());
        Ok(client)
    }

    fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
        self.out.extend_from_slice(&[kind, flags]);
        self.out.extend_from_slice(&stream.to_be_bytes());
        self.out.extend_from_slice(payload);
    }

    /// Starts a call; its stream.
    fn call(&mut self, path: &str, message: &[u8]) -> Result<u32, Box<dyn Error>> {
        let stream = self.next;
        self.next += 2;
        // POST, http, path, authority, content-type, te: literals without indexing.
        let mut headers = vec![0x83, 0x86, 0x04, u8::try_from(path.len())?];
        headers.extend_from_slice(path.as_bytes());
        headers.extend_from_slice(b"\x01\x09127.0.0.1\x0f\x10\x10application/grpc\x00\x02te\x08trailers");
        self.frame(1, 4, stream, &headers);
        let mut body = vec![0];
        body.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
        body.extend_from_slice(message);
        self.frame(0, 1, stream, &body);
        self.answers.insert(stream, Vec::new());
        Ok(stream)
    }

    /// Sends what is to be sent and waits for the next call that is over: its stream and its message.
    fn wait(&mut self) -> Result<(u32, Vec<u8>), Box<dyn Error>> {
        loop {
            if let Some(done) = self.next_done()? {
                return Ok(done);
            }
            let out = std::mem::take(&mut self.out);
            self.stream.write_all(&out)?;
            let mut chunk = [0; 1 << 14];
            let count = self.stream.read(&mut chunk)?;
            if count == 0 {
                return Err("etcd closed the connection".into());
            }
            self.bytes.extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
    }

    fn next_done(&mut self) -> Outcome<Option<(u32, Vec<u8>)>> {
        loop {
            let Some(header) = self.bytes.first_chunk::<9>().copied() else { return Ok(None) };
            let [a, b, c, kind, flags, stream @ ..] = header;
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
            if self.bytes.len() < 9 + length {
                return Ok(None);
            }
            let payload: Vec<u8> = self.bytes.drain(..9 + length).skip(9).collect();
            match kind {
                0 => {
                    if let Some(answer) = self.answers.get_mut(&stream) {
                        answer.extend_from_slice(&payload);
                    }
                }
                4 if flags & 1 == 0 => self.frame(4, 1, 0, &[]),
                6 if flags & 1 == 0 => self.frame(6, 1, 0, &payload),
                3 | 7 => return Err(format!("etcd ended a call or the connection: frame {kind}").into()),
                _ => {}
            }
            if matches!(kind, 0 | 1) && flags & 1 != 0 {
                let answer = self.answers.remove(&stream).unwrap_or_default();
                return Ok(Some((stream, answer.get(5..).ok_or("a call failed")?.to_vec())));
            }
        }
    }

    /// Lock and unlock pairs a second with so many under way.
    pub(crate) fn rate(&mut self, flight: u64, time: Duration) -> Result<f64, Box<dyn Error>> {
        let mut under_way: BTreeMap<u32, bool> = BTreeMap::new();
        let lock = |client: &mut Self, n: u64| {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, format!("lock{n}").as_bytes());
            message.push(0x10);
            put_varint(&mut message, client.lease);
            client.call("/v3lockpb.Lock/Lock", &message)
        };
        let mut next = u64::from(self.next) << 20;
        for _ in 0..flight {
            next += 1;
            let stream = lock(self, next)?;
            under_way.insert(stream, true);
        }
        let (watch, mut pairs) = (Stopwatch::start(), 0u64);
        while !under_way.is_empty() {
            let (stream, answer) = self.wait()?;
            match under_way.remove(&stream) {
                Some(true) => {
                    let (key, _) = field(&answer, 2).ok_or("a lock without its key")?;
                    let mut message = Vec::new();
                    put_bytes(&mut message, 1, &key);
                    let stream = self.call("/v3lockpb.Lock/Unlock", &message)?;
                    under_way.insert(stream, false);
                }
                Some(false) => {
                    pairs += 1;
                    if watch.nanos() < time.as_nanos() as f64 {
                        next += 1;
                        let stream = lock(self, next)?;
                        under_way.insert(stream, true);
                    }
                }
                None => {}
            }
        }
        Ok(pairs as f64 / watch.nanos() * 1e9)
    }
}
