//! End of a cluster's credential: `exp` of a JWT, or `notAfter` of a client certificate.
//!
//! Only for display, warnings and the refusal of ended credentials. Signatures are not verified:
//! the API server decides whether it accepts a credential.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use serde::Deserialize;

/// Last second of the year 9999. A later end is no end that a person or Postgres could read.
const LATEST: f64 = 253_402_300_799.0;

#[derive(Deserialize)]
struct Claims {
    exp: Option<f64>,
}

/// Returns the end of a bearer token; `None` if the token is opaque or states none.
pub(super) fn of_token(token: &str) -> Option<DateTime<Utc>> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    let payload = URL_SAFE_NO_PAD.decode(payload).ok()?;
    let claims: Claims = serde_json::from_slice(&payload).ok()?;
    let exp = claims.exp.filter(|exp| (0.0..=LATEST).contains(exp))?;
    #[expect(clippy::cast_possible_truncation, reason = "within the range that was checked")]
    DateTime::from_timestamp(exp as i64, 0)
}

/// Returns the end of a certificate in DER.
pub(super) fn of_certificate(certificate: &[u8]) -> Option<DateTime<Utc>> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    DateTime::from_timestamp(parsed.validity().not_after.timestamp(), 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn token(payload: &str) -> String {
        format!("{}.{}.c2ln", URL_SAFE_NO_PAD.encode(r#"{"alg":"RS256"}"#), URL_SAFE_NO_PAD.encode(payload))
    }

    #[rstest]
    #[case(&token(r#"{"exp":1800000000}"#), Some(1_800_000_000))]
    #[case(&token(r#"{"iss":"x","exp":1800000000.9,"aud":["a"]}"#), Some(1_800_000_000))]
    #[case(&token(r#"{"exp":0}"#), Some(0))]
    #[case(&token(r#"{"exp":253402300799}"#), Some(253_402_300_799))]
    #[case(&token(r#"{"exp":253402300800}"#), None)]
    #[case(&token(r#"{"exp":-1}"#), None)]
    #[case(&token(r#"{"exp":1e400}"#), None)]
    #[case(&token(r#"{"exp":"1800000000"}"#), None)]
    #[case(&token(r#"{"exp":1,"exp":2}"#), None)]
    #[case(&token(r#"{"iss":"kubernetes/serviceaccount"}"#), None)]
    #[case(&token("[]"), None)]
    #[case("admin-token", None)]
    #[case("a.b.c", None)]
    #[case("..", None)]
    #[case(&format!("{}.x", token(r#"{"exp":1800000000}"#)), None)]
    fn end_of_a_token_is_its_exp(#[case] token: &str, #[case] seconds: Option<i64>) {
        assert_eq!(of_token(token).map(|at| at.timestamp()), seconds);
    }

    proptest! {
        #[test]
        fn any_token_is_read_without_panic(token in "\\PC*", payload in "\\PC*", exp in any::<f64>()) {
            of_token(&token);
            of_token(&self::token(&payload));
            of_token(&self::token(&format!("{{\"exp\":{exp}}}")));
        }

        #[test]
        fn any_certificate_is_read_without_panic(der in proptest::collection::vec(any::<u8>(), 0..200)) {
            of_certificate(&der);
        }
    }
}
