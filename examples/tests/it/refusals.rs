//! What people get wrong: documents, devices, commands without a node. Each is told in one line with an exit code.

use crate::cluster::{Cluster, complaint, one_at_a_time, quorate, wait_for};
use quorate::admin::protocol::Command as Admin;

const NODES: &str = "name = \"c\"\n[[node]]\nid = 1\nname = \"a\"\naddress = \"127.0.0.1:1\"\n";

#[test]
fn documents_with_duplicates_are_refused_with_line_and_column() {
    let temp = crate::cluster::Temp::new();
    let path = temp.0.join("c.toml");
    let file = path.to_str().unwrap();
    let cases = [
        (
            format!("{NODES}[[node]]\nid = 1\nname = \"b\"\naddress = \"127.0.0.1:2\"\n"),
            "7:6: node id 1 is there twice",
        ),
        (
            format!("{NODES}[[node]]\nid = 2\nname = \"a\"\naddress = \"127.0.0.1:2\"\n"),
            "8:8: node name a is there twice",
        ),
        (format!("{NODES}votes = 1\nvotes = 2\n"), "7:1: duplicate key"),
        (format!("{NODES}votes = -1\n"), "6:9: invalid value: integer `-1`, expected u32"),
        (format!("{NODES}votes = 0\n"), "3:6: no node has a vote"),
        (
            format!("{NODES}[timing]\nheartbeat_ms = 400\n"),
            "7:16: heartbeat_ms is 400, from 10 to 200 is allowed: detection_ms is 800",
        ),
    ];
    for (text, wanted) in cases {
        std::fs::write(&path, &text).unwrap();
        let words = complaint(1, &["config", "check", file]);
        assert!(words.contains(wanted), "{wanted}: {words}");
    }
    std::fs::write(&path, NODES).unwrap();
    assert!(quorate(&["config", "check", file]).status.success());
}

#[test]
fn what_is_not_there_is_named() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(1);
    let words = complaint(1, &["storage", "--dir", &cluster.path("s1"), "--export", "x=/nonexistent/disk"]);
    assert!(
        words.starts_with("quorate: export x: ") && words.contains("No such file or directory"),
        "{words}"
    );
    let words = complaint(1, &["--node", &cluster.path("n1"), "status"]);
    assert!(words.contains("no node answers at ") && words.contains("admin.sock"), "{words}");
    cluster.start_storage();
    cluster.form(1);
    let document = |export: &str| {
        format!(
            "name = \"test\"\n[[node]]\nid = 1\nname = \"node1\"\naddress = \"{}\"\n\
             [[export]]\nname = \"{export}\"\nserver = \"storage1\"\naddress = \"{}\"\n",
            cluster.address(1),
            cluster.storage_address()
        )
    };
    cluster.ask(1, Admin::ConfigApply { expected: None, document: document("absent") }).unwrap();
    let error = cluster.ask(1, Admin::PvCreate("absent".into())).unwrap_err();
    assert!(error.contains("device absent: the storage server refuses this node"), "{error}");
    let error = cluster.ask(1, Admin::Mount("data".into())).unwrap_err();
    assert!(error.contains("the configuration has no filesystem data"), "{error}");
    // A volume that cannot hold its journals.
    let small = document("shared")
        + "[[volume_group]]\nname = \"vg0\"\ndevices = [\"shared\"]\n\
           [[filesystem]]\nname = \"data\"\nvolume = \"vg0/small\"\njournals = 3\n";
    cluster.ask(1, Admin::ConfigApply { expected: None, document: small }).unwrap();
    cluster.ask(1, Admin::PvCreate("shared".into())).unwrap();
    cluster.ask(1, Admin::VgCreate { name: "vg0".into(), devices: vec!["shared".into()] }).unwrap();
    let bytes = 20 << 20;
    cluster.ask(1, Admin::LvCreate { group: "vg0".into(), name: "small".into(), bytes }).unwrap();
    let error = cluster.ask(1, Admin::Mkfs { name: "data".into() }).unwrap_err();
    assert!(
        error.contains("the device has 20971520 bytes, but these journals and the system files need")
            && error.ends_with("make it larger, or fewer or smaller journals"),
        "{error}"
    );
    let error = cluster.ask(1, Admin::Mount("data".into())).unwrap_err();
    assert!(error.contains("no GFS2 metadata"), "{error}");
    let twice = document("absent") + "[[node]]\nid = 1\nname = \"b\"\naddress = \"127.0.0.1:2\"\n";
    let error = cluster.ask(1, Admin::ConfigApply { expected: None, document: twice }).unwrap_err();
    assert!(error.contains("11:6: node id 1 is there twice"), "{error}");
}

/// A device that this host's kernel has: here an image that is a loop device. One that is mounted is named with its mount.
#[test]
fn an_export_that_the_kernel_uses_is_refused() {
    let _one = one_at_a_time();
    let cluster = Cluster::new(1);
    let image = cluster.temp.0.join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let losetup = |args: &[&str]| {
        let mut command = std::process::Command::new("losetup");
        command.args(args).output().ok().filter(|output| output.status.success())
    };
    let Some(made) = losetup(&["-f", "--show", image.to_str().unwrap()]) else {
        println!("SKIP: an_export_that_the_kernel_uses_is_refused: no loop device can be had here");
        return;
    };
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let export = format!("x={}", image.display());
    let output = quorate(&["storage", "--dir", &cluster.path("s1"), "--export", &export]);
    losetup(&["-d", &device]).expect("the loop device goes away");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    let name = device.trim_start_matches("/dev/");
    let wanted =
        format!("quorate: export x: {} is in use by {name} on this host: stop that first\n", image.display());
    assert_eq!((output.status.code(), words), (Some(1), wanted));
}

