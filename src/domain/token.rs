//! Tokens: JSON Web Tokens (RFC 7519) in the compact form of a signature (RFC 7515), read before anybody vouches for them.
//!
//! What is read here is believed by nobody: it says whom to ask, and what to compare once somebody has vouched for the whole.

use std::collections::BTreeMap;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use crate::domain::{jwk::Algorithm, unique::UniqueMap};

/// Longer tokens are refused unread, in bytes.
pub const TOKEN_MAX: usize = 16 * 1024;
/// How far the clock of an issuer may be ahead of ours, in seconds. An end is an end: it has no leeway.
const LEEWAY_SECONDS: i64 = 30;
/// The most audiences that are looked at.
const AUDIENCES_MAX: usize = 16;
/// The longest key id, in bytes.
const KID_MAX: usize = 512;
/// The longest subject that is shown, in characters.
const SUBJECT_SHOWN: usize = 200;

/// What a token says, top level alone.
#[derive(Debug, Clone, Default)]
pub struct Claims(BTreeMap<String, Value>);

impl Claims {
    /// Whether a claim has this value. Booleans and numbers are compared as text; of a list, one element has to match.
    #[must_use]
    pub fn has(&self, name: &str, wanted: &str) -> bool {
        match self.0.get(name) {
            Some(Value::Array(values)) => values.iter().any(|value| is_text(value, wanted)),
            Some(value) => is_text(value, wanted),
            None => false,
        }
    }

    /// A claim that is a string.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// Whom the token was made for; none if it names more than anybody has use for, or something that is no name.
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

    /// A moment, in seconds since 1970, with or without a fraction (RFC 7519, 2).
    fn moment(&self, name: &str) -> Option<Moment> {
        let value = self.0.get(name)?;
        // A fraction is cut off: an end comes a little early.
        #[expect(clippy::cast_possible_truncation, reason = "a float that is no moment becomes one that is none, too")]
        let seconds = value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64));
        Some(seconds.and_then(|seconds| DateTime::from_timestamp(seconds, 0)).map_or(Moment::Odd, Moment::At))
    }

    /// The subject, fit to be shown and logged: of limited length, without control characters.
    #[must_use]
    pub fn subject_shown(&self) -> String {
        shown(self.text("sub").unwrap_or("-"))
    }
}

impl<const N: usize> From<[(&str, Option<String>); N]> for Claims {
    /// Claims that somebody else found out, without those that he did not.
    fn from(claims: [(&str, Option<String>); N]) -> Self {
        let known = claims.into_iter().filter_map(|(name, value)| Some((name.to_owned(), Value::String(value?))));
        Self(known.collect())
    }
}

/// A text of somebody else, fit to be shown and logged.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SUBJECT_SHOWN).flat_map(escaped).collect();
    if text.chars().nth(SUBJECT_SHOWN).is_some() {
        shown.push('…');
    }
    shown
}

/// A character, or how it is written where it would change how a line looks.
fn escaped(character: char) -> Vec<char> {
    // Beside control characters, those that turn or hide the text around them.
    let changes_lines = character.is_control()
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
    if changes_lines { character.escape_unicode().collect() } else { vec![character] }
}

#[derive(Debug, Clone, Copy)]
enum Moment {
    At(DateTime<Utc>),
    Odd,
}

fn is_text(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        Value::Bool(truth) => wanted == if *truth { "true" } else { "false" },
        Value::Number(number) => number.to_string() == wanted,
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// A token as its bearer shows it: well-formed, not verified. `Debug` does not show it.
#[derive(Debug)]
pub struct PresentedToken {
    /// How it claims to be signed, if that is a way that is taken.
    pub algorithm: Option<Algorithm>,
    /// Which key of its issuer it claims to be signed with.
    pub key_id: Option<String>,
    /// What it says.
    pub claims: Claims,
    /// Its signature.
    pub signature: Vec<u8>,
    /// Where what is signed ends in the text.
    signed: usize,
    text: SecretString,
}

/// Why a token is not one for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotNow {
    /// It says no end, or a moment in it is none.
    Endless,
    /// Its end is past.
    Expired,
    /// Its begin, or when it was made, is to come.
    Early,
}

