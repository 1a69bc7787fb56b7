//! The lock manager from outside: scenarios as text, the lock cache, and the simulation.

mod cache;
mod scenarios;
mod sim;
mod support;
