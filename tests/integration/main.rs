//! Integration tests against real Postgres, API servers and registries, started by
//! `dev/with-services`.

#![expect(clippy::disallowed_methods, reason = "tests read the environment and the wall clock")]

/// As in `main`: [`memory`] measures with it.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

mod access;
mod accounts;
mod api_keys;
mod architecture;
mod audit;
mod bad_input;
mod cluster_checks;
mod cluster_client;
mod cluster_credentials;
mod command_line;
mod coverage;
mod dependencies;
mod diagnosis;
mod direct_secrets;
mod documents;
mod dry_runs;
mod edge;
mod error_texts;
mod examples;
mod explain;
mod idempotency;
mod identity_providers;
mod image_matches;
mod imports;
mod leaks;
mod lifecycle;
mod lists;
mod logins;
mod memory;
mod migrations;
mod mints;
mod monitoring;
mod narrow_keys;
mod openapi;
mod packaging;
mod peppers;
mod pull_secrets;
mod readers;
mod resource_events;
mod row_cache;
mod sealed_values;
mod sessions;
mod support;
mod traces;
mod unchanged;
mod verify;
mod walkthrough;
