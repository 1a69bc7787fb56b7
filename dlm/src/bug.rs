//! Deliberate mistakes, each of which a check must see. Set only in simulations.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(any(test, feature = "sim")), allow(dead_code, unreachable_pub))]
pub enum Bug {
    /// A failed node's locks are given to others as soon as it is out of the view.
    GrantBeforeFence,
    /// Holds end with the fence instead of the replay.
    ForgetHolds,
    /// A bucket answers before all members have registered.
    AnswerEarly,
    /// A bucket of a failed owner comes back without holds.
    NoUnknownHolds,
    /// A rebuilt resource is missing the granted locks of one survivor.
    LoseRelock,
    /// Messages of failed nodes are heard.
    HearTheDead,
    /// The directory forgets how far grants were numbered.
    ForgetFloor,
    /// A rebuilt value block counts as valid, whoever had it.
    TrustEveryCopy,
    /// An unlock from another node is not carried out.
    LoseUnlock,
    /// Operations on names whose master lives wait until recovery is over.
    StopEverything,
    /// What an unlock in the middle of a POSIX lock leaves to its right is lost at the master.
    LoseRemainder,
    /// A rebuilt resource does not look which POSIX requests without an answer its old master had carried out.
    ForgetPosixCuts,
    /// A deadlock is believed after one walk, with what earlier walks saw.
    WalkOnce,
    /// The search does not see who waits for whose turn.
    OverlookOrder,
    /// An unlock that was under way when its master failed is not carried out by the next one.
    LoseUnlockInRecovery,
    /// Operations that a new master has taken over are not repeated to it, and neither are those it has not.
    NeverResend,
    /// A resource moves before its users know, so that they do not register it if its heir fails.
    MoveUnannounced,
    /// Who asks the old master of a resource that has moved gets no answer.
    MoveLosesForward,
    /// The old master goes on granting after it gave the resource away.
    MoveKeepsMaster,
    /// A resource moves without its value block.
    MoveLosesValue,
    /// A resource moves without the number of its last grant.
    MoveLosesToken,
    /// The new master takes again what was in the queues already.
    MoveTakesTwice,
    /// The old master says nothing when the new one fails before everybody knew it.
    HeirForgotten,
    /// The directory keeps the old master of a resource that has moved.
    ClaimLost,
}
