//! A flag that is raised once, and can be waited for by tasks.

use event_listener::Event;
use std::sync::atomic::{AtomicBool, Ordering};

/// Down at first, up for ever after [`Done::raise`].
#[derive(Debug, Default)]
pub(crate) struct Done {
    up: AtomicBool,
    event: Event,
}

impl Done {
    pub(crate) fn raise(&self) {
        self.up.store(true, Ordering::SeqCst);
        self.event.notify(usize::MAX);
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    pub(crate) async fn wait(&self) {
        while !self.is_up() {
            let listener = self.event.listen();
            if self.is_up() {
                return;
            }
            listener.await;
        }
    }
}
