//! `quorate fs`: filesystems of the cluster through a node, and images without one.

use super::admin::ask;
use clap::Subcommand;
use quorate::admin::client::Client;
use quorate::admin::protocol::{Command, FileOperation, IO_BYTES_MAX, Reply};
use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// What can be done with filesystems. With `--image` no node, certificate or cluster is needed, and nothing is written.
#[derive(Debug, Subcommand)]
pub(crate) enum Files {
    /// List a directory.
    Ls {
        /// The filesystem's name; left out with --image.
        #[arg(required_unless_present = "image")]
        filesystem: Option<String>,
        /// The path in it.
        #[arg(default_value = "/")]
        path: String,
        /// Read this image or device instead.
        #[arg(long)]
        image: Option<PathBuf>,
    },
    /// Print a file.
    Cat {
        /// FILESYSTEM:PATH, or PATH with --image.
        file: String,
        /// Read this image or device instead.
        #[arg(long)]
        image: Option<PathBuf>,
    },
    /// Copy a file in or out: one of the two is FILESYSTEM:PATH (with --image: `:PATH`, out only).
    Cp {
        /// From here.
        from: String,
        /// To there.
        to: String,
        /// Read this image or device instead.
        #[arg(long)]
        image: Option<PathBuf>,
    },
    /// Write a directory of an image as a tar archive to standard output.
    Tar {
        /// The image or device.
        #[arg(long)]
        image: PathBuf,
        /// The path in it.
        #[arg(default_value = "/")]
        path: String,
    },
    /// Make a directory.
    Mkdir {
        /// FILESYSTEM:PATH.
        path: String,
    },
    /// Remove a file or an empty directory.
    Rm {
        /// FILESYSTEM:PATH.
        path: String,
    },
    /// Make the configured filesystem on its volume. What was on the volume is lost.
    Mkfs {
        /// The filesystem's name in the configuration.
        name: String,
    },
    /// Mount a configured filesystem on this node; or an image, read-only, at a directory.
    Mount {
        /// The filesystem's name in the configuration; with --image the directory.
        name: String,
        /// Mount this image or device instead.
        #[arg(long, requires = "read_only")]
        image: Option<PathBuf>,
        /// Needed with --image.
        #[arg(long)]
        read_only: bool,
    },
    /// Unmount a filesystem on this node.
    Umount {
        /// Its name in the configuration.
        name: String,
    },
    /// Check a filesystem that no node has mounted, or an image. Nothing is changed.
    Fsck {
        /// Its name in the configuration.
        #[arg(required_unless_present = "image")]
        name: Option<String>,
        /// Check this image or device instead.
        #[arg(long)]
        image: Option<PathBuf>,
    },
    /// Take over the filesystem of an image for a cluster. All nodes of its former cluster must be stopped.
    Claim {
        /// The image or device.
        image: PathBuf,
        /// CLUSTER:FILESYSTEM, the new lock table.
        table: String,
        /// Needed: GFS2 keeps no sign of life on disk, so this cannot be checked.
        #[arg(long)]
        all_other_nodes_are_stopped: bool,
    },
    /// Give a claimed filesystem its former lock table back.
    Release {
        /// The image or device.
        image: PathBuf,
        /// Needed, as for claim.
        #[arg(long)]
        all_other_nodes_are_stopped: bool,
    },
}

