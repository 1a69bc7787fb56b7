//! Deliberate mistakes, for proving that the simulator's checkers catch them. Compiled for tests and `sim` only.

/// One mistake that a machine can be told to make.
#[cfg(any(test, feature = "sim"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bug {
    /// Promises and accepts are answered before they are durable (R4).
    AnswersBeforeDurable,
    /// Phase 1 does not adopt what an acceptor shows as accepted (R4).
    ForgetsAccepted,
    /// A majority of the live members decides, not one of the voter set (R4).
    MajorityOfTheLiving,
    /// A removed life's attachments vanish instead of becoming a debt (R6).
    DropsDebts,
    /// The removal of the last members, as in a cold start, forgets the debts there were (R6).
    ColdStartForgets,
    /// The lease counts from the arrival of the acknowledgement, not from the sending of the heartbeat (R8).
    LeaseFromArrival,
    /// An acceptor goes on acknowledging a life after it accepted its removal (R8).
    AcknowledgesTheRemoved,
    /// The end of a removed life's lease ignores when acceptors last acknowledged it (R8).
    LeaseNotAwaited,
    /// A proof of fence is taken before the lease's end (R8, R9).
    FencesEarly,
    /// A life that is not newer than what the cluster has seen is let in (R1).
    AdmitsOldLives,
    /// The leader takes copies of requests that were for an earlier record.
    TakesLateRequests,
    /// Decisions are installed with gaps (R4).
    InstallsWithGaps,
    /// The tie breaker's half a vote is counted on every side (R5).
    TieBreaksBothSides,
    /// Last man standing lowers the votes by the word of whoever is left, quorate or not (R5).
    LowersWithoutQuorum,
    /// A forced quorum is written down as an ordinary change of voters.
    ForcesInSilence,
    /// The cluster's version is raised before everybody speaks it.
    RaisesVersionEarly,
    /// The leader's own silence suffices to remove a member, whatever the other observers say.
    LeaderAlone,
    /// The first failure of an incident is removed without waiting for the others that are about to be found.
    CutsAtOnce,
    /// A node that was removed for its paths is let in again without having shown better ones (R3).
    ReadmitsAtOnce,
    /// More than a cover of the broken pairs is removed: both ends of each (R3).
    RemovesBothEnds,
}

/// Whether the machine `$m` was told to make mistake `$b`; false in ordinary builds.
macro_rules! bug {
    ($m:expr, $b:ident) => {{
        #[cfg(any(test, feature = "sim"))]
        let told = $m.bug == Some($crate::machine::Bug::$b);
        #[cfg(not(any(test, feature = "sim")))]
        let told = $crate::machine::bug::never();
        told
    }};
}
pub(crate) use bug;

/// An ordinary build makes no mistake on purpose.
#[cfg(not(any(test, feature = "sim")))]
pub(crate) fn never() -> bool {
    false
}
