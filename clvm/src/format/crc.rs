//! LVM2's checksum: CRC-32 with the usual reflected polynomial, an initial value of its own, and no final inversion.

/// The initial value.
const INITIAL: u32 = 0xf597_a6cf;

/// The checksum of label, metadata area header and text.
#[must_use]
pub(crate) fn crc(bytes: &[u8]) -> u32 {
    // crc32fast speaks of finished checksums, which are inverted.
    let mut hasher = crc32fast::Hasher::new_with_initial(!INITIAL);
    hasher.update(bytes);
    !hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the definition says.
    fn slow(bytes: &[u8]) -> u32 {
        bytes.iter().fold(INITIAL, |mut crc, byte| {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            }
            crc
        })
    }

    #[test]
    fn it_is_the_definition() {
        for bytes in [&b""[..], b"a", b"LABELONE", &[0; 600]] {
            assert_eq!(crc(bytes), slow(bytes));
        }
        assert_eq!(crc(b""), INITIAL);
    }
}
