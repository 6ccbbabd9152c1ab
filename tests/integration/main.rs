//! Integration tests against real Postgres, API servers and registries, started by
//! `dev/with-services`.

#![expect(clippy::disallowed_methods, reason = "tests read the environment and the wall clock")]

/// As in `main`: [`memory`] measures with it.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> = zeroizing_alloc::ZeroAlloc(std::alloc::System);

mod access;
mod accounts;
mod architecture;
mod audit;
mod bad_input;
mod cluster_checks;
mod cluster_client;
mod dependencies;
mod edge;
mod examples;
mod explain;
mod idempotency;
mod identity_providers;
mod imports;
mod leaks;
mod lifecycle;
mod memory;
mod narrow_keys;
mod openapi;
mod peppers;
mod pull_secrets;
mod readers;
mod row_cache;
mod sealed_values;
mod support;
mod verify;
mod walkthrough;
