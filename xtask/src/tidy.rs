//! `cargo xtask tidy`: rules on files that no compiler knows.

use crate::run::root;
use std::fs;
use std::path::{Path, PathBuf};

/// No source file outside tests may be longer.
const LINES_MAX: usize = 1000;

/// Marks of work that was left undone.
const UNDONE: [&str; 3] = ["FIXME", "XXX:", "TODO"];

pub(crate) fn tidy() -> Result<(), String> {
    let mut files = Vec::new();
    for folder in [
        "membership",
        "fencing",
        "dlm",
        "ccs",
        "gnbd",
        "clvm",
        "gfs",
        "failover",
        "examples",
        "xtask",
        "docs",
    ] {
        collect(&root().join(folder), &mut files)?;
    }
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"] {
        files.push(root().join(name));
    }
    let mut faults = Vec::new();
    for file in &files {
        let shown = file.strip_prefix(root()).unwrap_or(file).display().to_string();
        let text = fs::read_to_string(file).map_err(|e| format!("cannot read {shown}: {e}"))?;
        match file.extension().and_then(|e| e.to_str()) {
            Some("rs") => rust(&shown, &text, &mut faults),
            Some("md") => links(file, &shown, &text, &mut faults),
            _ => (),
        }
    }
    println!("tidy: {} files read, {} faults", files.len(), faults.len());
    if faults.is_empty() { Ok(()) } else { Err(faults.join("\n")) }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let entries = fs::read_dir(folder).map_err(|e| format!("cannot list {}: {e}", folder.display()))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if matches!(path.extension().and_then(|e| e.to_str()), Some("rs" | "md")) {
            files.push(path);
        }
    }
    files.sort();
    Ok(())
}

fn rust(shown: &str, text: &str, faults: &mut Vec<String>) {
    if !text.starts_with("//!") && !text.starts_with("#!") {
        faults.push(format!("{shown}: the first line must say in one sentence what the file is for (//! …)"));
    }
    let lines = text.lines().count();
    if LINES_MAX < lines && !shown.contains("/tests/") && !shown.ends_with("tests.rs") {
        faults.push(format!("{shown}: {lines} lines, the limit is {LINES_MAX}"));
    }
    if shown.starts_with("xtask/src/tidy") {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        if UNDONE.iter().any(|mark| line.contains(mark)) {
            faults.push(format!("{shown}:{}: unfinished work: {}", number + 1, line.trim()));
        }
    }
}

/// Relative links must lead somewhere.
fn links(file: &Path, shown: &str, text: &str, faults: &mut Vec<String>) {
    for part in text.split("](").skip(1) {
        let Some(link) = part.split(')').next() else { continue };
        let path = link.split('#').next().unwrap_or_default();
        if path.is_empty() || path.contains("://") || path.contains(char::is_whitespace) {
            continue;
        }
        let target = file.parent().map(|p| p.join(path)).unwrap_or_default();
        if !target.exists() {
            faults.push(format!("{shown}: the link to {path} leads nowhere"));
        }
    }
}
