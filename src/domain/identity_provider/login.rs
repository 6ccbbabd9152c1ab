//! Sign-in of people: the client that regcred is at an identity provider.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use crate::domain::invalid::{FieldError, FieldErrors, Invalid};

/// Maximum length of the id of a client, in bytes.
const CLIENT_ID_MAX: usize = 512;
/// Maximum length of the secret of a client, in bytes.
const CLIENT_SECRET_MAX: usize = 4096;

/// Id of the client that regcred is at an issuer (RFC 6749, section 2.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientId(String);

impl ClientId {
    /// Parses an id: printable ASCII characters (RFC 6749, appendix A.1).
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the violated rule.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        if text.is_empty() || text.len() > CLIENT_ID_MAX || !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return Err(Invalid::new("must have 1 to 512 printable ASCII characters"));
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Client of a request, with its secret.
#[derive(Debug, Clone)]
pub struct LoginClient {
    /// Id.
    pub client_id: ClientId,
    /// Secret.
    pub client_secret: SecretString,
}

impl LoginClient {
    /// Validates a client. Errors name fields below `login`.
    ///
    /// # Errors
    ///
    /// Every invalid field.
    pub fn parse(client_id: &str, client_secret: SecretString) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let client_id = errors.take("login.clientId", ClientId::parse(client_id));
        let client_secret = errors.take("login.clientSecret", check_secret(client_secret));
        errors.finish(|| Some(Self { client_id: client_id?, client_secret: client_secret? }))
    }
}

/// A secret with other characters could not be sent (RFC 6749, appendix A.2).
fn check_secret(secret: SecretString) -> Result<SecretString, Invalid> {
    let text = secret.expose_secret();
    if text.is_empty() || text.len() > CLIENT_SECRET_MAX || !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Err(Invalid::new("must have 1 to 4096 printable ASCII characters"));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("regcred", "one", &[])]
    #[case("api://regcred, with a space", "+/=?&\"", &[])]
    #[case("", "", &["login.clientId", "login.clientSecret"])]
    #[case("a\nb", "a\u{0}b", &["login.clientId", "login.clientSecret"])]
    #[case("é", "one", &["login.clientId"])]
    fn client_has_printable_characters(#[case] id: &str, #[case] secret: &str, #[case] refused: &[&str]) {
        let parsed = LoginClient::parse(id, SecretString::from(secret));
        let fields: Vec<String> = parsed.err().into_iter().flatten().map(|error| error.field).collect();
        assert_eq!(fields, refused);
    }
}
