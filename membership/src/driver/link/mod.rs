//! Everything between a transport's raw connection and a machine: frames, the hello, the mesh of connections.

mod frames;
mod hello;
mod mesh;
#[cfg(test)]
mod tests;

pub(super) use frames::{FrameReader, OutQueue, write_out};
pub use hello::HelloRefusal;
pub(super) use hello::{Established, Me, RosterCheck};
pub(super) use mesh::{Mesh, MeshEvent, Paths};
