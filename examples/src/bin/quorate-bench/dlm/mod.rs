//! The lock manager's rows.

mod etcd;
mod local;
mod member;
mod recovery;
mod redis;
mod remote;

use crate::Options;
use crate::table::Table;
use std::error::Error;

/// Measures the rows that are wanted.
pub(crate) fn measure(options: &Options) -> Result<Table, Box<dyn Error>> {
    let mut table = Table::default();
    local::measure(options, &mut table)?;
    remote::measure(options, &mut table)?;
    recovery::measure(options, &mut table)?;
    Ok(table)
}

/// A process that a measurement started.
pub(crate) fn child(args: &[String]) -> Result<(), Box<dyn Error>> {
    let rest = args.get(1..).unwrap_or_default();
    match args.first().map(String::as_str) {
        Some("memory") => local::memory_child(),
        Some("program") => member::program(rest),
        Some("member") => member::run(rest),
        other => Err(format!("no such child: {other:?}").into()),
    }
}