pub(crate) fn run(files: Files, node: &Path, json: bool) -> Result<u8, Box<dyn Error>> {
    let client = || Client::connect(&node.join("admin.sock"));
    match files {
        Files::Ls { image: Some(image), filesystem, path } => {
            // With an image the first word is the path.
            quorate::rescue::list(&image, filesystem.as_deref().unwrap_or(&path), json)
        }
        Files::Ls { filesystem, path, image: None } => {
            let filesystem = filesystem.ok_or("which filesystem?")?;
            for file in client()?.list(&filesystem, &path)? {
                println!("{:06o} {:>12} {}", file.mode, file.bytes, file.name);
            }
            Ok(0)
        }
        Files::Cat { file, image: Some(image) } => {
            quorate::rescue::cat(&image, &file, &mut io::stdout().lock())
        }
        Files::Cat { file, image: None } => {
            let (filesystem, path) = inside(&file)?;
            copy_out(&mut client()?, filesystem, path, &mut io::stdout().lock())
        }
        Files::Cp { from, to, image: Some(image) } => {
            let path = from.strip_prefix(':').ok_or("the source of a copy out of an image is `:PATH`")?;
            quorate::rescue::cat(&image, path, &mut File::create(&to)?)
        }
        Files::Cp { from, to, image: None } => copy(&mut client()?, &from, &to),
        Files::Tar { image, path } => quorate::rescue::tar(&image, &path, &mut io::stdout()),
        Files::Mkdir { path } => {
            let (filesystem, path) = inside(&path)?;
            client()?.file(filesystem, FileOperation::MakeDir(path.into()))?;
            Ok(0)
        }
        Files::Rm { path } => {
            let (filesystem, path) = inside(&path)?;
            client()?.file(filesystem, FileOperation::Remove(path.into()))?;
            Ok(0)
        }
        Files::Mkfs { name } => ask(Command::Mkfs { name }, node, json),
        Files::Mount { name, image: Some(image), .. } => quorate::rescue::mount(&image, Path::new(&name)),
        Files::Mount { name, image: None, .. } => ask(Command::Mount(name), node, json),
        Files::Umount { name } => ask(Command::Unmount(name), node, json),
        Files::Fsck { image: Some(image), .. } => quorate::rescue::fsck(&image, json),
        Files::Fsck { name, image: None } => ask(Command::Fsck(name.ok_or("which filesystem?")?), node, json),
        Files::Claim { image, table, all_other_nodes_are_stopped } => {
            quorate::rescue::claim(&image, &table, all_other_nodes_are_stopped)
        }
        Files::Release { image, all_other_nodes_are_stopped } => {
            quorate::rescue::release(&image, all_other_nodes_are_stopped)
        }
    }
}

/// `data:/a/b` as filesystem and path.
fn inside(text: &str) -> Result<(&str, &str), String> {
    text.split_once(':').ok_or_else(|| format!("`{text}`: FILESYSTEM:PATH is wanted"))
}

fn copy(client: &mut Client, from: &str, to: &str) -> Result<u8, Box<dyn Error>> {
    match (inside(from), inside(to)) {
        (Ok((filesystem, path)), Err(_)) => copy_out(client, filesystem, path, &mut File::create(to)?),
        (Err(_), Ok((filesystem, path))) => {
            let mut source = File::open(from).map_err(|e| format!("cannot read {from}: {e}"))?;
            client.file(filesystem, write(path, 0, Vec::new(), false))?;
            client.file(filesystem, FileOperation::Truncate { path: path.into(), bytes: 0 })?;
            let mut offset = 0;
            loop {
                let mut data = Vec::new();
                Read::by_ref(&mut source).take(IO_BYTES_MAX as u64).read_to_end(&mut data)?;
                if data.is_empty() {
                    client.file(filesystem, write(path, offset, Vec::new(), true))?;
                    return Ok(0);
                }
                let len = data.len() as u64;
                client.file(filesystem, write(path, offset, data, false))?;
                offset += len;
            }
        }
        _ => Err("one of the two must be FILESYSTEM:PATH".into()),
    }
}

fn write(path: &str, offset: u64, data: Vec<u8>, sync: bool) -> FileOperation {
    FileOperation::Write { path: path.into(), offset: Some(offset), data, sync }
}

fn copy_out(
    client: &mut Client,
    filesystem: &str,
    path: &str,
    to: &mut impl Write,
) -> Result<u8, Box<dyn Error>> {
    let mut offset = 0;
    loop {
        let operation = FileOperation::Read { path: path.into(), offset, len: IO_BYTES_MAX as u32 };
        match client.file(filesystem, operation)? {
            Reply::Data(data) if data.is_empty() => return Ok(0),
            Reply::Data(data) => {
                to.write_all(&data)?;
                offset += data.len() as u64;
            }
            other => return Err(format!("unexpected answer: {other:?}").into()),
        }
    }
}
