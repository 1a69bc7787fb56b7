//! Which flags go together (libdlm manual; the immediate EINVAL cases of the fact table).

use crate::{ConvertRequest, Flags, LockError, LockRequest, Mode, UnlockRequest};

/// Flags that are known but belong to a later release: refused rather than ignored.
const LATER: Flags = Flags(Flags::PERSISTENT.0 | Flags::ORPHAN.0);

/// Checks a new request.
///
/// # Errors
/// [`LockError::Invalid`] naming what does not go together.
pub(crate) fn check_request(request: &LockRequest) -> Result<(), LockError> {
    let f = request.flags;
    if f.0 & LATER.0 != 0 {
        return Err(LockError::Invalid("PERSISTENT and ORPHAN are not supported yet"));
    }
    if f.has(Flags::QUECVT) || f.has(Flags::CONVDEADLK) {
        return Err(LockError::Invalid("QUECVT and CONVDEADLK are for conversions"));
    }
    if f.has(Flags::EXPEDITE) && (request.mode != Mode::NL || f.has(Flags::NOQUEUE)) {
        return Err(LockError::Invalid("EXPEDITE is for new NL locks that may queue"));
    }
    if request.range.end < request.range.start {
        return Err(LockError::Invalid("a range that ends before it starts"));
    }
    Ok(())
}

/// Checks a conversion of a lock that is granted in `granted`.
///
/// # Errors
/// [`LockError::Invalid`] naming what does not go together.
pub(crate) fn check_convert(
    granted: Mode,
    request: &ConvertRequest,
    value_bytes: usize,
) -> Result<(), LockError> {
    let f = request.flags;
    if f.0 & LATER.0 != 0 {
        return Err(LockError::Invalid("PERSISTENT and ORPHAN are not supported yet"));
    }
    if f.has(Flags::EXPEDITE) {
        return Err(LockError::Invalid("EXPEDITE is for new locks"));
    }
    if f.has(Flags::CONVDEADLK) && f.has(Flags::NOQUEUE) {
        return Err(LockError::Invalid("CONVDEADLK with NOQUEUE"));
    }
    if f.has(Flags::QUECVT) && granted.is_covering(request.mode) {
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
