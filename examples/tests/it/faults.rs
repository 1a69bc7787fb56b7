//! Failures of running clusters: a killed supervisor, storage that is away in the middle of a recovery, junk on every port,
//! a full state disk.

use crate::cluster::{
    CEILING, Cluster, is, numbers, one_at_a_time, output_of, runs, signal, time, wait_for, who,
};
use quorate::admin::protocol::Command as Admin;
use quorate::events::boottime_ns;
use quorate_membership::Rng;
use rustix::process::Signal;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// An agent whose service is a daemon of another session. It keeps its number in a file for each node.
const AGENT: &str = r#"#!/bin/sh
pidfile="$OCF_RESKEY_dir/pid.$OCF_RESKEY_CRM_meta_on_node"
runs() { [ -s "$pidfile" ] && kill -0 "$(cat "$pidfile")" 2>/dev/null; }
case "$1" in
start) runs && exit 0; setsid sleep 86400 >/dev/null 2>&1 </dev/null & echo $! >"$pidfile"; exit 0 ;;
stop) runs && kill -9 "$(cat "$pidfile")"; rm -f "$pidfile"; exit 0 ;;
monitor) runs && exit 0; exit 7 ;;
*) exit 3 ;;
esac
"#;

#[test]
fn a_killed_supervisors_service_moves_and_what_it_left_is_ended_before_the_next_life() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(3);
    let agent = cluster.temp.0.join("agent");
    std::fs::write(&agent, AGENT).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    cluster.start_storage();
    cluster.form(3);
    let service = format!(
        "[[service]]\nname = \"daemon\"\nautostart = false\n[[service.resource]]\nname = \"r\"\nagent = \"{}\"\n\
         [service.resource.parameters]\ndir = \"{}\"\n",
        agent.display(),
        cluster.temp.0.display()
    );
    cluster.configure(3, &service);
    wait_for("the failover manager", || {
        cluster.ask(1, Admin::ServiceRelocate { name: "daemon".into(), node: Some(1) }).ok()
    });
    let pid_of = |node: &str| {
        let text = std::fs::read_to_string(cluster.temp.0.join(format!("pid.{node}"))).ok()?;
        text.trim().parse::<u32>().ok()
    };
    let daemon = wait_for("the daemon", || pid_of("node1").filter(|pid| runs(*pid)));
    let node = cluster.node_process(1);
    let since = boottime_ns();
    cluster.kill("node1");
    wait_for("the node's death with its supervisor", || (!runs(node)).then_some(()));
    let started = cluster.wait_event("the service elsewhere", since, |e| {
        is(e, "service") && e["state"] == "started" && who(e) != "node 1"
    });
    let elsewhere = format!("node{}", started["node"].as_u64().unwrap());
    // Nobody is left on node 1 who could end the daemon: the next supervisor does, before its node's first packet.
    let again = boottime_ns();
    cluster.start_node(1);
    cluster.wait_event("the next life", again, |e| is(e, "started") && who(e) == "node 1");
    assert!(!runs(daemon), "the daemon of the former life runs beside the next one");
    assert!(
        cluster.log("node1").contains("an earlier life left these processes"),
        "{}",
        cluster.log("node1")
    );
    cluster.everybody_in(again, &[1, 2, 3]);
    let pid_of = |node: &str| {
        std::fs::read_to_string(cluster.temp.0.join(format!("pid.{node}"))).unwrap().trim().parse().unwrap()
    };
    assert!(runs(pid_of(&elsewhere)), "the service goes on where it is");
    cluster.ask(2, Admin::ServiceDisable("daemon".into())).unwrap();
    assert!(!cluster.temp.0.join(format!("pid.{elsewhere}")).exists(), "stopped in order");
}

