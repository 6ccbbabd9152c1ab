//! End of a cluster's credential: `exp` of a JWT, or `notAfter` of a client certificate. Audiences
//! and `ServiceAccount` of tokens that an API server issued.
//!
//! Only for display, warnings and refusals. Signatures are not verified: the API server decides
//! whether it accepts a credential.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use serde::{Deserialize, de::DeserializeOwned};

use super::ServiceAccountRef;
use crate::domain::names::{NamespaceName, ServiceAccountName};

/// Last second of the year 9999. A later end is no end that a person or Postgres could read.
const LATEST: f64 = 253_402_300_799.0;

#[derive(Deserialize)]
struct Claims {
    exp: Option<f64>,
}

#[derive(Deserialize)]
struct AudienceClaims {
    aud: Audiences,
}

#[derive(Deserialize)]
struct SubjectClaims {
    sub: String,
}

/// One audience, or a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

/// Returns the end of a bearer token; `None` if the token is opaque or states none.
pub(super) fn of_token(token: &str) -> Option<DateTime<Utc>> {
    let exp = claims::<Claims>(token)?.exp.filter(|exp| (0.0..=LATEST).contains(exp))?;
    #[expect(clippy::cast_possible_truncation, reason = "within the range that was checked")]
    DateTime::from_timestamp(exp as i64, 0)
}

/// Returns the audiences of a bearer token; none if the token is opaque or states none.
#[must_use]
pub fn audiences_of_token(token: &str) -> Vec<String> {
    match claims::<AudienceClaims>(token).map(|claims| claims.aud) {
        Some(Audiences::One(audience)) => vec![audience],
        Some(Audiences::Many(audiences)) => audiences,
        None => Vec::new(),
    }
}

/// Returns the `ServiceAccount` that a bearer token belongs to; none if the token is opaque or not one
/// of a `ServiceAccount`.
#[must_use]
pub fn service_account_of_token(token: &str) -> Option<ServiceAccountRef> {
    let subject = claims::<SubjectClaims>(token)?.sub;
    let (namespace, name) = subject.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    Some(ServiceAccountRef {
        namespace: NamespaceName::parse(namespace).ok()?,
        name: ServiceAccountName::parse(name).ok()?,
    })
}

fn claims<T: DeserializeOwned>(token: &str) -> Option<T> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
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

    #[rstest]
    #[case(&token(r#"{"aud":"a"}"#), &["a"])]
    #[case(&token(r#"{"aud":["a","b"],"exp":1}"#), &["a", "b"])]
    #[case(&token(r#"{"aud":7}"#), &[])]
    #[case(&token("{}"), &[])]
    #[case("admin-token", &[])]
    fn audiences_of_a_token_are_one_or_a_list(#[case] token: &str, #[case] expected: &[&str]) {
        assert_eq!(audiences_of_token(token), expected);
    }

    #[rstest]
    #[case(&token(r#"{"sub":"system:serviceaccount:regcred:pull","aud":["a"]}"#), Some("regcred/pull"))]
    #[case(&token(r#"{"sub":"system:serviceaccount:regcred"}"#), None)]
    #[case(&token(r#"{"sub":"system:serviceaccount::pull"}"#), None)]
    #[case(&token(r#"{"sub":"system:serviceaccount:regcred:a:b"}"#), None)]
    #[case(&token(r#"{"sub":"pull"}"#), None)]
    #[case(&token("{}"), None)]
    #[case("admin-token", None)]
    fn service_account_of_a_token_is_its_subject(#[case] token: &str, #[case] expected: Option<&str>) {
        assert_eq!(service_account_of_token(token).map(|account| account.to_string()).as_deref(), expected);
    }

    proptest! {
        #[test]
        fn any_token_is_read_without_panic(token in "\\PC*", payload in "\\PC*", exp in any::<f64>()) {
            of_token(&token);
            let _ = audiences_of_token(&token);
            let _ = service_account_of_token(&token);
            of_token(&self::token(&payload));
            of_token(&self::token(&format!("{{\"exp\":{exp}}}")));
        }

        #[test]
        fn any_certificate_is_read_without_panic(der in proptest::collection::vec(any::<u8>(), 0..200)) {
            of_certificate(&der);
        }
    }
}
