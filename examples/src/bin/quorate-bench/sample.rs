//! Figures of several runs: median, smallest, largest; and the clocks they are taken with.

#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::time::Instant;

/// One figure, measured several times.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample(pub(crate) Vec<f64>);

impl Sample {
    /// One more run.
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle one; NaN without any.
    pub(crate) fn median(&self) -> f64 {
        percentile(&mut self.0.clone(), 50.0)
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
}

/// The value below which `percent` of all lie; sorts them.
pub(crate) fn percentile(values: &mut [f64], percent: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() {
        return f64::NAN;
    }
    let at = (values.len() as f64 * percent / 100.0) as usize;
    values[at.min(values.len() - 1)]
}

/// How long `work` takes, in nanoseconds.
pub(crate) fn nanos(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as f64
}

/// Nanoseconds of one call of `work`, the mean of `count` calls.
pub(crate) fn mean(count: u32, mut work: impl FnMut()) -> f64 {
    nanos(|| (0..count).for_each(|_| work())) / f64::from(count)
}

/// A clock for figures within one process, in nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn nanos(self) -> f64 {
        self.0.elapsed().as_nanos() as f64
    }
}
