//! The demo's cluster: its directory, its addresses, its processes, and how to talk to them.

use crate::children::{Process, interrupted};
use quorate::admin::client::Client;
use quorate::admin::protocol::Command as Admin;
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The size of the shared image.
pub(crate) const IMAGE_BYTES: u64 = 1 << 30;

/// How often something that cannot be waited for is looked at.
const POLL: Duration = Duration::from_millis(4);

/// One node as the demo sees it.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: u32,
    pub(crate) dir: PathBuf,
    pub(crate) address: String,
    pub(crate) supervisor: Option<Process>,
}

impl Node {
    pub(crate) fn name(&self) -> String {
        format!("node{}", self.id)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("admin.sock")
    }

    pub(crate) fn mount_point(&self) -> PathBuf {
        self.dir.join("mnt/data")
    }

    /// Asks its node process a command; the JSON of the answer.
    pub(crate) fn ask(&self, command: Admin) -> Result<Value, String> {
        let shown: String = format!("{command:?}").chars().take_while(char::is_ascii_alphanumeric).collect();
        let outcome = Client::connect(&self.socket()).and_then(|mut c| c.command(command));
        let (code, text, json) = outcome.map_err(|e| format!("{}: {e}", self.name()))?;
        if code != 0 {
            return Err(format!("{}: {shown}: {text}", self.name()));
        }
        serde_json::from_str(&json).map_err(|e| format!("{}: {shown}: bad answer: {e}", self.name()))
    }
}

/// Everything the demo started.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) scratch: PathBuf,
    pub(crate) programs: PathBuf,
    pub(crate) nodes: Vec<Node>,
    pub(crate) storage: Option<Process>,
    pub(crate) storage_address: String,
    pub(crate) http_address: String,
    events_read: u64,
    events: Vec<Value>,
}

impl Cluster {
    /// Makes the directory and chooses the addresses: a loopback network of its own.
    pub(crate) fn new(nodes: u32, network: Option<&str>) -> Result<Self, String> {
        let pid = std::process::id();
        let base = std::env::temp_dir();
        has_room(&base)?;
        let scratch = base.join(format!("qdemo-{pid}"));
        fs::create_dir(&scratch).map_err(|e| format!("cannot make {}: {e}", scratch.display()))?;
        let programs = std::env::current_exe()
            .ok()
            .and_then(|p| p.parent().map(Path::to_path_buf))
            .ok_or("cannot tell where the programs are")?;
        let net = network.map_or_else(|| format!("127.{}.{}", 64 + pid / 256 % 64, pid % 256), str::to_owned);
        let cluster = Self {
            nodes: (1..=nodes)
                .map(|id| Node {
                    id,
                    dir: scratch.join(format!("n{id}")),
                    address: format!("{net}.{id}:7411"),
                    supervisor: None,
                })
                .collect(),
            storage: None,
            storage_address: format!("{net}.100:10809"),
            http_address: format!("{net}.200:8080"),
            scratch,
            programs,
            events_read: 0,
            events: Vec::new(),
        };
        for address in
            cluster.nodes.iter().map(|n| &n.address).chain([&cluster.storage_address, &cluster.http_address])
        {
            TcpListener::bind(address)
                .map_err(|e| format!("cannot use {address}: {e}; is another demo running?"))?;
        }
        Ok(cluster)
    }

    /// The file every process appends its events to.
    pub(crate) fn events_file(&self) -> PathBuf {
        self.scratch.join("events.jsonl")
    }

    /// A `quorate` command.
    pub(crate) fn quorate(&self) -> Command {
        let mut command = Command::new(self.programs.join("quorate"));
        command.stdin(Stdio::null()).env("TMPDIR", &self.scratch);
        command
    }

    /// Runs a `quorate` command to its end.
    pub(crate) fn run(&self, args: &[&str]) -> Result<String, String> {
        let output = self
            .quorate()
            .args(args)
            .output()
            .map_err(|e| format!("cannot run quorate {}: {e}", args.join(" ")))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(format!(
            "quorate {}: {}",
            args.join(" "),
            stderr.trim().lines().last().unwrap_or("failed without a word")
        ))
    }

