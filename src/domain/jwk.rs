//! JSON Web Keys (RFC 7517, 7518, 8037) that verify signatures of tokens.

use std::{fmt, str::FromStr};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::Value;

use crate::domain::invalid::Invalid;

/// Maximum number of keys in a set. Issuers have two or three, some large ones a dozen.
const KEYS_MAX: usize = 100;
/// Accepted lengths of an RSA modulus, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Accepted signature algorithm. Only the issuer has the private key; `none` and HMACs are not
/// accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// RSA, PKCS#1 v1.5, SHA-256.
    Rs256,
    /// RSA, PKCS#1 v1.5, SHA-384.
    Rs384,
    /// RSA, PKCS#1 v1.5, SHA-512.
    Rs512,
    /// RSA, PSS, SHA-256.
    Ps256,
    /// RSA, PSS, SHA-384.
    Ps384,
    /// RSA, PSS, SHA-512.
    Ps512,
    /// ECDSA on P-256, SHA-256.
    Es256,
    /// ECDSA on P-384, SHA-384.
    Es384,
    /// Ed25519.
    EdDsa,
}

impl Algorithm {
    /// All accepted algorithms.
    pub const ALL: [Self; 9] = [
        Self::Rs256,
        Self::Rs384,
        Self::Rs512,
        Self::Ps256,
        Self::Ps384,
        Self::Ps512,
        Self::Es256,
        Self::Es384,
        Self::EdDsa,
    ];

    /// Name in the header of a token.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Rs384 => "RS384",
            Self::Rs512 => "RS512",
            Self::Ps256 => "PS256",
            Self::Ps384 => "PS384",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
        }
    }
}

impl FromStr for Algorithm {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|algorithm| algorithm.as_str() == name);
        known.ok_or_else(|| Invalid::new("is not an accepted algorithm"))
    }
}

/// Public key.
#[derive(Clone, PartialEq, Eq)]
pub enum KeyMaterial {
    /// RSA key: big-endian, without leading zeros.
    Rsa {
        /// Modulus.
        modulus: Vec<u8>,
        /// Exponent.
        exponent: Vec<u8>,
    },
    /// A point on P-256, uncompressed.
    P256(Vec<u8>),
    /// A point on P-384, uncompressed.
    P384(Vec<u8>),
    /// A point on edwards25519.
    Ed25519(Vec<u8>),
}

impl fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rsa { .. } => "Rsa",
            Self::P256(_) => "P256",
            Self::P384(_) => "P384",
            Self::Ed25519(_) => "Ed25519",
        })
    }
}

/// Key of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Jwk {
    id: Option<String>,
    /// The only algorithm of the key, if the issuer restricts it.
    algorithm: Option<Algorithm>,
    /// Public key.
    pub material: KeyMaterial,
}

impl Jwk {
    /// Whether the key can verify this algorithm: by its type, its curve and the issuer's
    /// restriction.
    #[must_use]
    pub fn fits(&self, algorithm: Algorithm) -> bool {
        use Algorithm as A;
        let kind_fits = match self.material {
            KeyMaterial::Rsa { .. } => {
                matches!(algorithm, A::Rs256 | A::Rs384 | A::Rs512 | A::Ps256 | A::Ps384 | A::Ps512)
            }
            KeyMaterial::P256(_) => algorithm == A::Es256,
            KeyMaterial::P384(_) => algorithm == A::Es384,
            KeyMaterial::Ed25519(_) => algorithm == A::EdDsa,
        };
        kind_fits && self.algorithm.is_none_or(|only| only == algorithm)
    }

