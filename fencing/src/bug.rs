//! Deliberate mistakes, each of which a checker is shown to catch. Compiled for tests and simulation only.

/// A mistake the coordinator can be told to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Fences without quorum.
    NoQuorum,
    /// Every member fences, not only the one with the lowest id.
    EveryMember,
    /// Forgets with each view that the victim was turned off.
    ForgetsPowerOff,
    /// Proves without waiting for the end of the lease.
    IgnoresLease,
    /// Takes the lease for enough for services, without the kill time.
    IgnoresKillTime,
    /// One storage server's word stands for all.
    OneServerIsEnough,
    /// Takes the first step of a method for the whole.
    FirstStepIsEnough,
    /// Takes a failed step for a success.
    IgnoresFailure,
    /// Tries once.
    GivesUp,
}
