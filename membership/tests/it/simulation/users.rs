//! Users of the membership: they attach, detach, prove, evict, change voters and leave, on every node.

use super::World;
use quorate_membership::sim::Happening;
use quorate_membership::{
    AttachRequest, Attachment, NodeId, Proof, QuorumOptions, Request, ResourceId, ResourceKind, Rng, Safety,
    ServerEntry, ServerId, TieBreaker, View,
};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Options under which `voters` voters can still be a cluster when all of them are well.
pub(crate) fn quorum_options(rng: &mut Rng, voters: u32) -> QuorumOptions {
    let mut options = QuorumOptions::default();
    if rng.chance_ppm(400_000) {
        return options;
    }
    if rng.chance_ppm(300_000) {
        options.votes.insert(NodeId(1 + rng.below(u64::from(voters)) as u32), rng.below(4) as u32);
    }
    if rng.chance_ppm(200_000) {
        options.expected_votes = voters;
    }
    options.wait_for_all = rng.chance_ppm(300_000);
    options.allow_downscale = rng.chance_ppm(300_000);
    options.tie_breaker = match rng.below(5) {
        0 => Some(TieBreaker::Lowest),
        1 => Some(TieBreaker::Highest),
        2 => Some(TieBreaker::List(vec![NodeId(2), NodeId(1)])),
        _ => None,
    };
    if rng.chance_ppm(400_000) {
        options.last_man_standing_ms = Some(1_000 + rng.below(4_000) as u32);
    }
    options
}

/// The users.
pub(crate) struct Users {
    rng: Rng,
    busy_ppm: u32,
    /// Whether they change the quorum options.
    options: bool,
}

const SPACES: [&str; 2] = ["a", "b"];

impl Users {
    pub(crate) fn new(mut rng: Rng, options: bool) -> Self {
        let busy_ppm = *rng.pick(&[100_000, 400_000, 900_000]).unwrap();
        Self { rng, busy_ppm, options }
    }

    /// Each node's user perhaps asks for something.
    pub(crate) fn work(&mut self, world: &mut World) {
        for (node, view) in members(world) {
            if self.rng.chance_ppm(self.busy_ppm)
                && let Some(request) = self.any(world, node, &view)
            {
                ask(world, node, request);
            }
        }
    }

    /// Pays debts and gives up attachments only.
    pub(crate) fn clean_up(&mut self, world: &mut World) {
        for (node, view) in members(world) {
            if world.history.open.values().any(|(who, _)| who.node == node) {
                continue;
            }
            if let Some(request) = self.pay(world, node, &view, true) {
                ask(world, node, request);
            }
        }
    }

    fn any(&mut self, world: &World, node: NodeId, view: &View) -> Option<Request> {
        let me = view.identity(node)?;
        match self.rng.below(100) {
            0..35 => Some(Request::Attach(self.attach(view))),
            35..55 => {
                let mine: Vec<&Attachment> = view.attachments.iter().filter(|a| a.owner == me).collect();
                self.rng.pick(&mine).map(|a| Request::Detach(a.resource.clone()))
            }
            55..90 => self.pay(world, node, view, false),
            90..92 => {
                let who: Vec<_> = view.identities().collect();
                let who = *self.rng.pick(&who)?;
                Some(Request::Evict { who, reason: "a user's whim".into() })
            }
            92..94 => Some(Request::Leave { give_up_vote: false }),
            94..95 if self.options => {
                let voters = u32::try_from(view.voters.voters.len()).unwrap();
                Some(Request::SetQuorum(quorum_options(&mut self.rng, voters)))
            }
            94..97 => {
                let id = ServerId::from_bytes([self.rng.below(2) as u8; 16]);
                if self.rng.chance_ppm(800_000) {
                    let entry = ServerEntry { name: "s".into(), address: "127.0.0.1:1".into() };
                    Some(Request::Enrol(id, entry))
                } else {
                    Some(Request::Retire(id))
                }
            }
            _ => {
                // Fewer voters, or a tie breaker; the leader brings missing ones back in.
                let mut set = view.voters.clone();
                let all: Vec<NodeId> = set.voters.keys().copied().collect();
                let one = *self.rng.pick(&all)?;
                if self.rng.chance_ppm(500_000) && 3 < all.len() {
                    set.voters.remove(&one);
                    set.tie_breaker = set.tie_breaker.filter(|t| *t != one);
                } else {
                    set.tie_breaker = if set.tie_breaker.is_some() { None } else { Some(one) };
                }
                Some(Request::SetVoters(set))
            }
        }
    }