#[test]
fn storage_that_is_away_for_ten_seconds_in_the_middle_of_a_recovery_is_waited_for() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::running(3, "");
    cluster.mount_everywhere(3);
    cluster.append(1, "/one", b"of the node that dies\n").unwrap();
    cluster.append(2, "/two", b"of a survivor\n").unwrap();
    let lives = [2, 3].map(|id| cluster.status(id)["incarnation"].clone());
    let since = boottime_ns();
    signal(cluster.node_process(1), Signal::KILL);
    cluster.kill("storage");
    cluster.wait_event("the removal of node 1", since, |e| {
        is(e, "view") && who(e) == "node 2" && !numbers(e, "members").contains(&1)
    });
    let (socket, path) = (cluster.socket(2), "/one".to_owned());
    let writer = std::thread::spawn(move || {
        let operation = quorate::admin::protocol::FileOperation::Write {
            path,
            offset: None,
            data: b"after the recovery\n".to_vec(),
            sync: true,
        };
        quorate::admin::client::Client::connect(&socket).and_then(|mut c| c.file("data", operation))
    });
    pause(since + 10_000_000_000);
    assert!(!writer.is_finished(), "a write that needs the dead node's lock waits for its fence");
    assert!(cluster.events().iter().all(|e| !is(e, "replayed")), "nothing is replayed without storage");
    // What a person is told meanwhile, with the exit code for it.
    let why = output_of(11, &["--node", &cluster.path("n2"), "why"]);
    println!("{why}");
    let dead =
        |line: &str| line.starts_with("fence: 1#") && line.contains(" is not yet proven harmless for ");
    assert!(why.lines().all(dead), "{why}");
    for resource in ["filesystem data", "lockspace gfs:data", "device "] {
        assert!(why.contains(&format!(" is not yet proven harmless for {resource}")), "{resource}: {why}");
    }
    cluster.start_storage();
    cluster.wait_event("the fence", since, |e| is(e, "fence") && !numbers(e, "admitted").contains(&1));
    cluster.wait_event("the replay", since, |e| is(e, "replayed"));
    writer.join().unwrap().unwrap();
    assert_eq!(cluster.read(3, "/one"), b"of the node that dies\nafter the recovery\n");
    assert_eq!(cluster.read(3, "/two"), b"of a survivor\n");
    assert_eq!([2, 3].map(|id| cluster.status(id)["incarnation"].clone()), lives, "nobody else was removed");
    let other =
        cluster.events().iter().find(|e| since <= time(e) && is(e, "over") && who(e) != "node 1").cloned();
    assert_eq!(other, None);
}

/// Until this instant of the clock of leases; a timer, not a guess.
fn pause(until_ns: u64) {
    use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
    let timer = rustix::time::timerfd_create(TimerfdClockId::Boottime, TimerfdFlags::CLOEXEC).unwrap();
    let at = Duration::from_nanos(until_ns);
    assert!(at < Duration::from_nanos(boottime_ns()) + CEILING);
    let it_value = Timespec { tv_sec: at.as_secs().cast_signed(), tv_nsec: at.subsec_nanos().into() };
    let spec = Itimerspec { it_interval: Timespec::default(), it_value };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME, &spec).unwrap();
    rustix::io::read(&timer, &mut [0_u8; 8][..]).unwrap();
}

