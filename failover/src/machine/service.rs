//! One service on this node: from the attachment to the last monitor, and back in exactly the reverse order.

use super::{Attempt, Bug, Event, Manager, Output, RETRY_TIME, resource_id};
use crate::ocf::Found;
use crate::place::{Plan, Reaction, Target, place, react};
use crate::shared::{Report, Versioned};
use crate::{Action, Exit, Outcome, ServiceConfig, StateName};
use quorate_membership::{AttachRequest, Instant, Request, RequestError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A service this node has, wants, or gets rid of.
#[derive(Debug)]
pub(super) struct Local {
    /// As it was when it was taken: it is stopped as it was started.
    pub(super) config: Arc<ServiceConfig>,
    /// Whether it should run here.
    pub(super) is_wanted: bool,
    phase: Phase,
    /// The attachment was asked for: it may be decided, whatever was answered.
    may_be_attached: bool,
    /// When it was restarted after a failure.
    restarts: Vec<Instant>,
    detail: Option<String>,
    reported: Option<Report>,
}

/// Where it stands. Indices are places in the start order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// The attachment is to be asked for.
    New { after: Instant },
    /// It was asked for.
    Attaching(Attempt),
    /// Attached; the owner lock was asked for.
    Locking,
    /// Locked; `left` resources are still to be looked at for leftovers, the last in the start order first.
    Probing { left: usize, running: Option<Running> },
    /// Resources below `next` are up. `is_started`: `next` was started and is to be verified.
    Starting { next: usize, is_started: bool, running: Option<Running> },
    /// All are up; each is monitored when due.
    Up { due: BTreeMap<usize, Instant>, running: Option<Running> },
    /// The resources below `left` are still to be stopped, the last first.
    Stopping { left: usize, running: Option<Running>, then: Then },
    /// A resource would not stop. Attachment and lock stay: it may run.
    StopFailed { left: usize },
    /// The owner lock is being given up.
    Unlocking,
    /// The attachment is to be given up.
    Leaving { after: Instant },
    /// That was asked for.
    Detaching(Attempt),
}

/// An agent at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    attempt: Attempt,
    resource: usize,
    action: Action,
}

/// What follows when all is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// Give it up.
    Release,
    /// It could not be started: not here again.
    StartFailed,
    /// It failed while it ran: as the recovery policy says.
    RunFailed,
}

impl Local {
    pub(super) fn new(config: Arc<ServiceConfig>) -> Self {
        Self {
            config,
            is_wanted: true,
            phase: Phase::New { after: Instant(0) },
            may_be_attached: false,
            restarts: Vec::new(),
            detail: None,
            reported: None,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Up { .. })
    }

    pub(super) fn next_deadline(&self, frozen: bool) -> Option<Instant> {
        match &self.phase {
            Phase::Leaving { after } => Some(*after),
            _ if frozen => None,
            Phase::New { after } => Some(*after),
            Phase::Up { due, running: None } => due.values().min().copied(),
            _ => None,
        }
    }

    fn count(&self) -> usize {
        self.config.start_order().len()
    }

    fn resource_name(&self, index: usize) -> String {
        self.config.start_order().get(index).map_or_else(String::new, |r| r.name.clone())
    }

    fn running(&self) -> Option<Running> {
        match &self.phase {
            Phase::Probing { running, .. }
            | Phase::Starting { running, .. }
            | Phase::Up { running, .. }
            | Phase::Stopping { running, .. } => *running,
            _ => None,
        }
    }

    fn report(&self) -> Report {
        let state = match &self.phase {
            Phase::Up { .. } => StateName::Running,
            Phase::Stopping { .. } | Phase::Unlocking | Phase::Leaving { .. } | Phase::Detaching(_) => {
                StateName::Stopping
            }
            Phase::StopFailed { .. } => StateName::StopFailed,
            _ => StateName::Starting,
        };
        let restarts = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        Report { state, detail: self.detail.clone(), restarts }
    }
}

impl Manager {
    /// Takes the next steps of a service, as far as nothing is waited for.
    pub(super) fn step(&mut self, now: Instant, service: &str, out: &mut Vec<Output>) {
        let Some(mut local) = self.local.remove(service) else { return };
        loop {
            let before = local.phase.clone();
            if !self.advance(now, &mut local, out) {
                return;
            }
            if local.phase == before {
                break;
            }
        }
        let report = local.report();
        if local.reported.as_ref() != Some(&report) {
            local.reported = Some(report.clone());
            let (count, by) = (self.next_count(), self.me);
            self.facts.entry(service.to_owned()).or_default().report =
                Some(Versioned { count, by, value: report });
            self.announce(out);
        }
        self.local.insert(service.to_owned(), local);
    }

