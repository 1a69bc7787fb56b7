//! The OCF resource agent interface 1.1: environment, actions and exit codes. Nothing here runs anything.

use crate::{Agent, ResourceConfig};
use core::time::Duration;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What an agent is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Action {
    /// Bring it up; success if it is up already.
    Start,
    /// Bring it down; success if it is down already.
    Stop,
    /// Say whether it runs. As a probe: with interval zero, before anything was started.
    Monitor {
        /// Whether it is a probe.
        probe: bool,
    },
}

impl Action {
    /// The argument the agent is called with.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Monitor { .. } => "monitor",
        }
    }

    /// How long it may take.
    #[must_use]
    pub fn timeout(self, resource: &ResourceConfig) -> Duration {
        match self {
            Self::Start => resource.timeouts.start,
            Self::Stop => resource.timeouts.stop,
            Self::Monitor { .. } => resource.timeouts.monitor,
        }
    }
}

/// How an action ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The agent's exit code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It took too long; its process group was killed.
    TimedOut,
    /// There is no such agent, or it could not be started.
    NotStarted(String),
}

/// How an action ended, and why, in the agent's own words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// How.
    pub exit: Exit,
    /// The last line that began with `ocf-exit-reason:`.
    pub reason: Option<String>,
}

/// What a monitor found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It runs.
    Running,
    /// It is cleanly stopped, or cannot be here at all.
    NotRunning,
    /// Neither: it is broken, or the agent is.
    Broken,
}

/// `OCF_SUCCESS`.
pub const SUCCESS: i32 = 0;
/// `OCF_ERR_INSTALLED`.
pub const ERR_INSTALLED: i32 = 5;
/// `OCF_NOT_RUNNING`.
pub const NOT_RUNNING: i32 = 7;

impl Outcome {
    /// Success without further words.
    #[must_use]
    pub fn code(code: i32) -> Self {
        Self { exit: Exit::Code(code), reason: None }
    }

    /// Whether a start or stop did what it should.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.exit == Exit::Code(SUCCESS)
    }

    /// What a monitor's result says. Promoted (8) and degraded (190, 191) ones run.
    #[must_use]
    pub fn found(&self, probe: bool) -> Found {
        match &self.exit {
            Exit::Code(SUCCESS | 8 | 190 | 191) => Found::Running,
            Exit::Code(NOT_RUNNING) => Found::NotRunning,
            // What is not installed cannot run here.
            Exit::Code(ERR_INSTALLED) | Exit::NotStarted(_) if probe => Found::NotRunning,
            _ => Found::Broken,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.exit {
            Exit::Code(code) => write!(f, "{}", code_name(*code))?,
            Exit::Signal(signal) => write!(f, "killed by signal {signal}")?,
            Exit::TimedOut => write!(f, "took too long and was killed")?,
            Exit::NotStarted(why) => write!(f, "cannot be started: {why}")?,
        }
        match &self.reason {
            Some(reason) => write!(f, " ({reason})"),
            None => Ok(()),
        }
    }
}

fn code_name(code: i32) -> String {
    let name = match code {
        0 => "success",
        1 => "generic error",
        2 => "invalid parameter on this node",
        3 => "unimplemented action",
        4 => "insufficient privileges",
        5 => "not installed",
        6 => "not configured",
        7 => "not running",
        8 => "running, promoted",
        9 => "promoted, but failed",
        190 => "degraded",
        191 => "degraded, promoted",
        _ => return format!("exit code {code}"),
    };
    name.to_owned()
}

/// The line of an agent's standard error that is meant for people: the last one that says so.
#[must_use]
pub fn exit_reason(stderr: &str) -> Option<String> {
    let said = stderr.lines().rev().find_map(|l| l.trim().strip_prefix("ocf-exit-reason:"))?;
    let said = said.trim();
    (!said.is_empty()).then(|| said.chars().take(500).collect())
}

/// The program of an agent.
#[must_use]
pub fn program(ocf_root: &Path, agent: &Agent) -> PathBuf {
    match agent {
        Agent::Ocf { provider, kind } => ocf_root.join("resource.d").join(provider).join(kind),
        Agent::Program(path) => path.clone(),
    }
}

