//! A block device in memory that can crash: what was not flushed is lost in part, torn or reordered, as the seed says.

use crate::{BlockDevice, Buf, Geometry, IoError, WriteFlags, ZeroFlags};
use quorate_membership::Rng;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The unit in which a crash keeps or loses what was not flushed.
const SECTOR_BYTES: usize = 512;

/// A device in memory, with a volatile cache.
#[derive(Debug)]
pub struct MemoryDevice {
    geometry: Geometry,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// What reads see.
    current: Vec<u8>,
    /// What a crash is sure to keep.
    durable: Vec<u8>,
    /// Writes since the last flush, oldest first.
    pending: Vec<(usize, Vec<u8>)>,
}

impl MemoryDevice {
    /// A device of `size_bytes` zeros, with blocks of 512 bytes.
    ///
    /// # Panics
    /// If the size is not in whole blocks or does not fit into memory.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::from_bytes(vec![
            0;
            usize::try_from(size_bytes)
                .expect("the size of a memory device fits into memory")
        ])
    }

    /// A device with these contents, all of them durable.
    ///
    /// # Panics
    /// If the size is not in whole blocks.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        assert!(bytes.len().is_multiple_of(SECTOR_BYTES), "a device has whole blocks");
        let geometry = Geometry {
            size_bytes: bytes.len() as u64,
            block_bytes: SECTOR_BYTES as u32,
            preferred_bytes: 4096,
            transfer_bytes_max: 32 << 20,
            read_only: false,
            can_discard: true,
        };
        let state = State { current: bytes.clone(), durable: bytes, pending: Vec::new() };
        Self { geometry, state: Mutex::new(state) }
    }

    /// What reads see now.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().current.clone()
    }

    /// What could be found after a crash now: every sector written since the last flush has, independently, the bytes of
    /// any of its writes or those before them. With `None` as generator nothing unflushed is kept.
    #[must_use]
    pub fn crashed(&self, rng: Option<&mut Rng>) -> Vec<u8> {
        let state = self.lock();
        let mut bytes = state.durable.clone();
        let Some(rng) = rng else { return bytes };
        for (at, data) in &state.pending {
            for (i, sector) in data.chunks(SECTOR_BYTES).enumerate() {
                if rng.chance_ppm(500_000) {
                    let from = at + i * SECTOR_BYTES;
                    bytes[from..from + sector.len()].copy_from_slice(sector);
                }
            }
        }
        bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self, offset: u64, data: Vec<u8>, durable: bool) {
        let at = offset as usize; // checked against the size, which is that of a vector
        let mut state = self.lock();
        state.current[at..at + data.len()].copy_from_slice(&data);
        if durable {
            state.durable[at..at + data.len()].copy_from_slice(&data);
        }
        // Also if durable: an older pending write of the same bytes must not come back over it.
        state.pending.push((at, data));
        if durable {
            let newest = state.pending.len() - 1;
            let (at, data) = state.pending.swap_remove(newest);
            let range = at..at + data.len();
            for (from, old) in &mut state.pending {
                for (i, byte) in old.iter_mut().enumerate() {
                    if range.contains(&(*from + i)) {
                        *byte = data[*from + i - at];
                    }
                }
            }
        }
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset: u64, mut buf: Buf) -> Result<Buf, IoError> {
        self.geometry.check(offset, buf.len() as u64)?;
        let at = offset as usize;
        let len = buf.len();
        buf.copy_from_slice(&self.lock().current[at..at + len]);
        Ok(buf)
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<Buf, IoError> {
        self.geometry.check(offset, buf.len() as u64)?;
        self.store(offset, buf.to_vec(), flags.fua);
        Ok(buf)
    }

    async fn flush(&self) -> Result<(), IoError> {
        let mut state = self.lock();
        for (at, data) in std::mem::take(&mut state.pending) {
            state.durable[at..at + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.geometry.check(offset, len)?;
        self.store(offset, vec![0; len as usize], false);
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), IoError> {
        self.geometry.check(offset, len)?;
        self.store(offset, vec![0; len as usize], flags.fua);
        Ok(())
    }
}