    /// One step; false if there is nothing of the service left here.
    fn advance(&mut self, now: Instant, local: &mut Local, out: &mut Vec<Output>) -> bool {
        let may_start = self.is_quorate || self.bug_is(Bug::IgnoresQuorum);
        match local.phase.clone() {
            Phase::New { .. } if !local.is_wanted => {
                if !local.may_be_attached {
                    return false;
                }
                local.phase = Phase::Leaving { after: now };
            }
            Phase::New { after } if self.is_quorate && after <= now => {
                let config = &local.config;
                let attempt = self.propose(
                    Request::Attach(AttachRequest {
                        resource: resource_id(&config.name),
                        safety: config.safety,
                        servers: config.servers.clone(),
                        journals: None,
                        lockspace: None,
                        exclusive: true,
                    }),
                    out,
                );
                local.may_be_attached = true;
                local.phase = Phase::Attaching(attempt);
            }
            Phase::Probing { running: None, .. } if !local.is_wanted => self.release(local, out),
            Phase::Probing { left: 0, running: None } => {
                local.phase = Phase::Starting { next: 0, is_started: false, running: None };
            }
            Phase::Probing { left, running: None } if may_start => {
                let running = Some(self.run(local, left - 1, Action::Monitor { probe: true }, out));
                local.phase = Phase::Probing { left, running };
            }
            Phase::Starting { next, is_started, running: None } if !local.is_wanted => {
                self.begin_stop(local, next + usize::from(is_started), Then::Release, out);
            }
            Phase::Starting { next, running: None, .. } if next == local.count() => {
                let order = local.config.start_order();
                let due = (0..).zip(order).filter(|(_, r)| !r.monitor_interval.is_zero());
                let due = due.map(|(i, r)| (i, now + r.monitor_interval)).collect();
                local.phase = Phase::Up { due, running: None };
                local.detail = None;
                out.push(Output::Event(Event::Started { service: local.config.name.clone() }));
            }
            Phase::Starting { next, is_started, running: None } if may_start => {
                let action = if is_started { Action::Monitor { probe: false } } else { Action::Start };
                let index = if self.bug_is(Bug::StartsBackwards) { local.count() - 1 - next } else { next };
                let running = Some(self.run(local, index, action, out));
                local.phase = Phase::Starting { next, is_started, running };
            }
            Phase::Up { running: None, .. } if !local.is_wanted => {
                self.begin_stop(local, local.count(), Then::Release, out);
            }
            // While frozen nothing is decided on what a monitor says (R8).
            Phase::Up { due, running: None } if self.is_quorate => {
                if let Some((resource, _)) =
                    due.iter().filter(|(_, at)| **at <= now).min_by_key(|(_, at)| **at)
                {
                    let running = Some(self.run(local, *resource, Action::Monitor { probe: false }, out));
                    local.phase = Phase::Up { due, running };
                }
            }
            Phase::Stopping { left: 0, running: None, then } => self.all_stopped(now, local, then, out),
            Phase::Stopping { left, running: None, then } => {
                let index = if self.bug_is(Bug::StopsForwards) { local.count() - left } else { left - 1 };
                let running = Some(self.run(local, index, Action::Stop, out));
                local.phase = Phase::Stopping { left, running, then };
            }
            Phase::Leaving { after } if after <= now => {
                let attempt = self.propose(Request::Detach(resource_id(&local.config.name)), out);
                local.phase = Phase::Detaching(attempt);
            }
            _ => {}
        }
        true
    }

    fn run(&mut self, local: &Local, resource: usize, action: Action, out: &mut Vec<Output>) -> Running {
        let attempt = self.next_attempt();
        let config = Arc::clone(&local.config);
        out.push(Output::Run { attempt, service: config.name.clone(), resource, config, action });
        Running { attempt, resource, action }
    }

    fn begin_stop(&mut self, local: &mut Local, left: usize, then: Then, out: &mut Vec<Output>) {
        if self.bug_is(Bug::ReleasesFirst) {
            out.push(Output::Unlock { service: local.config.name.clone() });
            self.propose(Request::Detach(resource_id(&local.config.name)), out);
        }
        local.phase = Phase::Stopping { left, running: None, then };
    }

