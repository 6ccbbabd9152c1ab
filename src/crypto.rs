//! Sealing of stored secrets, the keys that callers show, and the certificate that regcred shows.

pub mod api_key;
pub mod audit;
pub mod certificate;
pub mod jws;
pub mod keyed_digest;
pub mod sealer;
