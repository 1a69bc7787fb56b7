//! The wall clock, for time stamps only: nothing is decided by it.

use crate::format::Timestamp;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where time stamps come from.
pub type WallClock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The host's clock.
#[must_use]
pub fn system_clock() -> WallClock {
    Arc::new(|| {
        #[expect(clippy::disallowed_methods, reason = "time stamps of files are the host's wall clock")]
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp { sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX), nsec: now.subsec_nanos() }
    })
}
