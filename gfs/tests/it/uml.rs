//! The kernel's own gfs2 as judge, in User-Mode Linux: what it left dirty we replay, what we left dirty it replays.
//!
//! The guest's root is this host's, read-only; its first process is a script that loads gfs2 (with this test binary, for
//! want of a modprobe), does the test's job, and says so on the console. Then the guest is killed: nothing is unmounted
//! that the job did not unmount.

use crate::fs::harness::{Disk, Node, User, formatted_alone, judge};
use crate::tools::{TempDir, block_on, mkfs_gfs2, sparse, tool};
use quorate_dlm::local::LocalManager;
use quorate_gfs::face::{Filesystem, Ino};
use quorate_gfs::fs::MountOptions;
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

const ROLE: &str = "QUORATE_UML_ROLE";
/// How long a guest may take.
const CEILING: Duration = Duration::from_secs(60);

/// The guest's first process.
const INIT: &str = r#"#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
for word in $(cat /proc/cmdline); do case $word in share=*|mods=*|it=*) eval "$word";; esac; done
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /run
mount -t tmpfs tmp /mnt
mount -t hostfs none $share -o $share
exec >$share/log 2>&1
QUORATE_UML_ROLE=$mods $it --exact uml::role --nocapture
mkdir /mnt/a /mnt/b
. $share/job
dmesg | grep -i gfs2
echo 'uml: done' >/dev/console
while :; do read line </dev/null; wait; sleep 1000; done
"#;

/// Not a test by itself: loads gfs2 in the guest.
#[test]
fn role() {
    let Some(modules) = std::env::var_os(ROLE).map(PathBuf::from) else { return };
    let table = std::fs::read_to_string(modules.join("modules.dep")).unwrap();
    let line = table.lines().find(|line| line.split(':').next().is_some_and(|m| m.ends_with("/gfs2.ko")));
    let (module, needed) = line.expect("the guest's kernel has gfs2").split_once(':').unwrap();
    // Whom others need comes last in the list.
    for path in needed.split_whitespace().rev().chain([module]) {
        load(&modules.join(path));
    }
}

#[expect(unsafe_code, reason = "no safe call loads a module")]
fn load(module: &Path) {
    use std::os::fd::AsRawFd;
    let file = std::fs::File::open(module).unwrap();
    // SAFETY: an open file, an empty string that ends with zero, no flags; the kernel checks the rest.
    let done = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    let error = std::io::Error::last_os_error();
    assert!(done == 0 || error.raw_os_error() == Some(libc::EEXIST), "{}: {error}", module.display());
    println!("loaded {}", module.display());
}

/// Runs a job in a guest with these disks; what it printed. `None` if there is no guest to be had.
fn guest(test: &str, dir: &TempDir, disks: &[&Path], job: &str) -> Option<String> {
    let kernel = tool(test, "linux.uml")?;
    let modules = std::fs::read_dir("/usr/lib/uml/modules").unwrap().next().unwrap().unwrap().path();
    let share = dir.path("share");
    std::fs::create_dir_all(&share).unwrap();
    let init = share.join("init");
    std::fs::write(&init, INIT).unwrap();
    std::fs::write(share.join("job"), job).unwrap();
    let mode = <std::fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    std::fs::set_permissions(&init, mode).unwrap();
    let mut command = Command::new(kernel);
    command.args(["mem=256M", "rootfstype=hostfs", "rootflags=/", "ro", "noreboot", "quiet"]);
    command.args(["con=null", "con0=null,fd:1", "ssl=null"]);
    command.arg(format!("umid=quorate{}", std::process::id()));
    command.arg(format!("uml_dir={}", dir.path("umid").display()));
    for (n, disk) in disks.iter().enumerate() {
        command.arg(format!("ubd{n}={}", disk.display()));
    }
    command.arg(format!("init={}", init.display()));
    command.arg(format!("share={}", share.display())).arg(format!("mods={}", modules.display()));
    command.arg(format!("it={}", std::env::current_exe().unwrap().display()));
    // Its processes are a group of their own, which is ended as a whole.
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let group = rustix::process::Pid::from_child(&child);
    let kill = move || {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    };
    let (finished, ended) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let late = ended.recv_timeout(CEILING) == Err(RecvTimeoutError::Timeout);
        kill();
        late
    });
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let told = lines.map_while(Result::ok).any(|line| line.contains("uml: done"));
    drop(finished);
    let late = watchdog.join().unwrap();
    child.wait().unwrap();
    let log = std::fs::read_to_string(share.join("log")).unwrap_or_default();
    assert!(told && !late, "{test}: the guest did not finish:\n{log}");
    Some(log)
}

