//! The names of things: nodes, their lives, epochs, clusters, states and servers.

use core::fmt;
use serde::{Deserialize, Serialize};

/// A node of the cluster. Fixed in the node's certificate; never reused for another machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u32);

/// One life of a node: a counter that is made durable before the node's first packet (R1).
///
/// Locks, block queues, caches and mounts belong to an incarnation and die with it (R10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

/// The number of a decided view record. Every record has the epoch of the one before it plus one (R4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch that follows. It saturates: a number from the network must not overflow, and no chain gets so far.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A node in one of its lives. What is fenced, owes debts and owns locks is always an identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Which node.
    pub node: NodeId,
    /// In which of its lives.
    pub incarnation: Incarnation,
}

impl Identity {
    /// The identity of `node` in its life number `incarnation`.
    #[must_use]
    pub fn new(node: NodeId, incarnation: Incarnation) -> Self {
        Self { node, incarnation }
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `NODE#INCARNATION`, as in logs and in `quorate status`.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.node, self.incarnation)
    }
}

/// A text that is not a UUID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a UUID: 32 hexadecimal digits, with or without hyphens, are wanted")]
pub struct UuidError {
    /// What was given.
    pub text: String,
}

fn parse_uuid(text: &str) -> Result<[u8; 16], UuidError> {
    let bad = || UuidError { text: text.chars().take(64).collect() };
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()
        .ok_or_else(bad)?;
    if digits.len() != 32 {
        return Err(bad());
    }
    let mut out = [0; 16];
    for (byte, pair) in out.iter_mut().zip(digits.chunks(2)) {
        *byte = pair.iter().fold(0, |acc, d| (acc << 4) | d);
    }
    Ok(out)
}

fn show_uuid(bytes: &[u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    for (i, b) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            write!(f, "-")?;
        }
        write!(f, "{b:02x}")?;
    }
    Ok(())
}

macro_rules! uuid {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name([u8; 16]);

        impl $name {
            /// From 16 bytes, best random ones.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
            /// The 16 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                show_uuid(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                show_uuid(&self.0, f)
            }
        }
        impl core::str::FromStr for $name {
            type Err = UuidError;
            fn from_str(text: &str) -> Result<Self, UuidError> {
                parse_uuid(text).map(Self)
            }
        }
    };
}

uuid!(
    /// A cluster. Random, made once by `quorate cluster create`; every hello names it.
    ClusterId
);
uuid!(
    /// A state directory. An acceptor is a node together with this (R4): a lost or copied directory is another acceptor.
    StateId
);
uuid!(
    /// A storage server, in the life of its fence record: it makes a fresh one when it loses the record (R9).
    ServerId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_back_as_it_was_shown() {
        let id = ServerId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233-3435-3637-3839-616263646566");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn a_text_that_is_no_uuid_is_refused_with_the_text() {
        let error = "30313233-zz".parse::<ClusterId>().unwrap_err();
        assert!(error.to_string().contains("30313233-zz"), "{error}");
    }
}
