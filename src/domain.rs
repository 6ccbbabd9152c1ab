//! The nouns and their rules: pure, no I/O, imports nothing else of regcred.

pub mod account;
pub mod caller;
pub mod cluster;
pub mod docker_config;
pub mod invalid;
pub mod names;
pub mod registry;
pub mod sealed;
pub mod secret;