    /// Parses one key. None if it does not verify signatures or is too weak.
    fn parse(key: &Value) -> Option<Self> {
        #[derive(Deserialize)]
        struct Parts {
            kty: String,
            kid: Option<String>,
            r#use: Option<String>,
            key_ops: Option<Vec<String>>,
            alg: Option<String>,
            crv: Option<String>,
            n: Option<String>,
            e: Option<String>,
            x: Option<String>,
            y: Option<String>,
        }
        let parts = Parts::deserialize(key).ok()?;
        let signs = parts.r#use.is_none_or(|usage| usage == "sig")
            && parts.key_ops.is_none_or(|operations| operations.iter().any(|operation| operation == "verify"));
        if !signs {
            return None;
        }
        // A key restricted to an algorithm that is not accepted is useless.
        let algorithm = parts.alg.map(|name| name.parse().ok()).map_or(Some(None), |only: Option<_>| only.map(Some))?;
        let material = match (parts.kty.as_str(), parts.crv.as_deref()) {
            ("RSA", _) => rsa(&parts.n?, &parts.e?)?,
            ("EC", Some("P-256")) => KeyMaterial::P256(point(&parts.x?, &parts.y?, 32)?),
            ("EC", Some("P-384")) => KeyMaterial::P384(point(&parts.x?, &parts.y?, 48)?),
            ("OKP", Some("Ed25519")) => KeyMaterial::Ed25519(decode(&parts.x?).filter(|point| point.len() == 32)?),
            _ => return None,
        };
        Some(Self { id: parts.kid, algorithm, material })
    }
}

fn decode(text: &str) -> Option<Vec<u8>> {
    BASE64_URL_SAFE_NO_PAD.decode(text).ok()
}

fn rsa(modulus: &str, exponent: &str) -> Option<KeyMaterial> {
    let plain =
        |text: &str| -> Option<Vec<u8>> { Some(decode(text)?.into_iter().skip_while(|byte| *byte == 0).collect()) };
    let (modulus, exponent) = (plain(modulus)?, plain(exponent)?);
    let bits = modulus.len() * 8 - usize::try_from(modulus.first()?.leading_zeros()).ok()?;
    let is_good = RSA_BITS.contains(&bits) && (1..=8).contains(&exponent.len());
    is_good.then_some(KeyMaterial::Rsa { modulus, exponent })
}

fn point(x: &str, y: &str, length: usize) -> Option<Vec<u8>> {
    let (x, y) = (decode(x)?, decode(y)?);
    (x.len() == length && y.len() == length).then(|| [&[4], &x[..], &y[..]].concat())
}

/// Keys of an issuer that verify tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySet(Vec<Jwk>);

impl KeySet {
    /// Parses a JWK set. Keys of unknown types, for other purposes or with too few bits are
    /// ignored, so that issuers can add new kinds of keys.
    ///
    /// # Errors
    ///
    /// The document is not a set, or has more than 100 keys.
    pub fn parse(document: &[u8]) -> Result<Self, Invalid> {
        #[derive(Deserialize)]
        struct Document {
            keys: Vec<Value>,
        }
        let Document { keys } =
            serde_json::from_slice(document).map_err(|_| Invalid::new("the key document is not a JWK set"))?;
        if keys.len() > KEYS_MAX {
            return Err(Invalid::new("the JWK set has more than 100 keys"));
        }
        Ok(Self(keys.iter().filter_map(Jwk::parse).collect()))
    }

    /// Keys that may verify a signature: those with this id that fit the algorithm. Without an id,
    /// the key must be the only one.
    pub fn candidates(&self, id: Option<&str>, algorithm: Algorithm) -> impl Iterator<Item = &Jwk> {
        let only = self.0.len() == 1;
        let is_named = move |key: &Jwk| match id {
            Some(id) => key.id.as_deref() == Some(id),
            None => only,
        };
        self.0.iter().filter(move |key| is_named(key) && key.fits(algorithm))
    }

