//! What a token service answers: a token, and what can be seen in it without trusting it.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

/// A bearer token. `Debug` does not show it.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) secret: SecretString,
    claims: Option<Claims>,
}

/// What a JWT of a registry says (`distribution`, `docs/spec/auth/jwt.md`). Nobody vouches for it here: it is a hint on
/// whom the token service took the caller for, never a proof of a right.
#[derive(Debug, Deserialize)]
struct Claims {
    #[serde(default)]
    sub: Option<String>,
    #[serde(default)]
    access: Option<Vec<Access>>,
}

#[derive(Debug, Deserialize)]
struct Access {
    #[serde(default)]
    name: String,
    #[serde(default)]
    actions: Vec<String>,
}

/// What a token service made of a login.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recognition {
    /// It took the caller for somebody.
    Somebody,
    /// It took the caller for anybody.
    Anybody,
    /// The tokens do not tell.
    Unknown,
}

impl Token {
    /// Reads the answer of a token service.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<SecretString>,
            access_token: Option<SecretString>,
        }
        let answer: Answer = serde_json::from_slice(body).ok()?;
        let is_usable = |token: &SecretString| {
            let token = token.expose_secret();
            !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let secret = [answer.token, answer.access_token].into_iter().flatten().find(is_usable)?;
        let claims = claims(secret.expose_secret());
        Some(Self { secret, claims })
    }

    fn subject(&self) -> Option<&str> {
        self.claims.as_ref()?.sub.as_deref()
    }

    /// Compares the token for a login with what the same service gives to anybody: a token, or nothing.
    pub(super) fn recognition(&self, anybody: Option<&Self>) -> Recognition {
        match (self.subject(), anybody) {
            (Some(""), _) => Recognition::Anybody,
            (_, None) => Recognition::Somebody,
            (Some(subject), Some(anybody)) if Some(subject) != anybody.subject() => Recognition::Somebody,
            (_, Some(anybody)) if self.secret.expose_secret() == anybody.secret.expose_secret() => Recognition::Anybody,
            (Some(_), Some(_)) => Recognition::Anybody,
            (None, Some(_)) => Recognition::Unknown,
        }
    }

    /// Whether the token says itself that it grants no pull of a repository.
    pub(super) fn grants_nothing(&self, repository: &str) -> bool {
        let Some(access) = self.claims.as_ref().and_then(|claims| claims.access.as_ref()) else { return false };
        let pulls = |access: &Access| access.actions.iter().any(|action| action == "pull" || action == "*");
        !access.iter().any(|access| access.name == repository && pulls(access))
    }
}

fn claims(token: &str) -> Option<Claims> {
    let mut parts = token.split('.');
    let payload = parts.nth(1).filter(|_| parts.next().is_some() && parts.next().is_none())?;
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn jwt(claims: &str) -> Token {
        let body = format!(r#"{{"token":"e30.{}.c2ln"}}"#, BASE64_URL_SAFE_NO_PAD.encode(claims));
        Token::parse(body.as_bytes()).unwrap()
    }

    fn opaque(token: &str) -> Token {
        Token::parse(format!(r#"{{"access_token":"{token}"}}"#).as_bytes()).unwrap()
    }

    #[rstest]
    #[case(r#"{"token":"a"}"#, Some("a"))]
    #[case(r#"{"token":"a","access_token":"b","expires_in":60}"#, Some("a"))]
    #[case(r#"{"token":"","access_token":"b"}"#, Some("b"))]
    #[case(r#"{"token":null,"access_token":"b"}"#, Some("b"))]
    #[case(r#"{"token":"a\r\nX: y"}"#, None)]
    #[case(r#"{"token":7}"#, None)]
    #[case("{}", None)]
    #[case("<html>", None)]
    fn a_token_is_read(#[case] body: &str, #[case] token: Option<&str>) {
        let read = Token::parse(body.as_bytes());
        assert_eq!(read.as_ref().map(|read| read.secret.expose_secret()), token);
    }

    #[rstest]
    #[case(jwt(r#"{"sub":"martin"}"#), None, Recognition::Somebody)]
    #[case(jwt(r#"{"sub":"martin"}"#), Some(jwt(r#"{"sub":""}"#)), Recognition::Somebody)]
    #[case(jwt(r#"{"sub":"martin"}"#), Some(opaque("x")), Recognition::Somebody)]
    #[case(jwt(r#"{"sub":""}"#), None, Recognition::Anybody)]
    #[case(jwt(r#"{"sub":""}"#), Some(jwt(r#"{"sub":""}"#)), Recognition::Anybody)]
    #[case(jwt(r#"{"sub":"anonymous"}"#), Some(jwt(r#"{"sub":"anonymous","jti":"2"}"#)), Recognition::Anybody)]
    #[case(opaque("x"), None, Recognition::Somebody)]
    #[case(opaque("x"), Some(opaque("x")), Recognition::Anybody)]
    #[case(opaque("x"), Some(opaque("y")), Recognition::Unknown)]
    #[case(jwt("{}"), Some(jwt(r#"{"jti":"2"}"#)), Recognition::Unknown)]
    fn a_token_tells_whom_the_service_saw(
        #[case] login: Token,
        #[case] anybody: Option<Token>,
        #[case] recognition: Recognition,
    ) {
        assert_eq!(login.recognition(anybody.as_ref()), recognition);
    }

    #[rstest]
    #[case(r#"{"access":[]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/alpine","actions":["push"]}]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/other","actions":["pull"]}]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/alpine","actions":["pull"]}]}"#, false)]
    #[case("{}", false)]
    fn a_token_may_say_that_it_grants_nothing(#[case] claims: &str, #[case] nothing: bool) {
        assert_eq!(jwt(claims).grants_nothing("os/alpine"), nothing);
    }

    #[test]
    fn a_token_is_not_in_debug() {
        assert!(!format!("{:?}", opaque("canary")).contains("canary"));
    }
}
