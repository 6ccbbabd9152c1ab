//! Registry accounts: a credential for one registry scope.

use chrono::{DateTime, SubsecRound, Utc};
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use crate::domain::{
    cluster::CaCertificate,
    invalid::Invalid,
    mint::{Mint, NewSource, StoredSource},
    names::{Labels, Name},
    registry::RegistryScope,
    sealed::{Ca, RegistryDestination},
    verification::{Verification, VerifyInterval},
};

/// A registry account, without its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Immutable identifier. The ciphertext of the password is bound to it.
    pub id: Uuid,
    /// Unique name that addresses the account in the API.
    pub name: Name,
    /// Registry, and optionally the path in it, that the credential is valid for.
    pub registry: RegistryScope,
    /// User name of the login.
    pub username: Username,
    /// E-mail address. `kubectl create secret docker-registry` writes one; no container runtime
    /// reads it.
    pub email: Option<Email>,
    /// Labels that label selectors match.
    pub labels: Labels,
    /// Whether the registry is called without TLS.
    pub plain_http: bool,
    /// Expiry of the password, as stated by the operator.
    pub expires_at: Option<DateTime<Utc>>,
    /// CA of the registry's certificate, trusted in addition to the host's trust store.
    pub ca_certificate: Option<CaCertificate>,
    /// Interval of the background verification; `None` disables it.
    pub verify_interval: Option<VerifyInterval>,
    /// Result of the last verification of this login.
    pub verification: Option<Verification>,
    /// Source of the login, and the state of its mints; none for a login that a caller set.
    pub mint: Option<Mint>,
    /// Whether the password ends with white space.
    pub password_ends_with_whitespace: bool,
    /// Time of the last change of the login, by a caller or a mint; none for the first login.
    pub login_changed_at: Option<DateTime<Utc>>,
    /// Version, incremented by every change.
    pub version: i64,
    /// Creation time, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// Time of the last change, by the database's clock.
    pub updated_at: DateTime<Utc>,
}

/// Validated input for the registration of an account.
#[derive(Debug)]
pub struct NewAccount {
    /// Unique name.
    pub name: Name,
    /// Registry, and optionally the path in it, that the credential is valid for.
    pub registry: RegistryScope,
    /// User name of the login.
    pub username: Username,
    /// Password, sealed before it is stored.
    pub password: Password,
    /// E-mail address.
    pub email: Option<Email>,
    /// Labels that label selectors match.
    pub labels: Labels,
    /// Whether the registry is called without TLS.
    pub plain_http: bool,
    /// Expiry of the password, if known.
    pub expires_at: Option<DateTime<Utc>>,
    /// CA of the registry's certificate, trusted in addition to the host's trust store.
    pub ca_certificate: Option<CaCertificate>,
    /// Interval of the background verification; `None` disables it.
    pub verify_interval: Option<VerifyInterval>,
}

/// Change of an account. `None` keeps the field.
#[derive(Debug, Clone, Default)]
pub struct AccountChange {
    /// New registry scope.
    pub registry: Option<RegistryScope>,
    /// New user name.
    pub username: Option<Username>,
    /// New password: a rotation.
    pub password: Option<Password>,
    /// New e-mail address; `Some(None)` removes it.
    pub email: Option<Option<Email>>,
    /// Change of the labels, key by key.
    pub labels: Option<LabelChange>,
    /// Whether the registry is called without TLS.
    pub plain_http: Option<bool>,
    /// New expiry; `Some(None)` removes it.
    pub expires_at: Option<Option<DateTime<Utc>>>,
    /// New CA; `Some(None)` removes it.
    pub ca_certificate: Option<Option<CaCertificate>>,
    /// New verification interval; `Some(None)` disables the background verification.
    pub verify_interval: Option<Option<VerifyInterval>>,
    /// New source of the login, or its removal.
    pub source: Option<SourceChange>,
}

/// Change of the source of a login.
#[derive(Debug, Clone)]
pub enum SourceChange {
    /// Mints the login from this source.
    Set(Box<NewSource>),
    /// Removes the source: the change brings a login.
    Remove,
}

/// Account to register.
#[derive(Debug)]
pub enum Registration {
    /// With its login.
    Given(Box<NewAccount>),
    /// With a source, from which the login is minted.
    Minted(Box<UnmintedAccount>, Box<NewSource>),
}

impl Registration {
    /// Returns name and labels.
    #[must_use]
    pub fn name_and_labels(&self) -> (&Name, &Labels) {
        match self {
            Self::Given(new) => (&new.name, &new.labels),
            Self::Minted(new, _) => (&new.name, &new.labels),
        }
    }
}

