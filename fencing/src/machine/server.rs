//! Keeps every enrolled storage server at the newest view that changes whom it admits.
//!
//! One installation serves all incidents, and the admission of new members too: a server that confirmed an epoch serves
//! exactly that epoch's members.

use super::{Attempt, Coordinator, Output};
use crate::{How, StorageFenceError};
use core::time::Duration;
use quorate_membership::{Epoch, Identity, Instant, ServerId, View};

/// What is known of one storage server.
#[derive(Debug)]
pub(super) struct Server {
    /// The highest epoch it confirmed to this coordinator.
    pub(super) confirmed: Epoch,
    /// The installation under way.
    pub(super) attempt: Option<Attempt>,
    /// The next one starts no earlier.
    pub(super) retry_at: Instant,
    /// Failures in a row.
    pub(super) failures: u32,
    /// What it said last, while it fails.
    pub(super) failure: Option<String>,
    /// Since when it fails.
    pub(super) failing_since: Option<Instant>,
    /// It said that it cannot drain, so the next level runs at once.
    pub(super) is_stuck: bool,
    /// The chain above `confirmed` did not fit: send all of it.
    pub(super) wants_all: bool,
}

impl Coordinator {
    pub(super) fn sync_servers(&mut self, now: Instant, view: &View) {
        self.servers.retain(|id, _| view.servers.contains_key(id));
        for id in view.servers.keys() {
            self.servers.entry(*id).or_insert_with(|| Server {
                confirmed: Epoch(0),
                attempt: None,
                retry_at: now,
                failures: 0,
                failure: None,
                failing_since: None,
                is_stuck: false,
                wants_all: false,
            });
        }
    }

    pub(super) fn advance_servers(&mut self, now: Instant, out: &mut Vec<Output>) {
        let Some(view) = self.view.clone() else { return };
        for (id, entry) in &view.servers {
            let Some(server) = self.servers.get(id) else { continue };
            if self.admission <= server.confirmed || server.attempt.is_some() {
                continue;
            }
            // A new view is worth a try at once if the last try did not fail.
            if now < server.retry_at {
                self.wake_at(server.retry_at);
                continue;
            }
            let since = if server.wants_all { Epoch(0) } else { server.confirmed };
            let attempt = self.attempt();
            if let Some(server) = self.servers.get_mut(id) {
                server.attempt = Some(attempt);
            }
            let timeout = self.config.timing.install_timeout;
            out.push(Output::Install { attempt, server: *id, entry: entry.clone(), since, timeout });
        }
    }

    pub(super) fn on_installed(
        &mut self,
        now: Instant,
        attempt: Attempt,
        result: Result<Epoch, StorageFenceError>,
        out: &mut Vec<Output>,
    ) {
        let found = self.servers.iter_mut().find(|(_, s)| s.attempt == Some(attempt));
        let Some((id, server)) = found else { return };
        let id = *id;
        server.attempt = None;
        match result {
            Ok(epoch) => {
                let before = server.confirmed;
                server.confirmed = before.max(epoch);
                server.failures = 0;
                server.failure = None;
                server.failing_since = None;
                server.is_stuck = false;
                server.wants_all = false;
                server.retry_at = now;
                if epoch < self.admission {
                    // The views moved on while it was asked; not a failure, but not a busy loop either.
                    server.retry_at = now + Duration::from_millis(1);
                }
                self.record_confirmed(now, id, before, epoch, out);
            }
            Err(error) => self.on_install_failed(now, id, &error, out),
        }
    }

    fn record_confirmed(
        &mut self,
        now: Instant,
        server: ServerId,
        before: Epoch,
        epoch: Epoch,
        out: &mut Vec<Output>,
    ) {
        for who in self.victims_at(server) {
            let newly = self.incidents.get(&who).is_some_and(|i| before < i.removed && i.removed <= epoch);
            if newly {
                self.record(now, who, How::Storage { server, epoch }, Ok(()), out);
            }
        }
    }

    fn on_install_failed(
        &mut self,
        now: Instant,
        id: ServerId,
        error: &StorageFenceError,
        out: &mut Vec<Output>,
    ) {
        let text = error.to_string();
        let Some(server) = self.servers.get_mut(&id) else { return };
        server.failures += 1;
        let failures = server.failures;
        let is_new = server.failure.as_ref() != Some(&text);
        server.failure = Some(text.clone());
        server.failing_since.get_or_insert(now);
        server.is_stuck = matches!(error, StorageFenceError::Undrained { .. });
        server.wants_all = matches!(error, StorageFenceError::Chain(_));
        let pause = self.pause(failures);
        if let Some(server) = self.servers.get_mut(&id) {
            server.retry_at = now + pause;
        }
        if is_new {
            let epoch = self.admission;
            for who in self.victims_at(id) {
                if self.incidents.get(&who).is_some_and(|i| self.confirmed_at(id) < i.removed) {
                    self.record(now, who, How::Storage { server: id, epoch }, Err(text.clone()), out);
                }
            }
        }
    }

    pub(super) fn confirmed_at(&self, server: ServerId) -> Epoch {
        self.servers.get(&server).map_or(Epoch(0), |s| s.confirmed)
    }

    fn victims_at(&self, server: ServerId) -> Vec<Identity> {
        self.incidents.keys().copied().filter(|w| self.servers_of(*w).contains(&server)).collect()
    }
}