/// Resident memory in bytes.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn junk_on_every_port_and_socket_disturbs_nobody_and_takes_no_memory() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::running(2, "");
    let processes = [cluster.pid("storage"), cluster.node_process(1), cluster.node_process(2)];
    let before = processes.map(resident);
    let since = boottime_ns();
    let mut rng = Rng::new(7);
    let mut junk = |n: usize| (0..n).map(|_| rng.next_u64() as u8).collect::<Vec<u8>>();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let ports = [cluster.address(1), cluster.address(2), cluster.storage_address()];
    let mut idle = Vec::new();
    for i in 0..60 {
        for port in &ports {
            udp.send_to(&junk(1 + i * 20), port).unwrap();
            let mut tcp = TcpStream::connect(port).unwrap();
            let mut bytes = junk(1 + i * 300);
            if port.ends_with(":10809") && i % 3 == 0 {
                // Behind the client's flags: an option with an absurd length.
                bytes = [&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 7], &[255; 4], &bytes].concat();
            }
            // Either end may close at any time.
            let _ = tcp.write_all(&bytes);
            if i % 4 == 0 {
                idle.push(tcp);
            }
        }
        for id in [1, 2] {
            let mut socket = UnixStream::connect(cluster.socket(id)).unwrap();
            let bytes =
                if i % 2 == 0 { junk(1 + i * 50) } else { [&[255, 255, 31, 0, 1][..], &junk(50)].concat() };
            let _ = socket.write_all(&bytes);
        }
    }
    // Everything still answers, with the idle connections open.
    for id in [1, 2] {
        assert_eq!(cluster.status(id)["quorate"], true);
    }
    cluster.ask(1, Admin::PvCreate("shared".into())).unwrap();
    let after = [cluster.pid("storage"), cluster.node_process(1), cluster.node_process(2)];
    assert_eq!(after, processes, "nobody was started again");
    for (before, after) in before.into_iter().zip(processes.map(resident)) {
        assert!(after < before + (64 << 20), "{before} bytes became {after}");
    }
    let bad = cluster.events().iter().find(|e| since <= time(e) && is(e, "over")).cloned();
    assert_eq!(bad, None);
    for name in ["storage", "node1", "node2"] {
        assert!(!cluster.log(name).contains("panicked"), "{}", cluster.log(name));
    }
}

/// A small filesystem over a directory.
struct Tmpfs(String);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l", &self.0]).output();
    }
}

#[test]
fn a_voter_whose_state_disk_is_full_leaves_and_the_others_go_on() {
    let _one = one_at_a_time();
    let test = "a_voter_whose_state_disk_is_full_leaves_and_the_others_go_on";
    let mut cluster = Cluster::new(3);
    let state = cluster.path("n3/state");
    std::fs::create_dir_all(&state).unwrap();
    let mount =
        std::process::Command::new("mount").args(["-t", "tmpfs", "-o", "size=128k", "none", &state]).output();
    if !mount.is_ok_and(|o| o.status.success()) {
        assert!(std::env::var_os("QUORATE_NO_SKIP").is_none(), "{test}: a tmpfs cannot be mounted");
        println!("SKIP: {test}: a tmpfs cannot be mounted (root is needed)");
        return;
    }
    let disk = Tmpfs(state);
    cluster.start_storage();
    cluster.form(3);
    cluster.configure(3, "");
    let since = boottime_ns();
    let mut fill = std::fs::File::create(format!("{}/fill", disk.0)).unwrap();
    while fill.write_all(&[0; 4096]).is_ok() {}
    while fill.write_all(&[0; 1]).is_ok() {}
    // Records, until node 3 has no room for one.
    wait_for("the end of node 3", || {
        let names = ["10.0.0.1:1", "10.0.0.2:1"];
        for address in names {
            let certificate = std::fs::read_to_string(cluster.path("n2/pki/server-cert.pem")).unwrap();
            // The same node at another address: a decided record each time.
            let _maybe = cluster.ask(1, Admin::AddNode { id: 2, certificate, address: address.into() });
        }
        cluster.events().iter().find(|e| is(e, "over") && who(e) == "node 3").cloned()
    });
    let over = cluster.wait_event("why", since, |e| is(e, "over") && who(e) == "node 3");
    let reason = over["reason"].as_str().unwrap().to_owned();
    assert!(reason.contains("No space left on device") || reason.contains("durable"), "{reason}");
    assert_eq!(cluster.ended("node3").code(), Some(75));
    cluster.everybody_in(since, &[1, 2]);
    wait_for("quorum without it", || (cluster.status(1)["quorate"] == true).then_some(()));
}
