//! One test binary for the crate.

#[cfg(feature = "driver")]
mod pki;
#[cfg(feature = "driver")]
mod temp;
