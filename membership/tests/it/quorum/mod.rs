//! The quorum cases of `tests/scenarios/quorum/*.txt`, run against the production machines in the simulator.
//!
//! The format is described in `docs/quorum.md`. One file holds several cases; `QUORATE_CASE=TEXT` runs those whose title
//! contains it.

mod run;

use run::Runner;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// One case: its title and its lines with their numbers.
struct Case {
    file: PathBuf,
    title: String,
    lines: Vec<(usize, String)>,
}

fn cases() -> Vec<Case> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios/quorum");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut cases: Vec<Case> = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if let Some(title) = line.strip_prefix("case ") {
                cases.push(Case { file: file.clone(), title: title.trim().into(), lines: Vec::new() });
            } else if !line.is_empty() {
                let case = cases.last_mut().filter(|c| c.file == file);
                let case =
                    case.unwrap_or_else(|| panic!("{}:{}: no `case` before it", file.display(), number + 1));
                case.lines.push((number + 1, line.to_owned()));
            }
        }
    }
    cases
}

#[test]
fn every_case_of_the_quorum_table_holds() {
    let wanted = std::env::var("QUORATE_CASE").unwrap_or_default();
    let mut failures = String::new();
    let (mut count, mut differ) = (0, 0);
    for case in cases().into_iter().filter(|c| c.title.contains(&wanted)) {
        count += 1;
        let mut runner = Runner::default();
        for (number, line) in &case.lines {
            if let Err(what) = runner.line(line) {
                let file = case.file.file_name().unwrap_or_default().to_string_lossy();
                writeln!(failures, "{file}:{number}: {line}\n  case: {}\n  {what}", case.title).unwrap();
                break;
            }
        }
        if !runner.has_expected() {
            writeln!(failures, "case `{}` expects nothing", case.title).unwrap();
        }
        differ += usize::from(runner.differs());
    }
    println!("{count} cases, {differ} of them differ from votequorum on purpose");
    assert!(failures.is_empty(), "\n{failures}");
    assert!(!wanted.is_empty() || 60 <= count, "the table has {count} cases");
}

#[test]
fn a_wrong_expectation_is_found() {
    for (line, text) in [
        ("expect quorate 1", "quorate: 1 2 3"),
        ("expect votes 2 of 3", "votes"),
        ("expect voters 1 2", "voters: 1 2 3"),
        ("expect refused nobody", "no request"),
        ("votequorum quorate 1 2 3", "says the same"),
    ] {
        let mut runner = Runner::default();
        runner.line("nodes 3").unwrap();
        runner.line("up").unwrap();
        let error = runner.line(line).unwrap_err();
        assert!(error.contains(text), "{line}: {error}");
    }
}
