//! Parser for JSON Web Tokens (RFC 7519) in the compact form of JWS (RFC 7515), before
//! verification.
//!
//! Unverified content is not trusted: it selects the issuer to verify with. Claims are compared
//! only after verification.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use crate::domain::{jwk::Algorithm, unique::UniqueMap};

/// Maximum length of a token, in bytes.
pub const TOKEN_MAX: usize = 16 * 1024;
/// Accepted clock skew for `nbf` and `iat`, in seconds. `exp` has none.
const LEEWAY_SECONDS: i64 = 30;
/// Maximum number of audiences.
const AUDIENCES_MAX: usize = 16;
/// Maximum length of a key id, in bytes.
const KID_MAX: usize = 512;
/// Maximum length of a displayed subject, in characters.
const SUBJECT_MAX: usize = 200;

/// Claims of an ID token that say nothing about its bearer. Rules cannot name the first six (`OpenID`
/// Connect Core 1.0, section 2).
const NOT_OF_BEARER: [&str; 9] = ["iss", "aud", "exp", "nbf", "iat", "jti", "nonce", "at_hash", "c_hash"];

/// Claims of a token; only the top level can be compared.
#[derive(Debug, Clone, Default)]
pub struct Claims(BTreeMap<String, Value>);

impl Claims {
    /// Whether a claim has this value. Booleans and numbers are compared as text; in a list, one
    /// element must match.
    #[must_use]
    pub fn has(&self, name: &str, wanted: &str) -> bool {
        match self.0.get(name) {
            Some(Value::Array(values)) => values.iter().any(|value| is_text(value, wanted)),
            Some(value) => is_text(value, wanted),
            None => false,
        }
    }

    /// Value of a string claim.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// Audiences of the token. Empty if there are too many, or if one is not a string.
    #[must_use]
    pub fn audiences(&self) -> Vec<&str> {
        match self.0.get("aud") {
            Some(Value::String(audience)) => vec![audience],
            Some(Value::Array(audiences)) if audiences.len() <= AUDIENCES_MAX => {
                let texts: Option<Vec<&str>> = audiences.iter().map(Value::as_str).collect();
                texts.unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }

    /// A `NumericDate`: seconds since 1970, with or without a fraction (RFC 7519, 2).
    fn date(&self, name: &str) -> Option<Date> {
        let value = self.0.get(name)?;
        // Without its fraction, an expiry is slightly early.
        #[expect(clippy::cast_possible_truncation, reason = "a float out of range becomes an invalid date")]
        let seconds = value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64));
        Some(seconds.and_then(|seconds| DateTime::from_timestamp(seconds, 0)).map_or(Date::Invalid, Date::At))
    }

    /// The claims that a rule may name, as JSON: without those that every token has, or that differ
    /// per token.
    #[must_use]
    pub fn identifying(&self) -> String {
        let claims = self.0.iter().filter(|(name, _)| !NOT_OF_BEARER.contains(&name.as_str()));
        Value::Object(claims.map(|(name, value)| (name.clone(), value.clone())).collect()).to_string()
    }

    /// Parses claims that [`identifying`](Self::identifying) wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let UniqueMap(map) = serde_json::from_str(text).ok()?;
        Some(Self(map))
    }

    /// Subject for logs and responses: of limited length, without control characters.
    #[must_use]
    pub fn display_subject(&self) -> String {
        display(self.text("sub").unwrap_or("-"))
    }
}

impl<const N: usize> From<[(&str, Option<String>); N]> for Claims {
    /// Builds claims from known values; absent values are omitted.
    fn from(claims: [(&str, Option<String>); N]) -> Self {
        let known = claims.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::String(value?))));
        Self(known.collect())
    }
}

/// Escapes and truncates untrusted text for logs and responses.
fn display(text: &str) -> String {
    let mut display: String = text.chars().take(SUBJECT_MAX).flat_map(escaped).collect();
    if text.chars().nth(SUBJECT_MAX).is_some() {
        display.push('…');
    }
    display
}

/// A character, or its escape if it would change the appearance of a line.
fn escaped(character: char) -> Vec<char> {
    // Includes characters that reverse or hide the text around them.
    let changes_lines = character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    if changes_lines { character.escape_unicode().collect() } else { vec![character] }
}

#[derive(Debug, Clone, Copy)]
enum Date {
    At(DateTime<Utc>),
    Invalid,
}

