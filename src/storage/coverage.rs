//! Coverage of clusters: runs, snapshots, and what they say of accounts and pull secrets.

pub mod lists;
pub mod runs;
pub mod snapshots;
pub mod sources;
pub mod usage;