    fn release(&self, local: &mut Local, out: &mut Vec<Output>) {
        out.push(Output::Unlock { service: local.config.name.clone() });
        local.phase = Phase::Unlocking;
    }

    fn all_stopped(&mut self, now: Instant, local: &mut Local, then: Then, out: &mut Vec<Output>) {
        out.push(Output::Event(Event::Stopped { service: local.config.name.clone() }));
        if !local.is_wanted {
            return self.release(local, out);
        }
        match then {
            Then::Release => {}
            Then::StartFailed => self.mark_failed(local),
            Then::RunFailed => match react(&local.config, &local.restarts, now, self.has_other(local)) {
                Reaction::Restart => {
                    let window = local.config.restart_expire_time;
                    if !window.is_zero() {
                        local.restarts.retain(|at| now.since(*at) < window);
                    }
                    local.restarts.push(now);
                    local.phase = Phase::Probing { left: local.count(), running: None };
                    return;
                }
                Reaction::Relocate => self.mark_failed(local),
                Reaction::Disable => {
                    let (count, by) = (self.next_count(), self.me);
                    let facts = self.facts.entry(local.config.name.clone()).or_default();
                    facts.target = Some(Versioned { count, by, value: Target::Disabled });
                }
            },
        }
        // Why it stopped is told before it is given up: a node that is free to take it must not do so for want of that.
        self.announce(out);
        self.release(local, out);
    }

    /// Not here again, until a person says so or a new life of this node begins.
    fn mark_failed(&mut self, local: &mut Local) {
        let (count, by) = (self.next_count(), self.me);
        let reason = local.detail.clone().unwrap_or_else(|| "failed".into());
        let facts = self.facts.entry(local.config.name.clone()).or_default();
        facts.failed.insert(by, Versioned { count, by, value: Some(reason) });
        local.is_wanted = false;
    }

    /// Whether another node could take the service.
    fn has_other(&self, local: &Local) -> bool {
        let mut state = self.cluster_state(&local.config, &BTreeMap::new());
        state.owner = None;
        state.failed.insert(self.me.node);
        matches!(place(&local.config, &state), Plan::Start(_))
    }

    pub(super) fn on_proposed(
        &mut self,
        now: Instant,
        attempt: Attempt,
        result: Result<(), RequestError>,
        out: &mut Vec<Output>,
    ) {
        if self.closing.remove(&attempt).is_some() {
            if result.is_err() {
                self.close_after = now + RETRY_TIME;
            }
            return;
        }
        let waits =
            |l: &&mut Local| l.phase == Phase::Attaching(attempt) || l.phase == Phase::Detaching(attempt);
        let ignores_refusal = self.bug_is(Bug::StartsUnfenced);
        let ignores_lock = self.bug_is(Bug::IgnoresLock);
        let Some(local) = self.local.values_mut().find(waits) else { return };
        let service = local.config.name.clone();
        match (&local.phase, result) {
            (Phase::Attaching(_), result) if result.is_ok() || ignores_refusal => {
                out.push(Output::Lock { service });
                local.phase = Phase::Locking;
                if ignores_lock {
                    local.phase = Phase::Probing { left: local.count(), running: None };
                }
            }
            (Phase::Attaching(_), Err(error)) => {
                local.detail = Some(error.to_string());
                // A refusal made no record; anything else may have.
                local.may_be_attached = !matches!(error, RequestError::Refused(_));
                local.phase = Phase::New { after: now + RETRY_TIME };
            }
            (_, Ok(())) => {
                self.local.remove(&service);
                // What was said of it by this life is over.
                if let Some(facts) = self.facts.get_mut(&service)
                    && facts.report.as_ref().is_some_and(|r| r.by == self.me)
                {
                    facts.report = None;
                }
                self.announce(out);
            }
            (_, Err(_)) => local.phase = Phase::Leaving { after: now + RETRY_TIME },
        }
    }

    pub(super) fn on_locked(&mut self, now: Instant, service: &str, held: bool, out: &mut Vec<Output>) {
        let skips = self.bug_is(Bug::SkipsProbe);
        let Some(local) = self.local.get_mut(service) else {
            if held {
                out.push(Output::Unlock { service: service.to_owned() });
            }
            return;
        };
        if local.phase != Phase::Locking {
            return;
        }
        local.phase = match held {
            true if skips => Phase::Starting { next: 0, is_started: false, running: None },
            true => Phase::Probing { left: local.count(), running: None },
            false => {
                local.detail = Some("the owner lock was not granted".into());
                Phase::Leaving { after: now + RETRY_TIME }
            }
        };
    }

