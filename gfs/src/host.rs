//! Whether this host's kernel uses a device already: mounts, devices on top, an exclusive opener, and whether anybody has
//! registered a reservation key on it (R19).
//!
//! Other hosts cannot be seen from here, but for such keys: who claims a filesystem is told so.

mod keys;

use rustix::fs::{Dev, FileType, Mode, OFlags, major, minor};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// How deep devices may stand on devices.
const DEPTH_MAX: u32 = 16;

/// What uses a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostUse {
    /// It is mounted.
    #[error("{} is mounted on {at} ({filesystem}) by this host's kernel, as process {pid} sees it: unmount it first", .device.display())]
    Mounted {
        /// What was asked about.
        device: PathBuf,
        /// The mount point.
        at: String,
        /// Type of the filesystem.
        filesystem: String,
        /// A process in whose mount namespace it is.
        pid: u32,
    },
    /// Another device stands on it.
    #[error("{} is in use by {holder} on this host: stop that first", .device.display())]
    Held {
        /// What was asked about.
        device: PathBuf,
        /// The device on top: its kernel name, and its own name if it has one.
        holder: String,
    },
    /// It is swap space.
    #[error("{} is swap space of this host", .device.display())]
    Swap {
        /// What was asked about.
        device: PathBuf,
    },
    /// Somebody in the kernel, or another process, has it for itself.
    #[error("{} is held exclusively by this host's kernel or by another process", .device.display())]
    Exclusive {
        /// What was asked about.
        device: PathBuf,
    },
    /// Somebody, on whatever host, has registered reservation keys on it (SCSI or NVMe).
    #[error("{} has reservation keys registered on it ({}): another cluster or host uses it; have it unregister them first", .device.display(), .keys.iter().map(|k| format!("{k:#x}")).collect::<Vec<_>>().join(", "))]
    Reserved {
        /// What was asked about.
        device: PathBuf,
        /// The keys, each once.
        keys: BTreeSet<u64>,
    },
    /// It cannot be looked at.
    #[error("{}: {error}", .device.display())]
    Unknown {
        /// What was asked about.
        device: PathBuf,
        /// Why.
        error: Errno,
    },
}

/// Where to look; another root in tests.
#[derive(Clone, Debug)]
pub struct Host {
    proc: PathBuf,
    sys: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { proc: "/proc".into(), sys: "/sys".into() }
    }
}

