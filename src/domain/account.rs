//! Registry accounts: one credential for one registry scope.

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use crate::domain::{
    cluster::CaCertificate,
    invalid::Invalid,
    names::{Labels, Name},
    registry::RegistryScope,
    verification::{Verification, VerifyInterval},
};

/// A registry account as it is shown: everything but the password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Identity that survives everything; the sealed password is bound to it.
    pub id: Uuid,
    /// Unique name, by which the API addresses the account.
    pub name: Name,
    /// What the credential is for.
    pub registry: RegistryScope,
    /// Who logs in.
    pub username: Username,
    /// Kept because `kubectl create secret docker-registry` writes it; no reader needs it.
    pub email: Option<Email>,
    /// What label selectors find the account by.
    pub labels: Labels,
    /// The registry is spoken to without TLS.
    pub plain_http: bool,
    /// When the registry will stop taking the password, as far as the operator knows.
    pub expires_at: Option<DateTime<Utc>>,
    /// Who signs the registry's certificate, beside the authorities that regcred's host trusts.
    pub ca_certificate: Option<CaCertificate>,
    /// How often the login is verified in the background, if it is.
    pub verify_interval: Option<VerifyInterval>,
    /// What the last check of this login found.
    pub verification: Option<Verification>,
    /// Grows by one with every change.
    pub version: i64,
    /// Database time of the creation.
    pub created_at: DateTime<Utc>,
    /// Database time of the last change.
    pub updated_at: DateTime<Utc>,
}

/// What is needed to register an account.
#[derive(Debug)]
pub struct NewAccount {
    /// Unique name.
    pub name: Name,
    /// What the credential is for.
    pub registry: RegistryScope,
    /// Who logs in.
    pub username: Username,
    /// What is sealed.
    pub password: Password,
    /// Optional, for tools that want one.
    pub email: Option<Email>,
    /// What label selectors find the account by.
    pub labels: Labels,
    /// The registry is spoken to without TLS.
    pub plain_http: bool,
    /// When the password stops working, if known.
    pub expires_at: Option<DateTime<Utc>>,
    /// Who signs the registry's certificate, beside the authorities that regcred's host trusts.
    pub ca_certificate: Option<CaCertificate>,
    /// How often the login is verified in the background, if it is.
    pub verify_interval: Option<VerifyInterval>,
}

/// A change of an account; `None` leaves a field as it is.
#[derive(Debug, Clone, Default)]
pub struct AccountChange {
    /// Another registry scope.
    pub registry: Option<RegistryScope>,
    /// Another user name.
    pub username: Option<Username>,
    /// A rotation.
    pub password: Option<Password>,
    /// Another address, or none.
    pub email: Option<Option<Email>>,
    /// Label by label: set to a value, or removed.
    pub labels: Option<LabelChange>,
    /// With or without TLS.
    pub plain_http: Option<bool>,
    /// Another expiry, or none.
    pub expires_at: Option<Option<DateTime<Utc>>>,
    /// Another CA, or none.
    pub ca_certificate: Option<Option<CaCertificate>>,
    /// Another interval of verification, or none.
    pub verify_interval: Option<Option<VerifyInterval>>,
}

impl AccountChange {
    /// The fields that it says something of.
    #[must_use]
    pub fn fields(&self) -> Vec<&'static str> {
        let said = [
            ("registry", self.registry.is_some()),
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("email", self.email.is_some()),
            ("labels", self.labels.is_some()),
            ("plainHttp", self.plain_http.is_some()),
            ("expiresAt", self.expires_at.is_some()),
            ("caCertificate", self.ca_certificate.is_some()),
            ("verifyInterval", self.verify_interval.is_some()),
        ];
        said.into_iter().filter(|(_, is_said)| *is_said).map(|(field, _)| field).collect()
    }

    /// Applies the change to an account. The password is stored beside it, by whoever stores the account.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the changed labels break a rule.
    pub fn apply(self, account: &mut Account) -> Result<(), Invalid> {
        if let Some(labels) = self.labels {
            account.labels = labels.apply(&account.labels)?;
        }
        if let Some(registry) = self.registry {
            account.registry = registry;
        }
        if let Some(username) = self.username {
            account.username = username;
        }
        if let Some(email) = self.email {
            account.email = email;
        }
        if let Some(plain_http) = self.plain_http {
            account.plain_http = plain_http;
        }
        if let Some(expires_at) = self.expires_at {
            account.expires_at = expires_at;
        }
        if let Some(ca_certificate) = self.ca_certificate {
            account.ca_certificate = ca_certificate;
        }
        if let Some(verify_interval) = self.verify_interval {
            account.verify_interval = verify_interval;
        }
        Ok(())
    }
}

