//! regcred: a credential broker that turns registry accounts into Kubernetes image pull secrets.
//!
//! `docs/ARCHITECTURE.md` shows the modules and traces a request through them.
#![warn(missing_docs)]

pub mod app;
pub mod cli;
pub mod clients;
pub mod clock;
pub mod config;
pub mod crypto;
pub mod domain;
pub mod http;
pub mod metrics;
pub mod service;
pub mod shutdown;
pub mod storage;
pub mod telemetry;
pub mod worker;