/// New account without its login.
#[derive(Debug)]
pub struct UnmintedAccount {
    /// Unique name.
    pub name: Name,
    /// Registry, and optionally the path in it, that the credential is valid for.
    pub registry: RegistryScope,
    /// E-mail address.
    pub email: Option<Email>,
    /// Labels that label selectors match.
    pub labels: Labels,
    /// Whether the registry is called without TLS.
    pub plain_http: bool,
    /// CA of the registry's certificate, trusted in addition to the host's trust store.
    pub ca_certificate: Option<CaCertificate>,
    /// Interval of the background verification; `None` disables it.
    pub verify_interval: Option<VerifyInterval>,
}

impl UnmintedAccount {
    /// Adds the login. Its end is that of the mint.
    #[must_use]
    pub fn with_login(self, username: Username, password: Password) -> NewAccount {
        let Self { name, registry, email, labels, plain_http, ca_certificate, verify_interval } = self;
        NewAccount {
            name,
            registry,
            username,
            password,
            email,
            labels,
            plain_http,
            expires_at: None,
            ca_certificate,
            verify_interval,
        }
    }
}

impl AccountChange {
    /// Returns the account with the change applied. The password is not part of [`Account`] and is
    /// stored separately.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the changed labels are not valid.
    pub fn apply_to(&self, account: &Account) -> Result<Account, Invalid> {
        let mut changed = account.clone();
        if let Some(labels) = &self.labels {
            changed.labels = labels.apply_to(&account.labels)?;
        }
        if let Some(registry) = &self.registry {
            changed.registry = registry.clone();
        }
        if let Some(username) = &self.username {
            changed.username = username.clone();
        }
        if let Some(password) = &self.password {
            changed.password_ends_with_whitespace = password.ends_with_whitespace();
        }
        if let Some(email) = &self.email {
            changed.email.clone_from(email);
        }
        if let Some(plain_http) = self.plain_http {
            changed.plain_http = plain_http;
        }
        if let Some(expires_at) = self.expires_at {
            // As Postgres stores it, so that the same time is no change.
            changed.expires_at = expires_at.map(|at| at.trunc_subsecs(6));
        }
        if let Some(ca_certificate) = &self.ca_certificate {
            changed.ca_certificate.clone_from(ca_certificate);
        }
        if let Some(verify_interval) = self.verify_interval {
            changed.verify_interval = verify_interval;
        }
        Ok(changed)
    }
}

impl Account {
    /// Names of the fields that differ from an earlier state of the account, as audit events name
    /// them.
    #[must_use]
    pub fn fields_changed_since(&self, before: &Self, has_new_password: bool) -> Vec<&'static str> {
        let fields = [
            ("registry", self.registry != before.registry),
            ("username", self.username != before.username),
            ("password", has_new_password),
            ("email", self.email != before.email),
            ("labels", self.labels != before.labels),
            ("plainHttp", self.plain_http != before.plain_http),
            ("expiresAt", self.expires_at != before.expires_at),
            ("caCertificate", self.ca_certificate != before.ca_certificate),
            ("verifyInterval", self.verify_interval != before.verify_interval),
            ("source", self.source() != before.source()),
        ];
        fields.into_iter().filter(|(_, is_changed)| *is_changed).map(|(field, _)| field).collect()
    }

    /// Source of the login.
    #[must_use]
    pub fn source(&self) -> Option<&StoredSource> {
        self.mint.as_ref().map(|mint| &mint.source)
    }

    /// Where the password is sent.
    #[must_use]
    pub fn destination(&self) -> RegistryDestination<'_> {
        destination(&self.registry, self.plain_http, self.ca_certificate.as_ref())
    }
}

impl NewAccount {
    /// Where the password is sent.
    #[must_use]
    pub fn destination(&self) -> RegistryDestination<'_> {
        destination(&self.registry, self.plain_http, self.ca_certificate.as_ref())
    }
}

fn destination<'a>(
    registry: &'a RegistryScope,
    plain_http: bool,
    ca: Option<&'a CaCertificate>,
) -> RegistryDestination<'a> {
    RegistryDestination { authority: registry.authority(), plain_http, ca: ca.map(|ca| Ca::Pem(ca.as_pem())) }
}

/// Change of labels, with the semantics of a JSON merge patch.
#[derive(Debug, Clone)]
pub enum LabelChange {
    /// Removes all labels.
    Clear,
    /// Sets (`Some`) or removes (`None`) the listed labels and keeps the others.
    Merge(std::collections::BTreeMap<String, Option<String>>),
}

