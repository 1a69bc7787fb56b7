//! Fence devices, the levels of each node, and the times of the coordinator.

use core::time::Duration;
use quorate_membership::NodeId;
use std::collections::{BTreeMap, BTreeSet};

/// The most fence devices of a cluster.
pub const DEVICES_MAX: usize = 1024;
/// The most methods (levels) of one node.
pub const METHODS_MAX: usize = 16;
/// The most steps of one method.
pub const STEPS_MAX: usize = 16;
/// The longest option name or value handed to an agent, in bytes.
pub const OPTION_BYTES_MAX: usize = 4096;

/// What an agent is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Power off, or cut off; counts only when `status` then says "off".
    Off,
    /// Power on again.
    On,
    /// Off, verified, then on. A failed "on" leaves the node fenced.
    Reboot,
}

impl core::fmt::Display for Action {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Reboot => "reboot",
        })
    }
}

/// One device that can fence, such as a power switch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceDevice {
    /// The agent program: a path, or a name to be looked up in `PATH`.
    pub agent: String,
    /// Options of every call, handed over as `name=value` lines.
    pub options: BTreeMap<String, String>,
    /// How long one call of the program may take before it is killed and counts as failed. 1 s to 10 min; 60 s fits
    /// most power switches (their own `power_timeout` is 20 s).
    pub timeout: Duration,
}

/// One step of a method.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which device; a key of [`FencingConfig::devices`].
    pub device: String,
    /// What it shall do.
    pub action: Action,
    /// Options for this node, such as `port`; they win over the device's own.
    pub options: BTreeMap<String, String>,
}

/// One way to fence a node: all steps must succeed, in order. Dual power supplies are off, off, on, on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Method {
    /// Its name, for the history.
    pub name: String,
    /// What to do.
    pub steps: Vec<Step>,
}

/// How patient the coordinator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FencingTiming {
    /// How long after the end of its lease a node's supervisor may take to kill services (R8). Added to the lease for
    /// services of lease safety. Must be the supervisors' own kill time.
    pub kill_time: Duration,
    /// First pause after a failure; doubled with each failure in a row.
    pub retry_min: Duration,
    /// Longest pause between two tries. Tries never end.
    pub retry_max: Duration,
    /// How long one try to install a view at a storage server may take.
    pub install_timeout: Duration,
    /// How long storage servers may fail to confirm before the node's methods run as the next level. A server that says
    /// that it cannot drain is not waited for.
    pub storage_patience: Duration,
}

impl FencingTiming {
    /// For a local network: kill time 1 s, tries after 100 ms up to 5 s, 2 s for one installation, 5 s of patience.
    #[must_use]
    pub fn lan() -> Self {
        Self {
            kill_time: Duration::from_secs(1),
            retry_min: Duration::from_millis(100),
            retry_max: Duration::from_secs(5),
            install_timeout: Duration::from_secs(2),
            storage_patience: Duration::from_secs(5),
        }
    }
}

/// All that the coordinator is told by the cluster's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FencingConfig {
    /// The devices by name.
    pub devices: BTreeMap<String, FenceDevice>,
    /// The methods of each node, best first. Storage servers are always tried before them.
    pub methods: BTreeMap<NodeId, Vec<Method>>,
    /// Times.
    pub timing: FencingTiming,
}

/// What is wrong with a configuration. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A step names a device that is not there.
    #[error("node {node}, method {method}: there is no fence device {device}")]
    NoDevice {
        /// Whose method.
        node: NodeId,
        /// Which.
        method: String,
        /// The name.
        device: String,
    },
    /// The steps can succeed without the node being off at any moment.
    #[error("node {node}, method {method}: {reason}")]
    NeverOff {
        /// Whose method.
        node: NodeId,
        /// Which.
        method: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// Too many or too large.
    #[error("{what} is above the limit of {limit}")]
    Limit {
        /// What.
        what: &'static str,
        /// The most that is allowed.
        limit: usize,
    },
    /// An option that cannot be a line of its own.
    #[error("fence device {device}: option {option:?} has a line break, an empty name or a `=` in its name")]
    Option {
        /// The device.
        device: String,
        /// The option's name.
        option: String,
    },
    /// A time out of its range.
    #[error("{what} must be {range}")]
    Time {
        /// Which.
        what: &'static str,
        /// The range.
        range: &'static str,
    },
}

impl FencingConfig {
    /// No device, no method: storage servers and leases alone.
    #[must_use]
    pub fn new(timing: FencingTiming) -> Self {
        Self { devices: BTreeMap::new(), methods: BTreeMap::new(), timing }
    }

