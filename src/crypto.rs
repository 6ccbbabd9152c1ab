//! Sealing of stored secrets, and the keys that callers show.

pub mod api_key;
pub mod audit;
pub mod jws;
pub mod keyed_digest;
pub mod sealer;
