//! Diagnosis of image pulls against a real API server and real registries.

mod applied;
mod attacks;
mod broken;
mod command;
mod events;
mod limits;
mod nodes;
mod pods;
mod rights;
mod secrecy;
pub mod setup;
