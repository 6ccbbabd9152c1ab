//! Verifies token signatures with the public key of the issuer.
//!
//! Uses aws-lc-rs directly. A JWT library would add the parsing of headers, claims and keys, for
//! which `domain::token` and `domain::jwk` have stricter rules.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384,
    RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512,
    RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};

use crate::domain::jwk::{Algorithm, Jwk, KeyMaterial};

/// Verifies the `signature` of a `message`. Fails if the key does not fit the algorithm.
#[must_use]
pub fn verify(key: &Jwk, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
    if !key.fits(algorithm) {
        return false;
    }
    let verified = match &key.material {
        KeyMaterial::Rsa { modulus, exponent } => {
            let Some(parameters) = rsa_parameters(algorithm) else { return false };
            RsaPublicKeyComponents { n: modulus, e: exponent }.verify(parameters, message, signature)
        }
        KeyMaterial::P256(point) => UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature),
        KeyMaterial::P384(point) => UnparsedPublicKey::new(&ECDSA_P384_SHA384_FIXED, point).verify(message, signature),
        KeyMaterial::Ed25519(point) => UnparsedPublicKey::new(&ED25519, point).verify(message, signature),
    };
    verified.is_ok()
}

fn rsa_parameters(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    Some(match algorithm {
        Algorithm::Rs256 => &RSA_PKCS1_2048_8192_SHA256,
        Algorithm::Rs384 => &RSA_PKCS1_2048_8192_SHA384,
        Algorithm::Rs512 => &RSA_PKCS1_2048_8192_SHA512,
        Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
        Algorithm::Ps384 => &RSA_PSS_2048_8192_SHA384,
        Algorithm::Ps512 => &RSA_PSS_2048_8192_SHA512,
        Algorithm::Es256 | Algorithm::Es384 | Algorithm::EdDsa => return None,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;
    use crate::domain::{jwk::KeySet, token::PresentedToken};

    /// Example of RFC 7515, appendix A.3.
    const ES256: (&str, &str) = (
        r#"{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}"#,
        "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
    );
    /// Key of RFC 8037, appendix A.2, and signature of A.4.
    const ED25519_KEY: &str = r#"{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
    const ED25519_SIGNED: &str = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    const ED25519_SIGNATURE: &str =
        "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";

    fn keys(key: &str) -> KeySet {
        let key: serde_json::Value = serde_json::from_str(key).unwrap();
        KeySet::parse(json!({"keys": [key]}).to_string().as_bytes()).unwrap()
    }

    fn verified(keys: &KeySet, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> bool {
        keys.candidates(None, algorithm).any(|key| verify(key, algorithm, message, signature))
    }

    #[test]
    fn examples_of_the_standards_verify() {
        let (key, text) = ES256;
        let token = PresentedToken::parse(text).unwrap();
        assert!(verified(&keys(key), Algorithm::Es256, token.signed_part(), &token.signature));
        let signature = base64::Engine::decode(&base64::prelude::BASE64_URL_SAFE_NO_PAD, ED25519_SIGNATURE).unwrap();
        assert!(verified(&keys(ED25519_KEY), Algorithm::EdDsa, ED25519_SIGNED.as_bytes(), &signature));
    }

    #[rstest]
    #[case(0)]
    #[case(31)]
    #[case(63)]
    fn changed_signature_does_not_verify(#[case] at: usize) {
        let (key, text) = ES256;
        let mut token = PresentedToken::parse(text).unwrap();
        token.signature[at] ^= 1;
        assert!(!verified(&keys(key), Algorithm::Es256, token.signed_part(), &token.signature));
        assert!(!verified(&keys(key), Algorithm::Es256, token.signed_part(), &[]));
        assert!(!verified(&keys(key), Algorithm::Es256, token.signed_part(), &[0; 64]));
    }

    #[test]
    fn key_of_another_type_does_not_verify() {
        let (key, text) = ES256;
        let token = PresentedToken::parse(text).unwrap();
        for algorithm in Algorithm::ALL.into_iter().filter(|algorithm| *algorithm != Algorithm::Es256) {
            let keys = keys(key);
            let key = keys.candidates(None, Algorithm::Es256).next().unwrap();
            assert!(!verify(key, algorithm, token.signed_part(), &token.signature), "{algorithm:?}");
        }
    }
}
