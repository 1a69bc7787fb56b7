//! The demo where it cannot start, and where somebody ends it: clear words, and nothing left behind.

use crate::cluster::{Temp, network, one_at_a_time, wait_for};
use rustix::process::Signal;
use std::path::Path;
use std::process::{Command, Stdio};

fn demo(temp: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate-demo"));
    command.args(args).env("TMPDIR", temp).stdin(Stdio::null());
    command
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn a_taken_port_a_wrong_option_and_a_full_disk_are_told_before_anything_starts() {
    let _one = one_at_a_time();
    let (temp, net) = (Temp::new(), network());
    let _taken = std::net::TcpListener::bind(format!("{net}.100:10809")).unwrap();
    let output = demo(&temp.0, &["--network", &net]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let wanted = format!(
        "quorate-demo: cannot use {net}.100:10809: Address already in use (os error 98); is another demo running?\n"
    );
    assert_eq!(stderr, wanted);
    assert!(is_empty(&temp.0), "something was left in {}", temp.0.display());
    let output = demo(&temp.0, &["--nodes", "2"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "quorate-demo: --nodes 2: 3 to 5 nodes can be shown\n"
    );
    let dir = temp.0.join("small");
    std::fs::create_dir(&dir).unwrap();
    let path = dir.to_str().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "none", path]).output();
    if !mounted.is_ok_and(|o| o.status.success()) {
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "a tmpfs cannot be mounted");
        println!("SKIP: the demo on a full disk: a tmpfs cannot be mounted (root is needed)");
        return;
    }
    let output = demo(&dir, &[]).output().unwrap();
    let empty = is_empty(&dir);
    let _gone = Command::new("umount").args(["-l", path]).output();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let wanted = format!(
        "quorate-demo: {path} has 16 MiB free, the demo wants 640: set TMPDIR to a directory with more\n"
    );
    assert_eq!(stderr, wanted);
    assert!(empty, "something was left in {path}");
}

/// The processes that have `text` on their command line or in their environment.
fn processes_with(text: &str) -> Vec<u32> {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str().and_then(|n| n.parse::<u32>().ok()));
    let holds = |file: String| std::fs::read(file).is_ok_and(|b| String::from_utf8_lossy(&b).contains(text));
    pids.filter(|p| *p != std::process::id())
        .filter(|p| holds(format!("/proc/{p}/cmdline")) || holds(format!("/proc/{p}/environ")))
        .collect()
}

/// At three moments: while certificates are made, with the nodes up, and while they mount.
#[test]
fn ctrl_c_leaves_no_process_mount_or_directory() {
    let _one = one_at_a_time();
    for moment in ["1. ", "2. ", "4. "] {
        let temp = Temp::new();
        let out = temp.0.join("out");
        let below = temp.0.join("t");
        std::fs::create_dir(&below).unwrap();
        let file = std::fs::File::create(&out).unwrap();
        let mut child = demo(&below, &["--network", &network()]).stdout(file).spawn().unwrap();
        wait_for(moment, || {
            let text = std::fs::read_to_string(&out).unwrap();
            assert!(!text.contains("ended early"), "{text}");
            text.contains(moment).then_some(())
        });
        crate::cluster::signal(child.id(), Signal::INT);
        let status = wait_for("the demo's end", || child.try_wait().unwrap());
        let text = std::fs::read_to_string(&out).unwrap();
        assert_eq!(status.code(), Some(130), "{moment}: {text}");
        assert!(is_empty(&below), "{moment}: a directory is left");
        let place = below.display().to_string();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&place), "{moment}: a mount is left");
        wait_for("every process's end", || processes_with(&place).is_empty().then_some(()));
    }
}
