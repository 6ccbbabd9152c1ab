//! Integration tests against real Postgres, API servers and registries, started by
//! `dev/with-services`.

#![expect(clippy::disallowed_methods, reason = "tests read the environment and the wall clock")]

mod access;
mod accounts;
mod architecture;
mod audit;
mod bad_input;
mod cluster_client;
mod dependencies;
mod edge;
mod explain;
mod identity_providers;
mod imports;
mod leaks;
mod lifecycle;
mod openapi;
mod pull_secrets;
mod readers;
mod row_cache;
mod support;
mod verify;
mod walkthrough;
