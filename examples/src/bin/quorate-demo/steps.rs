//! The steps of the main job, in order. A step that fails ends the run; what was proven until then is printed all the same.

use crate::access::{Access, FILESYSTEM};
use crate::children::{Process, interrupted, signal_pid};
use crate::cluster::{Cluster, http_get, poll};
use crate::late::LateWrite;
use crate::options::Options;
use crate::proof::Proofs;
use crate::timeline::Timeline;
use crate::tree::{self, Fingerprint};
use crate::worker::{COUNTER, hot_file, log_file, record};
use quorate::admin::protocol::Command as Admin;
use quorate::events::boottime_ns;
use quorate_gnbd::proto::Errno;
use quorate_membership::{Identity, Incarnation, NodeId};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long the whole of one step may take before the demo gives up.
const CEILING: Duration = Duration::from_secs(30);

/// The first bytes of the page the service shows.
const PAGE: &[u8] = b"served from the shared filesystem\n";

/// What a worker has told us.
#[derive(Debug, Default)]
struct Heard {
    acknowledged: u64,
    tried: u64,
    incremented: u64,
    blocks: u64,
    /// Start and length of acknowledged appends, in nanoseconds.
    appends: Vec<(u64, u64)>,
    probes: Vec<u64>,
    error: Option<String>,
    ended: bool,
}

/// A worker process and what it has said.
#[derive(Debug)]
struct Worker {
    name: String,
    process: Process,
    heard: Arc<Mutex<Heard>>,
}

impl Worker {
    fn heard(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&mut self, line: &str) -> Result<(), String> {
        let stdin = self.process.child().stdin.as_mut().ok_or("the worker takes no orders")?;
        writeln!(stdin, "{line}").map_err(|e| format!("worker {}: {e}", self.name))
    }

    /// Ends it after its current step.
    fn stop(&mut self) -> Result<(), String> {
        self.tell("stop")?;
        poll(CEILING, || self.heard().ended.then_some(()))
            .ok_or_else(|| format!("worker {} does not end", self.name))
    }
}

/// The state of the run.
struct Run<'a> {
    options: &'a Options,
    cluster: Cluster,
    timeline: Timeline,
    proofs: Proofs,
    workers: Vec<Worker>,
    generation: u32,
    fuse: bool,
    source: Fingerprint,
    kept: bool,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    let cluster = match Cluster::new(options.nodes, options.network.as_deref()) {
        Ok(cluster) => cluster,
        Err(message) => {
            eprintln!("quorate-demo: {message}");
            return ExitCode::from(2);
        }
    };
    let start = boottime_ns();
    let mut run = Run {
        options,
        cluster,
        timeline: Timeline::default(),
        proofs: Proofs::default(),
        workers: Vec::new(),
        generation: 0,
        fuse: false,
        source: Fingerprint::new(),
        kept: false,
    };
    let outcome = run.all();
    let seconds = (boottime_ns() - start) as f64 / 1e9;
    if let Err(message) = &outcome {
        println!("\nended early: {message}");
        for name in (1..=options.nodes).map(|n| format!("node{n}")).chain(["storage".to_owned()]) {
            println!("  last words of {name}: {}", run.cluster.last_words(&name).replace('\n', "\n    "));
        }
    }
    let (failed, missed) = (run.proofs.failed(), run.timeline.missed());
    println!("\n{failed} proofs fail, {missed} times are missed, {seconds:.1} s in all");
    if let Some(file) = &options.json {
        let report = json!({
            "seed": options.seed, "nodes": options.nodes, "fuse": run.fuse, "seconds": seconds,
            "error": outcome.as_ref().err(), "times": run.timeline.json(), "proofs": run.proofs.json(),
        });
        if let Err(error) = std::fs::write(file, format!("{report:#}\n")) {
            eprintln!("quorate-demo: cannot write {}: {error}", file.display());
            return ExitCode::from(2);
        }
    }
    if interrupted() && !run.kept {
        return ExitCode::from(130);
    }
    if outcome.is_err() || 0 < failed {
        return ExitCode::FAILURE;
    }
    if options.strict_times && 0 < missed { ExitCode::from(3) } else { ExitCode::SUCCESS }
}