    fn attach(&mut self, view: &View) -> AttachRequest {
        let space = *self.rng.pick(&SPACES).unwrap();
        let servers: BTreeSet<ServerId> = view.servers.keys().copied().collect();
        let storage = if self.rng.chance_ppm(500_000) { servers } else { BTreeSet::new() };
        let plain = |kind, name: &str, safety| AttachRequest {
            resource: ResourceId::new(kind, name),
            safety,
            servers: BTreeSet::new(),
            journals: None,
            lockspace: None,
            exclusive: false,
        };
        match self.rng.below(5) {
            0 | 1 => plain(ResourceKind::Lockspace, space, Safety::Lease),
            2 => AttachRequest {
                journals: if self.rng.chance_ppm(800_000) { Some(3) } else { None },
                lockspace: Some("a".into()),
                servers: storage,
                ..plain(ResourceKind::Filesystem, "f", Safety::Storage)
            },
            3 => AttachRequest { servers: storage, ..plain(ResourceKind::BlockDevice, "d", Safety::Storage) },
            _ => AttachRequest { exclusive: true, ..plain(ResourceKind::Service, "s", Safety::Lease) },
        }
    }

    /// A proof for some debt. An impatient user does not wait for the lease's end; the leader has to.
    fn pay(&mut self, world: &World, node: NodeId, view: &View, calm: bool) -> Option<Request> {
        let me = view.identity(node)?;
        let debts: Vec<_> =
            view.debts.iter().flat_map(|(who, d)| d.items.iter().map(move |(r, i)| (*who, r, i))).collect();
        let (debtor, resource, item) = *self.rng.pick(&debts)?;
        let attached = view.attached(resource).find(|a| a.owner == me);
        let impatient = !calm && self.rng.chance_ppm(300_000);
        let proof = if !item.fenced {
            if !impatient && !world.cluster.lease_is_over(node, debtor) {
                return None;
            }
            let confirmed = view.servers.keys().map(|s| (*s, view.epoch)).collect();
            if item.attachment.safety == Safety::Lease {
                Proof::LeaseOver
            } else {
                Proof::StorageFence { confirmed }
            }
        } else {
            match resource.kind {
                ResourceKind::Lockspace if !item.rebuilt && attached.is_some() => {
                    let since = view.lockspaces.get(&resource.name).copied().unwrap_or_default();
                    let epoch = if self.rng.chance_ppm(900_000) { view.epoch } else { since };
                    Proof::Rebuilt { epoch }
                }
                ResourceKind::Filesystem if item.rebuilt => {
                    if attached.is_none_or(|a| a.journal.is_none()) {
                        return self.open(view, me.node, resource, item.attachment.lockspace.clone());
                    }
                    Proof::Replayed
                }
                ResourceKind::Service => Proof::Recovered,
                _ => return None,
            }
        };
        let named = self.rng.chance_ppm(500_000) || !calm;
        let resources = if named { BTreeSet::from([resource.clone()]) } else { BTreeSet::new() };
        Some(Request::Prove { debtor, resources, proof })
    }

    /// Somebody has to mount a dirty filesystem read-write to replay it.
    fn open(
        &mut self,
        view: &View,
        node: NodeId,
        fs: &ResourceId,
        lockspace: Option<String>,
    ) -> Option<Request> {
        let me = view.identity(node)?;
        if view.attached(fs).any(|a| a.owner == me) {
            return Some(Request::Detach(fs.clone()));
        }
        let resource = fs.clone();
        let (safety, servers) = (Safety::Storage, BTreeSet::new());
        Some(Request::Attach(AttachRequest {
            resource,
            safety,
            servers,
            journals: Some(3),
            lockspace,
            exclusive: false,
        }))
    }
}

fn members(world: &World) -> Vec<(NodeId, Arc<View>)> {
    let inside = |m: &quorate_membership::machine::Member| m.is_member() && m.stopped().is_none();
    world
        .cluster
        .nodes()
        .filter(|(_, h)| !h.is_paused())
        .filter_map(|(n, h)| h.member().filter(|m| inside(m)).and_then(|m| m.view().cloned()).map(|v| (n, v)))
        .collect()
}

fn ask(world: &mut World, node: NodeId, request: Request) {
    world.look();
    let Some(life) = world.cluster.member(node).map(|m| m.me()) else { return };
    let Some(id) = world.cluster.propose(node, request.clone()) else { return };
    let news: Vec<Happening> = world.cluster.peek_happenings().to_vec();
    world.history.asked(life, id, request, &news);
    world.look();
}
