//! Token of a token service, and the hints in its claims.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

/// Bearer token. `Debug` does not print it.
#[derive(Debug)]
pub(super) struct Token {
    pub(super) secret: SecretString,
    claims: Option<Claims>,
}

/// Claims of a registry's JWT (`distribution`, `docs/spec/auth/jwt.md`). The signature is not
/// verified: the claims hint at how the token service identified the client, and prove no right.
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

/// How a token service identified a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recognition {
    /// As the user of the login.
    Login,
    /// As an anonymous client.
    Anonymous,
    /// The tokens do not say.
    Unknown,
}

impl Token {
    /// Parses the response of a token service.
    pub(super) fn parse(body: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Response {
            token: Option<SecretString>,
            access_token: Option<SecretString>,
        }
        let response: Response = serde_json::from_slice(body).ok()?;
        let is_usable = |token: &SecretString| {
            let token = token.expose_secret();
            !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let secret = [response.token, response.access_token].into_iter().flatten().find(is_usable)?;
        let claims = claims(secret.expose_secret());
        Some(Self { secret, claims })
    }

    fn subject(&self) -> Option<&str> {
        self.claims.as_ref()?.sub.as_deref()
    }

    /// Compares the token for a login with the anonymous token of the same service, if it issues
    /// one.
    pub(super) fn recognition(&self, anonymous: Option<&Self>) -> Recognition {
        match (self.subject(), anonymous) {
            (Some(""), _) => Recognition::Anonymous,
            (_, None) => Recognition::Login,
            (Some(subject), Some(anonymous)) if Some(subject) != anonymous.subject() => Recognition::Login,
            (_, Some(anonymous)) if self.secret.expose_secret() == anonymous.secret.expose_secret() => {
                Recognition::Anonymous
            }
            (Some(_), Some(_)) => Recognition::Anonymous,
            (None, Some(_)) => Recognition::Unknown,
        }
    }

    /// Whether the claims of the token grant no pull from a repository.
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
    fn token_is_parsed(#[case] body: &str, #[case] token: Option<&str>) {
        let read = Token::parse(body.as_bytes());
        assert_eq!(read.as_ref().map(|read| read.secret.expose_secret()), token);
    }

    #[rstest]
    #[case(jwt(r#"{"sub":"dev"}"#), None, Recognition::Login)]
    #[case(jwt(r#"{"sub":"dev"}"#), Some(jwt(r#"{"sub":""}"#)), Recognition::Login)]
    #[case(jwt(r#"{"sub":"dev"}"#), Some(opaque("x")), Recognition::Login)]
    #[case(jwt(r#"{"sub":""}"#), None, Recognition::Anonymous)]
    #[case(jwt(r#"{"sub":""}"#), Some(jwt(r#"{"sub":""}"#)), Recognition::Anonymous)]
    #[case(jwt(r#"{"sub":"anonymous"}"#), Some(jwt(r#"{"sub":"anonymous","jti":"2"}"#)), Recognition::Anonymous)]
    #[case(opaque("x"), None, Recognition::Login)]
    #[case(opaque("x"), Some(opaque("x")), Recognition::Anonymous)]
    #[case(opaque("x"), Some(opaque("y")), Recognition::Unknown)]
    #[case(jwt("{}"), Some(jwt(r#"{"jti":"2"}"#)), Recognition::Unknown)]
    fn token_shows_how_the_service_identified_the_client(
        #[case] login: Token,
        #[case] anonymous: Option<Token>,
        #[case] recognition: Recognition,
    ) {
        assert_eq!(login.recognition(anonymous.as_ref()), recognition);
    }

    #[rstest]
    #[case(r#"{"access":[]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/alpine","actions":["push"]}]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/other","actions":["pull"]}]}"#, true)]
    #[case(r#"{"access":[{"type":"repository","name":"os/alpine","actions":["pull"]}]}"#, false)]
    #[case("{}", false)]
    fn token_without_pull_access_grants_nothing(#[case] claims: &str, #[case] nothing: bool) {
        assert_eq!(jwt(claims).grants_nothing("os/alpine"), nothing);
    }

    #[test]
    fn debug_does_not_print_the_token() {
        assert!(!format!("{:?}", opaque("canary")).contains("canary"));
    }
}
