//! Runs the methods of a victim's node: in order, all steps of one, again and again until one has turned it off.

use super::incident::Incident;
use super::{Attempt, BugKind, Coordinator, Output};
use crate::{AgentError, FenceDevice, How, Method, Step, Wait};
use quorate_membership::{Identity, Instant, Safety};
use std::collections::BTreeMap;

/// How far the methods have come for one victim.
#[derive(Debug)]
pub(super) struct Power {
    /// It was verified to be off: by this device. Never unset (once per incident).
    pub(super) off: Option<String>,
    pub(super) running: Option<Running>,
    /// Which method comes next; counts on over the end of the list.
    next_method: usize,
    retry_at: Instant,
    rounds_failed: u32,
    is_spared: bool,
    /// The last failure in the history per method, device and action: the same one again is not recorded again.
    failures: BTreeMap<(String, String, crate::Action), String>,
}

/// A method under way. The method is a copy, for the configuration may change meanwhile.
#[derive(Debug)]
pub(super) struct Running {
    attempt: Attempt,
    method: Method,
    step: usize,
}

impl Power {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            off: None,
            running: None,
            next_method: 0,
            retry_at: now,
            rounds_failed: 0,
            is_spared: false,
            failures: BTreeMap::new(),
        }
    }
}

impl Coordinator {
    /// Whether methods must run for `who`, or when to look again.
    fn power_is_due(&self, now: Instant, who: Identity, incident: &Incident) -> Result<bool, Instant> {
        if self.open_items(who).any(|(_, i)| i.attachment.safety == Safety::Power) {
            return Ok(true);
        }
        let mut look_again = None;
        for server in self.servers_of(who).iter().filter_map(|s| self.servers.get(s)) {
            if incident.removed <= server.confirmed {
                continue;
            }
            if server.is_stuck {
                return Ok(true);
            }
            if let Some(since) = server.failing_since {
                let at = since.max(incident.since) + self.config.timing.storage_patience;
                if at <= now {
                    return Ok(true);
                }
                look_again = Some(look_again.map_or(at, |l: Instant| l.min(at)));
            }
        }
        look_again.map_or(Ok(false), Err)
    }

    /// Whether something else is done to the victim's machine, or better first: "off" and "on" of one machine must not run
    /// at once, or two supplies are each seen off and never both; and turning off the latest life serves all before it.
    fn machine_is_busy(&self, now: Instant, who: Identity) -> bool {
        let others = self.incidents.iter().filter(|(w, _)| w.node == who.node && **w != who);
        let mut others = others.filter(|(_, i)| i.power.off.is_none());
        self.restarts.contains_key(&who.node)
            || others.any(|(w, i)| {
                let is_due = || self.power_is_due(now, *w, i) == Ok(true);
                i.power.running.is_some() || who.incarnation < w.incarnation && is_due()
            })
    }

    /// Whether a later life of the victim's node is a member: turning the machine off would kill that one.
    fn is_back(&self, who: Identity) -> bool {
        self.view.as_ref().is_some_and(|v| v.members.contains_key(&who.node))
    }

    pub(super) fn advance_power(&mut self, now: Instant, who: Identity, out: &mut Vec<Output>) {
        let Some(incident) = self.incidents.get(&who) else { return };
        if incident.power.off.is_some() || incident.power.running.is_some() {
            return;
        }
        match self.power_is_due(now, who, incident) {
            Ok(true) => {}
            Ok(false) => return,
            Err(at) => {
                self.wake_at(at);
                return;
            }
        }
        if self.machine_is_busy(now, who) {
            return;
        }
        if self.is_back(who) {
            if !incident.power.is_spared {
                if let Some(incident) = self.incidents.get_mut(&who) {
                    incident.power.is_spared = true;
                }
                self.record(now, who, How::Spared, Ok(()), out);
            }
            return;
        }
        let methods = self.config.methods.get(&who.node).map_or(0, Vec::len);
        if methods == 0 {
            return;
        }
        let retry_at = incident.power.retry_at;
        if now < retry_at {
            self.wake_at(retry_at);
            return;
        }
        let next = incident.power.next_method % methods;
        let method = self.config.methods.get(&who.node).and_then(|m| m.get(next)).cloned();
        if let Some(method) = method {
            self.start_step(now, who, method, 0, out);
        }
    }

    fn start_step(
        &mut self,
        now: Instant,
        who: Identity,
        method: Method,
        index: usize,
        out: &mut Vec<Output>,
    ) {
        let Some((step, device)) = self.step_of(&method, index) else {
            // The configuration lost the device in the middle of the method.
            self.fail_method(now, who);
            return;
        };
        let attempt = self.attempt();
        let node = self.name_of(who);
        if let Some(incident) = self.incidents.get_mut(&who) {
            incident.power.running = Some(Running { attempt, method, step: index });
        }
        out.push(Output::Step { attempt, victim: who, node, device, step });
    }

