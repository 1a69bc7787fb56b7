//! The configuration without a cluster.

/// Checks a document; what it configures, in words.
///
/// # Errors
/// The first thing that is wrong, as `LINE:COLUMN: what`.
pub fn check(text: &str) -> Result<String, String> {
    let document = quorate_ccs::parse(text).map_err(|e| e.to_string())?;
    Ok(format!(
        "cluster {}: {} nodes, {} exports, {} filesystems, {} services",
        document.name.get_ref(),
        document.nodes.len(),
        document.exports.len(),
        document.filesystems.len(),
        document.services.len()
    ))
}