impl LabelChange {
    /// Returns the changed labels.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the result is not a valid set of labels.
    pub fn apply_to(&self, labels: &Labels) -> Result<Labels, Invalid> {
        let LabelChange::Merge(changes) = self else { return Ok(Labels::default()) };
        let mut merged = labels.as_map().clone();
        for (key, value) in changes {
            match value {
                Some(value) => merged.insert(key.clone(), value.clone()),
                None => merged.remove(key),
            };
        }
        Labels::parse(merged)
    }
}

/// User name that can be encoded in `auth`, which is `base64(username:password)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// Parses a user name.
    ///
    /// A colon is rejected: readers of `auth` split at the first one, so the rest of the name would
    /// become part of the password.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the name is empty, longer than 255 bytes, or contains a colon or a control
    /// character.
    pub fn parse(username: &str) -> Result<Self, Invalid> {
        if username.is_empty() {
            return Err(Invalid::new("must not be empty"));
        }
        if username.len() > 255 {
            return Err(Invalid::new("must be at most 255 bytes long"));
        }
        if username.contains(':') {
            return Err(Invalid::new("must not contain ':', which separates user name and password in `auth`"));
        }
        if username.chars().any(char::is_control) {
            return Err(Invalid::new("must not contain control characters"));
        }
        Ok(Self(username.to_owned()))
    }

    /// Returns the user name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Password or token for a registry.
#[derive(Debug, Clone)]
pub struct Password(SecretString);

impl Password {
    /// Maximum length, sufficient for the JSON key of a cloud provider.
    pub const MAX_BYTES: usize = 32 * 1024;

    /// Parses a password: any Unicode text without NUL, at which docker and podman truncate.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the password is empty, longer than [`Self::MAX_BYTES`] or contains NUL.
    pub fn parse(password: SecretString) -> Result<Self, Invalid> {
        let text = password.expose_secret();
        if text.is_empty() {
            return Err(Invalid::new("must not be empty"));
        }
        if text.len() > Self::MAX_BYTES {
            return Err(Invalid::new("must be at most 32768 bytes long"));
        }
        if text.contains('\0') {
            return Err(Invalid::new("must not contain NUL, at which docker and podman truncate the password"));
        }
        Ok(Self(password))
    }

    /// Returns the secret.
    #[must_use]
    pub fn secret(&self) -> &SecretString {
        &self.0
    }

    /// Whether the password ends with white space, such as the newline that `echo` adds.
    #[must_use]
    pub fn ends_with_whitespace(&self) -> bool {
        ends_with_whitespace(self.0.expose_secret())
    }
}

/// Whether a password ends with white space. It is stored as given: the white space may be part of
/// it.
#[must_use]
pub fn ends_with_whitespace(password: &str) -> bool {
    password.ends_with(char::is_whitespace)
}

/// E-mail address. The check is loose because no reader of docker configs uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Parses an e-mail address.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the address is longer than 254 bytes, lacks a part around `@`, or contains
    /// white space or control characters.
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

    /// Returns the address as text.
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
    fn username_must_fit_auth(#[case] name: &str, #[case] good: bool) {
        assert_eq!(Username::parse(name).is_ok(), good);
    }

    #[rstest]
    #[case("x", true)]
    #[case("with:colon and \"quotes\"\nand a line", true)]
    #[case("", false)]
    #[case("a\0b", false)]
    fn password_is_any_nonempty_text_without_nul(#[case] password: &str, #[case] good: bool) {
        assert_eq!(Password::parse(SecretString::from(password)).is_ok(), good);
    }

    #[rstest]
    #[case("secret\n", true)]
    #[case("secret ", true)]
    #[case("secret\t\r\n", true)]
    #[case(" sec ret", false)]
    fn white_space_at_the_end_is_noticed_and_kept(#[case] text: &str, #[case] expected: bool) {
        let password = Password::parse(SecretString::from(text)).unwrap();
        assert_eq!((password.ends_with_whitespace(), password.secret().expose_secret()), (expected, text));
    }

    #[test]
    fn debug_output_hides_the_password() {
        let password = Password::parse(SecretString::from("canary")).unwrap();
        assert!(!format!("{password:?}").contains("canary"));
    }

    #[test]
    fn label_change_merges_key_by_key() {
        let labels =
            Labels::parse([("a".to_owned(), "1".to_owned()), ("b".to_owned(), "2".to_owned())].into()).unwrap();
        let change = LabelChange::Merge([("a".to_owned(), None), ("c".to_owned(), Some("3".to_owned()))].into());
        let merged = change.apply_to(&labels).unwrap();
        assert_eq!(merged.into_map(), [("b".to_owned(), "2".to_owned()), ("c".to_owned(), "3".to_owned())].into());
    }
}