fn is_text(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        Value::Bool(truth) => wanted == if *truth { "true" } else { "false" },
        Value::Number(number) => number.to_string() == wanted,
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Presented token: well-formed, not verified. `Debug` does not print its text.
#[derive(Debug)]
pub struct PresentedToken {
    /// Algorithm in its header, if accepted.
    pub algorithm: Option<Algorithm>,
    /// Key id in its header.
    pub key_id: Option<String>,
    /// `typ` in its header, normalized.
    token_type: Option<String>,
    /// Claims.
    pub claims: Claims,
    /// Signature.
    pub signature: Vec<u8>,
    /// Length of the signed part of the text.
    signed_length: usize,
    text: SecretString,
}

/// Why a token is not valid at a given time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenTimeError {
    /// `exp` is missing, or a date is invalid.
    Malformed,
    /// `exp` has passed.
    Expired,
    /// `nbf` or `iat` is in the future.
    NotYetValid,
}

impl PresentedToken {
    /// Parses a token without I/O or cryptography.
    ///
    /// None for a `crit` header, whose extensions are not supported (RFC 7515, 4.1.11), and for a
    /// repeated header or claim.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > TOKEN_MAX {
            return None;
        }
        let signed_length = text.rfind('.')?;
        let (header, payload) = text.get(..signed_length)?.split_once('.')?;
        let signature = BASE64_URL_SAFE_NO_PAD.decode(text.get(signed_length + 1..)?).ok()?;
        let header = object(header)?;
        if header.contains_key("crit") || header.contains_key("b64") {
            return None;
        }
        let key_id = match header.get("kid") {
            None => None,
            Some(kid) => Some(kid.as_str().filter(|kid| kid.len() <= KID_MAX)?.to_owned()),
        };
        let token_type = match header.get("typ") {
            None => None,
            Some(token_type) => Some(normalize_type(token_type.as_str()?)),
        };
        Some(Self {
            algorithm: header.get("alg")?.as_str()?.parse().ok(),
            key_id,
            token_type,
            claims: Claims(object(payload)?),
            signature,
            signed_length,
            text: SecretString::from(text),
        })
    }

    /// Signed part of the token.
    #[must_use]
    pub fn signed_part(&self) -> &[u8] {
        self.text.expose_secret().as_bytes().get(..self.signed_length).unwrap_or_default()
    }

    /// Type of a token that was issued for another purpose than access, such as `logout+jwt`.
    ///
    /// A logout token is signed by the same keys and may have the audience and subject of an ID
    /// token. Its `typ` is optional, but it has `events` (RFC 8417, section 2.2; `OpenID` Connect
    /// Back-Channel Logout 1.0, section 2.4).
    #[must_use]
    pub fn special_type(&self) -> Option<&str> {
        let token_type = self.token_type.as_deref().filter(|token_type| is_special_type(token_type));
        token_type.or_else(|| self.claims.0.contains_key("events").then_some("secevent+jwt"))
    }

    /// Text of the token.
    #[must_use]
    pub fn secret(&self) -> &SecretString {
        &self.text
    }

    /// Checks the token's dates and returns its expiry.
    ///
    /// # Errors
    ///
    /// The token is not valid at `now`.
    pub fn expiry(&self, now: DateTime<Utc>) -> Result<DateTime<Utc>, TokenTimeError> {
        let Some(Date::At(expiry)) = self.claims.date("exp") else { return Err(TokenTimeError::Malformed) };
        if expiry <= now {
            return Err(TokenTimeError::Expired);
        }
        for name in ["nbf", "iat"] {
            match self.claims.date(name) {
                None => {}
                Some(Date::At(start)) if start.timestamp() <= now.timestamp() + LEEWAY_SECONDS => {}
                Some(Date::At(_)) => return Err(TokenTimeError::NotYetValid),
                Some(Date::Invalid) => return Err(TokenTimeError::Malformed),
            }
        }
        Ok(expiry)
    }
}

/// Normalizes a `typ`: in lower case, without `application/` (RFC 7515, section 4.1.9) and without
/// parameters.
#[must_use]
pub fn normalize_type(token_type: &str) -> String {
    let token_type = token_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    token_type.strip_prefix("application/").map_or_else(|| token_type.clone(), str::to_owned)
}

/// Whether a normalized `typ` declares another purpose than access (RFC 8725, section 3.11).
#[must_use]
pub fn is_special_type(token_type: &str) -> bool {
    token_type.ends_with("+jwt") && token_type != "at+jwt"
}

