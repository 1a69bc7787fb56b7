//! Mistakes that are planted to show that the simulation finds them.

/// Deliberate mistakes that the simulation must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// A sender delivers its own message before it has its place.
    DeliversAtOnce,
    /// What the others had in the old view is not handed out.
    SkipsMissing,
    /// What is still in order for the old view is taken in while the flush runs.
    TakesOldViews,
    /// What was dropped is sent again in the next view.
    SendsDropped,
    /// What is dropped is not told to its sender.
    DropsSilently,
    /// The own messages are not delivered.
    ForgetsItself,
    /// Processes of removed nodes stay.
    KeepsTheDead,
    /// Processes stay that have left as far as their own node knows, and only it.
    KeepsTheLeft,
    /// A node that gets a group anew goes on from an old copy of it.
    TrustsOldCopies,
    /// A message comes from another process than its sender.
    MixesSenders,
    /// A message gets two places.
    OrdersTwice,
    /// The order of joins and leaves is each node's own.
    TellsLeavesEarly,
}
