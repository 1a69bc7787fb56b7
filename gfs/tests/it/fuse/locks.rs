//! fcntl locks and flocks between two nodes, each mounted for processes of its own, beside the kernel's on tmpfs.
//!
//! The server mounts one filesystem twice, as node `a` and node `b`, and a tmpfs; the client drives a process on each
//! node, which does everything on both filesystems and says so where they differ.

use super::server::TokioRuntime;
use super::{MOUNTPOINT, in_role};
use crate::fs::harness::{Node, formatted};
use core::time::Duration;
use quorate_dlm::local::LocalManager;
use quorate_gfs::fuse::{MountOptions, Session, SessionOptions, UnmountMode};
use quorate_membership::Runtime;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;

/// How many random operations are compared.
const OPERATIONS: usize = 4_000;
/// Bytes that they lie in.
const BYTES: i64 = 24;

fn dir(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os(MOUNTPOINT).unwrap()).join(name)
}

/// The process with both mounts.
pub(crate) async fn serve(runtime: &Arc<TokioRuntime>, scenario: &str) {
    for name in ["a", "b", "tmpfs"] {
        std::fs::create_dir(dir(name)).unwrap();
    }
    rustix::mount::mount("tmpfs", dir("tmpfs"), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let disk = formatted(64 << 20, 2).await;
    let mut nodes = Vec::new();
    for (jid, manager) in LocalManager::shared(2).iter().enumerate() {
        let node = Node::mount(&disk, manager, jid as u32).await;
        let path = dir(["a", "b"][jid]);
        let options = MountOptions::new(&path, "test,2");
        let fs = Arc::new(node.gfs.clone());
        let session = Session::mount(fs, runtime.clone(), &options, SessionOptions::local()).unwrap();
        nodes.push((node, session));
    }
    let mut client = in_role("client", scenario);
    let status = tokio::task::spawn_blocking(move || client.status().unwrap()).await.unwrap();
    for (node, session) in nodes {
        let deadline = runtime.now() + Duration::from_secs(20);
        session.unmount(UnmountMode::Clean, deadline).await.unwrap();
        node.gfs.unmount().await.unwrap();
    }
    rustix::mount::unmount(dir("tmpfs"), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(status.success(), "client: {status}");
    super::super::fs::harness::judge(scenario, &disk.memory.bytes());
}

/// A process on a node that does what it is told.
struct Worker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    fn start(node: &str) -> Self {
        let mut child = in_role("helper", &format!("locker {node}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut worker = Self { child, orders, answers };
        assert_eq!(worker.answer(), "ready");
        worker
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.orders, "{order}").unwrap();
    }

    /// The harness of the tests prints on the same stream.
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the worker is gone");
            if let Some(answer) = line.trim_end().strip_prefix("answer: ") {
                return answer.to_owned();
            }
        }
    }

    fn ask(&mut self, order: &str) -> String {
        self.tell(order);
        self.answer()
    }

    /// Waits until the process waits in the kernel for a lock.
    fn until_it_waits(&self) {
        let path = format!("/proc/{}/task", self.child.id());
        loop {
            let waits = std::fs::read_dir(&path).unwrap().flatten().any(|task| {
                let at = std::fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
                // fcntl with F_SETLKW, or flock.
                let words: Vec<&str> = at.split(' ').collect();
                words.first() == Some(&libc::SYS_fcntl.to_string().as_str()) && words.get(2) == Some(&"0x7")
            });
            if waits {
                return;
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // With its files open the mount would be busy.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The kernel's form of a lock.
fn flock_of(kind: &str, start: i64, len: i64) -> libc::flock {
    let l_type = match kind {
        "r" => libc::F_RDLCK,
        "w" => libc::F_WRLCK,
        _ => libc::F_UNLCK,
    };
    libc::flock { l_type: l_type as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 }
}

#[expect(unsafe_code, reason = "no safe call locks a range")]
fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> i32 {
    // SAFETY: the lock is a live structure of the type that these commands take.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    if done == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap() }
}

/// What a worker does: `set r 3 4`, `get w 0 0` and `reopen` on both, `try w 0 0` and `wait w 0 0` on ours; numbers are
/// start and length.
pub(crate) fn work(node: &str) {
    let open = |name: &str| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir(name).join("file"))
    };
    super::client::catch_usr1();
    let (ours, theirs) = (open(node).unwrap(), open("tmpfs").unwrap());
    println!("\nanswer: ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let answer = match words[..] {
            ["reopen"] => {
                // Closing any descriptor ends the locks of the process.
                drop((open(node).unwrap(), open("tmpfs").unwrap()));
                "0".to_owned()
            }
            [what, kind, start, len] => {
                let (start, len) = (start.parse().unwrap(), len.parse().unwrap());
                let (mut one, mut two) = (flock_of(kind, start, len), flock_of(kind, start, len));
                match what {
                    "set" => {
                        let (a, b) =
                            (fcntl(&ours, libc::F_SETLK, &mut one), fcntl(&theirs, libc::F_SETLK, &mut two));
                        if a == b { a.to_string() } else { format!("{line}: {a} for {b}") }
                    }
                    "get" => {
                        let (a, b) =
                            (fcntl(&ours, libc::F_GETLK, &mut one), fcntl(&theirs, libc::F_GETLK, &mut two));
                        let shown = |l: &libc::flock| (l.l_type, l.l_start, l.l_len);
                        // The process is another node's: its number means nothing here.
                        let same = (a, shown(&one)) == (b, shown(&two)) && one.l_pid == 0;
                        let held = i32::from(two.l_type) != libc::F_UNLCK;
                        if same {
                            format!("{}", u8::from(held))
                        } else {
                            format!("{line}: {one:?} for {two:?}")
                        }
                    }
                    "try" => fcntl(&ours, libc::F_SETLK, &mut one).to_string(),
                    _ => fcntl(&ours, libc::F_SETLKW, &mut one).to_string(),
                }
            }
            _ => panic!("what is {line}?"),
        };
        println!("answer: {answer}");
    }
    std::process::exit(0);
}

pub(crate) fn run(scenario: &str) {
    match scenario {
        "locks_as_tmpfs" => as_tmpfs(),
        "locks_and_deadlocks" => deadlocks(),
        "locks_and_holes" => holes(),
        _ => waits(),
    }
}

/// Random operations by a process on each node: the same answers as from the kernel on one.
fn as_tmpfs() {
    let mut workers = [Worker::start("a"), Worker::start("b")];
    let mut rng = quorate_membership::Rng::new(7);
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..OPERATIONS {
        let who = rng.below(2) as usize;
        let start = rng.below(BYTES as u64);
        // Length 0 is to the end.
        let len = rng.below(9);
        let order = match rng.below(20) {
            0 => "reopen".to_owned(),
            1..5 => format!("get {} {start} {len}", ["r", "w"][rng.below(2) as usize]),
            _ => format!("set {} {start} {len}", ["r", "w", "u"][rng.below(3) as usize]),
        };
        let answer = workers[who].ask(&order);
        assert!(answer.len() < 4, "node {who}: {answer}");
        let word = order.split(' ').next().unwrap().to_owned();
        *seen.entry((word, answer)).or_insert(0) += 1;
    }
    println!("figure: fcntl operations compared with tmpfs: {seen:?}");
    for key in [("set", "0"), ("set", "11"), ("get", "0"), ("get", "1")] {
        assert!(seen.get(&(key.0.to_owned(), key.1.to_owned())).is_some_and(|n| 50 < *n), "{seen:?}");
    }
}

/// Waiting across nodes: granted when the other lets go, ended by a signal, by death, by the death of the holder.
fn waits() {
    let [mut a, mut b] = [Worker::start("a"), Worker::start("b")];
    assert_eq!(a.ask("try w 0 10"), "0");
    b.tell("wait w 5 10");
    b.until_it_waits();
    // What lies beside the waiter's range is free, and a part that it does not need changes nothing.
    assert_eq!(a.ask("try w 20 5"), "0");
    assert_eq!(a.ask("try u 0 5"), "0");
    assert_eq!(a.ask("try u 5 5"), "0");
    assert_eq!(b.answer(), "0");
    assert_eq!(a.ask("try r 14 1"), "11");

    // Killed while it waits: gone, and out of the queue; what it had is free.
    a.tell("wait w 0 0");
    a.until_it_waits();
    a.child.kill().unwrap();
    assert_eq!(a.child.wait().unwrap().signal(), Some(9));
    let mut a = Worker::start("a");
    assert_eq!(b.ask("try w 0 0"), "0", "the dead left nothing");

    // The holder dies: its node gives up what it had.
    a.tell("wait w 100 1");
    a.until_it_waits();
    b.child.kill().unwrap();
    b.child.wait().unwrap();
    assert_eq!(a.answer(), "0");

    // An open file description's locks end with its last descriptor.
    let description = OpenOptions::new().read(true).write(true).open(dir("a").join("file")).unwrap();
    let mut whole = flock_of("w", 0, 50);
    assert_eq!(fcntl(&description, libc::F_OFD_SETLK, &mut whole), 0);
    assert_eq!(a.ask("try w 0 1"), "11", "another owner of the same node");
    drop(description);
    // The kernel tells of the release later.
    while a.ask("try w 0 1") != "0" {
        std::thread::yield_now();
    }

    // flock is another world.
    let [one, two] = ["a", "b"].map(|n| File::open(dir(n).join("file")).unwrap());
    rustix::fs::flock(&one, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(rustix::fs::flock(&two, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err());
    assert_eq!(a.ask("try w 0 0"), "0");
    drop(one);
    rustix::fs::flock(&two, rustix::fs::FlockOperation::LockExclusive).unwrap();

    // What an uncontended lock and unlock costs, through the kernel.
    let ours = pair_micros(&File::create(dir("b").join("other")).unwrap());
    let theirs = pair_micros(&File::create(dir("tmpfs").join("other")).unwrap());
    println!("figure: fcntl lock and unlock, uncontended: {ours:.1} us (tmpfs {theirs:.2} us)");
}

/// Which of them says something first.
fn first_to_answer(workers: [&Worker; 2]) -> usize {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut fds = workers.map(|w| {
        assert!(w.answers.buffer().is_empty(), "an answer that nobody took");
        PollFd::new(w.answers.get_ref(), PollFlags::IN)
    });
    poll(&mut fds, None).unwrap();
    fds.iter().position(|fd| !fd.revents().is_empty()).unwrap()
}

/// Two processes on two nodes that wait for each other: one is refused with EDEADLK, the other goes on. A signal that
/// does not kill ends a wait with EINTR, and nothing of it stays in the queue.
fn deadlocks() {
    let [mut a, mut b] = [Worker::start("a"), Worker::start("b")];
    assert_eq!(a.ask("try w 0 10"), "0");
    assert_eq!(b.ask("try w 10 10"), "0");
    a.tell("wait w 15 1");
    a.until_it_waits();
    b.tell("wait r 5 1");
    // The later wait is refused. Waiting in the kernel does not tell which of the two the nodes learned of later.
    let is_a = first_to_answer([&a, &b]) == 0;
    let (refused, other, held) = if is_a { (&mut a, &mut b, "0") } else { (&mut b, &mut a, "10") };
    assert_eq!(refused.answer(), libc::EDEADLK.to_string());
    assert_eq!(refused.ask(&format!("try u {held} 10")), "0");
    assert_eq!(other.answer(), "0", "the other one goes on");
    for worker in [&mut a, &mut b] {
        assert_eq!(worker.ask("try u 0 0"), "0");
    }

    assert_eq!(a.ask("try w 15 1"), "0");
    b.tell("wait w 15 1");
    b.until_it_waits();
    super::client::poke(&b.child);
    assert_eq!(b.answer(), libc::EINTR.to_string());
    assert_eq!(a.ask("try u 0 0"), "0");
    assert_eq!(a.ask("try w 15 1"), "0", "the interrupted wait is in nobody's way");
}

/// SEEK_HOLE and SEEK_DATA through the kernel, on the node that wrote and on the other one.
fn holes() {
    use rustix::fs::{SeekFrom, seek};
    use std::os::unix::fs::FileExt;
    const BLOCK: u64 = 4096;
    let name = |node: &str| dir(node).join("sparse");
    let written = File::create(name("a")).unwrap();
    written.write_all_at(&[1; 100], 10 * BLOCK).unwrap();
    written.write_all_at(&[2; 2 * BLOCK as usize], 300 * BLOCK).unwrap();
    written.set_len(1000 * BLOCK + 5).unwrap();
    for node in ["a", "b"] {
        let file = File::open(name(node)).unwrap();
        let data = |at| seek(&file, SeekFrom::Data(at));
        let hole = |at| seek(&file, SeekFrom::Hole(at));
        assert_eq!((data(0), hole(0)), (Ok(10 * BLOCK), Ok(0)), "{node}");
        assert_eq!(
            (data(10 * BLOCK + 50), hole(10 * BLOCK + 50)),
            (Ok(10 * BLOCK + 50), Ok(11 * BLOCK)),
            "{node}"
        );
        assert_eq!((data(11 * BLOCK), hole(300 * BLOCK)), (Ok(300 * BLOCK), Ok(302 * BLOCK)), "{node}");
        assert_eq!(
            data(302 * BLOCK),
            Err(rustix::io::Errno::NXIO),
            "{node}: nothing but a hole up to the end"
        );
        assert_eq!(hole(900 * BLOCK), Ok(900 * BLOCK), "{node}");
        assert_eq!(hole(1000 * BLOCK + 5), Err(rustix::io::Errno::NXIO), "{node}: at the end");
    }
    // A program that copies with holes keeps them.
    let copied = std::process::Command::new("cp")
        .arg("--sparse=auto")
        .args([name("b"), dir("b").join("copy")])
        .status();
    assert!(copied.unwrap().success());
    assert!(std::fs::read(dir("a").join("copy")).unwrap() == std::fs::read(name("a")).unwrap());
    use std::os::unix::fs::MetadataExt;
    let blocks = |path: PathBuf| std::fs::metadata(path).unwrap().blocks();
    assert!(blocks(dir("a").join("copy")) < 200, "{}", blocks(dir("a").join("copy")));
}

#[expect(clippy::disallowed_methods, reason = "figures are measured on the clock")]
fn pair_micros(file: &File) -> f64 {
    const PAIRS: u32 = 3_000;
    let start = std::time::Instant::now();
    for _ in 0..PAIRS {
        assert_eq!(fcntl(file, libc::F_SETLK, &mut flock_of("w", 0, 1)), 0);
        assert_eq!(fcntl(file, libc::F_SETLK, &mut flock_of("u", 0, 1)), 0);
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(PAIRS)
}
