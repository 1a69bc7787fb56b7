//! What must hold after every step of a simulation; each invariant in a file of its own.

pub(crate) mod apply_once;
pub(crate) mod committed_stays;
pub(crate) mod durable_majority;
pub(crate) mod one_document;
