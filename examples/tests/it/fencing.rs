//! Power fencing of a real node by agent programs of the configuration, a person's word, and the tree of resources that
//! waits for either.

use crate::cluster::{Cluster, complaint, is, one_at_a_time, output_of, wait_for, who};
use quorate::events::boottime_ns;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// A FenceAgentAPI program: a power switch that works once the file `works` is there. It writes down what it is asked.
const SWITCH: &str = r#"#!/bin/sh
while IFS= read -r line; do export "$line"; done
echo "$action $nodename $port" >>"$dir/asked"
[ -e "$dir/works" ] || exit 1
case "$action" in
off) : >"$dir/off.$port"; exit 0 ;;
on) rm -f "$dir/off.$port"; exit 0 ;;
status) [ -e "$dir/off.$port" ] && exit 2; exit 0 ;;
esac
exit 1
"#;

/// An OCF agent that keeps a file for each node and writes down starts and stops.
const AGENT: &str = r#"#!/bin/sh
here="$OCF_RESKEY_dir/$OCF_RESKEY_CRM_meta_on_node.$OCF_RESOURCE_INSTANCE"
case "$1" in
start) : >"$here"; echo "$OCF_RESKEY_CRM_meta_on_node start $OCF_RESOURCE_INSTANCE" >>"$OCF_RESKEY_dir/did" ;;
stop) rm -f "$here"; echo "$OCF_RESKEY_CRM_meta_on_node stop $OCF_RESOURCE_INSTANCE" >>"$OCF_RESKEY_dir/did" ;;
monitor) [ -e "$here" ] || exit 7 ;;
*) exit 3 ;;
esac
exit 0
"#;