/// A device number as the kernel writes it.
fn number(dev: Dev) -> String {
    format!("{}:{}", major(dev), minor(dev))
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

fn text(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

impl Host {
    /// A host whose `/proc` and `/sys` stand elsewhere.
    #[must_use]
    pub fn at(proc: impl Into<PathBuf>, sys: impl Into<PathBuf>) -> Self {
        Self { proc: proc.into(), sys: sys.into() }
    }

    /// Refuses a device, or an image in a file, that this host's kernel uses, and a device on which keys are registered.
    ///
    /// # Errors
    /// See [`HostUse`]; what and where.
    pub fn check(&self, device: &Path) -> Result<(), HostUse> {
        let unknown = |error| HostUse::Unknown { device: device.into(), error };
        let stat = rustix::fs::stat(device).map_err(unknown)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut numbers = BTreeSet::new();
        if kind == FileType::BlockDevice {
            self.check_number(device, &number(stat.st_rdev), &mut numbers, 0)?;
        } else {
            let real = std::fs::canonicalize(device).unwrap_or_else(|_| device.into());
            for name in names_in(&self.sys.join("block")) {
                let dir = self.sys.join("block").join(&name);
                let backing = text(dir.join("loop/backing_file"));
                if backing.is_some_and(|b| Path::new(&b) == real || Path::new(&b) == device)
                    && let Some(number) = text(dir.join("dev"))
                {
                    // Mounted says more than that there is a loop device.
                    self.check_number(device, &number, &mut numbers, 0)?;
                    return Err(HostUse::Held { device: device.into(), holder: name });
                }
            }
        }
        if kind == FileType::BlockDevice {
            match rustix::fs::open(device, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
                Ok(open) => {
                    let keys = BTreeSet::from_iter(keys::registered(open));
                    if !keys.is_empty() {
                        return Err(HostUse::Reserved { device: device.into(), keys });
                    }
                }
                Err(Errno::BUSY) => return Err(HostUse::Exclusive { device: device.into() }),
                Err(error) => return Err(unknown(error)),
            }
        }
        Ok(())
    }

    /// A block device with its partitions, and what stands on them.
    fn check_number(
        &self,
        device: &Path,
        number: &str,
        seen: &mut BTreeSet<String>,
        depth: u32,
    ) -> Result<(), HostUse> {
        if DEPTH_MAX < depth || !seen.insert(number.to_owned()) {
            return Ok(());
        }
        self.check_mounts(device, number)?;
        let dir = self.sys.join("dev/block").join(number);
        let holders = names_in(&dir.join("holders"));
        let top = |holder: &str| self.sys.join("block").join(holder);
        // A mount further up says more than that there is something on top.
        for number in holders.iter().filter_map(|holder| text(top(holder).join("dev"))) {
            self.check_number(device, &number, seen, depth + 1)?;
        }
        if let Some(holder) = holders.first() {
            let name = text(top(holder).join("dm/name"));
            let holder = name.map_or_else(|| holder.clone(), |name| format!("{holder} ({name})"));
            return Err(HostUse::Held { device: device.into(), holder });
        }
        for part in names_in(&dir) {
            if dir.join(&part).join("partition").exists()
                && let Some(number) = text(dir.join(&part).join("dev"))
            {
                self.check_number(device, &number, seen, depth + 1)?;
            }
        }
        Ok(())
    }

    /// The mounts of every namespace that a process of this host is in, and swap space.
    fn check_mounts(&self, device: &Path, number: &str) -> Result<(), HostUse> {
        let mut pids: Vec<u32> = names_in(&self.proc).iter().filter_map(|n| n.parse().ok()).collect();
        pids.sort_unstable();
        let mut namespaces = BTreeSet::new();
        for pid in pids {
            let dir = self.proc.join(pid.to_string());
            // Who is in the same namespace sees the same.
            if let Ok(namespace) = std::fs::read_link(dir.join("ns/mnt"))
                && !namespaces.insert(namespace)
            {
                continue;
            }
            let Ok(mounts) = std::fs::read(dir.join("mountinfo")) else { continue };
            if let Some((at, filesystem)) = find_mount(&String::from_utf8_lossy(&mounts), number) {
                return Err(HostUse::Mounted { device: device.into(), at, filesystem, pid });
            }
        }
        let swaps = text(self.proc.join("swaps")).unwrap_or_default();
        let swap = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        let same = |path: &str| {
            rustix::fs::stat(path).is_ok_and(|s| {
                FileType::from_raw_mode(s.st_mode) == FileType::BlockDevice
                    && self::number(s.st_rdev) == number
            })
        };
        if swap.into_iter().any(same) {
            return Err(HostUse::Swap { device: device.into() });
        }
        Ok(())
    }
}

/// Mount point and type of the mount of a device (`proc(5)`, mountinfo).
fn find_mount(mountinfo: &str, number: &str) -> Option<(String, String)> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mut fields = left.split(' ');
        if fields.nth(2)? != number {
            return None;
        }
        let at = fields.nth(1)?.replace("\\040", " ");
        Some((at, right.split(' ').next()?.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_the_number_of_its_device() {
        let text = "22 1 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw\n\
                    40 22 8:17 / /srv/my\\040web rw - gfs2 /dev/sdb1 rw,localflocks\nbroken line\n";
        assert_eq!(find_mount(text, "8:17"), Some(("/srv/my web".into(), "gfs2".into())));
        assert_eq!(find_mount(text, "8:1"), Some(("/".into(), "ext4".into())));
        assert_eq!(find_mount(text, "8:18"), None);
    }
}
