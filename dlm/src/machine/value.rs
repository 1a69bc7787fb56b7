//! The value block of a resource: who reads it, who writes it, and when it is not valid.

use super::rare::Usual;
use crate::{Mode, ValueBlock};

/// What a grant does with the value block, where the operation has VALBLK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// The holder gets the resource's.
    Read,
    /// The resource gets the holder's.
    Write,
    /// Nothing is copied.
    Nothing,
}

/// The transfer of a grant from `granted` (`None`: a new lock) to `requested`, at the time of the grant.
pub(crate) fn transfer(granted: Option<Mode>, requested: Mode) -> Transfer {
    use Transfer::{Nothing as N, Read as R, Write as W};
    /// Row: granted. Column: requested. Measured against the kernel's lock manager.
    const TABLE: [[Transfer; 6]; 6] = [
        // NL CR CW PR PW EX
        [R, R, R, R, R, R],
        [N, R, R, R, R, R],
        [N, N, R, R, R, R],
        [N, N, N, R, R, R],
        [W, W, W, W, W, R],
        [W, W, W, W, W, W],
    ];
    granted.map_or(R, |g| TABLE[g as usize][requested as usize])
}

/// The value block of one resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Value {
    /// Its bytes; `None` until somebody writes it.
    pub(crate) bytes: Option<ValueBlock>,
    /// A possible writer was lost, or a writer said so. Until the next write.
    pub(crate) invalid: bool,
    /// How often it was written.
    pub(crate) sequence: u64,
    /// A failed node may have it, and nobody else knows it: zeros, not valid.
    pub(crate) is_unknown: bool,
}

impl Usual for Value {
    const USUAL: &'static Self = &Self { bytes: None, invalid: false, sequence: 0, is_unknown: false };
}

impl Value {
    /// A write.
    pub(crate) fn write(&mut self, bytes: ValueBlock) {
        self.bytes = Some(bytes);
        self.invalid = false;
        self.is_unknown = false;
        self.sequence += 1;
    }

    /// Of a resource that a failed node may have, and of which no survivor has a copy.
    pub(crate) fn unknown(value_bytes: usize) -> Self {
        Self { bytes: Some(vec![0; value_bytes]), invalid: true, sequence: 0, is_unknown: true }
    }

    /// Marks it as not valid. Invisible while nobody has ever written it.
    pub(crate) fn invalidate(&mut self) {
        self.invalid = self.bytes.is_some();
    }

    /// What a reader gets: zeros while nobody has written it.
    pub(crate) fn read(&self, value_bytes: usize) -> ValueBlock {
        self.bytes.clone().unwrap_or_else(|| vec![0; value_bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalidation_is_invisible_before_the_first_write() {
        let mut value = Value::default();
        value.invalidate();
        assert!(!value.invalid);
        value.write(vec![1]);
        value.invalidate();
        assert!(value.invalid);
        value.write(vec![2]);
        assert!(!value.invalid);
    }

    #[test]
    fn only_leaving_protected_write_or_exclusive_writes() {
        for g in Mode::ALL {
            for r in Mode::ALL {
                let writes = transfer(Some(g), r) == Transfer::Write;
                assert_eq!(writes, g == Mode::EX || (g == Mode::PW && r != Mode::EX), "{g}->{r}");
            }
        }
    }
}
