//! The process that works in the mount, and its helpers.

use super::{MOUNTPOINT, in_role};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

fn mountpoint() -> PathBuf {
    PathBuf::from(std::env::var_os(MOUNTPOINT).unwrap())
}

/// Asks the server to do something, and waits until it is done.
fn ask(what: &str) {
    // The test harness prints without a line end before the test: begin a line.
    println!("\nask: {what}");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).unwrap();
    assert_eq!(answer, "ok\n");
}

pub(crate) fn run(scenario: &str) {
    let dir = mountpoint();
    match scenario {
        "everything" => everything(&dir),
        "listing" => listing(&dir),
        "two_worlds" => two_worlds(&dir),
        "kill_lock_waiter" => kill_lock_waiter(&dir),
        "kill_reader" => kill_reader(&dir),
        "signals" => signals(&dir),
        "invalidation" => invalidation(&dir),
        "invalidation_under_read" => invalidation_under_read(&dir),
        "append" => append(&dir),
        "busy" => {
            let _file = File::create(dir.join("open")).unwrap();
            ask("hold");
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        "abort" => abort(&dir),
        "as_user" => everything(&dir),
        "figures" => figures(&dir),
        other => panic!("no scenario {other}"),
    }
}

/// What helpers do: one thing each, saying how it went by their exit status.
pub(crate) fn help(scenario: &str) {
    let file = || OpenOptions::new().read(true).write(true).open(mountpoint().join("file")).unwrap();
    let ok = match scenario {
        "flock_try" => flock(file(), FlockOperation::NonBlockingLockExclusive).is_ok(),
        "flock_wait" => flock(file(), FlockOperation::LockExclusive).is_ok(),
        "fcntl_try" => rustix::fs::fcntl_lock(file(), FlockOperation::NonBlockingLockExclusive).is_ok(),
        "fcntl_wait" => rustix::fs::fcntl_lock(file(), FlockOperation::LockExclusive).is_ok(),
        "flock_interrupted" => {
            catch_usr1();
            flock(file(), FlockOperation::LockExclusive) == Err(rustix::io::Errno::INTR)
        }
        "read_direct" => {
            catch_usr1();
            let flags = libc::O_DIRECT;
            let gated = OpenOptions::new().read(true).custom_flags(flags).open(mountpoint().join("gated"));
            let mut text = vec![0; 4096];
            let len = rustix::io::read(gated.unwrap(), &mut text).unwrap();
            &text[..len] == b"behind the gate"
        }
        "read_gated" => fs::read(mountpoint().join("gated")).is_ok(),
        other => panic!("no help for {other}"),
    };
    std::process::exit(if ok { 0 } else { 7 });
}

fn helper(what: &str) -> Child {
    in_role("helper", what).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

fn helped(what: &str) -> bool {
    match helper(what).wait().unwrap().code() {
        Some(0) => true,
        Some(7) => false,
        other => panic!("{what}: {other:?}"),
    }
}

fn everything(dir: &Path) {
    let a = dir.join("a");
    fs::write(&a, b"hello").unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"hello");
    // More than one request in size, not aligned to anything.
    let big: Vec<u8> = (0..3_333_333_u32).map(|n| (n % 251) as u8).collect();
    fs::write(dir.join("big"), &big).unwrap();
    assert!(fs::read(dir.join("big")).unwrap() == big);
    let file = OpenOptions::new().write(true).open(dir.join("big")).unwrap();
    file.write_all_at(b"middle", 1_048_570).unwrap();
    file.set_len(1_048_576).unwrap();
    file.sync_all().unwrap();
    assert_eq!(fs::metadata(dir.join("big")).unwrap().len(), 1_048_576);
    assert_eq!(&fs::read(dir.join("big")).unwrap()[1_048_570..], b"middle");

    fs::create_dir(dir.join("d")).unwrap();
    fs::rename(&a, dir.join("d/b")).unwrap();
    assert_eq!(fs::metadata(&a).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::read(dir.join("d/b")).unwrap(), b"hello");
    assert_eq!(fs::remove_dir(dir.join("d")).unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    fs::hard_link(dir.join("d/b"), dir.join("c")).unwrap();
    assert_eq!(fs::metadata(dir.join("c")).unwrap().nlink(), 2);
    std::os::unix::fs::symlink("d/b", dir.join("l")).unwrap();
    assert_eq!(fs::read_link(dir.join("l")).unwrap(), Path::new("d/b"));
    assert_eq!(fs::read(dir.join("l")).unwrap(), b"hello");

    // An open file without a name works on, and is gone when closed (the server looks).
    let mut orphan = File::options().read(true).write(true).create_new(true).open(dir.join("o")).unwrap();
    fs::remove_file(dir.join("o")).unwrap();
    orphan.write_all(b"still here").unwrap();
    orphan.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    orphan.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");

    let c = dir.join("c");
    fs::set_permissions(&c, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(fs::metadata(&c).unwrap().mode() & 0o7777, 0o4755);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&c, Some(1000), None).unwrap();
        assert_eq!(fs::metadata(&c).unwrap().mode() & 0o7777, 0o755, "a new owner takes set-uid away");
    }
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&c, "user.colour", b"blue", flags).unwrap();
    let mut value = [0; 16];
    assert_eq!(rustix::fs::getxattr(&c, "user.colour", &mut value[..]).unwrap(), 4);
    let short = rustix::fs::getxattr(&c, "user.colour", &mut value[..2]);
    assert_eq!(short.unwrap_err(), rustix::io::Errno::RANGE);
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, dir.join("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let sizes = rustix::fs::statfs(dir).unwrap();
    assert_eq!((sizes.f_blocks, sizes.f_bfree, sizes.f_bsize), (1000, 400, 4096));
    for name in ["big", "c", "l", "pipe", "d/b"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
    fs::remove_dir(dir.join("d")).unwrap();
    assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
}

fn listing(dir: &Path) {
    let names: BTreeSet<String> = (0..5000).map(|n| format!("file-number-{n:05}")).collect();
    for name in &names {
        File::create(dir.join(name)).unwrap();
    }
    for round in 0..2 {
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            // In the first round the kernel learns that entries are looked at, and asks for attributes along.
            assert!(entry.metadata().unwrap().is_file(), "round {round}");
            assert!(seen.insert(entry.file_name().into_string().unwrap()), "{entry:?} came twice");
        }
        assert_eq!(seen, names);
    }
}

fn two_worlds(dir: &Path) {
    let file = File::create(dir.join("file")).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    assert!(!helped("flock_try"));
    assert!(helped("fcntl_try"), "an fcntl lock is not barred by flock");
    rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
    assert!(!helped("fcntl_try"));
    flock(&file, FlockOperation::Unlock).unwrap();
    assert!(helped("flock_try"));
    assert!(!helped("fcntl_try"));
    // Closing any descriptor of the file ends the process's fcntl locks.
    drop(File::open(dir.join("file")).unwrap());
    assert!(helped("fcntl_try"));
    // A waiter gets it when the holder lets go.
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let mut waiter = helper("flock_wait");
    ask("waiting 1");
    drop(file);
    assert_eq!(waiter.wait().unwrap().code(), Some(0));
}

fn kill(child: &mut Child) {
    child.kill().unwrap();
    // Were the interrupt not answered, this would wait until the watchdog aborts everything.
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

fn kill_lock_waiter(dir: &Path) {
    let file = File::create(dir.join("file")).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
    let (mut one, mut two) = (helper("flock_wait"), helper("fcntl_wait"));
    ask("waiting 2");
    kill(&mut one);
    kill(&mut two);
    // Nothing of the dead is left in the queue.
    drop(file);
    assert!(helped("flock_try") && helped("fcntl_try"));
}

fn kill_reader(dir: &Path) {
    fs::write(dir.join("gated"), b"behind the gate").unwrap();
    let mut reader = helper("read_gated");
    ask("waiting 1");
    kill(&mut reader);
}

fn signals(dir: &Path) {
    let file = File::create(dir.join("file")).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    fs::write(dir.join("gated"), b"behind the gate").unwrap();
    let mut waiter = helper("flock_interrupted");
    ask("waiting 1");
    poke(&waiter);
    assert_eq!(waiter.wait().unwrap().code(), Some(0), "EINTR, as POSIX has it");
    // Direct reads: others wait for the page, which the kernel fills on its own, and no interrupt comes here.
    let mut reader = helper("read_direct");
    ask("waiting 1");
    poke(&reader);
    let mut other = helper("read_direct");
    ask("waiting 2");
    poke(&other);
    // The second signal is the deadly one, and the kernel does not interrupt twice.
    kill(&mut other);
    assert!(reader.try_wait().unwrap().is_none(), "the read goes on");
    ask("open_gate");
    assert_eq!(reader.wait().unwrap().code(), Some(0));
}

/// Sends a signal to every thread: to the process, it could go to one that waits for nothing.
#[expect(unsafe_code, reason = "no safe call signals a thread")]
pub(super) fn poke(child: &Child) {
    for task in fs::read_dir(format!("/proc/{}/task", child.id())).unwrap() {
        let tid: libc::pid_t = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: the call has no memory arguments.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, child.id(), tid, libc::SIGUSR1) };
        assert_eq!(sent, 0);
    }
}

