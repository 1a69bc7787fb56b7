//! The configuration's document in the words of the crates it configures.

use quorate_ccs::Document;
use quorate_ccs::schema::Timing;
use quorate_fencing::{Action, FenceDevice, FencingConfig, FencingTiming, Method, Step};
use quorate_membership::NodeId;
use quorate_membership::driver::AgreedTimes;
use quorate_membership::machine::Config;
use std::time::Duration;

/// The times of one life, for everything that has some. They are taken once, at its start.
#[derive(Clone, Debug)]
pub(crate) struct Times {
    pub(crate) membership: Config,
    pub(crate) fencing: FencingTiming,
}

impl Times {
    /// As the configuration has them; what it does not name is as on a local network.
    pub(crate) fn of(timing: &Timing) -> Self {
        let ms = |value: &toml::Spanned<u32>| Duration::from_millis(u64::from(*value.get_ref()));
        let lan = Config::lan();
        let detection = ms(&timing.detection_ms);
        let heartbeat = ms(&timing.heartbeat_ms);
        let membership = Config {
            heartbeat_interval: heartbeat,
            detection,
            drift_margin: ms(&timing.drift_margin_ms),
            // Both in proportion, where detection is not that of a local network.
            link_lost_grace: detection / 2,
            mesh_grace: lan.mesh_grace.max(detection),
            request_deadline: ms(&timing.request_deadline_ms),
            stage_deadline: ms(&timing.stage_deadline_ms),
            retry_interval: lan.retry_interval.min(heartbeat),
            ..lan
        };
        let fencing = FencingTiming {
            kill_time: ms(&timing.kill_ms),
            storage_patience: ms(&timing.storage_patience_ms),
            retry_max: ms(&timing.fence_retry_max_ms),
            ..FencingTiming::lan()
        };
        Self { membership, fencing }
    }

    pub(crate) fn kill_time(&self) -> Duration {
        self.fencing.kill_time
    }

    /// What all nodes must have alike.
    pub(crate) fn agreed(&self) -> AgreedTimes {
        AgreedTimes::of(&self.membership, self.kill_time())
    }
}

/// Fence devices and levels.
pub(crate) fn fencing(document: &Document, timing: FencingTiming) -> FencingConfig {
    let mut config = FencingConfig::new(timing);
    for device in &document.fence_devices {
        let entry = FenceDevice {
            agent: device.agent.clone(),
            options: device.parameters.clone(),
            timeout: Duration::from_secs(u64::from(device.timeout_s)),
        };
        config.devices.insert(device.name.get_ref().clone(), entry);
    }
    for node in &document.nodes {
        let methods: Vec<Method> = node
            .fence_levels
            .iter()
            .map(|level| Method {
                name: level.name.clone(),
                steps: level
                    .steps
                    .iter()
                    .map(|step| Step {
                        device: step.device.get_ref().clone(),
                        action: match step.action.get_ref().as_str() {
                            "on" => Action::On,
                            "reboot" => Action::Reboot,
                            _ => Action::Off,
                        },
                        options: step.parameters.clone(),
                    })
                    .collect(),
            })
            .collect();
        if !methods.is_empty() {
            config.methods.insert(NodeId(*node.id.get_ref()), methods);
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_the_configuration_are_those_of_the_crates() {
        let times = Times::of(&Timing::default());
        assert_eq!(times.membership, Config::lan());
        let lan = FencingTiming { kill_time: Duration::from_millis(500), ..FencingTiming::lan() };
        assert_eq!(times.fencing, lan);
    }

    #[test]
    fn whatever_the_configuration_accepts_the_membership_accepts() {
        let timings = [
            "heartbeat_ms = 25\ndetection_ms = 100\ndrift_margin_ms = 5",
            "heartbeat_ms = 1000\ndetection_ms = 60000\ndrift_margin_ms = 3000\nrequest_deadline_ms = 120000\nstage_deadline_ms = 240000",
            "heartbeat_ms = 10\ndetection_ms = 60000\ndrift_margin_ms = 30000\nrequest_deadline_ms = 120000\nstage_deadline_ms = 240000",
        ];
        for timing in timings {
            let document = quorate_ccs::parse(&format!("name = \"c\"\n[timing]\n{timing}\n")).unwrap();
            assert_eq!(Times::of(&document.timing).membership.check(), Ok(()), "{timing}");
        }
    }

    #[test]
    fn whatever_the_configuration_accepts_as_a_fence_the_coordinator_accepts() {
        let names: Vec<String> = (0..16).map(|n| format!("d{n}")).collect();
        let value = "v".repeat(4096);
        let devices: Vec<String> = names
            .iter()
            .map(|d| {
                format!("[[fence_device]]\nname = \"{d}\"\nagent = \"fence_x\"\nparameters = {{ k = \"{value}\" }}\n")
            })
            .collect();
        let steps: Vec<String> = names.iter().map(|d| format!("{{ device = \"{d}\" }}")).collect();
        let level = format!("[[node.fence]]\nname = \"power\"\nsteps = [{}]\n", steps.join(", "));
        let node = "[[node]]\nid = 1\nname = \"a\"\naddress = \"192.0.2.1:1\"\n";
        let text = format!("name = \"c\"\n{node}{}{}", level.repeat(16), devices.concat());
        let document = quorate_ccs::parse(&text).unwrap();
        let config = fencing(&document, FencingTiming::lan());
        assert_eq!(config.check(), Ok(()));
        assert_eq!((config.methods[&NodeId(1)].len(), config.methods[&NodeId(1)][0].steps.len()), (16, 16));
    }
}
