//! What must hold of sessions after every step.

pub(crate) mod bounded;
pub(crate) mod epochs;
pub(crate) mod exactly_once;
pub(crate) mod pauses;
