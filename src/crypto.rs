//! Cryptography: sealing of stored secrets, API keys, audit HMACs, token signatures, signed requests
//! and the TLS certificate.

pub mod api_key;
pub mod audit;
pub mod certificate;
pub mod constant_time;
pub mod cursor;
pub mod fingerprint;
pub mod jws;
pub mod jwt_signer;
pub mod keyed_digest;
pub mod pepper;
pub mod ring;
pub mod sealer;
pub mod session;
pub mod sigv4;
