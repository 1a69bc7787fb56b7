//! The lock manager's rows.

mod local;

use crate::Options;
use crate::table::Table;
use std::error::Error;

/// Measures the rows that are wanted.
pub(crate) fn measure(options: &Options) -> Result<Table, Box<dyn Error>> {
    let mut table = Table::default();
    local::measure(options, &mut table)?;
    Ok(table)
}

/// A process that a measurement started.
pub(crate) fn child(args: &[String]) -> Result<(), Box<dyn Error>> {
    match args.first().map(String::as_str) {
        Some("memory") => local::memory_child(),
        other => Err(format!("no such child: {other:?}").into()),
    }
}
