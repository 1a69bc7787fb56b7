//! Blocks by number, with what journals hold laid over them, and a small cache of metadata.

use super::ReadError;
use crate::format::{
    BlockNo, BlockSize, FormatError, MAGIC, MetaHeader, MetaType, SUPERBLOCK_OFFSET_BYTES, Superblock,
};
use quorate_gnbd::{BlockDevice, Buf};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// How many metadata blocks are kept. A walk over a tree or a directory reuses the last few again and again.
const CACHE_BLOCKS_MAX: usize = 1024;
/// The superblock is read with this many bytes: the greatest block size of any device.
const SUPERBLOCK_READ_BYTES: usize = 65536;

/// A newer copy of a block, in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalCopy {
    /// Where the copy is.
    pub at: BlockNo,
    /// Its magic number was blanked, because it is data that looks like metadata.
    pub escaped: bool,
}

/// A filesystem on a device that nobody changes meanwhile.
#[derive(Debug)]
pub struct Reader<D> {
    device: D,
    superblock: Superblock,
    device_blocks: u64,
    overlay: BTreeMap<BlockNo, JournalCopy>,
    cache: Mutex<BTreeMap<BlockNo, Arc<Vec<u8>>>>,
}

impl<D: BlockDevice> Reader<D> {
    /// Reads the superblock.
    ///
    /// # Errors
    /// The device fails, or holds no GFS2 that can be used.
    pub async fn open(device: D) -> Result<Self, ReadError> {
        let geometry = device.geometry();
        let at = BlockNo(SUPERBLOCK_OFFSET_BYTES / 512);
        let format = |source| ReadError::Format { block: at, source };
        let available = geometry.size_bytes.saturating_sub(SUPERBLOCK_OFFSET_BYTES);
        let block = u64::from(geometry.block_bytes);
        let len = available.min(SUPERBLOCK_READ_BYTES as u64) / block * block;
        // Small first: most filesystems have blocks of 4096 bytes, some images are not longer than that.
        let len = len.min(4096_u64.next_multiple_of(block)) as usize;
        if len == 0 {
            let source = FormatError::TooShort { what: "superblock", need: 512, have: 0 };
            return Err(format(source));
        }
        let bytes = device.read(SUPERBLOCK_OFFSET_BYTES, Buf::zeroed(len)).await?;
        let superblock = Superblock::decode(&bytes).map_err(format)?;
        let size = superblock.block_size;
        if !size.bytes().is_multiple_of(geometry.block_bytes) {
            let source = FormatError::Field {
                what: "block size below that of the device",
                value: u64::from(size.bytes()),
            };
            return Err(format(source));
        }
        Ok(Self {
            device_blocks: geometry.size_bytes >> size.shift(),
            device,
            superblock,
            overlay: BTreeMap::new(),
            cache: Mutex::default(),
        })
    }

    /// The superblock as it was at `open`.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The block size.
    #[must_use]
    pub fn size(&self) -> BlockSize {
        self.superblock.block_size
    }

    /// Whole blocks of the device.
    #[must_use]
    pub fn device_blocks(&self) -> u64 {
        self.device_blocks
    }

    /// What it reads from.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Lays copies over the device; of two copies of one block the later call's counts.
    pub fn lay_over(&mut self, copies: impl IntoIterator<Item = (BlockNo, JournalCopy)>) {
        self.overlay.extend(copies);
        self.forget();
    }

    /// Drops what is cached, for a caller that has written to the device.
    pub fn forget(&self) {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether a pointer can name this block: on the device, and behind the superblock.
    #[must_use]
    pub fn holds(&self, block: BlockNo) -> bool {
        self.size().superblock() < block && block.0 < self.device_blocks
    }

    pub(crate) fn check(&self, block: BlockNo, count: u64) -> Result<(), ReadError> {
        let last = block.checked_add(count.saturating_sub(1));
        if self.holds(block) && last.is_some_and(|last| self.holds(last)) {
            return Ok(());
        }
        Err(ReadError::Block { block, device_blocks: self.device_blocks })
    }

    /// Reads blocks from the device as they are there, whatever journals hold.
    ///
    /// # Errors
    /// The device fails, or they are not on it.
    pub async fn raw(&self, first: BlockNo, count: usize) -> Result<Buf, ReadError> {
        self.check(first, count as u64)?;
        let offset = first.0 << self.size().shift();
        Ok(self.device.read(offset, Buf::zeroed(count << self.size().shift())).await?)
    }

    /// Reads data blocks in one go, and those that a journal has a newer copy of from there.
    ///
    /// # Errors
    /// The device fails, or they are not on it.
    pub async fn run(&self, first: BlockNo, count: usize) -> Result<Buf, ReadError> {
        let mut bytes = self.raw(first, count).await?;
        let end = BlockNo(first.0 + count as u64);
        for (block, copy) in self.overlay.range(first..end) {
            let at = ((block.0 - first.0) as usize) << self.size().shift();
            let newer = self.copy(copy).await?;
            bytes[at..at + newer.len()].copy_from_slice(&newer);
        }
        Ok(bytes)
    }

    /// A metadata block, newest version, from the cache if it was read lately.
    ///
    /// # Errors
    /// The device fails, or the block is not on it.
    pub async fn block(&self, at: BlockNo) -> Result<Arc<Vec<u8>>, ReadError> {
        if let Some(block) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(&at) {
            return Ok(block.clone());
        }
        let bytes = match self.overlay.get(&at) {
            Some(copy) => self.copy(copy).await?,
            None => self.raw(at, 1).await?,
        };
        let block = Arc::new(bytes.to_vec());
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if CACHE_BLOCKS_MAX <= cache.len() {
            cache.clear();
        }
        cache.insert(at, block.clone());
        Ok(block)
    }

    /// A metadata block of one kind.
    ///
    /// # Errors
    /// As [`Self::block`], or it is of another kind.
    pub async fn meta(&self, at: BlockNo, kind: MetaType) -> Result<Arc<Vec<u8>>, ReadError> {
        let block = self.block(at).await?;
        MetaHeader::expect(&block, kind).map_err(|source| ReadError::Format { block: at, source })?;
        Ok(block)
    }

    async fn copy(&self, copy: &JournalCopy) -> Result<Buf, ReadError> {
        let mut bytes = self.raw(copy.at, 1).await?;
        if copy.escaped {
            bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        }
        Ok(bytes)
    }
}