fn object(part: &str) -> Option<BTreeMap<String, Value>> {
    let UniqueMap(map) = serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).ok()?).ok()?;
    Some(map)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn token(header: &str, payload: &str) -> String {
        let part = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.{}", part(header), part(payload), part("signature"))
    }

    fn claims(payload: &str) -> Claims {
        PresentedToken::parse(&token(r#"{"alg":"RS256"}"#, payload)).unwrap().claims
    }

    #[rstest]
    #[case(r#"{"alg":"RS256","kid":"a","typ":"JWT","jku":"https://evil.example"}"#, Some(Some(Algorithm::Rs256)))]
    #[case(r#"{"alg":"none"}"#, Some(None))]
    #[case(r#"{"alg":"None"}"#, Some(None))]
    #[case(r#"{"alg":"HS256"}"#, Some(None))]
    #[case(r#"{"alg":"rs256"}"#, Some(None))]
    #[case(r#"{"alg":7}"#, None)]
    #[case(r#"{"kid":"a"}"#, None)]
    #[case(r#"{"alg":"RS256","kid":7}"#, None)]
    #[case(r#"{"alg":"RS256","crit":["exp"]}"#, None)]
    #[case(r#"{"alg":"RS256","b64":false}"#, None)]
    #[case(r#"{"alg":"none","alg":"RS256"}"#, None)]
    #[case(r#"{"alg":"RS256","typ":["JWT"]}"#, None)]
    #[case("[]", None)]
    fn header_is_parsed(#[case] header: &str, #[case] algorithm: Option<Option<Algorithm>>) {
        assert_eq!(PresentedToken::parse(&token(header, "{}")).map(|token| token.algorithm), algorithm);
    }

    #[rstest]
    #[case(r#"{"alg":"RS256"}"#, "{}", None)]
    #[case(r#"{"alg":"RS256","typ":"JWT"}"#, "{}", None)]
    #[case(r#"{"alg":"RS256","typ":"at+jwt"}"#, "{}", None)]
    #[case(r#"{"alg":"RS256","typ":"application/at+JWT"}"#, "{}", None)]
    #[case(r#"{"alg":"RS256","typ":"JOSE"}"#, "{}", None)]
    #[case(r#"{"alg":"RS256","typ":"logout+jwt"}"#, "{}", Some("logout+jwt"))]
    #[case(r#"{"alg":"RS256","typ":"Application/Logout+JWT"}"#, "{}", Some("logout+jwt"))]
    #[case(r#"{"alg":"RS256","typ":"dpop+jwt"}"#, "{}", Some("dpop+jwt"))]
    #[case(r#"{"alg":"RS256","typ":"logout+jwt; charset=utf-8"}"#, "{}", Some("logout+jwt"))]
    #[case(r#"{"alg":"RS256","typ":" log out+jwt"}"#, "{}", Some("log out+jwt"))]
    #[case(r#"{"alg":"RS256","typ":"JWT"}"#, r#"{"events":{}}"#, Some("secevent+jwt"))]
    fn token_for_another_purpose_is_recognized(
        #[case] header: &str,
        #[case] payload: &str,
        #[case] special: Option<&str>,
    ) {
        assert_eq!(PresentedToken::parse(&token(header, payload)).unwrap().special_type(), special);
    }

    #[test]
    fn claims_of_the_bearer_outlive_the_token() {
        let all =
            claims(r#"{"sub":"lena","groups":["dev","ops"],"nonce":"n","exp":1,"aud":"x","email_verified":true}"#);
        let text = all.identifying();
        assert_eq!(text, r#"{"email_verified":true,"groups":["dev","ops"],"sub":"lena"}"#);
        let parsed = Claims::parse(&text).unwrap();
        assert!(parsed.has("groups", "ops") && parsed.has("email_verified", "true") && !parsed.has("nonce", "n"));
        assert!(Claims::parse("[]").is_none());
    }

    #[test]
    fn malformed_token_is_refused() {
        let good = token(r#"{"alg":"RS256"}"#, "{}");
        let parsed = PresentedToken::parse(&good).unwrap();
        assert_eq!(parsed.signed_part(), good.rsplit_once('.').unwrap().0.as_bytes());
        assert!(!format!("{parsed:?}").contains(&good));
        for bad in
            ["", ".", "..", "a.b.c", "rgc_x", &good[1..], &format!("{good}."), &format!("{good}="), &format!(" {good}")]
        {
            assert!(PresentedToken::parse(bad).is_none(), "{bad}");
        }
        let twice = token(r#"{"alg":"RS256"}"#, r#"{"sub":"a","sub":"b"}"#);
        assert!(PresentedToken::parse(&twice).is_none());
        let long = token(r#"{"alg":"RS256"}"#, &format!(r#"{{"x":"{}"}}"#, "x".repeat(TOKEN_MAX)));
        assert!(PresentedToken::parse(&long).is_none());
    }

    #[rstest]
    #[case(r#"{"x":"true"}"#, true)]
    #[case(r#"{"x":true}"#, true)]
    #[case(r#"{"x":["no",true]}"#, true)]
    #[case(r#"{"x":"TRUE"}"#, false)]
    #[case(r#"{"x":false}"#, false)]
    #[case(r#"{"x":[["true"]]}"#, false)]
    #[case(r#"{"x":{"true":true}}"#, false)]
    #[case(r#"{"x":null}"#, false)]
    #[case("{}", false)]
    fn claim_is_compared_as_text(#[case] payload: &str, #[case] matches: bool) {
        assert_eq!(claims(payload).has("x", "true"), matches);
    }

    #[test]
    fn number_is_compared_as_written() {
        assert!(claims(r#"{"project_id":42}"#).has("project_id", "42"));
        assert!(!claims(r#"{"project_id":420}"#).has("project_id", "42"));
        assert!(!claims(r#"{"project_id":42.5}"#).has("project_id", "42"));
    }

    #[rstest]
    #[case(r#"{"aud":"a"}"#, &["a"])]
    #[case(r#"{"aud":["a","b"]}"#, &["a", "b"])]
    #[case(r#"{"aud":["a",7]}"#, &[])]
    #[case(r#"{"aud":7}"#, &[])]
    #[case("{}", &[])]
    fn audiences_are_strings(#[case] payload: &str, #[case] audiences: &[&str]) {
        assert_eq!(claims(payload).audiences(), audiences);
    }

    #[rstest]
    #[case(r#"{"exp":1001}"#, Ok(1001))]
    #[case(r#"{"exp":1001.9}"#, Ok(1001))]
    #[case(r#"{"exp":1001,"nbf":1030,"iat":1030}"#, Ok(1001))]
    #[case(r#"{"exp":1001,"nbf":1031}"#, Err(TokenTimeError::NotYetValid))]
    #[case(r#"{"exp":1001,"iat":1031}"#, Err(TokenTimeError::NotYetValid))]
    #[case(r#"{"exp":1001,"nbf":"x"}"#, Err(TokenTimeError::Malformed))]
    #[case(r#"{"exp":1000}"#, Err(TokenTimeError::Expired))]
    #[case(r#"{"exp":-1}"#, Err(TokenTimeError::Expired))]
    #[case(r#"{"exp":"1001"}"#, Err(TokenTimeError::Malformed))]
    #[case(r#"{"exp":1e300}"#, Err(TokenTimeError::Malformed))]
    #[case(r#"{"exp":null}"#, Err(TokenTimeError::Malformed))]
    #[case("{}", Err(TokenTimeError::Malformed))]
    fn dates_of_a_token_are_checked(#[case] payload: &str, #[case] expiry: Result<i64, TokenTimeError>) {
        let token = PresentedToken::parse(&token(r#"{"alg":"RS256"}"#, payload)).unwrap();
        let now = DateTime::from_timestamp(1000, 0).unwrap();
        assert_eq!(token.expiry(now).map(|expiry| expiry.timestamp()), expiry);
    }

    #[test]
    fn displayed_subject_is_escaped_and_truncated() {
        let sub = |text: &str| Claims::from([("sub", Some(text.to_owned()))]).display_subject();
        assert_eq!(sub("repo:acme/app:ref:refs/heads/main"), "repo:acme/app:ref:refs/heads/main");
        assert_eq!(sub("a\nb\u{1b}[31m\u{202e}"), "a\\u{a}b\\u{1b}[31m\\u{202e}");
        assert_eq!(sub(&"x".repeat(201)).chars().count(), 201);
        assert_eq!(Claims::default().display_subject(), "-");
    }

    proptest! {
        #[test]
        fn arbitrary_token_does_not_panic(text in ".{0,200}", header in ".{0,40}", payload in ".{0,80}") {
            let _ = PresentedToken::parse(&text);
            let _ = PresentedToken::parse(&token(&header, &payload)).map(|token| token.expiry(crate::clock::now()));
        }
    }
}
