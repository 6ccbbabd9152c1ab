//! The world outside: what regcred calls over the network.

pub mod cluster;
pub mod guard;
pub mod oidc;
pub mod registry;
