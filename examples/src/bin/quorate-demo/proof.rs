//! What the demo proves: each claim checked, printed and counted.

use serde_json::{Map, Value, json};

/// How a proof came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Holds,
    Fails,
    Skipped,
}

/// All proofs so far.
#[derive(Debug, Default)]
pub(crate) struct Proofs {
    rows: Vec<(&'static str, String, Outcome)>,
}

impl Proofs {
    /// Notes whether the claim holds.
    pub(crate) fn check(&mut self, key: &'static str, claim: &str, holds: bool) {
        self.add(key, claim, if holds { Outcome::Holds } else { Outcome::Fails });
    }

    /// Notes that the claim could not be checked here, and why.
    pub(crate) fn skip(&mut self, key: &'static str, why: &str) {
        self.add(key, why, Outcome::Skipped);
    }

    fn add(&mut self, key: &'static str, claim: &str, outcome: Outcome) {
        let word = match outcome {
            Outcome::Holds => "holds  ",
            Outcome::Fails => "FAILS  ",
            Outcome::Skipped => "skipped",
        };
        println!("  {word}  {claim}");
        self.rows.push((key, claim.to_owned(), outcome));
    }

    pub(crate) fn failed(&self) -> usize {
        self.rows.iter().filter(|r| r.2 == Outcome::Fails).count()
    }

    pub(crate) fn json(&self) -> Value {
        let mut all = Map::new();
        for (key, claim, outcome) in &self.rows {
            let word = match outcome {
                Outcome::Holds => "holds",
                Outcome::Fails => "fails",
                Outcome::Skipped => "skipped",
            };
            // A key stands for all its claims: one that fails is not hidden by a later one that holds.
            let before = all.get(*key).and_then(|v: &Value| v.get("outcome")).and_then(Value::as_str);
            if before != Some("fails") {
                all.insert((*key).to_owned(), json!({ "claim": claim, "outcome": word }));
            }
        }
        Value::Object(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_fails_is_not_hidden_by_a_later_one_of_the_same_key() {
        let mut proofs = Proofs::default();
        proofs.check("hashes", "node 2", false);
        proofs.check("hashes", "node 3", true);
        proofs.skip("vgs", "not here");
        assert_eq!(proofs.failed(), 1);
        let json = proofs.json();
        assert_eq!(json["hashes"]["outcome"], "fails");
        assert_eq!(json["vgs"]["outcome"], "skipped");
    }
}