fn program(path: &Path, text: &str) -> String {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

/// The lines of a file that may not be there yet.
fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn did(node: &str, words: &str) -> Vec<String> {
    words.split(", ").map(|w| format!("{node} {w}")).collect()
}

#[test]
fn a_service_of_power_safety_waits_for_a_fence_level_that_works_or_for_a_person() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(3);
    let dir = cluster.temp.0.clone();
    let (switch, agent) = (program(&dir.join("switch"), SWITCH), program(&dir.join("agent"), AGENT));
    let resource = |name: &str, parent: &str| {
        format!(
            "[[service.resource]]\nname = \"{name}\"\nagent = \"{agent}\"\n{parent}\
             [service.resource.parameters]\ndir = \"{}\"\n",
            dir.display()
        )
    };
    let child = "parent = \"disk\"\n";
    let document = format!(
        "[[fence_device]]\nname = \"gone\"\nagent = \"/nonexistent\"\n\
         [[fence_device]]\nname = \"switch\"\nagent = \"{switch}\"\nparameters = {{ dir = \"{}\" }}\n\
         [[failover_domain]]\nname = \"order\"\nordered = true\nnodes = [3, 2, 1]\n\
         [[service]]\nname = \"s\"\nsafety = \"power\"\ndomain = \"order\"\n{}{}{}",
        dir.display(),
        resource("disk", ""),
        resource("ip", ""),
        resource("server", child),
    );
    // They are of the node that the document has last.
    let levels = "[[node.fence]]\nname = \"first\"\nsteps = [{ device = \"gone\" }]\n\
                  [[node.fence]]\nname = \"second\"\nsteps = [{ device = \"switch\", parameters = { port = \"7\" } }]\n";
    cluster.start_storage();
    cluster.form(3);
    cluster.configure(3, &format!("{document}{levels}"));
    let started = "start s-disk, start s-server, start s-ip";
    wait_for("the tree on node 3", || (lines(&dir.join("did")) == did("node3", started)).then_some(()));

    // Node 3 dies. Its first level cannot be started, the switch does not work yet: both are tried again and again.
    let since = boottime_ns();
    cluster.kill("node3");
    let failed = |e: &serde_json::Value| is(e, "fencing") && who(e) == "node 1" && e["failure"].is_string();
    cluster.wait_event("the first level", since, |e| {
        failed(e) && e["how"] == "off by device gone of method first"
    });
    let second = "off by device switch of method second";
    cluster.wait_event("the second level", since, |e| failed(e) && e["how"] == second);
    wait_for("another try", || (1 < lines(&dir.join("asked")).len()).then_some(()));
    let why = output_of(11, &["--node", &cluster.path("n2"), "why"]);
    assert!(why.contains(" is not yet proven harmless for service s"), "{why}");
    assert_eq!(lines(&dir.join("did")).len(), 3, "nobody starts it before the fence");
    std::fs::write(dir.join("works"), "").unwrap();
    cluster.wait_event("the fence", since, |e| {
        is(e, "fencing") && who(e) == "node 1" && e["how"] == second && e["failure"].is_null()
    });
    wait_for("the tree on node 2", || (lines(&dir.join("did"))[3..] == did("node2", started)).then_some(()));
    let asked = lines(&dir.join("asked"));
    let (last, before) = asked.split_last().unwrap();
    assert_eq!(last, "status node3 7");
    assert!(
        before.iter().all(|line| line == "off node3 7"),
        "verified once, and turned off no more: {asked:?}"
    );
    // Who, when, how and with what result, at the one who did it; who proved it, at the other.
    let history =
        |node: &str| output_of(0, &["--node", &dir.join(node).display().to_string(), "fence", "history"]);
    let all = history("n1");
    let life = all.lines().next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let by = cluster.status(1)["incarnation"].as_u64().map(|i| format!("1#{i}")).unwrap();
    for wanted in [
        format!(" {life} by {by}: off by device gone of method first: failed: cannot start /nonexistent"),
        format!(" {life} by {by}: {second}: failed: {switch} Off failed: exit status: 1"),
        format!(" {life} by {by}: {second}: done, after "),
    ] {
        assert!(all.contains(&wanted), "{wanted} is not in\n{all}");
    }
    assert!(life.starts_with("3#"), "{all}");
    let other = history("n2");
    assert!(other.lines().all(|l| l.contains(&format!(" {life} by {by}: record "))), "{other}");
    assert!(other.contains("service s: done"), "{other}");

    // Node 3 comes back and takes the service again; node 2 gets it, and dies. Nothing is configured against it: only a person can say that it is off.
    let again = boottime_ns();
    cluster.start_node(3);
    cluster.everybody_in(again, &[1, 2, 3]);
    wait_for("the tree back on node 3", || (lines(&dir.join("did")).len() == 15).then_some(()));
    let relocate = ["--node", &cluster.path("n1"), "service", "relocate", "s", "2"];
    assert_eq!(output_of(0, &relocate), "service s runs on node 2\n");
    let moved = lines(&dir.join("did"));
    let stopped = "stop s-ip, stop s-server, stop s-disk";
    let wanted = [
        did("node2", stopped),
        // What the former life left: its agents still say that it runs.
        did("node3", stopped),
        did("node3", started),
        did("node3", stopped),
        did("node2", started),
    ];
    assert_eq!(moved[6..], wanted.concat());
    let since = boottime_ns();
    cluster.kill("node2");
    cluster.wait_event("the removal of node 2", since, |e| {
        is(e, "view") && who(e) == "node 3" && !crate::cluster::numbers(e, "members").contains(&2)
    });
    let node = cluster.path("n3");
    let confirm = ["--node", &node, "fence", "confirm", "2"];
    let words = complaint(1, &confirm);
    assert!(words.contains("Look at the machine, then add --i-have-seen-that-it-is-off"), "{words}");
    wait_for("the person's turn", || history("n1").contains("it waits for a person").then_some(()));
    assert_eq!(lines(&dir.join("did")), moved, "nobody starts it before the word");
    let said = output_of(0, &[&confirm[..], &["--i-have-seen-that-it-is-off"]].concat());
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(said, format!("uid {uid} confirms that node 2 is off\n"));
    wait_for("the tree on node 3 again", || {
        (lines(&dir.join("did"))[21..] == did("node3", started)).then_some(())
    });
    assert!(history("n3").contains(&format!(": the word of uid {uid}: done")), "{}", history("n3"));
    let words = complaint(1, &[&confirm[..], &["--i-have-seen-that-it-is-off"]].concat());
    assert!(words.contains("node 2 does not wait for a fence"), "{words}");
}