    /// Checks names, limits and that every method turns its node off.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), ConfigError> {
        limit("the number of fence devices", self.devices.len(), DEVICES_MAX)?;
        for (name, device) in &self.devices {
            check_options(name, &device.options)?;
            if device.timeout < Duration::from_secs(1) || Duration::from_secs(600) < device.timeout {
                return Err(ConfigError::Time {
                    what: "the timeout of a fence device",
                    range: "1 s to 10 min",
                });
            }
        }
        for (node, methods) in &self.methods {
            limit("the number of methods of a node", methods.len(), METHODS_MAX)?;
            for method in methods {
                self.check_method(*node, method)?;
            }
        }
        let t = &self.timing;
        if t.retry_min.is_zero() || t.retry_max < t.retry_min {
            return Err(ConfigError::Time { what: "retry_min", range: "above zero and at most retry_max" });
        }
        Ok(())
    }

    fn check_method(&self, node: NodeId, method: &Method) -> Result<(), ConfigError> {
        limit("the number of steps of a method", method.steps.len(), STEPS_MAX)?;
        for step in &method.steps {
            if !self.devices.contains_key(&step.device) {
                let (method, device) = (method.name.clone(), step.device.clone());
                return Err(ConfigError::NoDevice { node, method, device });
            }
            check_options(&step.device, &step.options)?;
        }
        method.check().map_err(|reason| ConfigError::NeverOff { node, method: method.name.clone(), reason })
    }
}

impl Method {
    /// Whether success of all steps says that all power was off at one moment: every "off" before the first "on", and a
    /// "reboot" only alone.
    fn check(&self) -> Result<(), &'static str> {
        let actions: Vec<Action> = self.steps.iter().map(|s| s.action).collect();
        if actions == [Action::Reboot] {
            return Ok(());
        }
        if actions.contains(&Action::Reboot) {
            return Err("`reboot` must be the only step; write off, off, on, on for two power supplies");
        }
        let offs = actions.iter().take_while(|a| **a == Action::Off).count();
        if offs == 0 {
            return Err("the first step must be `off` or `reboot`");
        }
        if actions.iter().skip(offs).any(|a| *a == Action::Off) {
            return Err("an `off` after an `on` never has all power off at one moment");
        }
        let distinct: BTreeSet<_> = self.steps.iter().take(offs).map(|s| (&s.device, &s.options)).collect();
        if distinct.len() < offs { Err("the same `off` twice") } else { Ok(()) }
    }

    /// How many steps, from the first, turn the node off. The rest turns it on again.
    #[must_use]
    pub fn off_steps(&self) -> usize {
        self.steps.iter().take_while(|s| s.action != Action::On).count()
    }
}

fn limit(what: &'static str, found: usize, limit: usize) -> Result<(), ConfigError> {
    if limit < found { Err(ConfigError::Limit { what, limit }) } else { Ok(()) }
}

fn check_options(device: &str, options: &BTreeMap<String, String>) -> Result<(), ConfigError> {
    for (name, value) in options {
        limit("the length of an option of a fence device", name.len().max(value.len()), OPTION_BYTES_MAX)?;
        let bad_name = name.is_empty() || name.starts_with('#') || name.contains(['=', '\n', ' ', '\0']);
        if bad_name || value.contains(['\n', '\0']) {
            return Err(ConfigError::Option { device: device.to_owned(), option: name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(actions: &[(&str, Action)]) -> Method {
        let steps = actions
            .iter()
            .map(|(d, a)| Step { device: (*d).to_owned(), action: *a, options: BTreeMap::new() })
            .collect();
        Method { name: "m".to_owned(), steps }
    }

    #[test]
    fn two_power_supplies_are_off_off_on_on() {
        use Action::{Off, On, Reboot};
        assert_eq!(method(&[("a", Off), ("b", Off), ("a", On), ("b", On)]).check(), Ok(()));
        assert!(method(&[("a", Off), ("a", On), ("b", Off), ("b", On)]).check().is_err());
        assert!(method(&[("a", Reboot), ("b", Reboot)]).check().is_err());
        assert!(method(&[("a", On)]).check().is_err());
        assert!(method(&[("a", Off), ("a", Off)]).check().is_err());
        assert!(method(&[]).check().is_err());
        assert_eq!(method(&[("a", Reboot)]).check(), Ok(()));
    }

    #[test]
    fn a_step_of_an_unknown_device_is_named() {
        let mut config = FencingConfig::new(FencingTiming::lan());
        config.methods.insert(NodeId(3), vec![method(&[("pdu", Action::Off)])]);
        let error = config.check().unwrap_err();
        assert_eq!(error.to_string(), "node 3, method m: there is no fence device pdu");
    }

    #[test]
    fn an_option_cannot_smuggle_in_a_second_line() {
        let mut config = FencingConfig::new(FencingTiming::lan());
        let options = BTreeMap::from([("port".to_owned(), "1\naction=on".to_owned())]);
        let device = FenceDevice { agent: "fence_x".to_owned(), options, timeout: Duration::from_secs(60) };
        config.devices.insert("pdu".to_owned(), device);
        assert!(matches!(config.check(), Err(ConfigError::Option { .. })));
    }
}