    pub(super) fn on_stepped(
        &mut self,
        now: Instant,
        attempt: Attempt,
        result: Result<(), AgentError>,
        out: &mut Vec<Output>,
    ) {
        if let Some(node) = self.restarts.iter().find(|(_, r)| r.1.attempt == attempt).map(|(n, _)| *n) {
            let Some((who, running)) = self.restarts.remove(&node) else { return };
            self.record_step(now, who, &running.method, running.step, &result, out);
            self.turn_on(who, running.method, running.step + 1, out);
            return;
        }
        let is_it = |i: &Incident| i.power.running.as_ref().is_some_and(|r| r.attempt == attempt);
        let Some(who) = self.incidents.iter().find(|(_, i)| is_it(i)).map(|(w, _)| *w) else { return };
        let Some(running) = self.incidents.get_mut(&who).and_then(|i| i.power.running.take()) else { return };
        let Running { method, step: index, .. } = running;
        self.record_step(now, who, &method, index, &result, out);
        if result.is_err() && !self.bug_is(BugKind::IgnoresFailure) {
            self.fail_method(now, who);
            return;
        }
        let is_off = index + 1 == method.off_steps() || self.bug_is(BugKind::FirstStepIsEnough);
        if is_off {
            let device = method.steps.get(index).map(|s| s.device.clone()).unwrap_or_default();
            let is_covered = |w: &Identity| w.node == who.node && w.incarnation <= who.incarnation;
            for (_, incident) in self.incidents.iter_mut().filter(|(w, _)| is_covered(w)) {
                incident.power.off.get_or_insert_with(|| device.clone());
            }
            self.turn_on(who, method, index + 1, out);
        } else if self.is_coordinating() && !self.is_back(who) {
            // A coordinator that may not fence any more starts no further step.
            self.start_step(now, who, method, index + 1, out);
        }
    }

    /// Goes on with the steps after the victim was verified to be off. They outlive the incident, which ends as soon as
    /// the cluster has decided that the victim is fenced, and their failures undo nothing. They end early, and the node
    /// stays off, where this node loses quorum or a later life of the victim's node is to be fenced.
    fn turn_on(&mut self, who: Identity, method: Method, index: usize, out: &mut Vec<Output>) {
        let is_member = self.view.as_ref().is_some_and(|v| v.contains(self.me));
        let fails_again =
            self.incidents.keys().any(|w| w.node == who.node && who.incarnation < w.incarnation);
        if !self.quorate || !is_member || fails_again {
            return;
        }
        let Some((step, device)) = self.step_of(&method, index) else { return };
        let attempt = self.attempt();
        let node = self.name_of(who);
        self.restarts.insert(who.node, (who, Running { attempt, method, step: index }));
        out.push(Output::Step { attempt, victim: who, node, device, step });
    }

    fn step_of(&self, method: &Method, index: usize) -> Option<(Step, FenceDevice)> {
        let step = method.steps.get(index)?.clone();
        let device = self.config.devices.get(&step.device)?.clone();
        Some((step, device))
    }

    fn name_of(&self, who: Identity) -> String {
        let entry = self.view.as_ref().and_then(|v| v.roster.get(&who.node));
        entry.map_or_else(|| who.node.to_string(), |r| r.name.clone())
    }

    fn record_step(
        &mut self,
        now: Instant,
        who: Identity,
        method: &Method,
        index: usize,
        result: &Result<(), AgentError>,
        out: &mut Vec<Output>,
    ) {
        let Some(step) = method.steps.get(index) else { return };
        let key = (method.name.clone(), step.device.clone(), step.action);
        let how = How::Device { method: key.0.clone(), device: key.1.clone(), action: key.2 };
        let result = result.as_ref().copied().map_err(ToString::to_string);
        let known = self.incidents.get_mut(&who).map(|i| &mut i.power.failures);
        let is_new = match (&result, known) {
            (Err(text), Some(known)) => known.insert(key, text.clone()).as_ref() != Some(text),
            _ => true,
        };
        if is_new {
            self.record(now, who, how, result, out);
        }
    }

    /// Goes on with the next method: at once, or after a pause when all have failed.
    fn fail_method(&mut self, now: Instant, who: Identity) {
        let methods = self.config.methods.get(&who.node).map_or(0, Vec::len).max(1);
        let Some(incident) = self.incidents.get_mut(&who) else { return };
        incident.power.running = None;
        incident.power.next_method += 1;
        if incident.power.next_method.is_multiple_of(methods) {
            incident.power.rounds_failed += 1;
            let failed = incident.power.rounds_failed;
            let pause = self.pause(failed);
            if let Some(incident) = self.incidents.get_mut(&who) {
                incident.power.retry_at = now + pause;
            }
        }
    }

    pub(super) fn power_wait(&self, now: Instant, who: Identity, incident: &Incident) -> Option<Wait> {
        if incident.power.off.is_some() {
            return None;
        }
        if let Some(running) = &incident.power.running {
            let device = running.method.steps.get(running.step)?.device.clone();
            return Some(Wait::Device { method: running.method.name.clone(), device });
        }
        if self.power_is_due(now, who, incident) != Ok(true) {
            return None;
        }
        let has_method = self.config.methods.get(&who.node).is_some_and(|m| !m.is_empty());
        if self.is_back(who) || !has_method {
            return Some(Wait::Person);
        }
        Some(Wait::Retry(incident.power.retry_at))
    }
}