fn open_read_only(image: &Path) -> Device {
    let options = FileOptions { read_only: true, ..FileOptions::server() };
    Device::new(FileDevice::open(image, options).unwrap())
}

/// Every file below a directory, by path.
async fn files(fs: &dyn Filesystem, dir: Ino, at: &str, out: &mut BTreeMap<String, Vec<u8>>) {
    let mut cookie = 0;
    loop {
        let entries = fs.readdir(dir, cookie, 100).await.unwrap();
        let Some(last) = entries.last() else { return };
        cookie = last.cookie;
        for entry in entries {
            let name = String::from_utf8(entry.name.clone()).unwrap();
            let path = format!("{at}/{name}");
            if name == "." || name == ".." {
                continue;
            }
            let attr = fs.lookup(crate::fs::harness::cred(), dir, entry.name).await.unwrap().attr;
            match entry.kind {
                quorate_gfs::face::S_IFDIR => Box::pin(files(fs, attr.ino, &path, out)).await,
                quorate_gfs::face::S_IFREG => {
                    out.insert(path, fs.read(attr.ino, 0, attr.size as u32).await.unwrap());
                }
                _ => {
                    out.insert(path, fs.readlink(attr.ino).await.unwrap());
                }
            }
        }
    }
}

#[test]
fn a_journal_that_the_kernel_left_dirty_is_replayed_in_memory_and_in_place() {
    let test = "a_journal_that_the_kernel_left_dirty_is_replayed_in_memory_and_in_place";
    let Some(mkfs) = tool(test, "mkfs.gfs2") else { return };
    let dir = TempDir::new();
    let image = dir.path("image");
    sparse(&image, 128 << 20);
    mkfs_gfs2(&mkfs, &image, &["-p", "lock_nolock", "-j", "1", "-J", "8"]);
    let job = r#"
mount -t gfs2 /dev/ubda /mnt/a && echo mounted
cd /mnt/a
mkdir dir many
i=0; while [ $i -lt 400 ]; do echo "file number $i" > many/f$i; i=$((i+1)); done
head -c 3000000 /dev/zero | tr '\0' x > dir/large
head -c 100 /dev/zero | tr '\0' y > dir/small
ln -s dir/large link
sync
i=0; while [ $i -lt 400 ]; do rm many/f$i; i=$((i+7)); done
mv dir/small many/moved
echo changed > many/f1
sync many/f1 many
"#;
    let Some(log) = guest(test, &dir, &[&image], job) else { return };
    assert!(log.contains("mounted"), "{log}");
    let mut expected = BTreeMap::new();
    for i in (0..400).filter(|i| i % 7 != 0) {
        expected.insert(format!("/many/f{i}"), format!("file number {i}\n").into_bytes());
    }
    expected.insert("/many/f1".into(), b"changed\n".to_vec());
    expected.insert("/many/moved".into(), vec![b'y'; 100]);
    expected.insert("/dir/large".into(), vec![b'x'; 3_000_000]);
    expected.insert("/link".into(), b"dir/large".to_vec());

    let before = std::fs::read(&image).unwrap();
    let rescue = block_on(RescueFs::open(open_read_only(&image), RescueOptions::default())).unwrap();
    let journal = &rescue.journals()[0];
    assert!(journal.error.is_none() && 0 < journal.blocks, "the journal is dirty: {journal:?}");
    println!("the kernel's journal: {} blocks replayed", journal.blocks);
    let mut found = BTreeMap::new();
    block_on(files(&rescue, rescue.root(), "", &mut found));
    assert!(found == expected, "{:?} for {:?}", found.keys(), expected.keys());
    drop(rescue);
    assert!(std::fs::read(&image).unwrap() == before, "the device is as it was, byte for byte");

    // And read-write, in place.
    crate::fs::harness::run(async {
        let disk = Disk::new(before);
        let node = Node::mount(&disk, &LocalManager::new(), 0).await;
        let mut found = BTreeMap::new();
        files(&node.gfs, node.gfs.root(), "", &mut found).await;
        assert!(found == expected);
        let user = User(&node.gfs);
        let ino = user.create(user.root(), "ours").await.unwrap();
        user.write(ino, 0, b"added").await.unwrap();
        node.gfs.unmount().await.unwrap();
        judge(test, &disk.memory.bytes());
    });
}

