//! Sealing of stored secrets, and the keys that callers show.

pub mod api_key;
pub mod audit;
pub mod sealer;
