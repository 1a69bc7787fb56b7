//! Commands that a running node answers.

use super::{Config, Fence, Lock, Member, Service, Sized, Verb, Volume};
use quorate::admin::client::Client;
use quorate::admin::protocol::{Command, LockQuery, QuorumCommand};
use std::error::Error;
use std::path::Path;

/// Codes of answers that are not failures: what is waited for.
const ANSWERS: core::ops::RangeInclusive<u8> = 10..=14;

/// Sends the command to the node and prints the answer; the exit code.
pub(super) fn run(verb: Verb, node: &Path, json: bool) -> Result<u8, Box<dyn Error>> {
    ask(translate(verb)?, node, json)
}

/// Asks the node and prints the answer; the exit code.
pub(super) fn ask(command: Command, node: &Path, json: bool) -> Result<u8, Box<dyn Error>> {
    let (code, text, value) = Client::connect(&node.join("admin.sock"))?.command(command)?;
    if json {
        println!("{value}");
    } else if code == 0 || ANSWERS.contains(&code) {
        println!("{}", text.trim_end());
    } else {
        eprintln!("quorate: {}", text.trim_end());
    }
    Ok(code)
}

/// Checks a configuration document without a cluster.
pub(super) fn check_config(file: &Path) -> Result<u8, Box<dyn Error>> {
    let text = read(file)?;
    match quorate::config::check(&text) {
        Ok(summary) => {
            println!("{}: {summary}", file.display());
            Ok(0)
        }
        Err(error) => {
            eprintln!("{}:{error}", file.display());
            Ok(1)
        }
    }
}

fn read(file: &Path) -> Result<String, Box<dyn Error>> {
    std::fs::read_to_string(file).map_err(|e| format!("cannot read {}: {e}", file.display()).into())
}

