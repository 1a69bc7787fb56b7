//! The lock manager from outside: scenarios as text, the lock cache, and the simulation.

mod cache;
mod invariants;
mod scenarios;
mod sim;
mod support;