/// How a merge patch changes labels: `null` removes all of them or a single one.
#[derive(Debug, Clone)]
pub enum LabelChange {
    /// All labels go.
    Clear,
    /// These are set (`Some`) or removed (`None`); others stay.
    Merge(std::collections::BTreeMap<String, Option<String>>),
}

impl LabelChange {
    /// Applies the change.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the result breaks a rule for labels.
    pub fn apply(self, labels: &Labels) -> Result<Labels, Invalid> {
        let LabelChange::Merge(changes) = self else { return Ok(Labels::default()) };
        let mut merged = labels.as_map().clone();
        for (key, value) in changes {
            match value {
                Some(value) => merged.insert(key, value),
                None => merged.remove(&key),
            };
        }
        Labels::parse(merged)
    }
}

/// A user name that fits `base64(username:password)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// Parses a user name.
    ///
    /// A colon is refused because every reader of `auth` splits at the first one, so the rest of the name
    /// would become part of the password.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is empty, too long, or has a colon or a control character.
    pub fn parse(username: &str) -> Result<Self, Invalid> {
        if username.is_empty() {
            return Err(Invalid::new("must not be empty"));
        }
        if username.len() > 255 {
            return Err(Invalid::new("must be at most 255 bytes long"));
        }
        if username.contains(':') {
            return Err(Invalid::new("must not contain ':', which ends the user name in `auth`"));
        }
        if username.chars().any(char::is_control) {
            return Err(Invalid::new("must not contain control characters"));
        }
        Ok(Self(username.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A password or token of a registry, write-only for every caller.
#[derive(Debug, Clone)]
pub struct Password(SecretString);

impl Password {
    /// The longest password: long enough for a cloud provider's JSON key.
    pub const MAX_BYTES: usize = 32 * 1024;

    /// Parses a password: any Unicode text but NUL, which docker and podman cut off.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is empty, too long or has a NUL.
    pub fn parse(password: SecretString) -> Result<Self, Invalid> {
        let text = password.expose_secret();
        if text.is_empty() {
            return Err(Invalid::new("must not be empty"));
        }
        if text.len() > Self::MAX_BYTES {
            return Err(Invalid::new("must be at most 32768 bytes long"));
        }
        if text.contains('\0') {
            return Err(Invalid::new("must not contain NUL, which docker and podman cut off"));
        }
        Ok(Self(password))
    }

    /// The secret, for sealing.
    #[must_use]
    pub fn secret(&self) -> &SecretString {
        &self.0
    }
}

/// An e-mail address, as far as a docker config cares: one line of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Parses an address.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is empty, over 254 bytes, without an `@` or has white space or control characters.
    pub fn parse(email: &str) -> Result<Self, Invalid> {
        if email.len() > 254 {
            return Err(Invalid::new("must be at most 254 bytes long"));
        }
        if email.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(Invalid::new("must not contain white space or control characters"));
        }
        match email.split_once('@') {
            Some((local, domain)) if !local.is_empty() && !domain.is_empty() => Ok(Self(email.to_owned())),
            _ => Err(Invalid::new("must be an address such as user@example.com")),
        }
    }

    /// The address as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("martin", true)]
    #[case("robot$team+ci", true)]
    #[case("_json_key", true)]
    #[case("00000000-0000-0000-0000-000000000000", true)]
    #[case("ünïcode", true)]
    #[case("", false)]
    #[case("a:b", false)]
    #[case("a\nb", false)]
    #[case("a\0", false)]
    fn a_username_fits_auth(#[case] name: &str, #[case] good: bool) {
        assert_eq!(Username::parse(name).is_ok(), good);
    }

    #[rstest]
    #[case("x", true)]
    #[case("with:colon and \"quotes\"\nand a line", true)]
    #[case("", false)]
    #[case("a\0b", false)]
    fn a_password_is_any_text_without_nul(#[case] password: &str, #[case] good: bool) {
        assert_eq!(Password::parse(SecretString::from(password)).is_ok(), good);
    }

    #[test]
    fn a_password_never_shows_in_debug() {
        let password = Password::parse(SecretString::from("canary")).unwrap();
        assert!(!format!("{password:?}").contains("canary"));
    }

    #[test]
    fn labels_merge_key_by_key() {
        let labels =
            Labels::parse([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into()).unwrap();
        let change = LabelChange::Merge([("a".to_owned(), None), ("c".to_owned(), Some("3".to_owned()))].into());
        let merged = change.apply(&labels).unwrap();
        assert_eq!(merged.into_map(), [("b".to_owned(), "2".to_owned()), ("c".to_owned(), "3".to_owned())].into());
    }
}
