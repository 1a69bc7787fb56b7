//! A request is applied once or not at all, and never after it was reported as not applied.

use super::Invariant;
use crate::simulation::History;
use quorate_membership::sim::{Cluster, Happening};
use quorate_membership::{Cause, Epoch, Identity, RequestError};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(crate) struct Requests {
    seen: Epoch,
    applied: BTreeMap<(Identity, u64), Epoch>,
    never: BTreeSet<(Identity, u64)>,
}

impl Invariant for Requests {
    fn name(&self) -> &'static str {
        "requests"
    }

    fn check(&mut self, _: &Cluster, history: &History, news: &[Happening]) -> Result<(), String> {
        for (epoch, view) in history.views.range(self.seen.next()..) {
            self.seen = *epoch;
            if let Cause::Request { by, number } = view.cause
                && let Some(first) = self.applied.insert((by, number), *epoch)
            {
                return Err(format!("request {number} of {by} is in records {first} and {epoch}"));
            }
        }
        for happening in news {
            let Happening::Done { life, id, result } = happening else { continue };
            let Some(number) = history.numbers.get(id) else { continue };
            let key = (*life, *number);
            match result {
                Ok(view) => {
                    let says = matches!(view.cause, Cause::Request { by, number: n } if (by, n) == key);
                    if says && self.applied.get(&key) != Some(&view.epoch) {
                        return Err(format!("request {number} of {life} was confirmed by no decided record"));
                    }
                }
                Err(RequestError::Unknown(_)) => (),
                Err(_) => {
                    self.never.insert(key);
                }
            }
        }
        match self.never.iter().find(|key| self.applied.contains_key(key)) {
            Some((life, number)) => Err(format!("request {number} of {life} was refused and applied")),
            None => Ok(()),
        }
    }
}