    /// A log file for a process.
    pub(crate) fn log(&self, name: &str) -> Result<File, String> {
        let path = self.scratch.join(format!("{name}.log"));
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    pub(crate) fn start_storage(&mut self) -> Result<(), String> {
        let mut command = self.quorate();
        let image = self.scratch.join("shared.img");
        command
            .args(["storage", "--dir"])
            .arg(self.scratch.join("s1"))
            .args(["--export", &format!("shared={}:{IMAGE_BYTES}", image.display()), "--events"])
            .arg(self.events_file())
            .stdout(self.log("storage")?)
            .stderr(self.log("storage")?);
        self.storage = Some(Process::start(&mut command).map_err(|e| e.to_string())?);
        Ok(())
    }

    /// Starts (again) the supervisor of node `id`, which starts the node.
    pub(crate) fn start_node(&mut self, id: u32, no_fuse: bool) -> Result<(), String> {
        let mut command = self.quorate();
        let index = (id - 1) as usize;
        command.args(["node", "--dir"]).arg(&self.nodes[index].dir).arg("--events").arg(self.events_file());
        if no_fuse {
            command.arg("--no-fuse");
        }
        let name = self.nodes[index].name();
        command.stdout(self.log(&name)?).stderr(self.log(&name)?);
        self.nodes[index].supervisor = Some(Process::start(&mut command).map_err(|e| e.to_string())?);
        Ok(())
    }

    /// Whether the last block of the image reads as zeros.
    pub(crate) fn last_block_is_zero(&self) -> io::Result<bool> {
        let mut image = File::open(self.scratch.join("shared.img"))?;
        image.seek(SeekFrom::Start(IMAGE_BYTES - crate::late::BLOCK_BYTES))?;
        let mut block = Vec::new();
        image.read_to_end(&mut block)?;
        Ok(block.len() as u64 == crate::late::BLOCK_BYTES && block.iter().all(|b| *b == 0))
    }

    pub(crate) fn node(&self, id: u32) -> &Node {
        &self.nodes[(id - 1) as usize]
    }

    pub(crate) fn node_mut(&mut self, id: u32) -> &mut Node {
        &mut self.nodes[(id - 1) as usize]
    }

    /// All events so far, oldest first.
    pub(crate) fn events(&mut self) -> &[Value] {
        if let Ok(mut file) = File::open(self.events_file()) {
            let mut text = String::new();
            if file.seek(SeekFrom::Start(self.events_read)).is_ok() && file.read_to_string(&mut text).is_ok()
            {
                // A line that is still being written is left for the next time.
                let whole = text.rfind('\n').map_or(0, |at| at + 1);
                self.events_read += whole as u64;
                self.events.extend(text[..whole].lines().filter_map(|l| serde_json::from_str(l).ok()));
            }
        }
        &self.events
    }

    /// Waits for an event at or after `since`; its time.
    pub(crate) fn wait_event(
        &mut self,
        since: u64,
        ceiling: Duration,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<u64, String> {
        poll(ceiling, || {
            let found = self.events().iter().find(|e| since <= time_of(e) && wanted(e)).map(time_of);
            found.map(Ok).or_else(|| self.dead().map(Err))
        })
        .unwrap_or_else(|| Err(format!("{what}: not seen within {} s", ceiling.as_secs())))
    }

    /// A process that should run and does not, in words, with the last line of its log.
    fn dead(&mut self) -> Option<String> {
        let scratch = self.scratch.clone();
        let last = |name: &str| {
            let text = fs::read_to_string(scratch.join(format!("{name}.log"))).unwrap_or_default();
            text.trim_end().lines().last().unwrap_or("it said nothing").to_owned()
        };
        if let Some(status) = self.storage.as_mut().and_then(Process::ended) {
            return Some(format!("the storage server ended ({status}): {}", last("storage")));
        }
        None
    }

    /// What the log of a node's process ends with.
    pub(crate) fn last_words(&self, name: &str) -> String {
        let text = fs::read_to_string(self.scratch.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.trim_end().lines().collect();
        lines[lines.len().saturating_sub(3)..].join("\n")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        use rustix::process::Signal;
        // Stopped processes first: they must be able to hear the request to end.
        for node in &self.nodes {
            if let Some(supervisor) = &node.supervisor {
                supervisor.signal(Signal::CONT);
                supervisor.signal(Signal::TERM);
            }
        }
        for node in &mut self.nodes {
            if let Some(mut supervisor) = node.supervisor.take() {
                supervisor.wait_for_quietly(Duration::from_secs(8));
            }
            // The mount is the supervisor's to end; this is for one that was killed.
            let _none =
                Command::new("umount").arg("-l").arg(node.mount_point()).stderr(Stdio::null()).status();
        }
        self.storage = None;
        if std::env::var_os("QUORATE_DEMO_KEEP_FILES").is_none() {
            let _left = fs::remove_dir_all(&self.scratch);
        }
    }
}

/// What the image, its copy for the checkers, and the logs take at most, in MiB.
const ROOM_MIB: u64 = 640;

fn has_room(dir: &Path) -> Result<(), String> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let free = (stat.f_bavail * stat.f_frsize) >> 20;
    if free < ROOM_MIB {
        let dir = dir.display();
        return Err(format!(
            "{dir} has {free} MiB free, the demo wants {ROOM_MIB}: set TMPDIR to a directory with more"
        ));
    }
    Ok(())
}

/// The time of an event.
pub(crate) fn time_of(event: &Value) -> u64 {
    event.get("t").and_then(Value::as_u64).unwrap_or(0)
}

/// Looks again and again until there is something, at most so long, or until we are interrupted.
#[expect(clippy::disallowed_methods, reason = "the demo watches other processes on the wall clock")]
pub(crate) fn poll<T>(ceiling: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = std::time::Instant::now() + ceiling;
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if interrupted() || end <= std::time::Instant::now() {
            return None;
        }
        std::thread::sleep(POLL);
    }
}

/// One HTTP GET; the process that answered and the body.
pub(crate) fn http_get(address: &str) -> io::Result<(String, Vec<u8>)> {
    use std::io::Write;
    let socket: std::net::SocketAddr = address.parse().map_err(io::Error::other)?;
    let mut stream = std::net::TcpStream::connect_timeout(&socket, Duration::from_millis(200))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let split =
        answer.windows(4).position(|w| w == b"\r\n\r\n").ok_or_else(|| io::Error::other("no HTTP answer"))?;
    let head = String::from_utf8_lossy(&answer[..split]).into_owned();
    if !head.starts_with("HTTP/1.1 200") {
        return Err(io::Error::other(head.lines().next().unwrap_or_default().to_owned()));
    }
    let server = head.lines().find_map(|l| l.strip_prefix("Server: ")).unwrap_or_default().to_owned();
    Ok((server, answer[split + 4..].to_vec()))
}

/// Copies the logical volume out of the image: one linear segment behind the physical volume's first extent.
///
/// The place is read with our own volume manager's reader, so this judges the contents, not the place.
pub(crate) fn extract_volume(image: &Path, to: &Path) -> Result<(), String> {
    let (offset, len) = quorate::volume::linear_place(image, "vg0", "lv0")?;
    let mut from = File::open(image).map_err(|e| e.to_string())?;
    from.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
    copy_sparse(&mut from.take(len), len, to).map_err(|e| e.to_string())
}

/// Copies, with zeros as holes.
fn copy_sparse(from: &mut impl Read, len: u64, to: &Path) -> io::Result<()> {
    use std::io::Write;
    let mut to = File::create(to)?;
    let mut buf = Vec::new();
    loop {
        buf.clear();
        from.by_ref().take(1 << 20).read_to_end(&mut buf)?;
        if buf.is_empty() {
            return to.set_len(len);
        }
        if buf.iter().all(|b| *b == 0) {
            to.seek(SeekFrom::Current(buf.len() as i64))?;
        } else {
            to.write_all(&buf)?;
        }
    }
}

/// Runs something on the image as a block device; needs root and loop devices.
pub(crate) fn with_loop_device<T>(image: &Path, work: impl FnOnce(&str) -> io::Result<T>) -> io::Result<T> {
    let output = Command::new("/sbin/losetup").args(["-f", "--show", "-r"]).arg(image).output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("no loop device: {}", text.trim())));
    }
    let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let outcome = work(&device);
    let _gone = Command::new("/sbin/losetup").args(["-d", &device]).status();
    outcome
}
