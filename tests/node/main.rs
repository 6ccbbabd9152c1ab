//! A real kubelet pulls from private registries with what regcred made: the published walk-through
//! of manual pull secrets, up to the running pod.
//!
//! `make node-test` runs these tests with `dev/with-node`; other targets leave them out.

#![expect(clippy::disallowed_methods, reason = "tests read the environment and the wall clock")]

#[path = "../integration"]
mod integration {
    #[expect(dead_code, reason = "the integration tests use all of it")]
    pub mod support;
}
mod pods;
mod refusals;
mod rotation;
mod walkthrough;

use integration::support;
