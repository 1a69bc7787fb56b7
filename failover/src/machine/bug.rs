//! Deliberate mistakes, each of which a checker is shown to catch. They can be made only in tests and simulation.

/// A mistake the manager can be told to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Does not look whether the former owner is fenced, and starts although the record refuses the attachment.
    StartsUnfenced,
    /// Starts without the owner lock.
    IgnoresLock,
    /// Gives the service up before it is stopped.
    ReleasesFirst,
    /// Takes a failed stop for a success.
    IgnoresFailedStop,
    /// Starts without looking for leftovers.
    SkipsProbe,
    /// Starts the last resource first.
    StartsBackwards,
    /// Stops in the order of the start.
    StopsForwards,
    /// Starts without quorum.
    IgnoresQuorum,
}
