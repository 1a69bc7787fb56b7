//! Images opened read-only, without node or kernel.

use crate::tools::{TempDir, block_on, mkfs_gfs2, run, sparse, tool};
use quorate_gfs::face::{Credentials, Filesystem, Ino};
use quorate_gfs::rescue::{RescueFs, RescueOptions};
use quorate_gnbd::{Device, FileDevice, FileOptions};
use std::path::Path;

fn open(path: &Path) -> RescueFs {
    let options = FileOptions { read_only: true, ..FileOptions::server() };
    let device = Device::new(FileDevice::open(path, options).unwrap());
    block_on(RescueFs::open(device, RescueOptions::default())).unwrap()
}

#[test]
fn fresh_images_of_every_block_size_and_format_open() {
    let test = "fresh_images_of_every_block_size_and_format_open";
    let Some(mkfs) = tool(test, "mkfs.gfs2") else { return };
    for (block, format) in [(512, 1802), (1024, 1801), (2048, 1802), (4096, 1801), (4096, 1802)] {
        let dir = TempDir::new();
        let image = dir.path("image");
        sparse(&image, 96 << 20);
        let (block_text, options) = (block.to_string(), format!("format={format}"));
        mkfs_gfs2(
            &mkfs,
            &image,
            &["-j", "2", "-J", "8", "-b", &block_text, "-o", &options, "-p", "lock_nolock"],
        );
        let before = std::fs::read(&image).unwrap();
        let fs = open(&image);
        assert_eq!(fs.reader().superblock().format, format);
        assert_eq!(fs.journals().len(), 2);
        assert!(fs.journals().iter().all(|journal| journal.blocks == 0 && journal.error.is_none()));
        let root = block_on(fs.getattr(fs.root())).unwrap();
        assert_eq!((root.attr.mode, root.attr.nlink), (0o040_755, 2));
        let names: Vec<_> =
            block_on(fs.readdir(fs.root(), 0, 10)).unwrap().into_iter().map(|e| e.name).collect();
        assert_eq!(names, [b".".to_vec(), b"..".to_vec()]);
        let statfs = block_on(fs.statfs()).unwrap();
        assert_eq!(statfs.block_size, block);
        assert!(0 < statfs.free && statfs.free < statfs.blocks);
        // The system directory has files of all sizes; hashed at 512 bytes a block.
        let master = Ino(fs.reader().superblock().master.addr.0);
        let find = |dir, name: &str| block_on(fs.lookup(Credentials::default(), dir, name.into())).unwrap();
        let jindex = find(master, "jindex").attr.ino;
        let journal = find(jindex, "journal1").attr;
        assert_eq!(journal.size, 8 << 20);
        let bytes = block_on(fs.read(journal.ino, 4 << 20, block)).unwrap();
        assert_eq!(bytes[..8], [1, 0x16, 0x19, 0x70, 0, 0, 0, 8]);
        drop(fs);
        assert_eq!(std::fs::read(&image).unwrap(), before);
    }
}

/// For an image that a kernel filled: `QUORATE_GFS_IMAGE=IMAGE QUORATE_GFS_TAR=OUTPUT` writes it as an archive.
#[test]
fn a_kernels_image_becomes_an_archive() {
    let (Ok(image), Ok(output)) = (std::env::var("QUORATE_GFS_IMAGE"), std::env::var("QUORATE_GFS_TAR"))
    else {
        return;
    };
    let fs = open(Path::new(&image));
    for journal in fs.journals() {
        eprintln!("journal {}: {} blocks", journal.jid, journal.blocks);
    }
    let root = block_on(fs.resolve(b"/", true)).unwrap();
    let mut file = std::fs::File::create(&output).unwrap();
    let report = block_on(fs.tar(&root, b"", &mut file)).unwrap();
    eprintln!("{report:?}");
    assert_eq!(report.damaged, []);
    let Some(tar) = tool("a_kernels_image_becomes_an_archive", "tar") else { return };
    let (status, text) = run(&tar, &["tvf", &output]);
    assert!(status.status.success(), "{text}");
}
