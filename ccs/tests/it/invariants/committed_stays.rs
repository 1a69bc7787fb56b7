//! Invariant (R17): what an updater was told is committed, or a replica showed as committed, is in every later
//! coordinator's history.

use quorate_ccs::Replica;

/// The highest version anybody was told of.
#[derive(Debug, Default)]
pub(crate) struct CommittedStays {
    told: u64,
}

impl CommittedStays {
    /// Somebody was told that this version is committed.
    pub(crate) fn told(&mut self, version: u64) {
        self.told = self.told.max(version);
    }

    /// A replica serves as coordinator: it must know all that anybody was told.
    pub(crate) fn check(&self, replica: &Replica) {
        if replica.serves() {
            let newest = replica.committed().map_or(0, |e| e.version);
            assert!(
                self.told <= newest,
                "committed stays: version {} was told, {newest} is served",
                self.told
            );
        }
    }

    /// How far the configuration got.
    pub(crate) fn newest(&self) -> u64 {
        self.told
    }
}