impl Run<'_> {
    fn all(&mut self) -> Result<(), String> {
        self.bring_up()?;
        self.tree_and_workers()?;
        self.service()?;
        self.kill()?;
        self.rejoin(1, "8. node 1 again: three full members")?;
        self.pause(false)?;
        self.rejoin(2, "9b. node 2 again, in a fresh process")?;
        self.pause(true)?;
        self.rejoin(2, "9d. node 2 again, in a fresh process")?;
        self.prove()
    }

    fn headline(&self, text: &str) -> Result<(), String> {
        if interrupted() {
            return Err("interrupted".into());
        }
        println!("\n{text}");
        Ok(())
    }

    /// Steps 1 to 5: storage, membership, configuration, volume, filesystem, mounts.
    fn bring_up(&mut self) -> Result<(), String> {
        self.headline("1. a cluster CA, certificates, a storage server with a 1 GiB image, and the nodes")?;
        let scratch = self.cluster.scratch.clone();
        let path = |name: &str| scratch.join(name).display().to_string();
        let first = self.cluster.node(1).address.clone();
        let (ca, n1, s1) = (path("ca"), path("n1"), path("s1"));
        self.cluster.run(&[
            "cluster",
            "create",
            "--ca",
            &ca,
            "--dir",
            &n1,
            "--name",
            "demo",
            "--id",
            "1",
            "--node-name",
            "node1",
            "--listen",
            &first,
        ])?;
        let storage = self.cluster.storage_address.clone();
        self.cluster.run(&[
            "cluster", "server", "--ca", &ca, "--dir", &s1, "--name", "storage1", "--listen", &storage,
        ])?;
        for id in 2..=self.options.nodes {
            let (dir, address) = (path(&format!("n{id}")), self.cluster.node(id).address.clone());
            let (id, name) = (id.to_string(), format!("node{id}"));
            self.cluster.run(&[
                "cluster",
                "node",
                "--ca",
                &ca,
                "--dir",
                &dir,
                "--id",
                &id,
                "--name",
                &name,
                "--listen",
                &address,
                "--join",
                &format!("1@{first}"),
            ])?;
        }
        let start = boottime_ns();
        self.cluster.start_storage()?;
        self.cluster.wait_event(start, CEILING, "the storage server", |e| {
            is(e, "listening") && who(e) == "storage"
        })?;
        for id in 1..=self.options.nodes {
            self.cluster.start_node(id, self.options.no_fuse)?;
        }
        self.cluster.wait_event(start, CEILING, "node 1's quorum", |e| {
            is(e, "quorum") && who(e) == "node 1" && e.get("quorate").and_then(Value::as_bool) == Some(true)
        })?;
        for id in 2..=self.options.nodes {
            let node = self.cluster.node(id);
            let certificate = std::fs::read_to_string(node.dir.join("pki/server-cert.pem"))
                .map_err(|e| format!("node {id}'s certificate: {e}"))?;
            let address = node.address.clone();
            self.cluster.node(1).ask(Admin::AddNode { id, certificate, address })?;
        }
        self.cluster.node(1).ask(Admin::Enrol { name: "storage1".into(), address: storage })?;
        self.everybody_in(start)?;
        self.cluster.node(1).ask(Admin::AdmitVoters)?;
        self.timeline.note(
            "members",
            "all nodes are members, from the start of the processes",
            since(start),
            None,
        );

        self.headline("2. the cluster configuration, applied on node 1")?;
        self.write_agent()?;
        let document = self.configuration();
        self.cluster.node(1).ask(Admin::ConfigApply { expected: None, document })?;
        let version = |v: &Value| v.get("version").and_then(Value::as_u64);
        let wanted = version(&self.cluster.node(1).ask(Admin::ConfigShow)?);
        let ids: Vec<u32> = (1..=self.options.nodes).collect();
        let same = poll(CEILING, || {
            ids.iter()
                .all(|id| self.cluster.node(*id).ask(Admin::ConfigShow).is_ok_and(|v| version(&v) == wanted))
                .then_some(())
        });
        self.proofs.check("config", "the configuration has the same version on all nodes", same.is_some());

        self.headline("3. a volume group and a logical volume, made on node 1")?;
        self.cluster.node(1).ask(Admin::PvCreate("shared".into()))?;
        self.cluster.node(1).ask(Admin::VgCreate { name: "vg0".into(), devices: vec!["shared".into()] })?;
        self.cluster.node(1).ask(Admin::LvCreate {
            group: "vg0".into(),
            name: "lv0".into(),
            bytes: 900 << 20,
        })?;
        let seen = ids.iter().all(|id| {
            self.cluster.node(*id).ask(Admin::Volumes).is_ok_and(|v| v.to_string().contains("\"lv0\""))
        });
        self.proofs.check("volume", "every node sees the logical volume", seen);

        self.headline("4. a GFS2 filesystem with a journal for each node, mounted by all")?;
        self.cluster.node(1).ask(Admin::Mkfs { name: FILESYSTEM.into() })?;
        for id in &ids {
            let answer = self.cluster.node(*id).ask(Admin::Mount(FILESYSTEM.into()))?;
            self.fuse = answer.get("access").and_then(Value::as_str) == Some("fuse");
        }
        println!(
            "  access: {}",
            if self.fuse { "FUSE mounts" } else { "each node's own file API (no usable FUSE)" }
        );
        self.timeline.note("up", "cluster up and mounted on all nodes", since(start), Some(5000.0));
        Ok(())
    }

    /// Puts the resource agent where the configuration says it is.
    fn write_agent(&self) -> Result<(), String> {
        use std::os::unix::fs::PermissionsExt;
        let path = self.cluster.scratch.join("quorate-http");
        let text = include_str!("../../../ocf/quorate-http");
        std::fs::write(&path, text)
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)))
            .map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    fn configuration(&self) -> String {
        let mut text = String::from("name = \"demo\"\n\n");
        for node in &self.cluster.nodes {
            text += &format!(
                "[[node]]\nid = {}\nname = \"node{}\"\naddress = \"{}\"\n\n",
                node.id, node.id, node.address
            );
        }
        text += &format!(
            "[[export]]\nname = \"shared\"\nserver = \"storage1\"\naddress = \"{}\"\n\n\
             [[volume_group]]\nname = \"vg0\"\ndevices = [\"shared\"]\n\n\
             [[filesystem]]\nname = \"{FILESYSTEM}\"\nvolume = \"vg0/lv0\"\njournals = {}\n\n",
            self.cluster.storage_address, self.options.nodes
        );
        let agent = self.cluster.scratch.join("quorate-http");
        text += &format!(
            "[[service]]\nname = \"web\"\nsafety = \"lease\"\nautostart = false\n\n\
             [[service.resource]]\nname = \"page\"\nagent = \"{}\"\n\
             [service.resource.parameters]\nprogram = \"{}\"\nlisten = \"{}\"\nsource = \"${{file:{FILESYSTEM}:/index.html}}\"\n\
             pidfile = \"{}\"\n",
            agent.display(),
            self.cluster.programs.join("quorate-httpd").display(),
            self.cluster.http_address,
            self.cluster.scratch.join("httpd.pid").display(),
        );
        text
    }

    /// Waits until every node has installed a view with all nodes in it.
    fn everybody_in(&mut self, since: u64) -> Result<(), String> {
        let all: Vec<u64> = (1..=u64::from(self.options.nodes)).collect();
        for id in 1..=self.options.nodes {
            let node = format!("node {id}");
            self.cluster.wait_event(since, CEILING, &format!("a view with everybody on {node}"), |e| {
                is(e, "view") && who(e) == node && numbers(e, "members") == all
            })?;
        }
        Ok(())
    }

    fn door(&self, id: u32) -> String {
        let node = self.cluster.node(id);
        if self.fuse {
            format!("mount:{}", node.mount_point().display())
        } else {
            format!("socket:{}", node.socket().display())
        }
    }

    fn access(&self, id: u32) -> Result<Access, String> {
        Access::open(&self.door(id)).map_err(|e| format!("node {id}'s filesystem: {e}"))
    }

    fn start_worker(&mut self, id: u32) -> Result<(), String> {
        self.generation += 1;
        let name = format!("{id}-{}", self.generation);
        let program = std::env::current_exe().map_err(|e| e.to_string())?;
        let seed = self.options.seed.wrapping_mul(1000) + u64::from(self.generation);
        let mut command = Command::new(program);
        command
            .args(["worker", &self.door(id), &name, &seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(self.cluster.log("workers")?);
        let mut process = Process::start(&mut command).map_err(|e| e.to_string())?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let stdout = process.child().stdout.take().ok_or("the worker has no output")?;
        let ear = Arc::clone(&heard);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                hear(&mut ear.lock().unwrap_or_else(PoisonError::into_inner), &line);
            }
            ear.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        });
        self.workers.push(Worker { name, process, heard });
        Ok(())
    }

    /// The newest worker of a node.
    fn worker(&mut self, id: u32) -> Result<&mut Worker, String> {
        let prefix = format!("{id}-");
        self.workers
            .iter_mut()
            .rfind(|w| w.name.starts_with(&prefix))
            .ok_or_else(|| format!("node {id} has no worker"))
    }

    /// Waits until every living worker has got further by some records.
    fn everybody_works(&mut self, nodes: &[u32]) -> Result<(), String> {
        for id in nodes {
            let before = self.worker(*id)?.heard().acknowledged;
            let worker = self.worker(*id)?;
            let done = poll(CEILING, || {
                let heard = worker.heard();
                if heard.ended {
                    return Some(Err(heard.error.clone().unwrap_or_else(|| "it ended".into())));
                }
                (before + 5 <= heard.acknowledged && 0 < heard.incremented).then_some(Ok(()))
            });
            done.unwrap_or_else(|| Err("no progress".into()))
                .map_err(|e| format!("worker {}: {e}", worker.name))?;
        }
        Ok(())
    }

    /// Step 6.
    fn tree_and_workers(&mut self) -> Result<(), String> {
        self.headline("5. a real tree, copied in through node 1 while the other nodes work")?;
        let (from, tree) =
            tree::find(self.options.input.as_deref(), &self.cluster.scratch, self.options.seed)
                .map_err(|e| format!("the tree: {e}"))?;
        let files = tree::files(&tree);
        println!("  {from}: {files} files");
        self.source = tree::fingerprint_of_source(&tree).map_err(|e| e.to_string())?;
        let others: Vec<u32> = (2..=self.options.nodes).collect();
        for id in &others {
            self.start_worker(*id)?;
        }
        let start = boottime_ns();
        let mut access = self.access(1)?;
        let all = tree.len();
        tree::copy(&tree, &mut access, "/tree", |done| {
            if done % 500 == 0 || done == all {
                println!("  copied {done} of {all}");
            }
        })
        .map_err(|e| e.to_string())?;
        self.timeline.note("copy", &format!("{files} files copied in through node 1"), since(start), None);
        self.everybody_works(&others)?;
        for id in &others {
            let start = boottime_ns();
            let mut access = self.access(*id)?;
            let seen = tree::fingerprint(&mut access, "/tree").map_err(|e| format!("node {id}: {e}"))?;
            self.timeline.note(
                "read_back",
                &format!("read back and hashed on node {id}"),
                since(start),
                None,
            );
            self.proofs.check(
                "hashes",
                &format!("node {id} sees every file as it was copied"),
                seen == self.source,
            );
        }
        self.proofs.check("tree_size", "the tree has at least 2,000 files", tree::FILES_MIN <= files);
        self.start_worker(1)?;
        let everybody: Vec<u32> = (1..=self.options.nodes).collect();
        self.everybody_works(&everybody)
    }

    /// Step 7.
    fn service(&mut self) -> Result<(), String> {
        self.headline(
            "6. a service: an OCF agent that serves a file of the shared filesystem, placed on node 1",
        )?;
        self.access(1)?.write_file("/index.html", PAGE, true).map_err(|e| format!("/index.html: {e}"))?;
        self.cluster.node(1).ask(Admin::ServiceRelocate { name: "web".into(), node: Some(1) })?;
        let address = self.cluster.http_address.clone();
        let answer = poll(CEILING, || http_get(&address).ok());
        let right = answer.is_some_and(|(_, body)| body == PAGE);
        self.proofs.check("service", "the service answers with the file's contents", right);
        Ok(())
    }

    /// Step 8: node 1's node process is killed.
    fn kill(&mut self) -> Result<(), String> {
        self.headline("7. SIGKILL for node 1's node process")?;
        let survivors: Vec<u32> = (2..=self.options.nodes).collect();
        let pid = self.node_process(1)?;
        let address = self.cluster.http_address.clone();
        let server_before = http_get(&address).map(|(server, _)| server).unwrap_or_default();
        let killed = boottime_ns();
        signal_pid(pid, Signal::KILL);
        // A block that node 1 was writing until now: its lock is the dead node's.
        self.worker(2)?.tell(&format!("probe {}", hot_file("1")))?;
        let service = std::thread::spawn(move || {
            poll(CEILING, || {
                http_get(&address).ok().filter(|(server, body)| *server != server_before && body == PAGE)
            })
            .map(|_| boottime_ns())
        });
        let suspected = self.cluster.wait_event(killed, CEILING, "the failure's detection", |e| {
            is(e, "suspect") && e.get("node").and_then(Value::as_u64) == Some(1)
        })?;
        self.timeline.note("detected", "failure detected", suspected - killed, Some(1000.0));
        let view = self.cluster.wait_event(killed, CEILING, "a view without node 1", |e| {
            is(e, "view") && who(e) != "node 1" && !numbers(e, "members").contains(&1)
        })?;
        self.timeline.note("view", "view without it agreed", view - killed, None);
        let fenced = self.cluster.wait_event(killed, CEILING, "the fence", |e| {
            is(e, "fence") && who(e) == "storage" && !numbers(e, "admitted").contains(&1)
        })?;
        self.timeline.note(
            "fenced",
            "node fenced (the storage server's own confirmation)",
            fenced - killed,
            Some(1200.0),
        );
        let rebuilt = self.cluster.wait_event(killed, CEILING, "the locks' recovery", |e| {
            is(e, "stage") && e.get("stage").and_then(Value::as_str) == Some("rebuilt") && who(e) != "node 1"
        })?;
        self.timeline.note("rebuilt", "locks recovered", rebuilt - killed, None);
        let replayed = self.cluster.wait_event(killed, CEILING, "the journal's replay", |e| {
            is(e, "replayed") && who(e) != "node 1"
        })?;
        self.timeline.note("replayed", "journal replayed", replayed - killed, None);
        let worker = self.worker(2)?;
        let probe = poll(CEILING, || worker.heard().probes.first().copied())
            .ok_or("no survivor got a lock of the dead node")?;
        self.timeline.note(
            "lock",
            "first write by a survivor that needed a lock of the dead node",
            probe - killed,
            Some(2000.0),
        );
        let answered = service.join().ok().flatten().ok_or("the service did not come back")?;
        self.timeline.note("service", "service answers from another node", answered - killed, Some(4000.0));
        self.everybody_works(&survivors)?;
        let stall = survivors
            .iter()
            .filter_map(|id| self.worker(*id).ok().map(|w| longest(&w.heard().appends, killed, answered)))
            .max()
            .unwrap_or(0);
        self.timeline.note(
            "stall",
            "longest stall of an operation that did not touch the dead node",
            stall,
            Some(250.0),
        );
        let worker = self.worker(1)?;
        poll(CEILING, || worker.heard().ended.then_some(())).ok_or("the dead node's mount still answers")?;
        Ok(())
    }

    /// The process number of a node's node process.
    fn node_process(&self, id: u32) -> Result<u32, String> {
        let status = self.cluster.node(id).ask(Admin::Status)?;
        let pid = status.get("pid").and_then(Value::as_u64).and_then(|p| u32::try_from(p).ok());
        pid.ok_or_else(|| format!("node {id} does not tell its process number"))
    }

    /// Steps 9 and 10's end: the node comes back in a new life.
    fn rejoin(&mut self, id: u32, headline: &str) -> Result<(), String> {
        self.headline(headline)?;
        let supervisor = self.cluster.node_mut(id).supervisor.take();
        if let Some(mut old) = supervisor {
            old.wait_for(CEILING).ok_or_else(|| format!("node {id}'s supervisor does not end"))?;
        }
        let start = boottime_ns();
        self.cluster.start_node(id, self.options.no_fuse)?;
        self.everybody_in(start)?;
        let node = format!("node {id}");
        self.cluster.wait_event(start, CEILING, "its mount", |e| is(e, "mounted") && who(e) == node)?;
        self.timeline.note(
            "rejoined",
            &format!("node {id} is a member again and has mounted"),
            since(start),
            None,
        );
        let seen = self.access(id)?.read_file("/index.html").map_err(|e| format!("node {id}: {e}"))?;
        self.proofs.check("rejoin_reads", &format!("node {id} reads what was written before"), seen == PAGE);
        self.start_worker(id)?;
        self.everybody_works(&[id])
    }

    /// Step 10: node 2 is stopped for three times the detection time, alone or with its supervisor.
    fn pause(&mut self, with_supervisor: bool) -> Result<(), String> {
        self.headline(if with_supervisor {
            "9c. SIGSTOP for node 2 and its supervisor together, for three times the detection time"
        } else {
            "9a. SIGSTOP for node 2's node process alone, for three times the detection time"
        })?;
        let status = self.cluster.node(2).ask(Admin::Status)?;
        let detection = status
            .get("detection_ms")
            .and_then(Value::as_u64)
            .ok_or("the node does not tell its detection time")?;
        let pid = self.node_process(2)?;
        let supervisor =
            self.cluster.node(2).supervisor.as_ref().map(Process::id).ok_or("node 2 has no supervisor")?;
        let incarnation = status.get("incarnation").and_then(Value::as_u64);
        let incarnation = Incarnation(incarnation.ok_or("the node does not tell its incarnation")?);
        let life = Identity::new(NodeId(2), incarnation);
        // A write in its name that the network holds up from before the stop until after the fence.
        let late = LateWrite::under_way(
            &self.cluster.node(2).dir,
            life,
            &self.cluster.storage_address,
            "storage1",
            "shared",
            crate::cluster::IMAGE_BYTES,
        )
        .map_err(|e| format!("a path of node 2 to the storage server: {e}"))?;
        let stopped = boottime_ns();
        signal_pid(pid, Signal::STOP);
        if with_supervisor {
            signal_pid(supervisor, Signal::STOP);
        }
        self.cluster.wait_event(stopped, CEILING, "the fence of node 2", |e| {
            is(e, "fence") && who(e) == "storage" && !numbers(e, "admitted").contains(&2)
        })?;
        let fenced = self.storage_counts(life)?;
        let answer = late.arrive().map_err(|e| format!("the write that was held up: {e}"))?;
        let after = self.storage_counts(life)?;
        let claim = format!(
            "a write in its name that the network held up until after the fence is refused ({})",
            match answer {
                Err(Errno::Shutdown) => "ESHUTDOWN, counted by the server".to_owned(),
                Err(error) => error.to_string(),
                Ok(()) => "APPLIED".to_owned(),
            }
        );
        self.proofs.check("late_write_refused", &claim, answer.is_err() && fenced.1 < after.1);
        // The others rewrite the very blocks node 2 was writing.
        for id in [1, 3] {
            let asked = boottime_ns();
            self.worker(id)?.tell(&format!("probe {}", hot_file("2")))?;
            let worker = self.worker(id)?;
            poll(CEILING, || worker.heard().probes.iter().any(|t| asked <= *t).then_some(()))
                .ok_or_else(|| format!("node {id} cannot write what node 2 was writing"))?;
        }
        let end = stopped + 3 * detection * 1_000_000;
        poll(CEILING, || (end <= boottime_ns()).then_some(()));
        // The node first: what it does before its supervisor wakes is what the storage server has to refuse.
        signal_pid(pid, Signal::CONT);
        if with_supervisor {
            poll(Duration::from_secs(5), || {
                self.storage_counts(life).is_ok_and(|woken| after.1 < woken.1).then_some(())
            });
        }
        signal_pid(supervisor, Signal::CONT);
        let worker = self.worker(2)?;
        poll(CEILING, || worker.heard().ended.then_some(()))
            .ok_or("the stopped node still answers its worker")?;
        let node = self.cluster.node_mut(2);
        let ended = node.supervisor.as_mut().and_then(|s| s.wait_for(CEILING));
        let how = if with_supervisor { "both" } else { "node" };
        self.proofs.check(
            "pause_ends",
            &format!("the stopped node ({how}) found itself out and ended"),
            ended.is_some(),
        );
        let end = self.storage_counts(life)?;
        self.proofs.check(
            "writes_after_fence",
            &format!("the storage server applied {} writes of it after the confirmed fence", end.0),
            end.0 == 0,
        );
        let own = end.1.saturating_sub(after.1);
        let all = end.1.saturating_sub(fenced.1);
        let claim = if with_supervisor {
            format!(
                "the storage server refused it ({all} requests or connections, {own} of the woken node itself)"
            )
        } else {
            // The supervisor kills the stopped process, which so never sends again.
            format!(
                "the storage server refused it ({all}; its supervisor ended it before it could send more)"
            )
        };
        self.proofs.check("refused_after_fence", &claim, 0 < if with_supervisor { own } else { all });
        Ok(())
    }

    /// The storage server's own counts for one life of a node: writes applied after a confirmed fence, refusals.
    fn storage_counts(&self, life: Identity) -> Result<(u64, u64), String> {
        let socket = self.cluster.scratch.join("s1/admin.sock");
        let (_, _, json) = quorate::admin::client::Client::connect(&socket)
            .and_then(|mut c| c.command(Admin::Status))
            .map_err(|e| format!("the storage server: {e}"))?;
        let status: Value = serde_json::from_str(&json).map_err(|e| format!("the storage server: {e}"))?;
        let number = |client: &Value, key: &str| client.get(key).and_then(Value::as_u64).unwrap_or(0);
        let clients = status.get("clients").and_then(Value::as_array).into_iter().flatten();
        let found = clients.into_iter().find(|c| {
            number(c, "node") == u64::from(life.node.0) && number(c, "incarnation") == life.incarnation.0
        });
        let client = found.ok_or_else(|| format!("the storage server does not know {life}"))?;
        Ok((number(client, "writes_applied_after_fence"), number(client, "refused")))
    }

    /// Step 11.
    fn prove(&mut self) -> Result<(), String> {
        self.headline("10. the proof")?;
        let everybody: Vec<u32> = (1..=self.options.nodes).collect();
        for id in &everybody {
            self.worker(*id)?.stop()?;
        }
        let mut access = self.access(3)?;
        let mut lost = BTreeMap::new();
        let (mut acknowledged, mut unreported, mut records) = (0, 0, 0);
        for worker in &self.workers {
            let heard = worker.heard();
            acknowledged += heard.incremented;
            unreported += heard.tried - heard.incremented;
            let data = match access.read_file(&log_file(&worker.name)) {
                Ok(data) => data,
                Err(_) if heard.acknowledged == 0 => continue,
                Err(error) => return Err(format!("{}: {error}", log_file(&worker.name))),
            };
            for number in 1..=heard.acknowledged {
                records += 1;
                let wanted = record(&worker.name, number);
                let at = (number as usize - 1) * wanted.len();
                if data.get(at..at + wanted.len()) != Some(wanted.as_bytes()) {
                    lost.entry(worker.name.clone()).or_insert(number);
                }
            }
        }
        let claim =
            format!("all {records} acknowledged records are there, also those of the killed node {lost:?}");
        self.proofs.check("records", claim.trim_end_matches(" {}"), lost.is_empty() && 0 < records);
        let text = access.read_file(COUNTER).map_err(|e| format!("{COUNTER}: {e}"))?;
        let counter: u64 =
            String::from_utf8_lossy(&text).trim().parse().map_err(|_| "the counter holds no number")?;
        self.proofs.check(
            "counter",
            &format!("the counter, {counter}, is from {acknowledged} to {}", acknowledged + unreported),
            (acknowledged..=acknowledged + unreported).contains(&counter) && 0 < acknowledged,
        );
        for id in &everybody {
            let seen =
                tree::fingerprint(&mut self.access(*id)?, "/tree").map_err(|e| format!("node {id}: {e}"))?;
            self.proofs.check(
                "hashes_after",
                &format!("node {id} still sees every file as it was copied"),
                seen == self.source,
            );
        }
        if self.options.keep {
            // A person ends it: what follows would need the cluster for itself.
            self.keep();
            self.kept = true;
            return Ok(());
        }
        drop(access);
        self.workers.clear();
        self.cluster.node(1).ask(Admin::ServiceDisable("web".into()))?;
        for id in everybody.iter().rev() {
            self.cluster.node(*id).ask(Admin::Unmount(FILESYSTEM.into()))?;
        }
        let own = self.cluster.node(1).ask(Admin::Fsck(FILESYSTEM.into()));
        let claim = match &own {
            Ok(_) => "our own fsck finds the filesystem clean".to_owned(),
            Err(error) => format!("our own fsck: {error}"),
        };
        self.proofs.check("own_fsck", &claim, own.is_ok());
        // The image is the server's alone until it ends.
        for id in everybody.iter().rev() {
            if let Some(mut supervisor) = self.cluster.node_mut(*id).supervisor.take() {
                supervisor.signal(Signal::TERM);
                let left = supervisor.wait_for(CEILING).is_some_and(|s| s.success());
                // The last ones keep their votes, so there is no quorum left that could decide their leave (R5).
                if 2 * (id - 1) >= self.options.nodes {
                    self.proofs.check("leave", &format!("node {id} leaves cleanly on SIGTERM"), left);
                }
            }
        }
        if let Some(mut storage) = self.cluster.storage.take() {
            storage.signal(Signal::TERM);
            storage.wait_for(CEILING).ok_or("the storage server does not end")?;
        }
        let untouched = self.cluster.last_block_is_zero().map_err(|e| format!("the image: {e}"))?;
        let claim = "nothing of the writes that were held up is on the device";
        self.proofs.check("late_write_absent", claim, untouched);
        self.judges();
        Ok(())
    }

    /// The field's own tools on the image, where they are installed.
    fn judges(&mut self) {
        let image = self.cluster.scratch.join("shared.img");
        let volume = self.cluster.scratch.join("lv0.img");
        match crate::cluster::extract_volume(&image, &volume) {
            Err(error) => {
                self.proofs.check("fsck_gfs2", &format!("the volume cannot be read: {error}"), false)
            }
            Ok(()) => match Command::new("/usr/sbin/fsck.gfs2").arg("-n").arg(&volume).output() {
                Err(_) => self.proofs.skip("fsck_gfs2", "fsck.gfs2 -n: gfs2-utils is not installed"),
                Ok(output) => {
                    let text = String::from_utf8_lossy(&output.stdout).into_owned();
                    self.proofs.check(
                        "fsck_gfs2",
                        "fsck.gfs2 -n finds the filesystem clean",
                        output.status.success(),
                    );
                    if !output.status.success() {
                        println!("{text}");
                    }
                }
            },
        }
        match Command::new("/usr/sbin/pvck").args(["--dump", "metadata"]).arg(&image).output() {
            Err(_) => self.proofs.skip("pvck", "pvck: lvm2 is not installed"),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let right = output.status.success() && text.contains("lv0");
                self.proofs.check("pvck", "pvck reads the volume group from the image", right);
            }
        }
        match crate::cluster::with_loop_device(&image, |device| {
            let run = |tool: &str, field: &str| {
                let output = Command::new(tool)
                    .args(["--devices", device, "--noheadings", "-o", field])
                    .env("LVM_SUPPRESS_FD_WARNINGS", "1")
                    .output();
                output
                    .map(|o| o.status.success().then(|| String::from_utf8_lossy(&o.stdout).trim().to_owned()))
            };
            Ok((run("/usr/sbin/vgs", "vg_name")?, run("/usr/sbin/lvs", "lv_name")?))
        }) {
            Err(error) => self.proofs.skip("vgs", &format!("vgs, lvs: {error}")),
            Ok((group, volume)) => {
                let right = group.as_deref() == Some("vg0") && volume.as_deref() == Some("lv0");
                self.proofs.check("vgs", "vgs and lvs read the volume group from the image", right);
            }
        }
    }

    /// Leaves the cluster up until Ctrl-C.
    fn keep(&self) {
        println!("\nthe cluster stays up until Ctrl-C; to play with it:");
        let quorate = self.cluster.programs.join("quorate");
        let dir = self.cluster.node(1).dir.display().to_string();
        for command in
            ["status", "member ls", "lock ls", "config show", "volume ls", "fs ls data /", "service ls"]
        {
            println!("  {} --node {dir} {command}", quorate.display());
        }
        while !interrupted() {
            poll(Duration::from_secs(3600), || None::<()>);
        }
    }
}

