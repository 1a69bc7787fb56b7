//! What all members know of the services: small values, each with a version, exchanged in full and merged.
//!
//! Nothing here keeps two nodes from running one service; the attachment and the owner lock do. It only makes the
//! members decide alike.

use crate::{StateName, Target};
use quorate_membership::Identity;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The largest announcement, in bytes.
pub const ANNOUNCEMENT_BYTES_MAX: usize = 1 << 20;
/// The version of the announcement's layout.
const WIRE_VERSION: u8 = 1;

/// The highest version of a value: one above it must be left for the next change.
const COUNT_MAX: u64 = u64::MAX / 2;

/// A value and who wrote it when; of two the later wins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Versioned<T> {
    pub(crate) count: u64,
    pub(crate) by: Identity,
    pub(crate) value: T,
}

impl<T: Clone> Versioned<T> {
    /// Takes the other if it is newer; true if so.
    fn merge(&mut self, other: &Self) -> bool {
        let newer = (self.count, self.by) < (other.count, other.by);
        if newer {
            *self = other.clone();
        }
        newer
    }
}

/// What is known of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// What is wanted; what the configuration says, if nobody said otherwise.
    pub(crate) target: Option<Versioned<Target>>,
    /// Why a life must not be tried again; `None` if it may.
    pub(crate) failed: BTreeMap<Identity, Versioned<Option<String>>>,
    /// What its owner last said of it.
    pub(crate) report: Option<Versioned<Report>>,
}

/// What an owner says of its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) state: StateName,
    /// The last failure.
    pub(crate) detail: Option<String>,
    pub(crate) restarts: u32,
}

fn merge_option<T: Clone>(mine: &mut Option<Versioned<T>>, other: Option<&Versioned<T>>) -> bool {
    match (mine.as_mut(), other) {
        (Some(mine), Some(other)) => mine.merge(other),
        (None, Some(other)) => {
            *mine = Some(other.clone());
            true
        }
        (_, None) => false,
    }
}

impl Facts {
    pub(crate) fn merge(&mut self, other: &Self) -> bool {
        let mut changed = merge_option(&mut self.target, other.target.as_ref());
        changed |= merge_option(&mut self.report, other.report.as_ref());
        for (life, theirs) in &other.failed {
            changed |= match self.failed.get_mut(life) {
                Some(mine) => mine.merge(theirs),
                None => {
                    self.failed.insert(*life, theirs.clone());
                    true
                }
            };
        }
        changed
    }

    fn newest(&self) -> u64 {
        let counts = self.failed.values().map(|v| v.count);
        let target = self.target.as_ref().map(|v| v.count);
        counts.chain(target).chain(self.report.as_ref().map(|v| v.count)).max().unwrap_or(0)
    }
}

/// All a member has to say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Announcement {
    version: u8,
    /// The sender takes no services any more.
    pub(crate) leaving: bool,
    pub(crate) facts: BTreeMap<String, Facts>,
}

/// An announcement that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an announcement of services is malformed")]
pub struct MalformedAnnouncement;

impl Announcement {
    pub(crate) fn new(leaving: bool, facts: BTreeMap<String, Facts>) -> Self {
        Self { version: WIRE_VERSION, leaving, facts }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, MalformedAnnouncement> {
        if ANNOUNCEMENT_BYTES_MAX < bytes.len() {
            return Err(MalformedAnnouncement);
        }
        match postcard::take_from_bytes::<Self>(bytes) {
            Ok((it, [])) if it.version == WIRE_VERSION && it.newest() <= COUNT_MAX => Ok(it),
            _ => Err(MalformedAnnouncement),
        }
    }

    /// The highest version in it.
    pub(crate) fn newest(&self) -> u64 {
        self.facts.values().map(Facts::newest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use quorate_membership::{Incarnation, NodeId};

    fn target(count: u64, node: u32, value: Target) -> Facts {
        let by = Identity::new(NodeId(node), Incarnation(1));
        Facts { target: Some(Versioned { count, by, value }), ..Facts::default() }
    }

    #[test]
    fn merging_gives_the_same_in_either_order() {
        let (a, b) = (target(3, 1, Target::Disabled), target(3, 2, Target::Enabled(None)));
        let (mut ab, mut ba) = (a.clone(), b.clone());
        assert!(ab.merge(&b));
        assert!(!ba.merge(&a));
        assert_eq!(ab, ba);
    }

    #[cfg(feature = "sim")]
    #[test]
    fn hostile_announcements_are_refused_or_merged() {
        use crate::Idle;
        let by = Identity::new(NodeId(1), Incarnation(300));
        let states = [
            StateName::Stopped(Idle::Disabled),
            StateName::Stopped(Idle::NoNode),
            StateName::Stopped(Idle::FailedEverywhere),
            StateName::WaitingForFence,
            StateName::Starting,
            StateName::Running,
            StateName::Stopping,
            StateName::StopFailed,
        ];
        let targets = [Target::Enabled(None), Target::Enabled(Some(NodeId(2))), Target::Disabled];
        let facts = |i: usize, state: StateName| Facts {
            target: targets.get(i % 4).map(|value| Versioned { count: 1 << i, by, value: *value }),
            failed: [(by, Versioned { count: 4, by, value: i.is_multiple_of(2).then(|| "no".to_owned()) })]
                .into(),
            report: Some(Versioned {
                count: 9,
                by,
                value: Report { state, detail: i.is_multiple_of(3).then(|| "why".to_owned()), restarts: 7 },
            }),
        };
        let all: BTreeMap<String, Facts> =
            states.into_iter().enumerate().map(|(i, s)| (format!("service{i}"), facts(i, s))).collect();
        let mut samples: Vec<Vec<u8>> = all
            .iter()
            .map(|(name, facts)| Announcement::new(false, [(name.clone(), facts.clone())].into()).encode())
            .collect();
        samples.push(Announcement::new(true, all.clone()).encode());
        let verdicts =
            quorate_membership::sim::hostile(&samples, 500, |bytes| match Announcement::decode(bytes) {
                Ok(it) => {
                    assert!(it.newest() <= COUNT_MAX);
                    assert_eq!(Announcement::decode(&it.encode()).as_ref(), Ok(&it));
                    let mut mine = all.clone();
                    for (name, facts) in &it.facts {
                        let known = mine.entry(name.clone()).or_default();
                        known.merge(facts);
                        assert!(!known.merge(facts), "merged once is merged");
                    }
                    true
                }
                Err(MalformedAnnouncement) => false,
            });
        assert!(200 < verdicts.taken && 500 < verdicts.refused, "{verdicts:?}");
    }

    proptest! {
        #[test]
        fn random_announcements_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Announcement::decode(&bytes);
        }
    }
}
