//! What must hold of process groups after every event.

pub(crate) mod membership_order;
pub(crate) mod no_creation;
pub(crate) mod self_delivery;
pub(crate) mod total_order;
pub(crate) mod virtual_synchrony;
