//! Real nodes of one process on loopback: certificates, sockets, disks and clocks.

mod cluster;
mod forming;
mod groups;
mod keys;
mod refusals;
mod upgrade;
