//! One test binary for the crate.

#[cfg(feature = "driver")]
mod pki;
mod session;
#[cfg(feature = "driver")]
mod temp;
