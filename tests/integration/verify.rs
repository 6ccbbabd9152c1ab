//! Does a login work: the check against real registries, and against those that are turned against its host.

mod api;
mod attacks;
mod bearer;
pub mod certificates;
mod clusters;
mod command;
mod health;
pub mod listening;
mod registries;
mod token_service;
