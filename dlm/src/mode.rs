//! The six lock modes and their compatibility (VMS; libdlm manual).

use core::fmt;
use serde::{Deserialize, Serialize};

/// How a resource may be used by the holder, and by others beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Mode {
    /// Null: interest only; keeps the resource and its value block alive.
    NL = 0,
    /// Concurrent read.
    CR = 1,
    /// Concurrent write.
    CW = 2,
    /// Protected read: shared.
    PR = 3,
    /// Protected write.
    PW = 4,
    /// Exclusive.
    EX = 5,
}

/// Row: granted. Column: requested.
const COMPATIBLE: [[bool; 6]; 6] = {
    const Y: bool = true;
    const N: bool = false;
    [
        // NL CR CW PR PW EX
        [Y, Y, Y, Y, Y, Y],
        [Y, Y, Y, Y, Y, N],
        [Y, Y, Y, N, N, N],
        [Y, Y, N, Y, N, N],
        [Y, Y, N, N, N, N],
        [Y, N, N, N, N, N],
    ]
};

impl Mode {
    /// All modes, weakest first.
    pub const ALL: [Self; 6] = [Self::NL, Self::CR, Self::CW, Self::PR, Self::PW, Self::EX];

    /// Whether a holder of `self` may go to `other` without anybody being in the way: `other` is compatible with all
    /// that `self` is compatible with. True for equal modes; false both ways between CW and PR.
    #[must_use]
    pub fn is_covering(self, other: Self) -> bool {
        Self::ALL.into_iter().all(|m| !self.is_compatible(m) || other.is_compatible(m))
    }

    /// Whether `requested` may be granted beside `self`.
    #[must_use]
    pub fn is_compatible(self, requested: Self) -> bool {
        COMPATIBLE[self as usize][requested as usize]
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