impl PresentedToken {
    /// Reads a token; no I/O, no cryptography. What has a `crit` header wants something to be understood that is not
    /// understood here, and is no token (RFC 7515, 4.1.11). A header or claim that is there twice makes it none, too.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > TOKEN_MAX {
            return None;
        }
        let signed = text.rfind('.')?;
        let (header, payload) = text.get(..signed)?.split_once('.')?;
        let signature = BASE64_URL_SAFE_NO_PAD.decode(text.get(signed + 1..)?).ok()?;
        let header = object(header)?;
        if header.contains_key("crit") || header.contains_key("b64") {
            return None;
        }
        let key_id = match header.get("kid") {
            None => None,
            Some(kid) => Some(kid.as_str().filter(|kid| kid.len() <= KID_MAX)?.to_owned()),
        };
        Some(Self {
            algorithm: header.get("alg")?.as_str()?.parse().ok(),
            key_id,
            claims: Claims(object(payload)?),
            signature,
            signed,
            text: SecretString::from(text),
        })
    }

    /// What the signature is over.
    #[must_use]
    pub fn signed(&self) -> &[u8] {
        self.text.expose_secret().as_bytes().get(..self.signed).unwrap_or_default()
    }

    /// The whole token.
    #[must_use]
    pub fn secret(&self) -> &SecretString {
        &self.text
    }

    /// When it ends, if it has begun and not ended.
    ///
    /// # Errors
    ///
    /// Why it is not one for now.
    pub fn end(&self, now: DateTime<Utc>) -> Result<DateTime<Utc>, NotNow> {
        let Some(Moment::At(end)) = self.claims.moment("exp") else { return Err(NotNow::Endless) };
        if end <= now {
            return Err(NotNow::Expired);
        }
        for begin in ["nbf", "iat"] {
            match self.claims.moment(begin) {
                None => {}
                Some(Moment::At(begin)) if begin.timestamp() <= now.timestamp() + LEEWAY_SECONDS => {}
                Some(Moment::At(_)) => return Err(NotNow::Early),
                Some(Moment::Odd) => return Err(NotNow::Endless),
            }
        }
        Ok(end)
    }
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
    #[case("[]", None)]
    fn a_header_is_read(#[case] header: &str, #[case] algorithm: Option<Option<Algorithm>>) {
        assert_eq!(PresentedToken::parse(&token(header, "{}")).map(|token| token.algorithm), algorithm);
    }

    #[test]
    fn what_is_no_token_is_none() {
        let good = token(r#"{"alg":"RS256"}"#, "{}");
        let parsed = PresentedToken::parse(&good).unwrap();
        assert_eq!(parsed.signed(), good.rsplit_once('.').unwrap().0.as_bytes());
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
    fn a_claim_is_compared_as_text(#[case] payload: &str, #[case] matches: bool) {
        assert_eq!(claims(payload).has("x", "true"), matches);
    }

    #[test]
    fn numbers_are_compared_as_they_are_written() {
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
    fn audiences_are_names(#[case] payload: &str, #[case] audiences: &[&str]) {
        assert_eq!(claims(payload).audiences(), audiences);
    }

    #[rstest]
    #[case(r#"{"exp":1001}"#, Ok(1001))]
    #[case(r#"{"exp":1001.9}"#, Ok(1001))]
    #[case(r#"{"exp":1001,"nbf":1030,"iat":1030}"#, Ok(1001))]
    #[case(r#"{"exp":1001,"nbf":1031}"#, Err(NotNow::Early))]
    #[case(r#"{"exp":1001,"iat":1031}"#, Err(NotNow::Early))]
    #[case(r#"{"exp":1001,"nbf":"x"}"#, Err(NotNow::Endless))]
    #[case(r#"{"exp":1000}"#, Err(NotNow::Expired))]
    #[case(r#"{"exp":-1}"#, Err(NotNow::Expired))]
    #[case(r#"{"exp":"1001"}"#, Err(NotNow::Endless))]
    #[case(r#"{"exp":1e300}"#, Err(NotNow::Endless))]
    #[case(r#"{"exp":null}"#, Err(NotNow::Endless))]
    #[case("{}", Err(NotNow::Endless))]
    fn a_token_has_its_time(#[case] payload: &str, #[case] end: Result<i64, NotNow>) {
        let token = PresentedToken::parse(&token(r#"{"alg":"RS256"}"#, payload)).unwrap();
        let now = DateTime::from_timestamp(1000, 0).unwrap();
        assert_eq!(token.end(now).map(|end| end.timestamp()), end);
    }

    #[test]
    fn a_subject_cannot_change_how_a_line_looks() {
        let sub = |text: &str| Claims::from([("sub", Some(text.to_owned()))]).subject_shown();
        assert_eq!(sub("repo:acme/app:ref:refs/heads/main"), "repo:acme/app:ref:refs/heads/main");
        assert_eq!(sub("a\nb\u{1b}[31m\u{202e}"), "a\\u{a}b\\u{1b}[31m\\u{202e}");
        assert_eq!(sub(&"x".repeat(201)).chars().count(), 201);
        assert_eq!(Claims::default().subject_shown(), "-");
    }

    proptest! {
        #[test]
        fn nothing_that_is_shown_makes_it_panic(text in ".{0,200}", header in ".{0,40}", payload in ".{0,80}") {
            let _ = PresentedToken::parse(&text);
            let _ = PresentedToken::parse(&token(&header, &payload)).map(|token| token.end(crate::clock::now()));
        }
    }
}
