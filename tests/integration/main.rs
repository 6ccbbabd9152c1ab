//! Tests against real parts: Postgres, kube-apiserver, registries. `dev/with-services` brings them.

mod cluster_client;
