//! Two users of one lock table: an exclusive lock, a waiter that is told, a value block that goes along.
//!
//! `cargo run --example dlm` prints each completion and blocking callback as it comes.

use quorate_dlm::local::LocalManager;
use quorate_dlm::{
    Completion, ConvertRequest, Flags, LockCallbacks, LockId, LockManager, LockName, LockRequest, Lockspace,
    LockspaceOptions, Mode, UnlockRequest,
};
use std::error::Error;
use std::sync::Arc;

/// Prints what a user is told.
struct Told(&'static str);

impl LockCallbacks for Told {
    fn completion(&self, id: LockId, completion: Completion) {
        match completion {
            Completion::Granted(grant) => {
                let value =
                    grant.value.map(|v| String::from_utf8_lossy(&v).trim_end_matches('\0').to_owned());
                println!(
                    "{}: lock {} granted in {} (token {:?}), value {value:?}",
                    self.0, id.0, grant.mode, grant.token
                );
            }
            other => println!("{}: lock {}: {other:?}", self.0, id.0),
        }
    }
    fn blocking(&self, id: LockId, mode: Mode) {
        println!("{}: lock {} is in the way of somebody who needs {mode}", self.0, id.0);
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let [one, two] = &LocalManager::shared(2)[..] else { return Err("two were asked for".into()) };
    let options = LockspaceOptions::plain("example");
    let (one, two): (Arc<dyn Lockspace>, Arc<dyn Lockspace>) =
        (one.join(&options).await?, two.join(&options).await?);
    let name = LockName::new(b"the printer")?;

    let request = LockRequest::new(name.clone(), Mode::EX).flags(Flags::VALBLK);
    let first = one.request(request, Arc::new(Told("one")))?;
    // It conflicts, so it waits, and `one` is told.
    let request = LockRequest::new(name, Mode::PR).flags(Flags::VALBLK);
    let second = two.request(request, Arc::new(Told("two")))?;
    // Going down from EX writes the value block, and lets the reader in.
    let mut value = b"last job: 17".to_vec();
    value.resize(one.value_bytes(), 0);
    one.convert(first, ConvertRequest::new(Mode::NL).flags(Flags::VALBLK).value(value))?;
    two.unlock(second, UnlockRequest::default())?;
    one.unlock(first, UnlockRequest::default())?;
    Ok(())
}