    pub(super) fn on_unlocked(&mut self, service: &str, _out: &mut Vec<Output>) {
        if let Some(local) = self.local.get_mut(service)
            && local.phase == Phase::Unlocking
        {
            local.phase = Phase::Leaving { after: Instant(0) };
        }
    }

    pub(super) fn on_done(
        &mut self,
        now: Instant,
        attempt: Attempt,
        outcome: &Outcome,
        out: &mut Vec<Output>,
    ) {
        let name = self
            .local
            .iter()
            .find(|(_, l)| l.running().is_some_and(|r| r.attempt == attempt))
            .map(|(name, _)| name.clone());
        let Some(name) = name else { return };
        let Some(mut local) = self.local.remove(&name) else { return };
        if let Some(running) = local.running() {
            self.on_result(now, &mut local, running, outcome, out);
        }
        self.local.insert(name, local);
    }

    fn on_result(
        &mut self,
        now: Instant,
        local: &mut Local,
        ran: Running,
        outcome: &Outcome,
        out: &mut Vec<Output>,
    ) {
        let resource = local.resource_name(ran.resource);
        let fail = |local: &mut Local, out: &mut Vec<Output>| {
            local.detail = Some(format!("{resource}: {}: {outcome}", ran.action.name()));
            out.push(Output::Event(Event::Failed {
                service: local.config.name.clone(),
                resource: resource.clone(),
                action: ran.action,
                outcome: outcome.clone(),
            }));
        };
        let stopped = outcome.is_success() || self.bug_is(Bug::IgnoresFailedStop);
        match (local.phase.clone(), ran.action) {
            (Phase::Probing { left, .. }, Action::Monitor { .. }) => match outcome.found(true) {
                Found::NotRunning => local.phase = Phase::Probing { left: left - 1, running: None },
                Found::Running | Found::Broken => {
                    let service = local.config.name.clone();
                    out.push(Output::Event(Event::Leftover { service, resource: resource.clone() }));
                    let running = Some(self.run(local, ran.resource, Action::Stop, out));
                    local.phase = Phase::Probing { left, running };
                }
            },
            (Phase::Probing { left, .. }, _) if stopped => {
                local.phase = Phase::Probing { left: left - 1, running: None };
            }
            (Phase::Stopping { left, then, .. }, _) if stopped => {
                local.phase = Phase::Stopping { left: left - 1, running: None, then };
            }
            (Phase::Probing { left, .. } | Phase::Stopping { left, .. }, _) => {
                fail(local, out);
                local.phase = Phase::StopFailed { left };
            }
            (Phase::Starting { next, .. }, Action::Start) if outcome.is_success() => {
                local.phase = Phase::Starting { next, is_started: true, running: None };
            }
            (Phase::Starting { next, .. }, Action::Monitor { .. })
                if outcome.found(false) == Found::Running =>
            {
                local.phase = Phase::Starting { next: next + 1, is_started: false, running: None };
            }
            (Phase::Starting { next, .. }, action) => {
                fail(local, out);
                // Where there is no such agent nothing was started, and nobody could stop it.
                let began = action != Action::Start || !matches!(outcome.exit, Exit::NotStarted(_));
                self.begin_stop(local, next + usize::from(began), Then::StartFailed, out);
            }
            (Phase::Up { mut due, .. }, _) if outcome.found(false) == Found::Running => {
                let interval =
                    local.config.start_order().get(ran.resource).map_or(RETRY_TIME, |r| r.monitor_interval);
                due.insert(ran.resource, now + interval);
                local.phase = Phase::Up { due, running: None };
            }
            (Phase::Up { .. }, _) => {
                fail(local, out);
                self.begin_stop(local, local.count(), Then::RunFailed, out);
            }
            _ => {}
        }
    }

    /// A person disabled a service whose stop failed: it is tried once more, from the last resource on.
    pub(super) fn retry_stop(&mut self, service: &str) {
        if let Some(local) = self.local.get_mut(service)
            && let Phase::StopFailed { .. } = local.phase
        {
            let left = local.count();
            local.phase = Phase::Stopping { left, running: None, then: Then::Release };
        }
    }
}
