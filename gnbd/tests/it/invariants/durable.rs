//! What was acknowledged and flushed is never lost (R12).

/// `durable` is what a crash of the server now would leave at least; `flushed` what users were told is durable.
pub(crate) fn after_step(durable: &[u64], flushed: &[u64]) {
    for (block, (has, told)) in durable.iter().zip(flushed).enumerate() {
        assert!(
            told <= has,
            "INVARIANT durable: block {block} holds {has}, but {told} was said to be durable"
        );
    }
}
