//! The scenarios on the distributed lock manager: no delays to speak of, failures and fences by hand.

use super::world::{Event, Told as WorldTold, World as Sim};
use crate::scenarios::{World, play_all};
use crate::support::Told;
use quorate_dlm::{
    ConvertRequest, LockError, LockId, LockName, LockRequest, LockspaceOptions, ResourceDump, UnlockRequest,
};
use quorate_membership::{Identity, Incarnation, NodeId};

struct Distributed {
    sim: Sim,
}

fn life(node: u32) -> Identity {
    Identity::new(NodeId(node), Incarnation(1))
}

impl Distributed {
    fn new(count: u32) -> Self {
        let mut sim = Sim::new(count.max(2), 1, LockspaceOptions::plain(super::world::SPACE), None);
        sim.by_hand = true;
        let mut world = Self { sim };
        world.settle();
        assert!(world.sim.nodes.values().all(|n| n.machine.is_ready()));
        world
    }
}

impl World for Distributed {
    fn request(&mut self, node: u32, request: LockRequest) -> Result<LockId, LockError> {
        self.sim.request(life(node), request)
    }
    fn convert(&mut self, node: u32, id: LockId, request: ConvertRequest) -> Result<(), LockError> {
        self.sim.convert(life(node), id, request)
    }
    fn unlock(&mut self, node: u32, id: LockId, request: UnlockRequest) -> Result<(), LockError> {
        self.sim.unlock(life(node), id, request)
    }
    fn cancel(&mut self, node: u32, id: LockId) -> Result<(), LockError> {
        self.sim.cancel(life(node), id)
    }
    fn settle(&mut self) {
        while self.sim.step().is_some() {}
    }
    fn told(&mut self) -> Vec<(u32, LockId, Told)> {
        std::mem::take(&mut self.sim.told)
            .into_iter()
            .map(|(who, id, told)| {
                let told = match told {
                    WorldTold::Done(completion) => Told::Done(completion),
                    WorldTold::Blocking(mode) => Told::Blocking(mode),
                };
                (who.node.0, id, told)
            })
            .collect()
    }
    fn show(&self, name: &LockName) -> Option<ResourceDump> {
        self.sim.nodes.values().flat_map(|n| n.machine.dump().resources).find(|r| r.name == *name)
    }
    fn crash(&mut self, node: u32) -> Option<()> {
        self.sim.crash(life(node), 1);
        Some(())
    }
    fn fence(&mut self, node: u32) {
        self.sim.after(1, Event::Fence { who: life(node) });
    }
}

#[test]
fn the_scenarios_hold_on_the_distributed_lock_manager() {
    let played = play_all(Distributed::new, true);
    assert!(50 <= played, "{played}");
}
