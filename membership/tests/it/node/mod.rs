//! Real nodes of one process on loopback: certificates, sockets, disks and clocks.

mod cluster;
mod forming;
mod keys;
mod refusals;
mod upgrade;
