//! The process that mounts and serves, and does on request what another node would do.

use super::memfs::MemFs;
use super::{MOUNTPOINT, in_role};
use core::time::Duration;
use quorate_gfs::fuse::{
    End, MountOptions, ReaddirPlus, Session, SessionOptions, UnmountError, UnmountMode, unmount,
};
use quorate_membership::{BoxFuture, Instant, Runtime};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};

/// How long a scenario may take before the connection is aborted and the test fails.
const CEILING: Duration = Duration::from_secs(60);

/// Tasks and timers on tokio.
pub(crate) struct TokioRuntime {
    handle: tokio::runtime::Handle,
    start: tokio::time::Instant,
}

impl Runtime for TokioRuntime {
    fn now(&self) -> Instant {
        Instant(self.start.elapsed().as_nanos() as u64)
    }
    fn sleep_until(&self, at: Instant) -> BoxFuture<'static, ()> {
        let _in = self.handle.enter();
        Box::pin(tokio::time::sleep_until(self.start + Duration::from_nanos(at.0)))
    }
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.handle.spawn(task);
    }
}

pub(crate) fn run(scenario: &str) {
    if !rustix::process::geteuid().is_root() {
        // The ordinary user of `as_user`: root made the namespace.
        return serve(scenario);
    }
    // New threads and processes inherit this thread's namespace; the tests' own process keeps the old one.
    #[expect(
        unsafe_code,
        reason = "the call is unsafe for what it may do to open files; it does not touch them here"
    )]
    // SAFETY: NEWNS gives this thread its own mounts, and with them its own working directory; descriptors are shared
    // as before.
    unsafe {
        rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS).unwrap();
    }
    rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::PRIVATE | rustix::mount::MountPropagationFlags::REC,
    )
    .unwrap();
    if scenario == "as_user" {
        // Once more as an ordinary user, in this namespace. Everybody may open the device where udev runs; where it
        // does not, a node of our own stands in for it.
        let device = std::path::PathBuf::from(std::env::var_os(MOUNTPOINT).unwrap()).with_file_name("fuse");
        let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o666));
        rustix::fs::mknodat(rustix::fs::CWD, &device, kind, mode, rustix::fs::makedev(10, 229)).unwrap();
        rustix::fs::chmod(&device, mode).unwrap();
        rustix::mount::mount_bind(&device, "/dev/fuse").unwrap();
        use std::os::unix::process::CommandExt;
        let mut command = in_role("server", "as_user");
        let status = command.uid(65534).gid(65534).status().unwrap();
        assert!(status.success(), "{status}");
        println!("served to the end");
        return;
    }
    serve(scenario);
}

fn serve(scenario: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    runtime.block_on(async {
        let runtime = Arc::new(TokioRuntime { handle: handle.clone(), start: tokio::time::Instant::now() });
        if scenario.starts_with("locks_") {
            // Whatever hangs, the test's process ends, and its mounts with their namespace.
            let served = super::locks::serve(&runtime, scenario);
            tokio::time::timeout(CEILING, served).await.expect("the scenario hangs");
            return;
        }
        let fs = MemFs::new();
        let mountpoint = std::path::PathBuf::from(std::env::var_os(MOUNTPOINT).unwrap());
        let options = MountOptions::new(&mountpoint, "test,1");
        let how = SessionOptions { readdir_plus: ReaddirPlus::Auto, ..SessionOptions::local() };
        let session = Session::mount(fs.clone(), runtime.clone(), &options, how).unwrap();
        let connection = session.connection().expect("the mount is in the table");
        let (finished, watchdog) = channel::<()>();
        let client_pid = Arc::new(AtomicU32::new(0));
        let victim = Arc::clone(&client_pid);
        let path = mountpoint.clone();
        let watchdog = std::thread::spawn(move || {
            if watchdog.recv_timeout(CEILING) == Err(RecvTimeoutError::Timeout) {
                eprintln!("watchdog: aborting the connection");
                let _ = connection
                    .abort()
                    .or_else(|_| unmount(&path, UnmountMode::Force).map_err(std::io::Error::other));
                if let Some(pid) = rustix::process::Pid::from_raw(victim.load(Ordering::SeqCst) as i32) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                std::process::exit(99);
            }
        });
        let (one, two, three) = (session, fs, mountpoint.clone());
        let scenario_name = scenario.to_owned();
        let (session, fs) = tokio::task::spawn_blocking(move || {
            with_client(&scenario_name, &three, &one, &two, &client_pid);
            (one, two)
        })
        .await
        .unwrap();
        let deadline = runtime.now() + Duration::from_secs(20);
        if scenario == "busy" {
            // This process holds a file open through /proc: nothing of it goes through this process's threads.
            let refused = session.unmount(UnmountMode::Clean, deadline).await;
            assert!(matches!(refused, Err(UnmountError::Busy(_))), "{refused:?}");
            let soon = runtime.now() + Duration::from_millis(200);
            let late = session.unmount(UnmountMode::Lazy, soon).await;
            assert!(matches!(late, Err(UnmountError::Deadline(_))), "{late:?}");
            session.abort();
            assert_eq!(session.ended().await, End::Aborted);
        } else if scenario == "abort" {
            assert_eq!(session.ended().await, End::Aborted);
            let _ = unmount(&mountpoint, UnmountMode::Lazy);
        } else {
            session.unmount(UnmountMode::Clean, deadline).await.unwrap();
            assert_eq!(session.ended().await, End::Unmounted);
            while session.waiting() != 0 {
                tokio::task::yield_now().await;
            }
            // The kernel's read ahead outlives the killed reader, and holds the file open until the mount goes.
            let read_ahead = u64::from(scenario == "kill_reader");
            let (open, nameless) = fs.leftovers();
            assert!(open <= read_ahead && nameless == 0, "{open} open files, {nameless} nameless inodes");
        }
        finished.send(()).unwrap();
        watchdog.join().unwrap();
    });
    println!("served to the end");
}

#[expect(
    clippy::zombie_processes,
    reason = "the watchdog ends it by its number, and the test's process is its reaper"
)]
fn with_client(scenario: &str, mountpoint: &Path, session: &Session, fs: &Arc<MemFs>, pid: &AtomicU32) {
    let mut client = in_role("client", scenario)
        .env(MOUNTPOINT, mountpoint)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    pid.store(client.id(), Ordering::SeqCst);
    let mut answers = client.stdin.take().unwrap();
    let runtime = tokio::runtime::Handle::current();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines();
    while let Some(Ok(line)) = lines.next() {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["ask:", "write_elsewhere", name, text] => runtime.block_on(fs.write_elsewhere(name, text)),
            ["ask:", "remove_elsewhere", name] => runtime.block_on(fs.remove_elsewhere(name)),
            ["ask:", "create_elsewhere", name] => runtime.block_on(fs.create_elsewhere(name)),
            ["ask:", "invalidate", name] => runtime.block_on(fs.invalidate(name)),
            ["ask:", "open_gate"] => fs.open_gate(),
            ["ask:", "waiting", count] => {
                let count: usize = count.parse().unwrap();
                while session.waiting() < count {
                    std::thread::yield_now();
                }
            }
            ["ask:", "abort"] => session.abort(),
            ["ask:", "hold"] => {
                // The client stays, with its file open, until this process ends.
                writeln!(answers, "ok").unwrap();
                std::mem::forget(answers);
                return;
            }
            _ => {
                println!("{line}");
                continue;
            }
        }
        writeln!(answers, "ok").unwrap();
    }
    let status = client.wait().unwrap();
    assert!(status.success(), "client: {status}");
}
