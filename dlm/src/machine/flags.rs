//! Which flags go together (libdlm manual; the immediate EINVAL cases of the fact table).

use crate::request::TIMEOUT_MAX;
use crate::{ConvertRequest, Flags, LockError, LockRequest, Mode, Range, UnlockRequest};
use core::time::Duration;

/// Whether a conversion only gives up: nobody can be in its way.
pub(crate) fn is_down(granted: Mode, range: Range, to: Mode, to_range: Range) -> bool {
    granted.is_covering(to) && range.contains(to_range)
}

/// Checks a new request.
///
/// # Errors
/// [`LockError::Invalid`] naming what does not go together.
pub(crate) fn check_request(request: &LockRequest) -> Result<(), LockError> {
    let f = request.flags;
    if f.has(Flags::QUECVT) || f.has(Flags::CONVDEADLK) {
        return Err(LockError::Invalid("QUECVT and CONVDEADLK are for conversions"));
    }
    if f.has(Flags::EXPEDITE) && (request.mode != Mode::NL || f.has(Flags::NOQUEUE)) {
        return Err(LockError::Invalid("EXPEDITE is for new NL locks that may queue"));
    }
    if f.has(Flags::PERSISTENT) && request.owner == 0 {
        return Err(LockError::Invalid("PERSISTENT without an owner to outlive"));
    }
    check_timeout(f, request.timeout)?;
    if f.has(Flags::TEST) && !f.has(Flags::POSIX) {
        return Err(LockError::Invalid("TEST is for POSIX locks"));
    }
    if f.has(Flags::POSIX) {
        let others = [Flags::TEST, Flags::NOQUEUE, Flags::NORECOVERYWAIT, Flags::NODLCKWT, Flags::TIMEOUT];
        if f.0 & !others.iter().fold(Flags::POSIX.0, |all, flag| all | flag.0) != 0 {
            return Err(LockError::Invalid(
                "POSIX goes with TEST, NOQUEUE, NODLCKWT, NORECOVERYWAIT and TIMEOUT only",
            ));
        }
        if !matches!(request.mode, Mode::NL | Mode::PR | Mode::EX) {
            return Err(LockError::Invalid("POSIX locks are NL, PR or EX"));
        }
    }
    if request.range.end < request.range.start {
        return Err(LockError::Invalid("a range that ends before it starts"));
    }
    Ok(())
}

fn check_timeout(flags: Flags, timeout: Option<Duration>) -> Result<(), LockError> {
    match timeout {
        None if flags.has(Flags::TIMEOUT) => Err(LockError::Invalid("TIMEOUT without a timeout")),
        Some(timeout) if TIMEOUT_MAX < timeout => Err(LockError::Invalid("a timeout of more than a day")),
        _ => Ok(()),
    }
}

/// Checks a conversion of a lock that is granted in `granted` on `range`.
///
/// # Errors
/// [`LockError::Invalid`] naming what does not go together.
pub(crate) fn check_convert(
    granted: Mode,
    range: Range,
    request: &ConvertRequest,
    value_bytes: usize,
) -> Result<(), LockError> {
    let f = request.flags;
    if f.has(Flags::EXPEDITE) || f.has(Flags::ORPHAN) {
        return Err(LockError::Invalid("EXPEDITE and ORPHAN are for new locks"));
    }
    check_timeout(f, request.timeout)?;
    if request.range.is_some_and(|r| r.end < r.start) {
        return Err(LockError::Invalid("a range that ends before it starts"));
    }
    if f.has(Flags::CONVDEADLK) && f.has(Flags::NOQUEUE) {
        return Err(LockError::Invalid("CONVDEADLK with NOQUEUE"));
    }
    if f.has(Flags::QUECVT) && is_down(granted, range, request.mode, request.range.unwrap_or(range)) {
        return Err(LockError::Invalid("QUECVT on a down-conversion"));
    }
    if let Some(value) = &request.value
        && value.len() != value_bytes
    {
        return Err(LockError::Invalid("a value block of another size than the lockspace's"));
    }
    let writes = super::value::transfer(Some(granted), request.mode) == super::value::Transfer::Write;
    if f.has(Flags::VALBLK) && !f.has(Flags::IVVALBLK) && writes && request.value.is_none() {
        return Err(LockError::Invalid("VALBLK without a value block where one is written"));
    }
    Ok(())
}

/// Checks the end of a lock that is granted in `granted` (`None`: it still waits).
///
/// # Errors
/// [`LockError::Invalid`] naming what does not go together.
pub(crate) fn check_unlock(
    granted: Option<Mode>,
    request: &UnlockRequest,
    value_bytes: usize,
) -> Result<(), LockError> {
    if let Some(value) = &request.value
        && value.len() != value_bytes
    {
        return Err(LockError::Invalid("a value block of another size than the lockspace's"));
    }
    let f = request.flags;
    if f.has(Flags::VALBLK)
        && !f.has(Flags::IVVALBLK)
        && granted.is_some_and(|g| Mode::PW <= g)
        && request.value.is_none()
    {
        return Err(LockError::Invalid("VALBLK without a value block where one is written"));
    }
    Ok(())
}
