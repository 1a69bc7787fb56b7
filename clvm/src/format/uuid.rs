//! LVM2's identifiers: 32 characters, shown in groups of 6-4-4-4-4-4-6.

use core::fmt;

/// What LVM2 itself generates, though it reads `!` and `#` too.
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Lengths of the groups.
const GROUPS: [usize; 7] = [6, 4, 4, 4, 4, 4, 6];

/// The identifier of a volume group, a physical or a logical volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid([u8; 32]);

/// A text that is no such identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an LVM identifier of 32 characters")]
pub struct UuidError(pub String);

/// Where random bytes come from.
pub trait Entropy: Send + Sync {
    /// Fills `bytes` with random ones.
    ///
    /// # Errors
    /// There are none to be had.
    fn fill(&self, bytes: &mut [u8]) -> Result<(), std::io::Error>;
}

/// The operating system's random numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemEntropy;

impl Entropy for SystemEntropy {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), std::io::Error> {
        use std::io::Read as _;
        std::fs::File::open("/dev/urandom")?.read_exact(bytes)
    }
}

impl Uuid {
    /// A new one.
    ///
    /// # Errors
    /// No random bytes are to be had.
    pub fn random(entropy: &dyn Entropy) -> Result<Self, std::io::Error> {
        let mut bytes = [0; 32];
        let mut filled = 0;
        let mut draw = [0; 64];
        while filled < bytes.len() {
            entropy.fill(&mut draw)?;
            // 248 is the largest multiple of 62 in a byte: what is above it would favour some characters.
            for byte in draw.iter().filter(|b| **b < 248) {
                if let Some(place) = bytes.get_mut(filled) {
                    *place = ALPHABET[usize::from(*byte) % ALPHABET.len()];
                    filled += 1;
                }
            }
        }
        Ok(Self(bytes))
    }

    /// From 32 characters without hyphens, as in a label.
    ///
    /// # Errors
    /// A character that is none of LVM2's.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, UuidError> {
        if bytes.iter().all(|b| ALPHABET.contains(b) || matches!(b, b'!' | b'#')) {
            Ok(Self(bytes))
        } else {
            Err(UuidError(bytes.escape_ascii().to_string()))
        }
    }

    /// The 32 characters.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = &self.0[..];
        for (i, len) in GROUPS.iter().enumerate() {
            if 0 < i {
                write!(f, "-")?;
            }
            let (group, tail) = rest.split_at(*len);
            rest = tail;
            write!(f, "{}", group.escape_ascii())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl core::str::FromStr for Uuid {
    type Err = UuidError;
    fn from_str(text: &str) -> Result<Self, UuidError> {
        let bad = || UuidError(text.chars().take(64).collect());
        let bytes: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| bad())?;
        Self::from_bytes(bytes).map_err(|_| bad())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_shown_in_groups_and_read_back() {
        let uuid = Uuid::from_bytes(*b"abcdefGHIJ0123456789KLMNopqrsTUV").unwrap();
        assert_eq!(uuid.to_string(), "abcdef-GHIJ-0123-4567-89KL-MNop-qrsTUV");
        assert_eq!(uuid.to_string().parse(), Ok(uuid));
        assert!("abc".parse::<Uuid>().is_err());
        assert!(Uuid::from_bytes([b'-'; 32]).is_err());
    }

    #[test]
    fn random_ones_differ() {
        let one = Uuid::random(&SystemEntropy).unwrap();
        assert_ne!(one, Uuid::random(&SystemEntropy).unwrap());
        assert_eq!(Uuid::from_bytes(*one.as_bytes()), Ok(one));
    }
}
