//! The coordinator, one input at a time.