#[test]
fn the_kernel_reads_what_we_wrote_and_replays_our_journal() {
    let test = "the_kernel_reads_what_we_wrote_and_replays_our_journal";
    if tool(test, "linux.uml").is_none() {
        return;
    }
    let dir = TempDir::new();
    let (crashed, clean) = (dir.path("crashed"), dir.path("clean"));
    let expected = crate::fs::harness::run(async {
        let disk = formatted_alone(128 << 20).await;
        let node = Node::mount_with(&disk, &LocalManager::new(), MountOptions::new(0)).await;
        let user = User(&node.gfs);
        let many = user.mkdir(user.root(), "many").await.unwrap();
        // A hashed directory, of several leaves.
        for i in 0..700 {
            let ino = user.create(many, &format!("a name of some length, number {i}")).await.unwrap();
            user.write(ino, 0, format!("contents {i}").as_bytes()).await.unwrap();
            node.gfs.forget(ino, 1);
        }
        let large = user.create(user.root(), "large").await.unwrap();
        let pattern: Vec<u8> = (0..5_000_000_u32).map(|n| (n / 7 % 251) as u8).collect();
        user.write(large, 0, &pattern).await.unwrap();
        // Sparse, with a tree of three levels.
        let sparse = user.create(user.root(), "sparse").await.unwrap();
        user.write(sparse, 1 << 30, b"far out").await.unwrap();
        let cred = crate::fs::harness::cred();
        node.gfs.symlink(cred.clone(), user.root(), b"link".to_vec(), b"many".to_vec()).await.unwrap();
        node.gfs.link(large, many, b"hard".to_vec()).await.unwrap();
        node.gfs.sync().await.unwrap();
        for i in (0..700).step_by(5) {
            node.gfs.unlink(many, format!("a name of some length, number {i}").into()).await.unwrap();
        }
        let mut expected = BTreeMap::new();
        for i in (0..700).filter(|i| i % 5 != 0) {
            let name = format!("many/a name of some length, number {i}");
            expected.insert(name, format!("contents {i}").into_bytes());
        }
        expected.insert("large".into(), pattern.clone());
        expected.insert("many/hard".into(), pattern);
        node.gfs.sync().await.unwrap();
        std::fs::write(&crashed, disk.memory.crashed(None)).unwrap();
        node.gfs.unmount().await.unwrap();
        std::fs::write(&clean, disk.memory.bytes()).unwrap();
        expected
    });
    let job = "
mount -t gfs2 /dev/ubda /mnt/a && echo mounted a
mount -t gfs2 /dev/ubdb /mnt/b && echo mounted b
for d in a b; do
  mkdir $share/$d; cd /mnt/$d; cp -r large many $share/$d
  readlink link; tail -c 7 sparse; echo; stat -c 'links %h' large
  echo 'from the kernel' > kernel; cd /
  umount /mnt/$d && echo unmounted $d
done
";
    let Some(log) = guest(test, &dir, &[&crashed, &clean], job) else { return };
    for line in ["mounted a", "mounted b", "unmounted a", "unmounted b", "many", "far out", "links 2"] {
        assert!(log.contains(line), "{line} is missing:\n{log}");
    }
    assert!(log.contains("jid=0: Replaying journal"), "our journal was dirty:\n{log}");
    for side in ["a", "b"] {
        let copy = dir.path("share").join(side);
        for (path, data) in &expected {
            let found = std::fs::read(copy.join(path)).unwrap_or_else(|e| panic!("{side}: {path}: {e}"));
            assert!(found == *data, "{side}: {path}");
        }
        assert_eq!(std::fs::read_dir(copy.join("many")).unwrap().count(), expected.len() - 1);
    }
    // What was unlinked but not yet deleted at the crash is an orphan, left to whoever mounts it next; the kernel leaves
    // them until it looks for space.
    let disk = Disk::new(std::fs::read(&crashed).unwrap());
    crate::fs::harness::run(async {
        let node = Node::mount_with(&disk, &LocalManager::new(), MountOptions::new(0)).await;
        node.gfs.unmount().await.unwrap();
    });
    std::fs::write(&crashed, disk.memory.bytes()).unwrap();
    for image in [&crashed, &clean] {
        judge(test, &std::fs::read(image).unwrap());
        let rescue = block_on(RescueFs::open(open_read_only(image), RescueOptions::default())).unwrap();
        let mut found = BTreeMap::new();
        let many = block_on(rescue.lookup(crate::fs::harness::cred(), rescue.root(), b"kernel".to_vec()));
        found.insert("kernel", block_on(rescue.read(many.unwrap().attr.ino, 0, 100)).unwrap());
        assert_eq!(found["kernel"], b"from the kernel\n");
    }
}
