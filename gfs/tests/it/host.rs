//! What this host's kernel uses is refused, and the refusal says what and where (R19).

use crate::tools::{TempDir, tool};
use quorate_gfs::host::{Host, HostUse};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A host in a directory: one process with these mounts, and block devices.
struct FakeHost(TempDir);

impl FakeHost {
    fn new(mountinfo: &str) -> Self {
        let it = Self(TempDir::new());
        it.write("proc/7/mountinfo", mountinfo);
        fs::create_dir_all(it.0.path("sys/block")).unwrap();
        it
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn host(&self) -> Host {
        Host::at(self.0.path("proc"), self.0.path("sys"))
    }

    fn image(&self) -> PathBuf {
        let path = self.0.path("image");
        fs::write(&path, "an image").unwrap();
        path
    }
}

#[test]
fn an_image_behind_a_loop_device_is_refused_and_its_mount_is_named() {
    let mounted = FakeHost::new("40 22 7:3 / /srv/web rw - gfs2 /dev/loop3 rw\n");
    let image = mounted.image();
    assert_eq!(mounted.host().check(&image), Ok(()));
    mounted.write("sys/block/loop3/loop/backing_file", image.to_str().unwrap());
    mounted.write("sys/block/loop3/dev", "7:3\n");
    let error = mounted.host().check(&image).unwrap_err();
    assert!(matches!(&error, HostUse::Mounted { at, pid: 7, .. } if at == "/srv/web"), "{error}");
    assert!(error.to_string().ends_with(
        "image is mounted on /srv/web (gfs2) by this host's kernel, as process 7 sees it: unmount it first"
    ));

    let idle = FakeHost::new("40 22 8:1 / / rw - ext4 /dev/sda1 rw\n");
    let image = idle.image();
    idle.write("sys/block/loop3/loop/backing_file", image.to_str().unwrap());
    idle.write("sys/block/loop3/dev", "7:3\n");
    assert_eq!(idle.host().check(&image), Err(HostUse::Held { device: image, holder: "loop3".into() }));
}

#[test]
fn what_stands_on_a_device_is_named_and_its_mount_found() {
    let it = FakeHost::new("40 22 253:0 / /srv/web rw - gfs2 /dev/mapper/vg-web rw\n");
    let image = it.image();
    it.write("sys/block/loop3/loop/backing_file", image.to_str().unwrap());
    it.write("sys/block/loop3/dev", "7:3\n");
    it.write("sys/dev/block/7:3/loop3p1/partition", "1");
    it.write("sys/dev/block/7:3/loop3p1/dev", "259:1");
    it.write("sys/dev/block/259:1/holders/dm-0/dev", "253:0");
    it.write("sys/block/dm-0/dev", "253:0");
    it.write("sys/block/dm-0/dm/name", "vg-web\n");
    let error = it.host().check(&image).unwrap_err();
    assert!(matches!(&error, HostUse::Mounted { at, .. } if at == "/srv/web"), "{error}");
    it.write("proc/7/mountinfo", "");
    assert_eq!(it.host().check(&image), Err(HostUse::Held { device: image, holder: "dm-0 (vg-web)".into() }));
}

#[test]
fn a_missing_device_says_so() {
    let missing = Path::new("/nonexistent/device");
    let error = Host::default().check(missing).unwrap_err();
    assert_eq!(error.to_string(), "/nonexistent/device: No such file or directory (os error 2)");
}

/// The real kernel: whatever block device the root directory, or any other mount, is on.
#[test]
fn a_device_that_is_really_mounted_is_refused() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let device = mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let (major, minor) = left.split(' ').nth(2)?.split_once(':')?;
        let path = PathBuf::from(right.split(' ').nth(1)?);
        let stat = fs::metadata(&path).ok()?;
        let rdev = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
        (stat.rdev() == rdev && stat.rdev() != 0).then_some(path)
    });
    let Some(device) = device else { return };
    let error = Host::default().check(&device).unwrap_err();
    assert!(matches!(error, HostUse::Mounted { .. }), "{error}");
}

#[test]
fn an_image_that_is_really_a_loop_device_is_refused() {
    let test = "an_image_that_is_really_a_loop_device_is_refused";
    let Some(losetup) = tool(test, "losetup") else { return };
    let dir = TempDir::new();
    let image = dir.path("image");
    fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let made = std::process::Command::new(&losetup).args(["-f", "--show"]).arg(&image).output().unwrap();
    if !made.status.success() {
        eprintln!("SKIP: {test}: no loop device can be had here");
        return;
    }
    let device = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let found = Host::default().check(&image);
    let free = Host::default().check(Path::new(&device));
    std::process::Command::new(&losetup).arg("-d").arg(&device).status().unwrap();
    assert!(matches!(found, Err(HostUse::Held { .. })), "{found:?}");
    assert_eq!(free, Ok(()), "the loop device itself is used by nobody");
    assert_eq!(Host::default().check(&image), Ok(()));
}