fn translate(verb: Verb) -> Result<Command, Box<dyn Error>> {
    Ok(match verb {
        Verb::Status => Command::Status,
        Verb::Why => Command::Why,
        Verb::Member(member) => match member {
            Member::Ls => Command::Members,
            Member::Links => Command::Links,
            Member::Explain { epoch } => Command::Explain(epoch),
            Member::Add { id, address, certificate } => {
                Command::AddNode { id, address, certificate: read(&certificate)? }
            }
            Member::Remove { id } => Command::RemoveNode(id),
            Member::Admit => Command::AdmitVoters,
            Member::Leave { give_up_vote } => Command::Leave { give_up_vote },
            Member::Quorum => Command::Quorum(QuorumCommand::Status),
            Member::WhatIf { down, split } => {
                Command::Quorum(QuorumCommand::WhatIf { down, split: sides(split.as_deref())? })
            }
            Member::Votes { id, votes } => Command::Quorum(QuorumCommand::Votes { id, votes }),
            Member::Expected { votes } => Command::Quorum(QuorumCommand::Expected(votes)),
            Member::Options { wait_for_all, auto_tie_breaker, last_man_standing, allow_downscale } => {
                Command::Quorum(QuorumCommand::Options {
                    wait_for_all,
                    tie_breaker: auto_tie_breaker,
                    last_man_standing_ms: last_man_standing,
                    allow_downscale,
                })
            }
            Member::AddWitness { id, address, certificate } => {
                let certificate = read(&certificate)?;
                Command::Quorum(QuorumCommand::AddWitness { id, certificate, address })
            }
            Member::Replace { id, certificate, address } => {
                let certificate = read(&certificate)?;
                Command::Quorum(QuorumCommand::Replace { id, certificate, address })
            }
            Member::ForceQuorum { off, reason, confirm } => {
                let sentence = force_sentence(&off);
                if confirm.as_deref() != Some(sentence.as_str()) {
                    return Err(format!(
                        "forcing the quorum is outside the guarantees: if a node that you declare to be off still runs, two \
                         clusters change the same data and it is lost.\nLook at every machine, then add --confirm '{sentence}'"
                    )
                    .into());
                }
                Command::Quorum(QuorumCommand::Force { off, word: reason })
            }
            Member::CancelWaitForAll => Command::Quorum(QuorumCommand::CancelWaitForAll),
            Member::Renew => Command::Quorum(QuorumCommand::Renew),
            Member::Revoke { id, reason } => Command::Quorum(QuorumCommand::Revoke { id, reason }),
            Member::Trust { certificates } => {
                let certificates = certificates.iter().map(|c| read(c)).collect::<Result<_, _>>()?;
                Command::Quorum(QuorumCommand::Trust { certificates })
            }
            Member::Enrol { name, address } => Command::Enrol { name, address },
            Member::Retire { server } => Command::Retire(server),
        },
        Verb::Metrics => Command::Metrics,
        Verb::Lock(lock) => Command::Locks(match lock {
            Lock::Ls { lockspace } => LockQuery::Ls { lockspace },
            Lock::Show { lockspace, resource } => LockQuery::Show { lockspace, resource },
            Lock::Why { resource } => LockQuery::Why { resource },
            Lock::Graph { dot } => LockQuery::Graph { dot },
            Lock::Stats => LockQuery::Stats,
            Lock::Run(_) | Lock::Take(_) => return Err("this command asks the lock service".into()),
        }),
        Verb::Config(config) => match config {
            Config::Show => Command::ConfigShow,
            Config::Apply { file, expected } => Command::ConfigApply { expected, document: read(&file)? },
            Config::History => Command::ConfigHistory,
            Config::Diff { from, to } => Command::ConfigDiff(from, to),
            Config::Rollback { version } => Command::ConfigRollback(version),
            Config::Check { .. } => return Err("`config check` asks no node".into()),
        },
        Verb::Fence(Fence::History) => Command::FenceHistory,
        Verb::Fence(Fence::Confirm { node, i_have_seen_that_it_is_off }) => {
            if !i_have_seen_that_it_is_off {
                return Err(format!(
                    "confirming that node {node} is off lets others use what it used: if it still runs, data is lost.\n\
                     Look at the machine, then add --i-have-seen-that-it-is-off"
                )
                .into());
            }
            Command::FenceConfirm(node)
        }
        Verb::Volume(volume) => match volume {
            Volume::Ls => Command::Volumes,
            Volume::Pvcreate { device } => Command::PvCreate(device),
            Volume::Vgcreate { name, devices } => Command::VgCreate { name, devices },
            Volume::Lvcreate(Sized { volume, size }) => {
                let (group, name) = split(&volume)?;
                Command::LvCreate { group, name, bytes: bytes(&size)? }
            }
            Volume::Lvextend(Sized { volume, size }) => {
                let (group, name) = split(&volume)?;
                Command::LvExtend { group, name, bytes: bytes(&size)? }
            }
            Volume::Lvremove { volume } => {
                let (group, name) = split(&volume)?;
                Command::LvRemove { group, name }
            }
        },
        Verb::Service(service) => match service {
            Service::Ls => Command::Services,
            Service::Enable { name } => Command::ServiceEnable(name),
            Service::Disable { name } => Command::ServiceDisable(name),
            Service::Relocate { name, node } => Command::ServiceRelocate { name, node },
        },
        Verb::Storage(_) | Verb::Witness(_) | Verb::Node(_) | Verb::Cluster(_) | Verb::Fs(_) => {
            return Err("this command asks no node".into());
        }
    })
}

/// What somebody types who forces the quorum.
fn force_sentence(off: &[u32]) -> String {
    let ids: Vec<String> = off.iter().map(ToString::to_string).collect();
    format!("I have seen that {} are off", ids.join(" and "))
}

/// `1,2/3` as the sides of a split.
fn sides(text: Option<&str>) -> Result<Vec<Vec<u32>>, String> {
    let id = |w: &str| w.trim().parse().map_err(|_| format!("`{w}` is no node id"));
    let side = |s: &str| s.split(',').filter(|w| !w.is_empty()).map(id).collect();
    text.map_or(Ok(Vec::new()), |t| t.split('/').map(side).collect())
}

fn split(volume: &str) -> Result<(String, String), String> {
    match volume.split_once('/') {
        Some((group, name)) if !group.is_empty() && !name.is_empty() => Ok((group.into(), name.into())),
        _ => Err(format!("`{volume}`: GROUP/NAME is wanted")),
    }
}

/// `512M` in bytes.
fn bytes(size: &str) -> Result<u64, String> {
    let bad = || format!("`{size}` is no size: a number of bytes is wanted, or one with K, M, G or T");
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &size[digits.len()..] {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(bytes("900M"), Ok(900 << 20));
        assert_eq!(bytes("4096"), Ok(4096));
        assert!(bytes("12Q").is_err());
        assert!(bytes("99999999999T").is_err());
    }

    #[test]
    fn a_volume_has_a_group() {
        assert_eq!(split("vg0/lv0"), Ok(("vg0".into(), "lv0".into())));
        assert!(split("lv0").is_err());
    }
}
