//! Which seeds a simulation's test runs, as everybody who replays one says it.

use core::ops::Range;

/// The seeds that the environment asks for: `QUORATE_SEED=N` one, `QUORATE_SEEDS=A..B` those from A up to B without B.
///
/// # Panics
/// Where a variable says neither: a typing error must not pass as a run of other seeds.
#[must_use]
pub fn chosen_seeds() -> Option<Range<u64>> {
    let number = |name: &str, text: &str| match text.trim().parse::<u64>() {
        Ok(number) => number,
        Err(error) => panic!("{name}: `{text}` is no seed: {error}"),
    };
    if let Ok(text) = std::env::var("QUORATE_SEED") {
        let seed = number("QUORATE_SEED", &text);
        return Some(seed..seed + 1);
    }
    let text = std::env::var("QUORATE_SEEDS").ok()?;
    let Some((from, to)) = text.split_once("..") else { panic!("QUORATE_SEEDS: `{text}` is not A..B") };
    Some(number("QUORATE_SEEDS", from)..number("QUORATE_SEEDS", to))
}

/// The same, or these where the environment asks for none.
#[must_use]
pub fn seeds(default: Range<u64>) -> Range<u64> {
    chosen_seeds().unwrap_or(default)
}
