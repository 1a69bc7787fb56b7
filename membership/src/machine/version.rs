//! Which versions of the messages a program speaks, and in which one it writes to whom: rolling upgrade.
//!
//! The cluster's version is a field of the view record. It rises by a decided record alone, once all members and voters
//! announced that they speak the next one; from that record on, messages are written in it.

use super::member::Member;
use crate::NodeId;
use serde::{Deserialize, Serialize};

/// The versions a program speaks, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versions {
    /// The oldest.
    pub oldest: u8,
    /// The newest.
    pub newest: u8,
}

impl Versions {
    /// The version every new cluster begins with.
    pub const FIRST: u8 = 1;

    /// What this program speaks.
    pub const CURRENT: Self = Self { oldest: 1, newest: 1 };

    /// What a program after this one would speak: a second version that differs in how acknowledgements are written. It
    /// exists for tests of the upgrade only.
    #[cfg(any(test, feature = "sim"))]
    pub const NEXT: Self = Self { oldest: 1, newest: 2 };

    /// What a program speaks that has given up the first version. For tests of the upgrade only.
    #[cfg(any(test, feature = "sim"))]
    pub const AFTER_NEXT: Self = Self { oldest: 2, newest: 2 };

    /// Whether `version` is one of them.
    #[must_use]
    pub fn speaks(self, version: u8) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }

    /// The newest version that both speak.
    #[must_use]
    pub fn common(self, other: Self) -> Option<u8> {
        let newest = self.newest.min(other.newest);
        (self.speaks(newest) && other.speaks(newest)).then_some(newest)
    }
}

impl core::fmt::Display for Versions {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "{}", self.oldest)
        } else {
            write!(f, "{} to {}", self.oldest, self.newest)
        }
    }
}

impl Member {
    /// The version of the newest record; before there is one, what others say it is, else the oldest spoken here.
    #[must_use]
    pub fn version(&self) -> u8 {
        let speaks = self.config.speaks;
        let heard = || self.live_lives().filter_map(|(_, l)| l.beat.as_ref()).map(|b| b.version).max();
        let version = self.tip.as_ref().map(|v| v.version).or_else(heard);
        version.unwrap_or(speaks.oldest).clamp(speaks.oldest, speaks.newest)
    }

    /// In which version to write to `node`: the cluster's; for a node that does not speak it, the newest one that both
    /// speak, so that it understands why it is refused.
    #[must_use]
    pub fn version_to(&self, node: NodeId) -> u8 {
        let version = self.version();
        let lives = self.peers.of_node(node).rev();
        let newest = lives.filter_map(|(_, l)| l.beat.as_ref()).map(|b| b.speaks).next();
        match newest {
            Some(theirs) if !theirs.speaks(version) => theirs.common(self.config.speaks).unwrap_or(version),
            _ => version,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Versions;
    use crate::machine::{ControlMsg, HeartbeatAck, WireError};
    use crate::{Epoch, StateId};

    #[test]
    fn the_common_version_is_the_newest_of_both_or_none() {
        let (now, next, after) = (Versions::CURRENT, Versions::NEXT, Versions::AFTER_NEXT);
        assert_eq!(now.common(next), Some(1));
        assert_eq!(next.common(after), Some(2));
        assert_eq!(now.common(after), None);
    }

    #[test]
    fn an_acknowledgement_of_one_version_is_none_of_the_other() {
        let ack = HeartbeatAck {
            sent_ns: 7,
            epoch: Epoch(9),
            state: StateId::from_bytes([3; 16]),
            leader: None,
            leases: true,
        };
        let msg = ControlMsg::HeartbeatAck(ack);
        let (first, second) = (msg.encode(1), msg.encode(2));
        assert_ne!(first[1..], second[1..], "the difference is more than the number");
        assert_eq!(ControlMsg::decode(&first, Versions::NEXT), Ok(msg.clone()));
        assert_eq!(ControlMsg::decode(&second, Versions::NEXT), Ok(msg.clone()));
        let unknown = WireError::Version { found: 2, speaks: Versions::CURRENT };
        assert_eq!(ControlMsg::decode(&second, Versions::CURRENT), Err(unknown));
        let mut relabelled = second;
        relabelled[0] = 1;
        assert_ne!(ControlMsg::decode(&relabelled, Versions::CURRENT), Ok(msg));
    }
}
