//! The command line: what can be typed after `quorate`, and where each command goes.

mod admin;
mod files;
mod locks;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// A shared filesystem, its locks, volumes and services on a cluster of machines.
#[derive(Debug, Parser)]
#[command(name = "quorate", version, about)]
pub(crate) struct Cli {
    /// The directory of the node to ask.
    // With an id of its own: a command that names a node would otherwise be taken for this one.
    #[arg(
        id = "node_dir",
        long = "node",
        global = true,
        value_name = "DIR",
        default_value = "/var/lib/quorate",
        env = "QUORATE_NODE"
    )]
    node: PathBuf,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a storage server: exports images and devices over NBD, and is a fence.
    Storage(quorate::storage::StorageOptions),
    /// Run a witness: it votes and is never a member.
    Witness(quorate::witness::WitnessOptions),
    /// Run a node under its supervisor.
    Node(quorate::node::NodeOptions),
    /// Make a cluster, and the directories and certificates of nodes and storage servers.
    #[command(subcommand)]
    Cluster(quorate::cluster::ClusterCommand),
    /// The state of everything on this node.
    Status,
    /// What a stuck cluster waits for. Exit codes: 0 nothing, 10 quorum, 11 a fence, 12 a recovery stage, 13 a member.
    Why,
    /// Members, roster and voters.
    #[command(subcommand)]
    Member(Member),
    /// Locks of all kinds.
    #[command(subcommand)]
    Lock(Lock),
    /// This node's metrics, in the text format of Prometheus.
    Metrics,
    /// The cluster configuration.
    #[command(subcommand)]
    Config(Config),
    /// Fencing: history, and a person's word.
    #[command(subcommand)]
    Fence(Fence),
    /// Volume groups and logical volumes.
    #[command(subcommand)]
    Volume(Volume),
    /// Filesystems: of the cluster, and images without one.
    #[command(subcommand)]
    Fs(files::Files),
    /// Services.
    #[command(subcommand)]
    Service(Service),
}