/// Catches a signal that would kill, and does nothing; interrupted calls are not restarted.
#[expect(unsafe_code, reason = "no safe call sets a handler")]
pub(super) fn catch_usr1() {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: all zeros is a valid structure: no flags, no signals blocked. The handler touches nothing.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut())
    };
    assert_eq!(done, 0);
}

fn invalidation(dir: &Path) {
    let a = dir.join("a");
    fs::write(&a, "old").unwrap();
    let mut open = File::open(&a).unwrap();
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!((&text[..], fs::metadata(&a).unwrap().len()), ("old", 3));
    ask("write_elsewhere a longer");
    assert_eq!(fs::metadata(&a).unwrap().len(), 6);
    assert_eq!(fs::read_to_string(&a).unwrap(), "longer");
    let mut again = [0; 6];
    open.read_exact_at(&mut again, 0).unwrap();
    assert_eq!(&again, b"longer", "through the descriptor that was open all along");
    ask("write_elsewhere a LONGER");
    open.read_exact_at(&mut again, 0).unwrap();
    assert_eq!(&again, b"LONGER", "of the same size");
    drop(open);
    ask("remove_elsewhere a");
    assert_eq!(fs::metadata(&a).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::metadata(dir.join("b")).unwrap_err().kind(), ErrorKind::NotFound);
    ask("create_elsewhere b");
    assert!(fs::metadata(dir.join("b")).unwrap().is_file());
    // The name was free when the kernel looked: another node was faster.
    assert_eq!(fs::metadata(dir.join("c")).unwrap_err().kind(), ErrorKind::NotFound);
    ask("create_elsewhere c");
    assert!(OpenOptions::new().write(true).create(true).truncate(true).open(dir.join("c")).is_ok());
}

