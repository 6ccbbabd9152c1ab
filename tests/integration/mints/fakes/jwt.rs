//! JWTs, as providers check them.

use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaParameters, UnparsedPublicKey};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::Utc;
use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256};
use serde_json::{Value, json};

use crate::identity_providers::keys::TestKey;

/// Parsed JWT whose signature is not verified yet.
pub struct Jwt {
    header: Value,
    claims: Value,
    message: String,
    signature: Vec<u8>,
}

impl Jwt {
    pub fn parse(text: &str) -> Option<Self> {
        let (message, signature) = text.rsplit_once('.')?;
        let (header, claims) = message.split_once('.')?;
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part.trim_end_matches('=')).ok();
        Some(Self {
            header: serde_json::from_slice(&decode(header)?).ok()?,
            claims: serde_json::from_slice(&decode(claims)?).ok()?,
            message: message.to_owned(),
            signature: decode(signature)?,
        })
    }

    /// Parameter of the header; empty if it is missing.
    pub fn parameter(&self, name: &str) -> &str {
        self.header[name].as_str().unwrap_or_default()
    }

    /// Text of a claim; empty if it is missing.
    pub fn claim(&self, name: &str) -> &str {
        self.claims[name].as_str().unwrap_or_default()
    }

    /// Whether an RSA key, as PKCS#1 DER, signed it with RS256 or PS256.
    pub fn is_signed_by(&self, key: &[u8]) -> bool {
        let parameters: &'static RsaParameters = match self.parameter("alg") {
            "RS256" => &RSA_PKCS1_2048_8192_SHA256,
            "PS256" => &RSA_PSS_2048_8192_SHA256,
            _ => return false,
        };
        UnparsedPublicKey::new(parameters, key).verify(self.message.as_bytes(), &self.signature).is_ok()
    }

    pub fn is_for(&self, audience: &str) -> bool {
        match &self.claims["aud"] {
            Value::Array(audiences) => audiences.iter().any(|own| own == audience),
            own => own == audience,
        }
    }

    /// Seconds until it expires; negative afterwards.
    pub fn remaining(&self) -> f64 {
        self.claims["exp"].as_f64().unwrap_or_default() - now()
    }

    /// Whether it is valid now, and for at most `seconds`. Clocks may differ by ten seconds.
    pub fn is_current(&self, seconds: f64) -> bool {
        let earliest = self.claims["nbf"].as_f64().or_else(|| self.claims["iat"].as_f64());
        let has_begun = earliest.is_none_or(|earliest| earliest <= now() + 10.0);
        has_begun && (0.0..=seconds + 10.0).contains(&self.remaining())
    }
}

fn now() -> f64 {
    // Milliseconds since 1970 have an exact representation.
    #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
    let milliseconds = Utc::now().timestamp_millis() as f64;
    milliseconds / 1_000.0
}

/// Token of a fake, which verifies it by comparison.
pub fn token_of(claims: &Value) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.{}", part(&json!({"alg": "RS256", "typ": "JWT"})), part(claims), part(&json!("fake")))
}

/// OIDC issuer that a provider trusts.
pub struct TrustedIssuer {
    pub issuer: &'static str,
    /// PKCS#1 DER.
    pub key: Vec<u8>,
    pub subject: String,
}

/// Why a provider does not accept a token of an issuer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// It is no JWT of this issuer.
    Invalid,
    Expired,
    Audience,
    Subject,
}

impl TrustedIssuer {
    /// Checks a token, and returns the seconds until it expires.
    pub fn check(&self, token: &str, audience: &str) -> Result<f64, Rejection> {
        let jwt = Jwt::parse(token).ok_or(Rejection::Invalid)?;
        if jwt.claim("iss") != self.issuer || !jwt.is_signed_by(&self.key) {
            return Err(Rejection::Invalid);
        }
        if !jwt.is_current(86_400.0) {
            return Err(Rejection::Expired);
        }
        if !jwt.is_for(audience) {
            return Err(Rejection::Audience);
        }
        if jwt.claim("sub") != self.subject {
            return Err(Rejection::Subject);
        }
        Ok(jwt.remaining())
    }
}

/// RSA key of a client.
pub struct ClientKey(KeyPair);

impl ClientKey {
    pub fn new() -> Self {
        Self(KeyPair::generate_for(&PKCS_RSA_SHA256).expect("a key"))
    }

    pub fn pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// Public key as PKCS#1 DER.
    pub fn public(&self) -> Vec<u8> {
        self.0.public_key_raw().to_vec()
    }

    /// The same key, to sign tokens with any claims.
    pub fn signer(&self) -> TestKey {
        TestKey::rsa_from("", self.0.serialized_der())
    }

    /// Self-signed certificate: PEM and DER.
    pub fn certificate(&self) -> (String, Vec<u8>) {
        let certificate = CertificateParams::default().self_signed(&self.0).expect("a certificate");
        (certificate.pem(), certificate.der().to_vec())
    }
}
