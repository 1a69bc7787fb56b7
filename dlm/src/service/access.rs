//! Who may open which lockspace.

use serde::{Deserialize, Serialize};

/// Who is at the other end of a connection, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// User id.
    pub uid: u32,
    /// Group id; supplementary groups are not looked at.
    pub gid: u32,
    /// Process id when it connected; 0 if unknown.
    pub pid: u32,
}

/// Users of a set of lockspaces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessRule {
    /// A lockspace's name, or with `*` at its end, all that begin so.
    pub lockspace: String,
    /// Users who may open it.
    #[serde(default)]
    pub uids: Vec<u32>,
    /// Groups whose members (by their primary group) may open it.
    #[serde(default)]
    pub gids: Vec<u32>,
    /// Everybody may.
    #[serde(default)]
    pub anybody: bool,
}

impl AccessRule {
    fn is_for(&self, lockspace: &str) -> bool {
        match self.lockspace.strip_suffix('*') {
            Some(prefix) => lockspace.starts_with(prefix),
            None => self.lockspace == lockspace,
        }
    }

    fn admits(&self, peer: Peer) -> bool {
        self.anybody || self.uids.contains(&peer.uid) || self.gids.contains(&peer.gid)
    }
}

/// All rules of a service. Root and the node's own user may open everything that is not reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessRules {
    /// Lockspaces that the system keeps for itself, as names or with `*` at the end. Opened by nobody.
    pub reserved: Vec<String>,
    /// Each admits; who is admitted by none is refused.
    pub rules: Vec<AccessRule>,
}

impl AccessRules {
    /// Whether `peer` may open `lockspace` on a node that runs as user `node_uid`.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn check(&self, peer: Peer, lockspace: &str, node_uid: u32) -> Result<(), String> {
        let is = |reserved: &String| {
            AccessRule { lockspace: reserved.clone(), ..AccessRule::default() }.is_for(lockspace)
        };
        if self.reserved.iter().any(is) {
            return Err(format!("lockspace {lockspace} is the system's own"));
        }
        let admitted = peer.uid == 0
            || peer.uid == node_uid
            || self.rules.iter().any(|r| r.is_for(lockspace) && r.admits(peer));
        if admitted { Ok(()) } else { Err(format!("user {} may not open lockspace {lockspace}", peer.uid)) }
    }

    /// Whether anybody but root and the node's user is admitted to anything.
    #[must_use]
    pub fn admits_others(&self) -> bool {
        !self.rules.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_admit_by_name_and_prefix_and_never_to_what_is_reserved() {
        let rule = |lockspace: &str| AccessRule { lockspace: lockspace.into(), ..AccessRule::default() };
        let rules = AccessRules {
            reserved: vec!["gfs:*".into(), "lvm".into()],
            rules: vec![
                AccessRule { uids: vec![7], ..rule("backup") },
                AccessRule { gids: vec![8], ..rule("web*") },
                AccessRule { anybody: true, ..rule("*") },
            ],
        };
        let peer = |uid, gid| Peer { uid, gid, pid: 1 };
        let narrow = AccessRules { rules: rules.rules[..2].to_vec(), ..rules.clone() };
        assert!(narrow.check(peer(7, 1), "backup", 5).is_ok());
        assert!(narrow.check(peer(7, 1), "backup2", 5).is_err());
        assert!(narrow.check(peer(9, 8), "web-1", 5).is_ok());
        assert!(narrow.check(peer(9, 9), "web-1", 5).is_err());
        assert!(narrow.check(peer(5, 9), "anything", 5).is_ok());
        assert!(rules.check(peer(9, 9), "anything", 5).is_ok());
        for uid in [0, 5, 9] {
            assert!(rules.check(peer(uid, 9), "gfs:data", 5).is_err());
            assert!(rules.check(peer(uid, 9), "lvm", 5).is_err());
        }
    }
}
