//! What a shard knows of its names: one entry for each, found once.
//!
//! A name that is mastered here is mostly used here too, so the resource and the node's own locks stand side by side.

use super::local::LocalName;
use super::master::Mastered;
use crate::LockName;
use crate::names::NameMap;

/// One name. Invariant: it is mastered here, or this node has to do with it, or both.
#[derive(Clone, Debug, Default)]
pub(super) struct Named {
    /// The resource, where this node is its master.
    pub(super) mastered: Option<Mastered>,
    /// This node's locks on it, and where its master is.
    pub(super) local: Option<LocalName>,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Names(NameMap<Named>);

impl Names {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn both_mut(&mut self, name: &LockName) -> Option<&mut Named> {
        self.0.get_mut(name)
    }

    pub(super) fn mastered(&self, name: &LockName) -> Option<&Mastered> {
        self.0.get(name)?.mastered.as_ref()
    }

    pub(super) fn mastered_mut(&mut self, name: &LockName) -> Option<&mut Mastered> {
        self.0.get_mut(name)?.mastered.as_mut()
    }

    pub(super) fn is_mastered(&self, name: &LockName) -> bool {
        self.mastered(name).is_some()
    }

    pub(super) fn local(&self, name: &LockName) -> Option<&LocalName> {
        self.0.get(name)?.local.as_ref()
    }

    pub(super) fn local_mut(&mut self, name: &LockName) -> Option<&mut LocalName> {
        self.0.get_mut(name)?.local.as_mut()
    }

    pub(super) fn put_mastered(&mut self, name: LockName, mastered: Mastered) {
        if let Some(named) = self.0.get_mut(&name) {
            named.mastered = Some(mastered);
        } else {
            self.0.insert(name, Named { mastered: Some(mastered), local: None });
        }
    }

    pub(super) fn put_local(&mut self, name: LockName, local: LocalName) {
        if let Some(named) = self.0.get_mut(&name) {
            named.local = Some(local);
        } else {
            self.0.insert(name, Named { mastered: None, local: Some(local) });
        }
    }

    pub(super) fn take_mastered(&mut self, name: &LockName) -> Option<Mastered> {
        let named = self.0.get_mut(name)?;
        let mastered = named.mastered.take();
        if named.local.is_none() {
            self.0.remove(name);
        }
        mastered
    }

    pub(super) fn take_local(&mut self, name: &LockName) -> Option<LocalName> {
        let named = self.0.get_mut(name)?;
        let local = named.local.take();
        if named.mastered.is_none() {
            self.0.remove(name);
        }
        local
    }

    pub(super) fn all_mastered(&self) -> impl Iterator<Item = (&LockName, &Mastered)> {
        self.0.iter().filter_map(|(name, named)| Some((name, named.mastered.as_ref()?)))
    }

    pub(super) fn all_mastered_mut(&mut self) -> impl Iterator<Item = (&LockName, &mut Mastered)> {
        self.0.iter_mut().filter_map(|(name, named)| Some((name, named.mastered.as_mut()?)))
    }

    pub(super) fn all_local(&self) -> impl Iterator<Item = (&LockName, &LocalName)> {
        self.0.iter().filter_map(|(name, named)| Some((name, named.local.as_ref()?)))
    }

    pub(super) fn all_local_mut(&mut self) -> impl Iterator<Item = (&LockName, &mut LocalName)> {
        self.0.iter_mut().filter_map(|(name, named)| Some((name, named.local.as_mut()?)))
    }
}
