//! Verification of logins against real registries, and against hostile ones.

mod api;
mod attacks;
mod bearer;
pub mod certificates;
mod clusters;
mod command;
mod health;
pub mod listening;
mod lookups;
mod minted;
mod proxied;
pub mod registries;
pub mod token_service;
