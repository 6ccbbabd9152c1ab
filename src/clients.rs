//! Clients for the systems that regcred calls over the network.

pub mod cluster;
pub mod mint;
pub mod oidc;
pub mod outbound;
pub mod registry;
