//! Real nodes of one process on loopback: certificates, sockets, disks and clocks.

mod cluster;
mod forming;
mod groups;
mod keys;
mod paths;
mod proxy;
mod refusals;
mod upgrade;
