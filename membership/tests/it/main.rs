//! One test binary for the crate.

#[cfg(feature = "driver")]
mod pki;
mod scenarios;
mod session;
#[cfg(feature = "driver")]
mod temp;
