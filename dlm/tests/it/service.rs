//! The service for other processes: real sockets and real processes, over lock managers that share one table.

use crate::support::{Recorder, Told};
use quorate_dlm::local::LocalManager;
use quorate_dlm::service::{AccessRule, AccessRules, Client, LockServer, ServerConfig};
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockError, LockManager, LockName, LockRequest, LockspaceOptions, Mode,
    Take, TakeError, UnlockRequest,
};
use quorate_membership::driver::TokioRuntime;
use quorate_membership::{Identity, Incarnation, NodeId};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Far above anything that happens; only a broken test waits so long.
const CEILING: Duration = Duration::from_secs(20);

/// One host: a lock manager, its service, and a runtime.
struct Host {
    path: PathBuf,
    server: LockServer,
    manager: LocalManager,
    _runtime: tokio::runtime::Runtime,
}

impl Host {
    fn start(manager: LocalManager, access: AccessRules) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("quorate-lock-{}-{number}.sock", std::process::id()));
        let tokio =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let runtime = Arc::new(TokioRuntime::new(tokio.handle().clone()));
        let node = Identity::new(NodeId(1), Incarnation(1));
        let config = ServerConfig { path: path.clone(), access };
        let server = LockServer::start(config, node, Arc::new(manager.clone()), runtime).unwrap();
        Self { path, server, manager, _runtime: tokio }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn alone() -> Host {
    Host::start(LocalManager::new(), AccessRules::default())
}

fn name(text: &str) -> LockName {
    LockName::new(text.as_bytes()).unwrap()
}

fn request(text: &str, mode: Mode) -> LockRequest {
    LockRequest::new(name(text), mode)
}

fn to(mode: Mode, value: Option<&[u8]>) -> ConvertRequest {
    let value = value.map(|v| {
        let mut block = v.to_vec();
        block.resize(32, 0);
        block
    });
    ConvertRequest::new(mode).flags(Flags::VALBLK).value(value)
}

/// Waits for what a lock is told.
fn told(recorder: &Recorder, count: usize) -> Vec<Told> {
    recorder.wait(count, CEILING).unwrap()
}

#[test]
fn programs_exclude_each_other_and_are_told_whom_they_block() {
    let host = alone();
    let (one, two) = (host.connect(), host.connect());
    let (a, b) = (one.open("backup", None).unwrap(), two.open("backup", None).unwrap());
    let (send, blocked) = std::sync::mpsc::channel();
    let take = Take::new(&a, request("nightly", Mode::EX))
        .on_blocking(move |mode| send.send(mode).unwrap_or_default());
    let first = take.wait().unwrap();
    let denied = Take::new(&b, request("nightly", Mode::PR).flags(Flags::NOQUEUE)).wait();
    assert_eq!(denied.unwrap_err(), TakeError::NotGranted(Completion::Again));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| Take::new(&b, request("nightly", Mode::PR)).wait_for(CEILING).unwrap());
        assert_eq!(blocked.recv_timeout(CEILING), Ok(Mode::PR));
        let token = first.grant().token;
        first.unlock(UnlockRequest::default()).unwrap();
        assert!(token < waiter.join().unwrap().grant().token);
    });
}

#[test]
fn the_lock_manager_of_another_process_is_one_like_the_nodes_own() {
    let host = alone();
    let client = host.connect();
    let options = LockspaceOptions { value_bytes: 32, ..LockspaceOptions::plain("shared") };
    let space = futures_util::FutureExt::now_or_never(host.manager.join(&options)).unwrap().unwrap();
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let theirs = tokio.block_on(client.join(&options)).unwrap();
    // What one writes the other reads, callbacks come in order, and wrong calls are refused at once.
    let recorder = Arc::new(Recorder::default());
    let id = theirs.request(request("v", Mode::EX).flags(Flags::VALBLK), recorder.clone()).unwrap();
    assert!(matches!(told(&recorder, 1)[..], [Told::Done(Completion::Granted(_))]));
    let mut keeper = Take::new(&space, request("v", Mode::NL).flags(Flags::VALBLK)).wait().unwrap();
    assert_eq!(
        theirs.convert(id, to(Mode::NL, None)),
        Err(LockError::Invalid("VALBLK without a value block where one is written"))
    );
    theirs.convert(id, to(Mode::NL, Some(b"hello"))).unwrap();
    told(&recorder, 1);
    // While somebody else has it the conversion cannot end, so the next one finds it under way.
    keeper.convert_wait(ConvertRequest::new(Mode::EX)).unwrap();
    theirs.convert(id, to(Mode::PR, None)).unwrap();
    assert_eq!(theirs.convert(id, to(Mode::PR, None)), Err(LockError::Busy));
    keeper.convert_wait(ConvertRequest::new(Mode::NL)).unwrap();
    let Told::Done(Completion::Granted(grant)) = told(&recorder, 1).remove(0) else { panic!("no grant") };
    assert_eq!(grant.value.as_deref().map(|v| &v[..5]), Some(&b"hello"[..]));
    let mut writer = Take::new(&space, request("v", Mode::NL).flags(Flags::VALBLK)).wait().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| writer.convert_wait(to(Mode::EX, None)).map(|g| g.mode));
        assert_eq!(told(&recorder, 1), [Told::Blocking(Mode::EX)]);
        theirs.unlock(id, UnlockRequest::default()).unwrap();
        assert_eq!(told(&recorder, 1), [Told::Done(Completion::Unlocked)]);
        assert_eq!(waiter.join().unwrap(), Ok(Mode::EX));
    });
    assert_eq!(theirs.unlock(id, UnlockRequest::default()), Err(LockError::NotFound));
    drop((keeper, writer));
    tokio.block_on(client.leave("shared")).unwrap();
    let gone = theirs.request(request("v", Mode::EX), recorder);
    assert_eq!(gone, Err(LockError::Stopped));
}