/// `quorate why` in a script: the exit codes of docs/commands.md.
#[test]
fn why_has_exit_codes_and_the_configuration_is_read_without_a_quorum() {
    let _one = one_at_a_time();
    let mut cluster = Cluster::new(3);
    cluster.start_storage();
    cluster.form(3);
    let dir = cluster.path("n1");
    let why = |code: i32, words: &str| {
        let said = std::cell::RefCell::new(String::new());
        crate::cluster::wait_or(
            || {
                let output = quorate(&["--node", &dir, "why"]);
                *said.borrow_mut() = format!(
                    "{:?}: {}{}",
                    output.status,
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                );
                (output.status.code() == Some(code) && said.borrow().contains(words)).then_some(())
            },
            || panic!("{code}, {words} was not said, but {}", said.borrow()),
        );
    };
    why(0, "nothing is waited for");
    // The configuration's history, while there is a quorum and, to be read, without one.
    cluster.configure(3, "");
    let path = cluster.temp.0.join("two.toml");
    let file = path.to_str().unwrap();
    let shown = cluster.ask(1, Admin::ConfigShow).unwrap();
    let text = shown["document"].as_str().unwrap().to_owned();
    std::fs::write(&path, format!("{text}# two\n")).unwrap();
    let config = |args: &[&str]| crate::cluster::output_of(0, &[&["--node", &dir, "config"], args].concat());
    assert_eq!(config(&["apply", file, "--expected", "1"]), "version 2\n");
    let words = complaint(1, &["--node", &dir, "config", "apply", file, "--expected", "1"]);
    assert_eq!(
        words,
        "quorate: version 1 is not the newest any more, 2 is: look at the difference and apply again\n"
    );
    assert!(
        config(&["diff", "1", "2"]).lines().any(|line| line == "+# two"),
        "{}",
        config(&["diff", "1", "2"])
    );
    assert_eq!(config(&["rollback", "1"]), "version 3 says what version 1 said\n");
    let words = complaint(1, &["--node", &dir, "config", "rollback", "77"]);
    assert_eq!(words, "quorate: version 77 is not in the history\n");
    wait_for("version 3 on node 3", || {
        (cluster.ask(3, Admin::ConfigShow).unwrap()["version"] == 3).then_some(())
    });
    assert_eq!(config(&["history"]).lines().count(), 3);
    cluster.kill("node2");
    cluster.kill("node3");
    why(10, "quorum: no majority of the voters 1, 2, 3 answers");
    assert_eq!(quorate(&["--node", &dir, "--json", "why"]).status.code(), Some(10));
    let shown = cluster.ask(1, Admin::ConfigShow).unwrap();
    assert_eq!((shown["version"].as_u64(), shown["document"].as_str()), (Some(3), Some(&text[..])));
}

/// Damaged images, read without a cluster: what is wrong is said, and where.
#[test]
fn a_truncated_or_corrupt_image_and_a_wrong_magic_are_told() {
    use quorate_gfs::format::{BlockSize, SUPERBLOCK_BYTES, Superblock};
    use quorate_gfs::mkfs::{MkfsOptions, mkfs};
    const SUPERBLOCK: usize = 65_536;
    let temp = crate::cluster::Temp::new();
    let device = quorate_gnbd::MemoryDevice::new(24 << 20);
    let options = MkfsOptions { journal_bytes: 8 << 20, ..MkfsOptions::new(1) };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(mkfs(&device, &options)).unwrap();
    let sound = device.bytes();
    let root = Superblock::decode(&sound[SUPERBLOCK..SUPERBLOCK + SUPERBLOCK_BYTES]).unwrap().root.addr.0;
    let root_at = usize::try_from(root).unwrap() * BlockSize::new(4096).unwrap().usize();
    let path = temp.0.join("image");
    let image = path.to_str().unwrap();
    let ls = ["fs", "ls", "--image", image, "/"];
    std::fs::write(&path, &sound).unwrap();
    assert!(quorate(&ls).status.success());
    let with = |at: usize, bytes: &[u8]| {
        let mut damaged = sound.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        damaged
    };
    let cases: [(&str, Vec<u8>, String); 6] = [
        ("nothing", vec![0; 1 << 20], "no GFS2 metadata: magic number 0x00000000".into()),
        (
            "magic",
            with(SUPERBLOCK, &[0xde, 0xad, 0xbe, 0xef]),
            "no GFS2 metadata: magic number 0xdeadbeef".into(),
        ),
        (
            "kind",
            with(SUPERBLOCK + 4, &[0, 0, 0, 4]),
            "metadata of type 4 where Superblock is expected".into(),
        ),
        ("start", sound[..60_000].to_vec(), "block 128: superblock needs 512 bytes, 0 are there".into()),
        ("half", sound[..1 << 20].to_vec(), "is not one of the filesystem's: the device has 256".into()),
        (
            "root",
            with(root_at, &[0; 4096]),
            format!("block {root}: no GFS2 metadata: magic number 0x00000000"),
        ),
    ];
    for (name, bytes, wanted) in cases {
        std::fs::write(&path, bytes).unwrap();
        let words = complaint(1, &ls);
        println!("{name}: {words}");
        assert!(words.starts_with("quorate: ") && words.contains(&wanted), "{name}: {wanted}: {words}");
    }
}
