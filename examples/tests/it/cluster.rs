//! The harness: a directory, a loopback network and the processes of one cluster. Waits are for events, with a ceiling.

use quorate::admin::client::Client;
use quorate::admin::protocol::{Command as Admin, FileOperation, Reply};
use quorate::events::boottime_ns;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Nothing that is waited for takes longer, on a busy machine too.
pub(crate) const CEILING: Duration = Duration::from_secs(60);

static ONE: Mutex<()> = Mutex::new(());

/// Process tests run one at a time.
pub(crate) fn one_at_a_time() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory that is removed at the end, unless the test failed: its logs say why.
pub(crate) struct Temp(pub(crate) PathBuf);

impl Temp {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        // Short: the path of an admin socket has at most 100 bytes.
        let path = std::env::temp_dir().join(format!("qt{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("what the test left is in {}", self.0.display());
        } else {
            let _left = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// A loopback network that no other test uses: the first three numbers.
pub(crate) fn network() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = std::process::id() * 8 + COUNT.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{}", 128 + n / 256 % 96, n % 256)
}

/// Looks again and again until there is something, or fails the test.
pub(crate) fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait_or(look, || panic!("{what}: not within {CEILING:?}"))
}

/// Looks again and again until there is something, at most for the ceiling.
#[expect(clippy::disallowed_methods, reason = "other processes are watched on the wall clock")]
pub(crate) fn wait_or<T>(mut look: impl FnMut() -> Option<T>, or: impl FnOnce() -> T) -> T {
    let end = std::time::Instant::now() + CEILING;
    loop {
        if let Some(found) = look() {
            return found;
        }
        if end <= std::time::Instant::now() {
            return or();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process runs.
pub(crate) fn runs(pid: u32) -> bool {
    // A zombie has no command line.
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// A program of this package, with its output captured.
pub(crate) fn quorate(args: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_quorate")).args(args).stdin(Stdio::null()).output();
    output.expect("started")
}

/// What a command that fails says; its exit code is checked.
pub(crate) fn complaint(code: i32, args: &[&str]) -> String {
    let output = quorate(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    stderr
}

/// What a command says on standard output; its exit code is checked.
pub(crate) fn output_of(code: i32, args: &[&str]) -> String {
    let output = quorate(args);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// One cluster.
pub(crate) struct Cluster {
    pub(crate) temp: Temp,
    pub(crate) net: String,
    processes: BTreeMap<String, Child>,
    events_read: u64,
    events: Vec<Value>,
}

/// The size of the image.
pub(crate) const IMAGE_BYTES: u64 = 256 << 20;

impl Cluster {
    /// Directories and certificates for so many nodes and a storage server; nothing runs yet.
    pub(crate) fn new(nodes: u32) -> Self {
        let cluster = Self {
            temp: Temp::new(),
            net: network(),
            processes: BTreeMap::new(),
            events_read: 0,
            events: Vec::new(),
        };
        let (ca, first) = (cluster.path("ca"), cluster.address(1));
        cluster.must(&[
            "cluster",
            "create",
            "--ca",
            &ca,
            "--dir",
            &cluster.path("n1"),
            "--name",
            "test",
            "--id",
            "1",
            "--node-name",
            "node1",
            "--listen",
            &first,
        ]);
        for id in 2..=nodes {
            cluster.make_node(id, &format!("n{id}"), &cluster.address(id));
        }
        let storage = cluster.storage_address();
        cluster.must(&[
            "cluster",
            "server",
            "--ca",
            &ca,
            "--dir",
            &cluster.path("s1"),
            "--name",
            "storage1",
            "--listen",
            &storage,
        ]);
        cluster
    }

    /// The directory of a node, made by the CA.
    pub(crate) fn make_node(&self, id: u32, dir: &str, listen: &str) {
        let (id, name, join) = (id.to_string(), format!("node{id}"), format!("1@{}", self.address(1)));
        self.must(&[
            "cluster",
            "node",
            "--ca",
            &self.path("ca"),
            "--dir",
            &self.path(dir),
            "--id",
            &id,
            "--name",
            &name,
            "--listen",
            listen,
            "--join",
            &join,
        ]);
    }

    /// A running cluster with a configuration; every node is a member and votes.
    pub(crate) fn running(nodes: u32, more: &str) -> Self {
        let mut cluster = Self::new(nodes);
        cluster.start_storage();
        cluster.form(nodes);
        cluster.configure(nodes, more);
        cluster
    }

    /// Starts the nodes and makes them members.
    pub(crate) fn form(&mut self, nodes: u32) {
        let since = boottime_ns();
        for id in 1..=nodes {
            self.start_node(id);
        }
        self.wait_event("node 1's quorum", since, |e| {
            is(e, "quorum") && who(e) == "node 1" && e["quorate"].as_bool() == Some(true)
        });
        for id in 2..=nodes {
            let certificate =
                std::fs::read_to_string(self.path(&format!("n{id}/pki/server-cert.pem"))).unwrap();
            self.ask(1, Admin::AddNode { id, certificate, address: self.address(id) }).unwrap();
        }
        self.ask(1, Admin::Enrol { name: "storage1".into(), address: self.storage_address() }).unwrap();
        self.everybody_in(since, &(1..=nodes).collect::<Vec<_>>());
        self.ask(1, Admin::AdmitVoters).unwrap();
        wait_for("every node's vote", || {
            let members = self.ask(1, Admin::Members).ok()?;
            let rows = members["nodes"].as_array()?;
            (rows.len() == nodes as usize && rows.iter().all(|n| n["votes"] == 1)).then_some(())
        });
    }

    pub(crate) fn configure(&mut self, nodes: u32, more: &str) {
        let mut document = String::from("name = \"test\"\n");
        for id in 1..=nodes {
            document +=
                &format!("[[node]]\nid = {id}\nname = \"node{id}\"\naddress = \"{}\"\n", self.address(id));
        }
        document += &format!(
            "[[export]]\nname = \"shared\"\nserver = \"storage1\"\naddress = \"{}\"\n\
             [[volume_group]]\nname = \"vg0\"\ndevices = [\"shared\"]\n\
             [[filesystem]]\nname = \"data\"\nvolume = \"vg0/lv0\"\njournals = {nodes}\n{more}",
            self.storage_address()
        );
        self.ask(1, Admin::ConfigApply { expected: None, document }).unwrap();
        for id in 1..=nodes {
            wait_for("the configuration", || self.ask(id, Admin::ConfigShow).ok());
        }
    }

    /// A volume group, a volume, a filesystem, and it mounted on all nodes.
    pub(crate) fn mount_everywhere(&mut self, nodes: u32) {
        self.ask(1, Admin::PvCreate("shared".into())).unwrap();
        self.ask(1, Admin::VgCreate { name: "vg0".into(), devices: vec!["shared".into()] }).unwrap();
        let bytes = IMAGE_BYTES - (32 << 20);
        self.ask(1, Admin::LvCreate { group: "vg0".into(), name: "lv0".into(), bytes }).unwrap();
        self.ask(1, Admin::Mkfs { name: "data".into() }).unwrap();
        for id in 1..=nodes {
            self.ask(id, Admin::Mount("data".into())).unwrap();
        }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.temp.0.join(name).display().to_string()
    }

    pub(crate) fn address(&self, id: u32) -> String {
        format!("{}.{id}:7411", self.net)
    }

    pub(crate) fn storage_address(&self) -> String {
        format!("{}.100:10809", self.net)
    }

    fn must(&self, args: &[&str]) {
        let output = quorate(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    pub(crate) fn start_storage(&mut self) {
        let since = boottime_ns();
        let export = format!("shared={}:{IMAGE_BYTES}", self.path("shared.img"));
        let args = ["storage", "--dir", &self.path("s1"), "--export", &export].map(str::to_owned);
        self.spawn("storage", &args);
        self.wait_event("the storage server", since, |e| is(e, "listening"));
    }

    pub(crate) fn start_node(&mut self, id: u32) {
        let args = ["node", "--no-fuse", "--dir", &self.path(&format!("n{id}"))].map(str::to_owned);
        self.spawn(&format!("node{id}"), &args);
    }

    /// A witness, named as its directory.
    pub(crate) fn start_witness(&mut self, dir: &str) {
        let args = ["witness", "--dir", &self.path(dir)].map(str::to_owned);
        self.spawn(dir, &args);
    }

    fn spawn(&mut self, name: &str, args: &[String]) {
        use std::os::unix::process::CommandExt;
        let log = || {
            File::options().create(true).append(true).open(self.temp.0.join(format!("{name}.log"))).unwrap()
        };
        let child = Command::new(env!("CARGO_BIN_EXE_quorate"))
            .args(args)
            .arg("--events")
            .arg(self.temp.0.join("events.jsonl"))
            .env("TMPDIR", &self.temp.0)
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .process_group(0)
            .spawn()
            .expect("started");
        self.processes.insert(name.to_owned(), child);
    }

    /// The process number of a storage server or supervisor.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        self.processes[name].id()
    }

    /// Kills a process that was started, and waits for its end.
    pub(crate) fn kill(&mut self, name: &str) {
        let mut child = self.processes.remove(name).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Waits for the end of a process.
    pub(crate) fn ended(&mut self, name: &str) -> ExitStatus {
        let mut child = self.processes.remove(name).unwrap();
        wait_for(&format!("the end of {name}"), || child.try_wait().unwrap())
    }

    pub(crate) fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.temp.0.join(format!("{name}.log"))).unwrap_or_default()
    }

    pub(crate) fn socket(&self, id: u32) -> PathBuf {
        self.temp.0.join(format!("n{id}/admin.sock"))
    }

    /// The JSON of a command's answer, or what it says.
    pub(crate) fn ask(&self, id: u32, command: Admin) -> Result<Value, String> {
        let answer = Client::connect(&self.socket(id)).and_then(|mut c| c.command(command));
        match answer.map_err(|e| e.to_string())? {
            (0, _, json) => serde_json::from_str(&json).map_err(|e| e.to_string()),
            (_, text, _) => Err(text),
        }
    }

    pub(crate) fn status(&self, id: u32) -> Value {
        self.ask(id, Admin::Status).unwrap()
    }

    pub(crate) fn node_process(&self, id: u32) -> u32 {
        u32::try_from(self.status(id)["pid"].as_u64().unwrap()).unwrap()
    }

    /// Appends durably through a node.
    pub(crate) fn append(&self, id: u32, path: &str, data: &[u8]) -> std::io::Result<()> {
        let operation =
            FileOperation::Write { path: path.into(), offset: None, data: data.to_vec(), sync: true };
        Client::connect(&self.socket(id))?.file("data", operation).map(drop)
    }

    pub(crate) fn read(&self, id: u32, path: &str) -> Vec<u8> {
        let operation = FileOperation::Read { path: path.into(), offset: 0, len: 1 << 20 };
        match Client::connect(&self.socket(id)).and_then(|mut c| c.file("data", operation)).unwrap() {
            Reply::Data(data) => data,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn events(&mut self) -> &[Value] {
        if let Ok(mut file) = File::open(self.temp.0.join("events.jsonl")) {
            let mut text = String::new();
            file.seek(SeekFrom::Start(self.events_read)).unwrap();
            file.read_to_string(&mut text).unwrap();
            let whole = text.rfind('\n').map_or(0, |at| at + 1);
            self.events_read += whole as u64;
            self.events.extend(text[..whole].lines().map(|l| serde_json::from_str::<Value>(l).unwrap()));
        }
        &self.events
    }

    /// Waits for an event at or after `since` and gives it.
    pub(crate) fn wait_event(&mut self, what: &str, since: u64, wanted: impl Fn(&Value) -> bool) -> Value {
        let look = || self.events().iter().find(|e| since <= time(e) && wanted(e)).cloned().map(Some);
        let found = wait_or(look, || None);
        found.unwrap_or_else(|| {
            let last = |name: &String| self.log(name).lines().last().unwrap_or_default().to_owned();
            let logs: Vec<String> =
                self.processes.keys().map(|name| format!("{name}: {}", last(name))).collect();
            panic!("{what}: not within {CEILING:?}\n{}", logs.join("\n"))
        })
    }

    /// Waits until each of the nodes has installed a view of exactly these.
    pub(crate) fn everybody_in(&mut self, since: u64, nodes: &[u32]) {
        for id in nodes {
            let node = format!("node {id}");
            let wanted: Vec<u64> = nodes.iter().map(|n| u64::from(*n)).collect();
            self.wait_event(&format!("a view of {nodes:?} on {node}"), since, |e| {
                is(e, "view") && who(e) == node && numbers(e, "members") == wanted
            });
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.processes.values() {
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            let _gone = pid.map(|pid| kill_process(pid, Signal::CONT));
        }
        for (_, mut child) in std::mem::take(&mut self.processes) {
            // The supervisor dies, with it its node (death signal) and the group.
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _gone = kill_process_group(pid, Signal::KILL);
            }
            let _reaped = child.wait();
        }
    }
}

pub(crate) fn time(event: &Value) -> u64 {
    event["t"].as_u64().unwrap_or(0)
}

pub(crate) fn is(event: &Value, kind: &str) -> bool {
    event["event"] == kind
}

pub(crate) fn who(event: &Value) -> &str {
    event["who"].as_str().unwrap_or_default()
}

pub(crate) fn numbers(event: &Value, key: &str) -> Vec<u64> {
    event[key].as_array().into_iter().flatten().filter_map(Value::as_u64).collect()
}

/// Copies a directory with all its files.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_dir(&entry.path(), &target),
            kind if kind.is_file() => drop(std::fs::copy(entry.path(), target).unwrap()),
            _ => (),
        }
    }
}