#[test]
fn a_cancel_and_an_unlock_overtake_a_request() {
    let host = alone();
    let (one, two) = (host.connect(), host.connect());
    let (a, b) = (one.open("s", None).unwrap(), two.open("s", None).unwrap());
    let held = Take::new(&a, request("r", Mode::EX)).wait().unwrap();
    let recorder = Arc::new(Recorder::default());
    let first = b.request(request("r", Mode::EX), recorder.clone()).unwrap();
    b.cancel(first).unwrap();
    assert_eq!(told(&recorder, 1), [Told::Done(Completion::Cancelled)]);
    let second = b.request(request("r", Mode::EX), recorder.clone()).unwrap();
    b.unlock(second, UnlockRequest::default()).unwrap();
    let again = b.unlock(second, UnlockRequest::default());
    assert!(matches!(again, Err(LockError::Busy | LockError::NotFound)), "{again:?}");
    assert_eq!(told(&recorder, 1), [Told::Done(Completion::Unlocked)]);
    // Neither is in the queue any more.
    drop(held);
    Take::new(&a, request("r", Mode::EX)).wait_for(CEILING).unwrap();
}

/// The part of a test that runs in a process of its own: takes what it is told to, says so, and waits to be killed.
#[test]
fn child() {
    let Ok(path) = std::env::var("QUORATE_TEST_LOCK_SOCKET") else { return };
    let client = Client::connect(path.as_ref()).unwrap();
    let space = client.open("s", None).unwrap();
    let flags = Flags::VALBLK;
    let _writer = Take::new(&space, request("written", Mode::EX).flags(flags)).wait().unwrap();
    let _reader = Take::new(&space, request("read", Mode::PR).flags(flags)).wait().unwrap();
    let waiting = Arc::new(Recorder::default());
    space.request(request("wanted", Mode::EX), waiting).unwrap();
    // Answered only when the server has seen the request.
    client.open("another", None).unwrap();
    println!("ready");
    std::io::stdout().flush().unwrap();
    let mut end = Vec::new();
    std::io::stdin().read_to_end(&mut end).unwrap();
}

#[test]
fn a_killed_programs_locks_are_given_up_and_what_it_may_have_written_is_not_valid() {
    let host = alone();
    let client = host.connect();
    let space = client.open("s", None).unwrap();
    // Row 51 of the fact table: there must be a value, and somebody who keeps it.
    let mut keepers = Vec::new();
    for text in ["written", "read"] {
        let mut keeper = Take::new(&space, request(text, Mode::EX).flags(Flags::VALBLK)).wait().unwrap();
        keeper.convert_wait(to(Mode::NL, Some(b"old"))).unwrap();
        keepers.push(keeper);
    }
    let wanted = Take::new(&space, request("wanted", Mode::EX)).wait().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "service::child", "--nocapture", "--test-threads=1"])
        .env("QUORATE_TEST_LOCK_SOCKET", &host.path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    let mut stdout = child.stdout.take().unwrap();
    while !said.contains("ready") {
        let mut byte = [0];
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{said}");
        said.push(byte[0] as char);
    }
    let process = host.server.processes().into_iter().find(|p| p.pid == child.id()).unwrap();
    assert_eq!((process.locks.len(), process.command.contains("service::child")), (3, true), "{process:?}");
    let denied = Take::new(&space, request("written", Mode::CR).flags(Flags::NOQUEUE)).wait();
    assert!(denied.is_err());
    child.kill().unwrap();
    child.wait().unwrap();
    let flags = Flags::VALBLK;
    let reader = Take::new(&space, request("written", Mode::PR).flags(flags)).wait_for(CEILING).unwrap();
    assert!(reader.grant().value_invalid, "{:?}", reader.grant());
    let other = Take::new(&space, request("read", Mode::EX).flags(flags)).wait_for(CEILING).unwrap();
    assert!(!other.grant().value_invalid, "{:?}", other.grant());
    // The dead one's request is out of the queue: who asks next need not wait for it.
    drop(wanted);
    Take::new(&space, request("wanted", Mode::EX)).wait_for(CEILING).unwrap();
}