fn hear(heard: &mut Heard, line: &str) {
    let mut words = line.splitn(2, ' ');
    let (kind, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let number = || rest.parse::<u64>().unwrap_or(0);
    match kind {
        "A" => heard.acknowledged = number(),
        "T" => heard.tried = number(),
        "C" => heard.incremented += 1,
        "W" => heard.blocks = number(),
        "P" => heard.probes.push(number()),
        "L" => {
            if let Some((start, took)) = rest.split_once(' ') {
                heard.appends.push((start.parse().unwrap_or(0), took.parse::<u64>().unwrap_or(0) * 1000));
            }
        }
        "E" => heard.error = Some(rest.to_owned()),
        _ => (),
    }
}

/// The longest append that was under way at some time between the two instants.
fn longest(appends: &[(u64, u64)], from: u64, to: u64) -> u64 {
    appends
        .iter()
        .filter(|(at, took)| from <= at + took && *at <= to)
        .map(|(_, took)| *took)
        .max()
        .unwrap_or(0)
}

fn since(start: u64) -> u64 {
    boottime_ns().saturating_sub(start)
}

fn is(event: &Value, kind: &str) -> bool {
    event.get("event").and_then(Value::as_str) == Some(kind)
}

fn who(event: &Value) -> &str {
    event.get("who").and_then(Value::as_str).unwrap_or_default()
}

fn numbers(event: &Value, key: &str) -> Vec<u64> {
    event.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64).collect()
}