/// What an agent finds in its environment, beside PATH. `instance` must be unique in the cluster: agents keep state
/// under that name. It never goes into the environment of this process.
#[must_use]
pub fn environment(
    ocf_root: &Path,
    instance: &str,
    node: &str,
    resource: &ResourceConfig,
    action: Action,
) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> =
        resource.params.iter().map(|(k, v)| (format!("OCF_RESKEY_{k}"), v.clone())).collect();
    let (provider, kind) = match &resource.agent {
        Agent::Ocf { provider, kind } => (provider.clone(), kind.clone()),
        Agent::Program(path) => {
            ("quorate".into(), path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        }
    };
    let interval = match action {
        Action::Monitor { probe: false } => resource.monitor_interval,
        _ => Duration::ZERO,
    };
    env.extend([
        ("OCF_ROOT".into(), ocf_root.display().to_string()),
        ("OCF_RA_VERSION_MAJOR".into(), "1".into()),
        ("OCF_RA_VERSION_MINOR".into(), "1".into()),
        ("OCF_RESOURCE_INSTANCE".into(), instance.into()),
        ("OCF_RESOURCE_TYPE".into(), kind),
        ("OCF_RESOURCE_PROVIDER".into(), provider),
        ("OCF_RESKEY_CRM_meta_timeout".into(), action.timeout(resource).as_millis().to_string()),
        ("OCF_RESKEY_CRM_meta_interval".into(), interval.as_millis().to_string()),
        ("OCF_RESKEY_CRM_meta_on_node".into(), node.into()),
        ("OCF_RESKEY_CRM_meta_name".into(), action.name().into()),
    ]);
    if matches!(action, Action::Monitor { .. }) {
        env.insert("OCF_CHECK_LEVEL".into(), "0".into());
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_reason_counts() {
        let text = "noise\nocf-exit-reason:first\n  ocf-exit-reason: second one \nmore noise\n";
        assert_eq!(exit_reason(text).as_deref(), Some("second one"));
        assert_eq!(exit_reason("ocf-exit-reason:\n"), None);
        assert_eq!(exit_reason(""), None);
    }

    #[test]
    fn not_installed_is_no_failure_of_a_probe() {
        assert_eq!(Outcome::code(ERR_INSTALLED).found(true), Found::NotRunning);
        assert_eq!(Outcome::code(ERR_INSTALLED).found(false), Found::Broken);
        assert_eq!(Outcome::code(190).found(false), Found::Running);
        let late = Outcome { exit: Exit::TimedOut, reason: None };
        assert_eq!(late.found(true), Found::Broken);
    }

    /// OCF resource agent API 1.1, "Exit status codes", with those that Pacemaker added.
    #[test]
    fn every_exit_code_means_what_the_standard_says() {
        use Found::{Broken, NotRunning, Running};
        let of_monitor = [(0, Running), (7, NotRunning), (8, Running), (190, Running), (191, Running)];
        for code in (0..=255).chain([-1]) {
            let found = of_monitor.iter().find(|(c, _)| *c == code).map_or(Broken, |(_, found)| *found);
            assert_eq!(Outcome::code(code).found(false), found, "monitor: {code}");
            let probed = if code == 5 { NotRunning } else { found };
            assert_eq!(Outcome::code(code).found(true), probed, "probe: {code}");
            assert_eq!(Outcome::code(code).is_success(), code == 0, "start and stop: {code}");
        }
        for exit in [Exit::Signal(15), Exit::TimedOut, Exit::NotStarted("x".into())] {
            let outcome = Outcome { exit, reason: None };
            assert!(!outcome.is_success());
            assert_eq!(outcome.found(false), Broken);
        }
    }

    #[test]
    fn an_agent_is_told_what_the_standard_promises_it() {
        let resource = ResourceConfig {
            name: "ip".into(),
            agent: Agent::Ocf { provider: "heartbeat".into(), kind: "IPaddr2".into() },
            params: [("ip".into(), "192.0.2.7".into()), ("nic".into(), "lo".into())].into(),
            timeouts: crate::Timeouts {
                start: Duration::from_secs(20),
                stop: Duration::from_secs(30),
                monitor: Duration::from_millis(500),
            },
            monitor_interval: Duration::from_secs(10),
            children: vec![],
        };
        let told = |action| environment(Path::new("/ocf"), "web-ip", "node1", &resource, action);
        let wanted = |timeout: &str, interval: &str, name: &str| {
            let all = [
                ("OCF_ROOT", "/ocf"),
                ("OCF_RA_VERSION_MAJOR", "1"),
                ("OCF_RA_VERSION_MINOR", "1"),
                ("OCF_RESOURCE_INSTANCE", "web-ip"),
                ("OCF_RESOURCE_TYPE", "IPaddr2"),
                ("OCF_RESOURCE_PROVIDER", "heartbeat"),
                ("OCF_RESKEY_ip", "192.0.2.7"),
                ("OCF_RESKEY_nic", "lo"),
                ("OCF_RESKEY_CRM_meta_timeout", timeout),
                ("OCF_RESKEY_CRM_meta_interval", interval),
                ("OCF_RESKEY_CRM_meta_on_node", "node1"),
                ("OCF_RESKEY_CRM_meta_name", name),
            ];
            all.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect::<BTreeMap<_, _>>()
        };
        assert_eq!(told(Action::Start), wanted("20000", "0", "start"));
        assert_eq!(told(Action::Stop), wanted("30000", "0", "stop"));
        let level = |mut env: BTreeMap<String, String>| {
            env.insert("OCF_CHECK_LEVEL".into(), "0".into());
            env
        };
        // Agents know a probe by its interval.
        assert_eq!(told(Action::Monitor { probe: true }), level(wanted("500", "0", "monitor")));
        assert_eq!(told(Action::Monitor { probe: false }), level(wanted("500", "10000", "monitor")));
        let root = Path::new("/usr/lib/ocf");
        let wanted = Path::new("/usr/lib/ocf/resource.d/heartbeat/IPaddr2");
        assert_eq!(program(root, &resource.agent), wanted);
    }

    #[test]
    fn what_a_mad_agent_says_is_cut_and_never_a_panic() {
        let mut rng = quorate_membership::Rng::new(5);
        let mut found = 0;
        for _ in 0..5_000 {
            let mut bytes = "started\nocf-exit-reason: no such device \u{1f480}\nmore".repeat(3).into_bytes();
            quorate_membership::sim::damage(&mut bytes, &mut rng);
            let said = exit_reason(&String::from_utf8_lossy(&bytes));
            assert!(said.as_ref().is_none_or(|s| !s.is_empty() && s.chars().count() <= 500));
            found += u32::from(said.is_some());
        }
        assert!(1_000 < found, "{found}");
        let long = format!("ocf-exit-reason:{}", "\u{1f480}".repeat(100_000));
        assert_eq!(exit_reason(&long).map(|s| s.chars().count()), Some(500));
    }
}