#[test]
fn a_persistent_lock_outlives_its_program_and_is_adopted_or_purged() {
    let host = alone();
    let client = host.connect();
    let space = client.open("s", None).unwrap();
    let program = host.connect();
    let theirs = program.open("s", None).unwrap();
    let recorder = Arc::new(Recorder::default());
    for text in ["adopted", "purged"] {
        theirs.request(request(text, Mode::EX).flags(Flags::PERSISTENT).owner(7), recorder.clone()).unwrap();
    }
    theirs.request(request("plain", Mode::EX), recorder.clone()).unwrap();
    told(&recorder, 3);
    drop((theirs, program));
    Take::new(&space, request("plain", Mode::EX)).wait_for(CEILING).unwrap();
    // Row 52 of the fact table.
    let noqueue = |text| Take::new(&space, request(text, Mode::PR).flags(Flags::NOQUEUE)).wait();
    assert!(noqueue("adopted").is_err() && noqueue("purged").is_err());
    let adopt = |mode| Take::new(&space, request("adopted", mode).flags(Flags::ORPHAN)).wait();
    assert_eq!(adopt(Mode::PR).unwrap_err(), TakeError::NotGranted(Completion::Again));
    drop(adopt(Mode::EX).unwrap());
    space.purge(NodeId(1), std::process::id());
    for text in ["adopted", "purged"] {
        Take::new(&space, request(text, Mode::EX)).wait_for(CEILING).unwrap();
    }
}

#[test]
fn users_open_what_rules_admit_them_to_and_nobody_the_systems_own() {
    let rule = AccessRule { lockspace: "mine".into(), uids: vec![1], ..AccessRule::default() };
    let access = AccessRules { reserved: vec!["gfs:*".into()], rules: vec![rule] };
    let host = Host::start(LocalManager::new(), access);
    let client = host.connect();
    let refused = client.open("gfs:data", None).err().unwrap();
    assert_eq!(refused.to_string(), "lockspace gfs:data is the system's own");
    // The test's own user is the node's.
    let space = client.open("anything", Some(8)).unwrap();
    assert_eq!(space.value_bytes(), 8);
    let refused = host.connect().open("anything", Some(16)).err().unwrap();
    assert_eq!(refused.to_string(), "lockspace anything: its value blocks have 8 bytes");
    let refused = client.open(&"n".repeat(65), None).err().unwrap();
    assert!(refused.to_string().contains("1 to 64 bytes"), "{refused}");
}

#[test]
fn a_stranger_an_old_client_and_a_hostile_one_are_cut_off_and_cost_nobody_else_anything() {
    let host = alone();
    let answer = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(&host.path).unwrap();
        stream.set_read_timeout(Some(CEILING)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // The end may come as a reset: what we sent was not all read.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(answer(b"GET / HTTP/1.1\r\n\r\n").contains("above the limit"));
    // `Hello` of version 9: variant 0, magic and version as postcard writes them.
    let mut hello = vec![0, 0, 0, 0, 0, 0xb1, 0x96, 0xb1, 0x8a, 0x05, 9];
    hello[0] = (hello.len() - 4) as u8;
    let text = answer(&hello);
    assert!(text.contains("protocol version 9, this node speaks 1"), "{text}");
    assert!(answer(&[2, 0, 0, 0, 2, 1]).contains("`Hello` comes first"));
    let space = host.connect().open("s", None).unwrap();
    Take::new(&space, request("r", Mode::EX)).wait_for(CEILING).unwrap();
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_its_locks_are_given_up() {
    let host = alone();
    let mut stream = UnixStream::connect(&host.path).unwrap();
    stream.set_write_timeout(Some(CEILING)).unwrap();
    let wire = quorate_dlm::service::TestFrames;
    stream.write_all(&wire.hello_and_open()).unwrap();
    // Locks one name again and again, and never reads a word of the answers.
    let mut number = 0;
    while stream.write_all(&wire.lock_and_unlock(number)).is_ok() {
        number += 1;
        assert!(number < 2_000_000, "it is never cut off");
    }
    let space = host.connect().open("s", None).unwrap();
    Take::new(&space, request("r", Mode::EX)).wait_for(CEILING).unwrap();
}

#[test]
fn the_end_of_the_service_ends_every_lock() {
    let host = alone();
    let client = host.connect();
    let space = client.open("s", None).unwrap();
    let held = Take::new(&space, request("r", Mode::EX)).wait().unwrap();
    assert!(!held.is_lost());
    assert!(host.server.shutdown(CEILING));
    assert!(held.wait_lost(CEILING) && held.is_lost());
    assert_eq!(
        Take::new(&space, request("r", Mode::EX)).wait().unwrap_err(),
        TakeError::Refused(LockError::Stopped)
    );
    assert!(client.open("s", None).is_err());
    // What it held is free within the node.
    let options = LockspaceOptions::plain("s");
    let inside = futures_util::FutureExt::now_or_never(host.manager.join(&options)).unwrap().unwrap();
    Take::new(&inside, request("r", Mode::EX)).wait_for(CEILING).unwrap();
}
