//! A bounded pool of threads for system calls that block, usable from any executor.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// Threads that carry out jobs in order of arrival, started as they are needed.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads_max: usize,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    pub(crate) fn new(threads_max: usize) -> Self {
        let shared = Arc::new(Shared { state: Mutex::new(State::default()), work: Condvar::new() });
        Self { shared, threads_max: threads_max.max(1) }
    }

    /// Runs `job` on a thread of the pool. The job runs even if the receiver is dropped; a receiver that ends without a
    /// value means that no thread could be started.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (tell, told) = oneshot::channel();
        let mut state = self.shared.lock();
        state.jobs.push_back(Box::new(move || {
            // Nobody may be waiting any more: that is their choice, the job is done all the same.
            let _ = tell.send(job());
        }));
        if state.idle < state.jobs.len() && state.threads < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let started = std::thread::Builder::new().name("gnbd-file".into()).spawn(move || serve(&shared));
            match started {
                Ok(_) => state.threads += 1,
                // Others will come to it; without any the jobs are dropped and every caller is told.
                Err(error) if state.threads == 0 => {
                    tracing::error!(target: "quorate_gnbd", %error, "no thread for file I/O");
                    state.jobs.clear();
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.shared.work.notify_one();
        told
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
    }
}

fn serve(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = shared.lock();
        } else if state.closed {
            state.threads -= 1;
            return;
        } else {
            state.idle += 1;
            state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_also_those_left_when_the_pool_is_dropped() {
        let pool = Pool::new(2);
        let told: Vec<_> = (0..100).map(|i| pool.run(move || i)).collect();
        drop(pool);
        for (i, t) in told.into_iter().enumerate() {
            assert_eq!(t.blocking_recv(), Ok(i));
        }
    }
}