#[derive(Debug, Subcommand)]
enum Member {
    /// Who is in, who may be in, who votes.
    Ls,
    /// The paths from this node to the others: up or down, who uses them, messages, round trips.
    Links,
    /// Why a view followed the one before it: who reported what, how it was counted, who accepted it.
    Explain {
        /// The view's epoch; the newest one if it is left out.
        epoch: Option<u64>,
    },
    /// Enter a node in the roster.
    Add {
        /// Its id.
        id: u32,
        /// Where it listens, IP:PORT; several addresses, each a path of its own, with commas.
        address: String,
        /// Its certificate, a PEM file.
        certificate: PathBuf,
    },
    /// Strike a node that is not a member from the roster.
    Remove {
        /// Its id.
        id: u32,
    },
    /// Make every member that is meant to vote a voter.
    Admit,
    /// Leave cleanly, and stop this node.
    Leave {
        /// Take this node's vote along: the others need fewer from then on. It votes again once it is back.
        #[arg(long)]
        give_up_vote: bool,
    },
    /// Whether this node is quorate, with the arithmetic and the reason. Exit codes: 0 quorate, 10 not.
    Quorum,
    /// Who would be quorate if nodes were down, or the cluster split.
    WhatIf {
        /// Ids of nodes that are down, with commas.
        #[arg(long, value_delimiter = ',', conflicts_with = "split")]
        down: Vec<u32>,
        /// The sides of a split: ids with commas, sides with slashes, as in 1,2/3.
        #[arg(long)]
        split: Option<String>,
    },
    /// Give a node another number of votes than one.
    Votes {
        /// Its id.
        id: u32,
        /// How many.
        votes: u32,
    },
    /// Expect at least so many votes; 0 for as many as the voters have.
    Expected {
        /// How many.
        votes: u32,
    },
    /// Change quorum options; see docs/quorum.md.
    Options {
        /// After everybody was gone, wait until every vote is present.
        #[arg(long)]
        wait_for_all: Option<bool>,
        /// Who has half a vote more: off, lowest, highest, or ids with commas.
        #[arg(long)]
        auto_tie_breaker: Option<String>,
        /// Go on without votes that were away for so many milliseconds; 0 switches it off.
        #[arg(long)]
        last_man_standing: Option<u32>,
        /// Whether a node that leaves cleanly takes its vote along.
        #[arg(long)]
        allow_downscale: Option<bool>,
    },
    /// Enter a witness in the roster: it votes and is never a member.
    AddWitness {
        /// Its id.
        id: u32,
        /// Where it listens, IP:PORT; several addresses, each a path of its own, with commas.
        address: String,
        /// Its certificate, a PEM file.
        certificate: PathBuf,
    },
    /// Put another machine in the place of a node whose state is lost.
    Replace {
        /// The node's id.
        id: u32,
        /// The new machine's certificate, a PEM file.
        certificate: PathBuf,
        /// Where it listens, IP:PORT, if elsewhere.
        #[arg(long)]
        address: Option<String>,
    },
    /// Give this side the quorum by your word that all other nodes are off. OUTSIDE THE GUARANTEES: see docs/quorum.md.
    ForceQuorum {
        /// Ids of all voters and members that are off, with commas.
        #[arg(long, value_delimiter = ',', required = true)]
        off: Vec<u32>,
        /// Why: it goes into the record.
        #[arg(long)]
        reason: String,
        /// The sentence that this command asks for.
        #[arg(long)]
        confirm: Option<String>,
    },
    /// Wait for all no more, at this node, until it is started again.
    CancelWaitForAll,
    /// Take the certificate into use that `quorate cluster renew` put beside this node's.
    Renew,
    /// Refuse the key of a node from now on, everywhere; a member is removed with it.
    Revoke {
        /// The node's id.
        id: u32,
        /// Why: it goes into the record.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Trust exactly these CAs; none: each node trusts the one of its own directory.
    Trust {
        /// Their certificates, PEM files.
        certificates: Vec<PathBuf>,
    },
    /// Take a storage server in as a fence.
    Enrol {
        /// Its name, as in its certificate.
        name: String,
        /// Where it listens, IP:PORT.
        address: String,
    },
    /// Give a storage server up for good.
    Retire {
        /// Its UUID.
        server: String,
    },
}

#[derive(Debug, Subcommand)]
enum Lock {
    /// Lockspaces and their resources, those with waiters first.
    Ls {
        /// Only this lockspace.
        lockspace: Option<String>,
    },
    /// One resource with its queues.
    Show {
        /// Its lockspace.
        lockspace: String,
        /// Its name.
        resource: String,
    },
    /// What those that wait wait for, the longest first. Exit code 14 if something waits.
    Why {
        /// Only this resource.
        resource: Option<String>,
    },
    /// The wait-for graph, an edge a line.
    Graph {
        /// For Graphviz: `quorate lock graph --dot | dot -Tsvg`.
        #[arg(long)]
        dot: bool,
    },
    /// Rates and waiting times of each lockspace on each node.
    Stats,
    /// Run a command while holding a lock: `quorate lock run backup EX -- rsync ...`.
    Run(locks::Run),
    /// Hold a lock until the end of the standard input.
    Take(locks::Wanted),
}

#[derive(Debug, Subcommand)]
enum Config {
    /// The document and its version.
    Show,
    /// Replace the document.
    Apply {
        /// A TOML file.
        file: PathBuf,
        /// Only if this is still the newest version.
        #[arg(long)]
        expected: Option<u64>,
    },
    /// The versions there were.
    History,
    /// The difference between two versions.
    Diff {
        /// The older.
        from: u64,
        /// The newer.
        to: u64,
    },
    /// Make the contents of an earlier version the newest.
    Rollback {
        /// Which.
        version: u64,
    },
    /// Check a document without a cluster.
    Check {
        /// A TOML file.
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum Fence {
    /// What was fenced when, by whom, how, and with what result.
    History,
    /// Your word that a failed node is off. It is recorded.
    Confirm {
        /// The node's id.
        node: u32,
        /// Needed: you have seen that the machine is off.
        #[arg(long)]
        i_have_seen_that_it_is_off: bool,
    },
}

#[derive(Debug, Subcommand)]
enum Volume {
    /// Volume groups, physical and logical volumes.
    Ls,
    /// Make an imported device a physical volume.
    Pvcreate {
        /// The export's name.
        device: String,
    },
    /// Make a volume group.
    Vgcreate {
        /// Its name.
        name: String,
        /// Its devices.
        devices: Vec<String>,
    },
    /// Make a linear logical volume.
    Lvcreate(Sized),
    /// Make a logical volume longer.
    Lvextend(Sized),
    /// Remove a logical volume.
    Lvremove {
        /// GROUP/NAME.
        volume: String,
    },
}

#[derive(Debug, Args)]
struct Sized {
    /// GROUP/NAME.
    volume: String,
    /// Its size in bytes, or with K, M, G or T (powers of 1024).
    size: String,
}

#[derive(Debug, Subcommand)]
enum Service {
    /// Services and where they run.
    Ls,
    /// Start a service where its domain says.
    Enable {
        /// Its name.
        name: String,
    },
    /// Stop a service and keep it stopped.
    Disable {
        /// Its name.
        name: String,
    },
    /// Move a service.
    Relocate {
        /// Its name.
        name: String,
        /// The node's id; where the policy says if left out.
        node: Option<u32>,
    },
}

/// Carries out the command; the exit code.
pub(crate) fn run(cli: Cli) -> Result<u8, Box<dyn std::error::Error>> {
    match cli.command {
        Verb::Storage(options) => quorate::storage::run(options),
        Verb::Witness(options) => quorate::witness::run(options),
        Verb::Node(options) => quorate::node::run(options),
        Verb::Cluster(command) => quorate::cluster::run(&command),
        Verb::Fs(files) => files::run(files, &cli.node, cli.json),
        Verb::Lock(Lock::Run(run)) => locks::run(&run, &cli.node),
        Verb::Lock(Lock::Take(wanted)) => locks::hold(&wanted, &cli.node, cli.json),
        Verb::Config(Config::Check { file }) => admin::check_config(&file),
        other => admin::run(other, &cli.node, cli.json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// An argument with the id of a global one is read as that one, with its type: a panic at every use.
    fn no_global_is_hidden(command: &clap::Command, globals: &[clap::Id]) {
        let own = command.get_arguments().filter(|a| !a.is_global_set());
        for arg in own {
            assert!(!globals.contains(arg.get_id()), "{} {}", command.get_name(), arg.get_id());
        }
        command.get_subcommands().for_each(|c| no_global_is_hidden(c, globals));
    }

    #[test]
    fn no_argument_of_a_command_is_mistaken_for_a_global_one() {
        let command = Cli::command();
        let globals: Vec<clap::Id> =
            command.get_arguments().filter(|a| a.is_global_set()).map(|a| a.get_id().clone()).collect();
        assert_eq!(globals, ["node_dir", "json"]);
        no_global_is_hidden(&command, &globals);
    }

    #[test]
    fn commands_that_name_a_node_are_told_from_the_node_that_is_asked() {
        let parse = |words: &str| Cli::try_parse_from(words.split(' ')).unwrap();
        let cli = parse("quorate --node /n fence confirm 2 --i-have-seen-that-it-is-off");
        assert_eq!(cli.node, PathBuf::from("/n"));
        let Verb::Fence(Fence::Confirm { node: 2, i_have_seen_that_it_is_off: true }) = cli.command else {
            panic!("{cli:?}")
        };
        let cli = parse("quorate service relocate web 3 --node /n --json");
        assert_eq!((&cli.node, cli.json), (&PathBuf::from("/n"), true));
        let Verb::Service(Service::Relocate { node: Some(3), .. }) = cli.command else { panic!("{cli:?}") };
    }
}
