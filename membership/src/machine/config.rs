//! The knobs of the membership machine, each with its unit, range and relation to the others.

use super::version::Versions;
use core::time::Duration;

/// How many voters a cluster may have: up to here the lowest live one leads with a pre-promised ballot (R5).
pub const VOTERS_MAX: usize = 8;
/// How many nodes a roster may name.
pub const ROSTER_MAX: usize = 1_024;
/// How many storage servers may be enrolled.
pub const SERVERS_MAX: usize = 64;
/// How many attachments one record may hold, debts included.
pub const ATTACHMENTS_MAX: usize = 4_096;
/// How many requests of one node may wait.
pub const REQUESTS_MAX: usize = 1_024;

/// Times of the machine. There is no default; [`Config::lan`] is tuned for one switched network and for loopback.
///
/// All of them follow from the heartbeat interval `h` (`docs/membership.md` has the reasons):
/// `detection = 8 h`; `drift_margin = detection / 8`; `link_lost_grace = detection / 2`; `mesh_grace` about
/// `4 detection`; `retry_interval = h / 2`; `request_deadline` at least `2 detection`; `stage_deadline` at least
/// `4 detection`. Whoever has a slower network raises `h` and keeps the ratios: [`Config::from_heartbeat`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Between two heartbeats to every node. 10 ms to 1 s; at most a quarter of `detection`, so that three in a row
    /// must be lost before a live node is suspected.
    pub heartbeat_interval: Duration,
    /// Silence after which a member is removed. 100 ms to 60 s. A crash is noticed `detection` after the last
    /// heartbeat that arrived, so between `detection - heartbeat_interval` and `detection` after the crash.
    pub detection: Duration,
    /// By how much the lease is shorter than `detection`; covers the difference of clock rates and the time between
    /// check and answer (R8). At least 5 % of `detection` and at least one millisecond.
    pub drift_margin: Duration,
    /// Silence after the transport reported a lost connection that suffices for suspicion; at most `detection`.
    /// It never shortens a lease, so below `detection` it trades waiting for suspicion against waiting for the lease.
    pub link_lost_grace: Duration,
    /// How long two members may be without a direct path before one of them is removed (R3). At least `detection`.
    pub mesh_grace: Duration,
    /// How long a request is tried before its outcome is reported as unknown. At least `detection * 2`, so that the
    /// failure of the leader alone does not end it.
    pub request_deadline: Duration,
    /// How long a recovery stage may wait for one participant that reports nothing (R7). At least `detection * 4`.
    pub stage_deadline: Duration,
    /// Between two sendings of a message that was not answered. At most `heartbeat_interval`.
    pub retry_interval: Duration,
    /// Whether the leader changes the voter set by itself to fit the roster's roles (R5).
    pub admits_voters: bool,
    /// The versions of the messages that this program speaks. [`Versions::CURRENT`] but in tests of the upgrade.
    pub speaks: Versions,
}

/// A relation between two knobs that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("membership configuration: {0}")]
pub struct ConfigError(&'static str);

impl Config {
    /// For one switched network or loopback: a SIGKILL is noticed within 0.8 s, a lease lasts 0.7 s.
    #[must_use]
    pub fn lan() -> Self {
        Self {
            heartbeat_interval: Duration::from_millis(100),
            detection: Duration::from_millis(800),
            drift_margin: Duration::from_millis(100),
            link_lost_grace: Duration::from_millis(400),
            mesh_grace: Duration::from_secs(3),
            request_deadline: Duration::from_secs(10),
            stage_deadline: Duration::from_secs(30),
            retry_interval: Duration::from_millis(50),
            admits_voters: true,
            speaks: Versions::CURRENT,
        }
    }

    /// The settings that follow from a heartbeat interval by the formula; [`Config::lan`] is that of 100 ms.
    #[must_use]
    pub fn from_heartbeat(interval: Duration) -> Self {
        let detection = interval * 8;
        Self {
            heartbeat_interval: interval,
            detection,
            drift_margin: detection / 8,
            link_lost_grace: detection / 2,
            mesh_grace: detection * 15 / 4,
            request_deadline: (detection * 2).max(Duration::from_secs(10)),
            stage_deadline: (detection * 4).max(Duration::from_secs(30)),
            retry_interval: interval / 2,
            ..Self::lan()
        }
    }

    /// How long acknowledgements keep a node acting, counted from the sending of its heartbeat:
    /// `detection - drift_margin` (R8).
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.detection.saturating_sub(self.drift_margin)
    }

    /// How long the lease of a removed life is waited for after the last acknowledgement of it:
    /// `lease + drift_margin`, which is `detection`; after a plain crash nothing of it is left.
    #[must_use]
    pub fn lease_wait(&self) -> Duration {
        self.lease() + self.drift_margin
    }

    /// Checks every range and relation.
    ///
    /// # Errors
    /// The first that does not hold.
    pub fn check(&self) -> Result<(), ConfigError> {
        let ms = Duration::from_millis;
        let rules = [
            (ms(10) <= self.heartbeat_interval, "heartbeat_interval is below 10 ms"),
            (self.heartbeat_interval <= ms(1_000), "heartbeat_interval is above 1 s"),
            (ms(100) <= self.detection, "detection is below 100 ms"),
            (self.detection <= ms(60_000), "detection is above 60 s"),
            (self.heartbeat_interval * 4 <= self.detection, "detection is below four heartbeat intervals"),
            (ms(1) <= self.drift_margin, "drift_margin is below 1 ms"),
            (self.detection / 20 <= self.drift_margin, "drift_margin is below 5 % of detection"),
            (self.drift_margin <= self.detection / 2, "drift_margin is above half of detection"),
            (self.link_lost_grace <= self.detection, "link_lost_grace is above detection"),
            (self.detection <= self.mesh_grace, "mesh_grace is below detection"),
            (self.detection * 2 <= self.request_deadline, "request_deadline is below twice detection"),
            (self.detection * 4 <= self.stage_deadline, "stage_deadline is below four times detection"),
            (self.speaks.oldest <= self.speaks.newest, "no version is spoken"),
            (ms(1) <= self.retry_interval, "retry_interval is below 1 ms"),
            (self.retry_interval <= self.heartbeat_interval, "retry_interval is above heartbeat_interval"),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(ConfigError(what)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lan_preset_holds_its_own_relations_and_detects_within_a_second() {
        let config = Config::lan();
        assert_eq!(config.check(), Ok(()));
        assert!(config.detection < Duration::from_secs(1));
        assert!(config.lease() < config.detection);
        assert!(config.lease_wait() <= config.detection, "a plain crash must not wait for the lease");
    }

    #[test]
    fn the_lan_preset_is_what_the_formula_gives_for_a_tenth_of_a_second() {
        assert_eq!(Config::from_heartbeat(Duration::from_millis(100)), Config::lan());
        for ms in [20, 50, 250, 1_000] {
            assert_eq!(Config::from_heartbeat(Duration::from_millis(ms)).check(), Ok(()), "{ms} ms");
        }
    }

    #[test]
    fn a_broken_relation_is_named() {
        let config = Config { drift_margin: Duration::from_millis(2), ..Config::lan() };
        assert!(config.check().unwrap_err().to_string().contains("drift_margin"));
    }
}
