//! Domain types and their rules: pure, without I/O, independent of the other modules.

pub mod account;
pub mod account_name;
pub mod audit;
pub mod caller;
pub mod cluster;
pub mod docker_config;
pub mod grants;
pub mod idempotency;
pub mod identity_provider;
pub mod invalid;
pub mod jwk;
pub mod matching;
pub mod names;
pub mod network;
pub mod origin;
pub mod proxies;
pub mod pull_secret;
pub mod rbac;
pub mod reconcile;
pub mod registry;
pub mod sealed;
pub mod secret;
pub mod selector;
pub mod token;
pub mod unique;
pub mod verification;
