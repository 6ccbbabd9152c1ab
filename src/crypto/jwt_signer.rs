//! Signs JWTs with an RSA key: the assertions that authenticate clients of Google and Azure.

use std::fmt;

use aws_lc_rs::{
    digest,
    rand::SystemRandom,
    rsa::KeyPair,
    signature::{RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding},
};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};

use crate::domain::invalid::Invalid;

/// Signature algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SigningAlgorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PSS with SHA-256.
    Ps256,
}

impl SigningAlgorithm {
    const fn name(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Ps256 => "PS256",
        }
    }

    fn encoding(self) -> &'static dyn RsaEncoding {
        match self {
            Self::Rs256 => &RSA_PKCS1_SHA256,
            Self::Ps256 => &RSA_PSS_SHA256,
        }
    }
}

/// RSA key that signs JWTs.
pub struct JwtSigner(KeyPair);

impl fmt::Debug for JwtSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSigner").finish_non_exhaustive()
    }
}

impl JwtSigner {
    /// Parses an unencrypted private key in PEM, PKCS#8 or PKCS#1.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is not an RSA key of 2048 to 8192 bits.
    pub fn parse(pem: &SecretString) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("must be an unencrypted RSA private key in PEM, of 2048 to 8192 bits");
        let der = PrivateKeyDer::from_pem_slice(pem.expose_secret().as_bytes()).map_err(|_| invalid())?;
        let key = match &der {
            PrivateKeyDer::Pkcs8(key) => KeyPair::from_pkcs8(key.secret_pkcs8_der()),
            PrivateKeyDer::Pkcs1(key) => KeyPair::from_der(key.secret_pkcs1_der()),
            _ => return Err(invalid()),
        };
        Ok(Self(key.map_err(|_| invalid())?))
    }

    /// Signs a JWT. `header` needs no `alg` and no `typ`.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the key does not sign.
    pub fn sign(
        &self,
        algorithm: SigningAlgorithm,
        mut header: Value,
        claims: &Value,
    ) -> Result<SecretString, Invalid> {
        header["alg"] = json!(algorithm.name());
        header["typ"] = json!("JWT");
        let encode = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", encode(&header), encode(claims));
        let mut signature = vec![0; self.0.public_modulus_len()];
        self.0
            .sign(algorithm.encoding(), &SystemRandom::new(), message.as_bytes(), &mut signature)
            .map_err(|_| Invalid::new("does not sign"))?;
        Ok(SecretString::from(format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))))
    }
}

/// Returns the SHA-256 of a certificate as the header parameter `x5t#S256` has it (RFC 7515, section
/// 4.1.8).
#[must_use]
pub fn thumbprint(certificate: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, certificate))
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::{AsDer, Pkcs8V1Der},
        rsa::KeySize,
        signature::{
            KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaParameters, UnparsedPublicKey,
        },
    };
    use base64::prelude::BASE64_STANDARD;
    use rstest::rstest;

    use super::*;

    fn pem(key: &KeyPair) -> SecretString {
        let der: Pkcs8V1Der<'_> = key.as_der().unwrap();
        let body = BASE64_STANDARD.encode(der.as_ref());
        SecretString::from(format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"))
    }

    #[rstest]
    #[case(SigningAlgorithm::Rs256, "RS256", &RSA_PKCS1_2048_8192_SHA256)]
    #[case(SigningAlgorithm::Ps256, "PS256", &RSA_PSS_2048_8192_SHA256)]
    fn signed_jwt_verifies_with_the_public_key(
        #[case] algorithm: SigningAlgorithm,
        #[case] name: &str,
        #[case] parameters: &'static RsaParameters,
    ) {
        let key = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let signer = JwtSigner::parse(&pem(&key)).unwrap();
        let jwt = signer.sign(algorithm, json!({"kid": "k"}), &json!({"iss": "a"})).unwrap();
        let jwt = jwt.expose_secret();
        let (message, signature) = jwt.rsplit_once('.').unwrap();
        let (header, claims) = message.split_once('.').unwrap();
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).unwrap();
        let header: Value = serde_json::from_slice(&decode(header)).unwrap();
        assert_eq!(header, json!({"alg": name, "typ": "JWT", "kid": "k"}));
        assert_eq!(serde_json::from_slice::<Value>(&decode(claims)).unwrap(), json!({"iss": "a"}));
        let public = UnparsedPublicKey::new(parameters, key.public_key());
        public.verify(message.as_bytes(), &decode(signature)).unwrap();
        assert!(public.verify(b"other", &decode(signature)).is_err());
    }

    #[rstest]
    #[case("")]
    #[case("canary")]
    #[case("-----BEGIN PRIVATE KEY-----\nY2FuYXJ5\n-----END PRIVATE KEY-----\n")]
    fn other_text_is_refused_without_repeating_it(#[case] pem: &str) {
        let refusal = JwtSigner::parse(&SecretString::from(pem)).unwrap_err().to_string();
        assert!(refusal.starts_with("must be") && !refusal.contains("canary") && !refusal.contains("Y2FuYXJ5"));
    }

    #[test]
    fn thumbprint_is_the_digest_in_base64() {
        assert_eq!(thumbprint(b""), "47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU");
    }
}
