//! The simulation of the distributed lock manager.

mod scenarios;
mod world;
