//! The deadlock search around the lockspaces of a node.

use super::Dlm;
use crate::deliver::lock;
use crate::machine::deadlock::{SearchInput, SearchMessage, SearchOutput};
use std::sync::Arc;

impl Dlm {
    /// Feeds the search and carries out what it wants. No shard may be entered by the caller.
    pub(super) fn search(self: &Arc<Self>, input: SearchInput) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let mut out = Vec::new();
            lock(&self.search).handle(self.now(), input, &mut out);
            for output in out {
                match output {
                    SearchOutput::Send { to, message } => self.outgoing.send(to, message.encode()),
                    SearchOutput::Collect { to, round } => {
                        let mut waits = Vec::new();
                        for space in self.all() {
                            space.collect_waits(self.now(), &mut waits);
                        }
                        if to == self.me {
                            inputs.push(SearchInput::Collected { round, waits });
                            continue;
                        }
                        for message in SearchMessage::pieces(round, waits) {
                            self.outgoing.send(to, message.encode());
                        }
                    }
                    SearchOutput::Refuse { key } => {
                        let space = lock(&self.spaces).by_hash.get(&key.space).cloned();
                        if let Some(space) = space {
                            space.refuse(self, key.id, key.op);
                        }
                    }
                    SearchOutput::Undecided { cycle } => {
                        tracing::warn!(target: "quorate_dlm", ?cycle, "a deadlock that nobody lets itself be refused for");
                    }
                }
            }
        }
        if lock(&self.search).next_deadline().is_some() {
            self.timer.notify(usize::MAX);
        }
    }
}
