//! Coverage of clusters against real API servers and real registries.
//!
//! The second cluster has no pods of other tests: a run asks the registries of all of its images.

mod command;
mod leases;
mod lists;
mod rights;
mod secrecy;
mod setup;
mod snapshots;