    /// Whether a key with this id exists; without an id, whether any key exists.
    #[must_use]
    pub fn contains(&self, id: Option<&str>) -> bool {
        match id {
            Some(id) => self.0.iter().any(|key| key.id.as_deref() == Some(id)),
            None => !self.0.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn encoded(length: usize) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(vec![0xff; length])
    }

    fn rsa_key(more: Value) -> Value {
        with(json!({"kty": "RSA", "kid": "a", "n": encoded(256), "e": "AQAB"}), more)
    }

    fn with(mut key: Value, more: Value) -> Value {
        let Value::Object(more) = more else { panic!("an object") };
        key.as_object_mut().unwrap().extend(more);
        key
    }

    #[rstest]
    #[case(json!({}), true)]
    #[case(json!({"use": "sig", "alg": "RS256", "key_ops": ["verify"], "x5c": ["ignored"]}), true)]
    #[case(json!({"use": "enc"}), false)]
    #[case(json!({"key_ops": ["encrypt"]}), false)]
    #[case(json!({"alg": "RSA-OAEP"}), false)]
    #[case(json!({"alg": "HS256"}), false)]
    #[case(json!({"n": encoded(255)}), false)]
    #[case(json!({"n": format!("AA{}", encoded(254))}), false)]
    #[case(json!({"n": encoded(1025)}), false)]
    #[case(json!({"n": ""}), false)]
    #[case(json!({"e": ""}), false)]
    #[case(json!({"kty": "oct", "k": "c2VjcmV0"}), false)]
    #[case(json!({"kid": 7}), false)]
    fn unusable_key_is_ignored(#[case] more: Value, #[case] kept: bool) {
        let set = KeySet::parse(json!({"keys": [rsa_key(more)]}).to_string().as_bytes()).unwrap();
        assert_eq!(set.0.len() == 1, kept);
    }

    #[rstest]
    #[case(rsa_key(json!({})), &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"])]
    #[case(rsa_key(json!({"alg": "PS256"})), &["PS256"])]
    #[case(json!({"kty": "EC", "crv": "P-256", "x": encoded(32), "y": encoded(32)}), &["ES256"])]
    #[case(json!({"kty": "EC", "crv": "P-384", "x": encoded(48), "y": encoded(48)}), &["ES384"])]
    #[case(json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(32)}), &["EdDSA"])]
    #[case(json!({"kty": "EC", "crv": "P-256", "x": encoded(31), "y": encoded(32)}), &[])]
    #[case(json!({"kty": "EC", "crv": "P-521", "x": encoded(66), "y": encoded(66)}), &[])]
    #[case(json!({"kty": "OKP", "crv": "X25519", "x": encoded(32)}), &[])]
    #[case(json!({"kty": "EC", "crv": "P-256", "alg": "RS256", "x": encoded(32), "y": encoded(32)}), &[])]
    fn key_fits_the_algorithms_of_its_type(#[case] key: Value, #[case] algorithms: &[&str]) {
        let key = Jwk::parse(&key);
        let fit = Algorithm::ALL.into_iter().filter(|algorithm| key.as_ref().is_some_and(|key| key.fits(*algorithm)));
        assert_eq!(fit.map(Algorithm::as_str).collect::<Vec<_>>(), algorithms);
    }

    #[test]
    fn without_key_id_the_issuer_must_have_one_key() {
        let set = |ids: &[&str]| {
            let keys: Vec<Value> = ids.iter().map(|id| rsa_key(json!({"kid": id}))).collect();
            KeySet::parse(json!({"keys": keys}).to_string().as_bytes()).unwrap()
        };
        let count = |set: &KeySet, id: Option<&str>| set.candidates(id, Algorithm::Rs256).count();
        assert_eq!((count(&set(&["a"]), None), count(&set(&["a", "b"]), None)), (1, 0));
        assert_eq!((count(&set(&["a", "b"]), Some("a")), count(&set(&["a"]), Some("b"))), (1, 0));
        assert!(set(&["a"]).contains(Some("a")) && !set(&["a"]).contains(Some("b")) && !set(&[]).contains(None));
    }

    #[test]
    fn set_is_bounded() {
        let many: Vec<Value> = (0..101).map(|_| rsa_key(json!({}))).collect();
        for bad in [json!({"keys": many}), json!({"keys": {}}), json!([]), json!("x")] {
            assert!(KeySet::parse(bad.to_string().as_bytes()).is_err());
        }
        assert_eq!(KeySet::parse(br#"{"keys":[null,7,{}]}"#), Ok(KeySet::default()));
    }
}
