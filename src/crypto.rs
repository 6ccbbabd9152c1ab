//! Sealing of stored secrets, the keys that callers show, and the certificate that regcred shows.

pub mod api_key;
pub mod certificate;
pub mod sealer;
