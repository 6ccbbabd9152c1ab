//! Cryptography: sealing of stored secrets, API keys, token signatures and the TLS certificate.

pub mod api_key;
pub mod audit;
pub mod certificate;
pub mod jws;
pub mod keyed_digest;
pub mod sealer;
