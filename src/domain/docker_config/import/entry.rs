//! What one entry becomes.

use std::borrow::Cow;

use secrecy::{ExposeSecret, SecretString};

use super::{FoundAccount, ImportItem, ImportOutcome, SkipReason};
use crate::domain::{
    docker_config::{
        auth,
        parse::{Config, Entry},
    },
    registry::RegistryScope,
};

type Skip = (SkipReason, Cow<'static, str>);

/// Judges one entry.
pub(super) fn judge(entry: &Entry, config: &Config) -> ImportItem {
    let key = shown(&entry.key);
    match found(entry, config) {
        Ok(account) => ImportItem { key: key.into_owned(), outcome: ImportOutcome::Found(account) },
        Err((reason, detail)) => ImportItem::skipped(&key, reason, detail),
    }
}

/// The key without what stands before an `@`, which may be a password.
pub(in crate::domain) fn shown(key: &str) -> Cow<'_, str> {
    match key.rsplit_once('@') {
        Some((_, rest)) => format!("…@{rest}").into(),
        None => key.into(),
    }
}

fn found(entry: &Entry, config: &Config) -> Result<FoundAccount, Skip> {
    let (username, password) = login(entry)?;
    if username.is_empty() || password.expose_secret().is_empty() {
        return Err(elsewhere(entry, config));
    }
    if username.contains(':') {
        return Err(invalid("its `username` has a colon, which every reader takes for the one before the password"));
    }
    let (scope, plain_http) = scope(&entry.key)?;
    let email = Some(entry.email.text()).filter(|email| !email.is_empty());
    let left_out = left_out(entry);
    Ok(FoundAccount { scope, plain_http, username, password, email: email.map(str::to_owned), left_out })
}

/// Fields that are there beside user, password and address.
fn left_out(entry: &Entry) -> Vec<String> {
    let tokens = [("identitytoken", &entry.identity_token), ("registrytoken", &entry.registry_token)];
    let tokens = tokens.into_iter().filter(|(_, token)| !token.text().is_empty()).map(|(name, _)| name);
    tokens.chain(entry.others.iter().map(String::as_str)).map(str::to_owned).collect()
}

/// `http://` is a property of an account, not a part of its registry's name.
fn scope(key: &str) -> Result<(RegistryScope, bool), Skip> {
    let named = match key.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
        _ => key,
    };
    match RegistryScope::parse(named) {
        Ok(scope) => Ok((scope, named != key)),
        Err(refusal) => Err((SkipReason::InvalidRegistry, refusal.to_string().into())),
    }
}

/// `auth` wins over `username` and `password`, as with every reader.
fn login(entry: &Entry) -> Result<(String, SecretString), Skip> {
    let fields = [("username", &entry.username), ("password", &entry.password), ("auth", &entry.auth)];
    if entry.is_malformed {
        return Err(invalid("it is not an object"));
    }
    if let Some((name, _)) = fields.iter().find(|(_, field)| field.is_malformed()) {
        return Err(invalid(format!("its `{name}` is not a text")));
    }
    if entry.auth.text().is_empty() {
        return Ok((entry.username.text().to_owned(), SecretString::from(entry.password.text())));
    }
    let login = auth::decode_leniently(entry.auth.text()).map_err(|problem| invalid(problem.to_string()))?;
    match (str::from_utf8(&login.username), str::from_utf8(&login.password)) {
        (Ok(username), Ok(password)) => {
            let password = without_nul(password, entry.password.text());
            Ok((username.to_owned(), SecretString::from(password)))
        }
        _ => Err(invalid("its `auth` holds a user or a password that is not UTF-8")),
    }
}

/// Old docker clients left NUL at the end of what they encoded, and the docker CLI and podman cut it from both ends
/// (`cli/config/configfile/file.go`, `decodeAuth`). Where the entry also has the password in the clear, that shows what
/// is meant.
fn without_nul<'a>(password: &'a str, in_the_clear: &str) -> &'a str {
    if password == in_the_clear { password } else { password.trim_matches('\0') }
}

/// Where the credential is, if not in the entry. `docker login` leaves an empty entry behind when a helper program
/// keeps it.
fn elsewhere(entry: &Entry, config: &Config) -> Skip {
    if !entry.identity_token.text().is_empty() {
        (
            SkipReason::IdentityToken,
            "it holds an identity token instead of a password: make an access token at the registry and use that"
                .into(),
        )
    } else if !entry.registry_token.text().is_empty() {
        (
            SkipReason::RegistryToken,
            "it holds a bearer token instead of a password: make an access token at the registry and use that".into(),
        )
    } else if let Some(helper) = config.helpers.iter().find(|helper| helper.registry == entry.key) {
        (
            SkipReason::CredHelpers,
            format!("the credential is with `docker-credential-{}`, not in this document", helper.name).into(),
        )
    } else if let Some(name) = &config.store {
        (
            SkipReason::CredsStore,
            format!("the credential is in the store of `docker-credential-{name}`, not in this document").into(),
        )
    } else {
        (SkipReason::Empty, "it lacks a user or a password".into())
    }
}

fn invalid(detail: impl Into<Cow<'static, str>>) -> Skip {
    (SkipReason::InvalidEntry, detail.into())
}
