//! The head of a journal: the valid log header with the highest sequence.

use super::{Journal, ReplayError};
use crate::format::LogHeader;
use crate::reader::{ReadError, Reader};
use quorate_gnbd::BlockDevice;

/// Blocks read at once while looking for a header: about one small flush.
const LOOK_BLOCKS: u32 = 32;

/// Finds the head.
///
/// Sequences rise around the ring except at the one seam behind the head, so it is found by halving; where they do not,
/// the ring is scanned from its start as the kernel does.
///
/// # Errors
/// The device fails, or there is no valid header.
pub async fn find_head<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
) -> Result<LogHeader, ReplayError> {
    let Some(first) = next_header(reader, journal, 0, journal.blocks()).await? else {
        return Err(ReplayError::NoHeader { jid: journal.jid() });
    };
    // No header from `end` on continues the sequence that began with `first`; `best` does.
    let mut best = first;
    let mut end = journal.blocks();
    while best.index + 1 < end {
        let middle = best.index + 1 + (end - best.index - 1) / 2;
        match next_header(reader, journal, middle, end).await? {
            Some(found) if best.sequence < found.sequence => best = found,
            Some(found) if first.sequence <= found.sequence => return scan(reader, journal, first).await,
            _ => end = middle,
        }
    }
    Ok(best)
}

async fn scan<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    first: LogHeader,
) -> Result<LogHeader, ReplayError> {
    tracing::warn!(jid = journal.jid(), "sequences of log headers do not rise; scanning the whole ring");
    let mut best = first;
    while best.index + 1 < journal.blocks() {
        match next_header(reader, journal, best.index + 1, journal.blocks()).await? {
            Some(found) if best.sequence <= found.sequence => best = found,
            _ => break,
        }
    }
    Ok(best)
}

/// The first valid header in ring blocks `from..end`.
pub(crate) async fn next_header<D: BlockDevice>(
    reader: &Reader<D>,
    journal: &Journal,
    from: u32,
    end: u32,
) -> Result<Option<LogHeader>, ReadError> {
    let mut index = from;
    while index < end {
        let bytes = journal.read(reader, index, LOOK_BLOCKS.min(end - index)).await?;
        for block in bytes.chunks_exact(reader.size().usize()) {
            if let Ok(header) = LogHeader::decode(block)
                && header.index == index
            {
                return Ok(Some(header));
            }
            index += 1;
        }
    }
    Ok(None)
}
