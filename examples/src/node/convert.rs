//! The configuration's document in the words of the crates it configures.

use quorate_ccs::Document;
use quorate_fencing::{Action, FenceDevice, FencingConfig, FencingTiming, Method, Step};
use quorate_membership::NodeId;
use std::time::Duration;

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
