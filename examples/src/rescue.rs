//! Images and devices without a cluster (R19): looking, copying out, archiving, mounting read-only, claiming.

use quorate_gfs::claim;
use quorate_gfs::face::{Filesystem, Ino, S_IFDIR, S_IFMT};
use quorate_gfs::fuse::{MountOptions, Session, SessionOptions};
use quorate_gfs::host::Host;
use quorate_gfs::reader::Inode;
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use quorate_membership::driver::TokioRuntime;
use serde_json::json;
use std::error::Error;
use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

type Outcome = Result<u8, Box<dyn Error>>;

/// How much is read at once.
const READ_BYTES: u32 = 1 << 20;

/// Exit code of a command that did what it could, but found damage.
const DAMAGED: u8 = 4;

fn block_on<T>(work: impl Future<Output = Result<T, Box<dyn Error>>>) -> Result<T, Box<dyn Error>> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

fn device(image: &Path, read_only: bool) -> Result<Device, Box<dyn Error>> {
    let options = FileOptions { read_only, ..FileOptions::server() };
    Ok(Device::new(FileDevice::open(image, options)?))
}

/// Opens the image read-only, its journals replayed into memory.
async fn open(image: &Path) -> Result<RescueFs, Box<dyn Error>> {
    let fs = RescueFs::open(device(image, true)?, RescueOptions::default())
        .await
        .map_err(|e| format!("{}: {e}", image.display()))?;
    Ok(fs)
}

async fn find(fs: &RescueFs, path: &str) -> Result<Inode, Box<dyn Error>> {
    Ok(fs.resolve(path.as_bytes(), true).await.map_err(|e| format!("{path}: {e}"))?)
}

/// Lists a directory of an image.
///
/// # Errors
/// The image or the path cannot be read.
pub fn list(image: &Path, path: &str, json: bool) -> Outcome {
    block_on(async {
        let fs = open(image).await?;
        let inode = find(&fs, path).await?;
        let attr = fs.attr(&inode);
        let mut rows = Vec::new();
        if attr.mode & S_IFMT == S_IFDIR {
            for entry in fs.reader().all_entries(&inode).await? {
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let found = fs.inode(Ino(entry.inum.addr.0)).await?;
                rows.push((String::from_utf8_lossy(&entry.name).into_owned(), fs.attr(&found)));
            }
        } else {
            rows.push((path.to_owned(), attr));
        }
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, attr) in rows {
            if json {
                println!(
                    "{}",
                    json!({ "name": name, "mode": attr.mode, "bytes": attr.size, "inode": attr.ino.0 })
                );
            } else {
                println!("{:06o} {:>5} {:>5} {:>12} {name}", attr.mode, attr.uid, attr.gid, attr.size);
            }
        }
        Ok(0)
    })
}

/// Writes a file of an image to `to`.
///
/// # Errors
/// The image or the path cannot be read, or `to` cannot be written.
pub fn cat(image: &Path, path: &str, to: &mut impl Write) -> Outcome {
    block_on(async {
        let fs = open(image).await?;
        let inode = find(&fs, path).await?;
        let ino = fs.attr(&inode).ino;
        let mut offset = 0;
        loop {
            let data = fs.read(ino, offset, READ_BYTES).await.map_err(|e| format!("{path}: {e}"))?;
            if data.is_empty() {
                return Ok(0);
            }
            to.write_all(&data)?;
            offset += data.len() as u64;
        }
    })
}

/// Writes a directory of an image as a tar archive. What cannot be read is said, and the archive goes on.
///
/// # Errors
/// The image or the path cannot be read, or `to` cannot be written.
pub fn tar(image: &Path, path: &str, to: &mut (impl Write + Send)) -> Outcome {
    block_on(async {
        let fs = open(image).await?;
        let inode = find(&fs, path).await?;
        let prefix = path.trim_matches('/');
        let report = fs.tar(&inode, prefix.as_bytes(), to).await?;
        for (path, error) in &report.damaged {
            eprintln!("{}: {error}", String::from_utf8_lossy(path));
        }
        Ok(if report.damaged.is_empty() { 0 } else { DAMAGED })
    })
}

/// Mounts an image read-only and serves it until it is unmounted or the process is told to end.
///
/// # Errors
/// The image cannot be read, or FUSE may not be used.
pub fn mount(image: &Path, at: &Path) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let fs = Arc::new(open(image).await?);
        let mut options = MountOptions::new(at, image.display().to_string());
        options.read_only = true;
        let session =
            Session::mount(fs, Arc::new(TokioRuntime::current()), &options, SessionOptions::local())?;
        println!("{} is mounted read-only on {}", image.display(), at.display());
        tokio::select! {
            end = session.ended() => tracing::info!(target: "quorate", "{end:?}"),
            signal = crate::node::stop_signal() => {
                signal?;
                let soon = quorate_membership::driver::boottime() + std::time::Duration::from_secs(5);
                session.unmount(quorate_gfs::fuse::UnmountMode::Clean, soon).await?;
            }
        }
        Ok(0)
    })
}

/// Takes over the filesystem of an image for a cluster. Refused while this host's kernel uses the device, or anybody has
/// reservation keys on it; whether another host does without keys cannot be seen: that is what `others_stopped` says.
///
/// # Errors
/// It cannot be claimed; nothing was changed.
pub fn claim(image: &Path, table: &str, others_stopped: bool) -> Outcome {
    block_on(async {
        Host::default().check(image)?;
        let done = claim::claim(&device(image, false)?, table, others_stopped).await?;
        println!(
            "{}: was {} {}, is {} {}",
            image.display(),
            done.before.0,
            done.before.1,
            done.after.0,
            done.after.1
        );
        Ok(0)
    })
}

/// Gives a claimed filesystem its former protocol and table back.
///
/// # Errors
/// It was not claimed; nothing was changed.
pub fn release(image: &Path, others_stopped: bool) -> Outcome {
    block_on(async {
        Host::default().check(image)?;
        let done = claim::release(&device(image, false)?, others_stopped).await?;
        println!(
            "{}: was {} {}, is {} {}",
            image.display(),
            done.before.0,
            done.before.1,
            done.after.0,
            done.after.1
        );
        Ok(0)
    })
}

/// Checks the filesystem of an image without changing anything. Exit code 0 if it is clean, 4 if not.
///
/// # Errors
/// The image holds no filesystem that can be read.
pub fn fsck(image: &Path, json: bool) -> Outcome {
    block_on(async {
        let found = quorate_gfs::fsck::fsck(device(image, true)?).await;
        let report = found.map_err(|e| format!("{}: {e}", image.display()))?;
        let problems: Vec<String> = report.problems.iter().map(ToString::to_string).collect();
        if json {
            println!(
                "{}",
                json!({ "clean": report.is_clean(), "inodes": report.inodes, "problems": problems })
            );
        } else {
            for problem in &problems {
                println!("{problem}");
            }
            let verdict = if report.is_clean() { "clean" } else { "NOT clean" };
            println!(
                "{}: {verdict}, {} inodes, {} resource groups",
                image.display(),
                report.inodes,
                report.rgrps
            );
        }
        Ok(if report.is_clean() { 0 } else { DAMAGED })
    })
}
