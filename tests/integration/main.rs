//! Tests against real parts: Postgres, kube-apiserver, registries. `dev/with-services` brings them.

mod access;
mod accounts;
mod architecture;
mod bad_input;
mod cluster_client;
mod dependencies;
mod edge;
mod explain;
mod imports;
mod leaks;
mod lifecycle;
mod openapi;
mod readers;
mod support;
mod verify;
mod walkthrough;
