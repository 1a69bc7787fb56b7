//! Owned, aligned buffers: what goes into a block device and comes out of it.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Every buffer starts at a multiple of this many bytes, so that direct I/O can use it as it is.
pub const BUF_ALIGN_BYTES: usize = 4096;

/// Bytes on their way to or from a device. It owns them: a dropped future leaves no dangling I/O behind.
pub struct Buf {
    // The vector never grows after it is made, so `start` stays aligned.
    store: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buf {
    /// A buffer of `len` zeros.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let store = vec![0; len + BUF_ALIGN_BYTES];
        let start = store.as_ptr().align_offset(BUF_ALIGN_BYTES);
        assert!(start <= BUF_ALIGN_BYTES, "a byte pointer can always be aligned");
        Self { store, start, len }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Keeps the first `len` bytes.
    ///
    /// # Panics
    /// If the buffer is shorter.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "a buffer of {} bytes has no {len} first ones", self.len);
        self.len = len;
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.store[self.start..self.start + self.len]
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.store[self.start..self.start + self.len]
    }
}

impl Clone for Buf {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_aligned_and_keeps_its_bytes() {
        for len in [0, 1, 511, 4096, 70_000] {
            let buf = Buf::copy_of(&vec![7; len]);
            assert_eq!(buf.as_ptr().align_offset(BUF_ALIGN_BYTES), 0);
            assert_eq!(&*buf, &vec![7; len][..]);
            assert_eq!(&*buf.clone(), &*buf);
        }
    }
}
