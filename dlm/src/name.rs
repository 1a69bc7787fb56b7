//! The name of a resource: bytes, short ones kept in place.

use core::fmt;
use core::hash::{Hash, Hasher};
use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;

/// The longest name of a resource, in bytes. Names are bytes, not text; the empty one is allowed.
pub const NAME_BYTES_MAX: usize = 64;

/// Names up to this length need no memory of their own. Those of GFS2's glocks have 24 bytes.
const INLINE_BYTES_MAX: usize = 30;

/// The name of a resource within its lockspace.
#[derive(Clone)]
pub struct LockName(Repr);

/// Invariant: a name that fits is `Inline`, and the bytes after it are zero, so that equal names are equal in memory.
#[derive(Clone)]
enum Repr {
    Inline { length: u8, bytes: [u8; INLINE_BYTES_MAX] },
    Long(Arc<[u8]>),
}

const _: () = assert!(size_of::<LockName>() == 32, "a name is half a cache line");

/// A name of more than [`NAME_BYTES_MAX`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a resource name of {0} bytes is above the limit of {NAME_BYTES_MAX}")]
pub struct NameTooLong(pub usize);

impl LockName {
    /// Checks the length.
    ///
    /// # Errors
    /// The name is too long.
    pub fn new(name: &[u8]) -> Result<Self, NameTooLong> {
        if NAME_BYTES_MAX < name.len() {
            return Err(NameTooLong(name.len()));
        }
        let mut bytes = [0; INLINE_BYTES_MAX];
        let (Some(room), Ok(length)) = (bytes.get_mut(..name.len()), u8::try_from(name.len())) else {
            return Ok(Self(Repr::Long(name.into())));
        };
        room.copy_from_slice(name);
        Ok(Self(Repr::Inline { length, bytes }))
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        match &self.0 {
            Repr::Inline { length, bytes } => bytes.get(..usize::from(*length)).unwrap_or_default(),
            Repr::Long(bytes) => bytes,
        }
    }
}

impl PartialEq for LockName {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Repr::Inline { length: a, bytes: x }, Repr::Inline { length: b, bytes: y }) => a == b && x == y,
            (Repr::Long(a), Repr::Long(b)) => a == b,
            _ => false,
        }
    }
}

impl Eq for LockName {}

impl PartialOrd for LockName {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for LockName {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.as_bytes().cmp(other.as_bytes())
    }
}

impl Hash for LockName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(self.as_bytes());
    }
}

impl TryFrom<Vec<u8>> for LockName {
    type Error = NameTooLong;
    fn try_from(bytes: Vec<u8>) -> Result<Self, NameTooLong> {
        Self::new(&bytes)
    }
}

impl From<LockName> for Vec<u8> {
    fn from(name: LockName) -> Self {
        name.as_bytes().to_vec()
    }
}

impl fmt::Debug for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

impl fmt::Display for LockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_bytes().escape_ascii())
    }
}

impl Serialize for LockName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.as_bytes())
    }
}

impl<'de> Deserialize<'de> for LockName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = LockName;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "up to {NAME_BYTES_MAX} bytes")
            }
            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<LockName, E> {
                LockName::new(bytes).map_err(E::custom)
            }
            // Formats for people have no bytes and write a list of numbers.
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LockName, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = list.next_element()? {
                    bytes.push(byte);
                    if NAME_BYTES_MAX < bytes.len() {
                        return Err(A::Error::custom(NameTooLong(bytes.len())));
                    }
                }
                LockName::new(&bytes).map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_bytes(Bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_lengths_come_back_and_keep_their_order() {
        let mut names: Vec<LockName> = Vec::new();
        for length in 0..=NAME_BYTES_MAX {
            for fill in [0, b'a'] {
                let bytes = vec![fill; length];
                let name = LockName::new(&bytes).unwrap();
                assert_eq!(name.as_bytes(), bytes);
                let wire = postcard::to_stdvec(&name).unwrap();
                // The layout on the wire is that of a list of bytes.
                assert_eq!(wire, postcard::to_stdvec(&bytes).unwrap());
                assert_eq!(postcard::from_bytes::<LockName>(&wire).unwrap(), name);
                names.push(name);
            }
        }
        names.dedup();
        for a in &names {
            for b in &names {
                assert_eq!(a.cmp(b), a.as_bytes().cmp(b.as_bytes()));
                assert_eq!(a == b, a.as_bytes() == b.as_bytes());
            }
        }
    }

    #[test]
    fn a_longer_name_is_refused_also_from_the_wire() {
        let bytes = vec![1; NAME_BYTES_MAX + 1];
        assert_eq!(LockName::new(&bytes), Err(NameTooLong(NAME_BYTES_MAX + 1)));
        assert!(postcard::from_bytes::<LockName>(&postcard::to_stdvec(&bytes).unwrap()).is_err());
    }
}