fn invalidation_under_read(dir: &Path) {
    fs::write(dir.join("gated"), vec![7; 100_000]).unwrap();
    ask("invalidate gated");
    let mut reader = helper("read_gated");
    ask("waiting 1");
    ask("invalidate gated");
    ask("open_gate");
    assert_eq!(reader.wait().unwrap().code(), Some(0));
}

fn append(dir: &Path) {
    fs::write(dir.join("log"), "one\n").unwrap();
    let mut log = OpenOptions::new().append(true).open(dir.join("log")).unwrap();
    log.write_all(b"two\n").unwrap();
    ask("write_elsewhere log one,two,three,");
    log.write_all(b"four").unwrap();
    log.sync_all().unwrap();
    assert_eq!(fs::read_to_string(dir.join("log")).unwrap(), "one,two,three,four");
}

fn abort(dir: &Path) {
    let file = File::create(dir.join("file")).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    let mut waiter = helper("flock_wait");
    ask("waiting 1");
    ask("abort");
    assert_eq!(waiter.wait().unwrap().code(), Some(7));
    assert!(fs::metadata(dir.join("other")).is_err());
}

#[expect(clippy::disallowed_methods, reason = "figures are measured on the clock")]
fn figures(dir: &Path) {
    let measure = |name: &str, count: u32, run: &mut dyn FnMut(u32)| {
        let start = std::time::Instant::now();
        for n in 0..count {
            run(n);
        }
        let each = start.elapsed().as_secs_f64() * 1e6 / f64::from(count);
        println!("figure: {name}: {each:.1} us");
    };
    measure("create and close", 2000, &mut |n| drop(File::create(dir.join(format!("f{n}"))).unwrap()));
    measure("open and close", 2000, &mut |n| drop(File::open(dir.join(format!("f{n}"))).unwrap()));
    measure("stat, cached", 20000, &mut |n| {
        fs::metadata(dir.join(format!("f{}", n % 2000))).unwrap();
    });
    let one = OpenOptions::new().write(true).open(dir.join("f0")).unwrap();
    measure("write of 4 KiB", 5000, &mut |n| {
        one.write_all_at(&[1; 4096], u64::from(n % 256) * 4096).unwrap()
    });
    let megabyte = vec![3; 1 << 20];
    measure("write of 1 MiB", 256, &mut |n| one.write_all_at(&megabyte, u64::from(n % 64) << 20).unwrap());
    measure("flock and unlock", 5000, &mut |_| {
        flock(&one, FlockOperation::LockExclusive).unwrap();
        flock(&one, FlockOperation::Unlock).unwrap();
    });
}
