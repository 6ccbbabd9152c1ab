//! Import of one entry.

use std::borrow::Cow;

use secrecy::{ExposeSecret, SecretString};

use super::{FoundAccount, ImportItem, ImportOutcome, SkipReason, helper_detail};
use crate::domain::{
    docker_config::{
        auth,
        parse::{Config, Entry},
    },
    registry::RegistryScope,
};

type Skip = (SkipReason, Cow<'static, str>);

/// Imports one entry.
pub(super) fn import_entry(entry: &Entry, config: &Config) -> ImportItem {
    let key = redact_key(&entry.key);
    match found(entry, config) {
        Ok(account) => ImportItem { source: None, key: key.into_owned(), outcome: ImportOutcome::Found(account) },
        Err((reason, detail)) => ImportItem::skipped(&key, reason, detail),
    }
}

/// Redacts the part of a key before an `@`, which may contain a password.
pub(in crate::domain) fn redact_key(key: &str) -> Cow<'_, str> {
    match key.rsplit_once('@') {
        Some((_, rest)) => format!("…@{rest}").into(),
        None => key.into(),
    }
}

fn found(entry: &Entry, config: &Config) -> Result<FoundAccount, Skip> {
    let (username, password) = login(entry)?;
    if username.is_empty() || password.expose_secret().is_empty() {
        return Err(without_login(entry, config));
    }
    if username.contains(':') {
        return Err(invalid(
            "its `username` has a colon, which every consumer reads as the separator before the password",
        ));
    }
    let (scope, plain_http) = scope(&entry.key)?;
    let email = Some(entry.email.text()).filter(|email| !email.is_empty());
    let left_out = left_out(entry);
    Ok(FoundAccount { scope, plain_http, username, password, email: email.map(str::to_owned), left_out })
}

/// Fields beside user, password and address.
fn left_out(entry: &Entry) -> Vec<String> {
    let tokens = [("identitytoken", &entry.identity_token), ("registrytoken", &entry.registry_token)];
    let tokens = tokens.into_iter().filter(|(_, token)| !token.text().is_empty()).map(|(name, _)| name);
    tokens.chain(entry.others.iter().map(String::as_str)).map(str::to_owned).collect()
}

/// Splits off `http://`, which is a property of the account, not of the registry's name.
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

/// `auth` takes precedence over `username` and `password`, as in every consumer.
fn login(entry: &Entry) -> Result<(String, SecretString), Skip> {
    let fields = [("username", &entry.username), ("password", &entry.password), ("auth", &entry.auth)];
    if entry.is_malformed {
        return Err(invalid("it is not an object"));
    }
    if let Some((name, _)) = fields.iter().find(|(_, field)| field.is_malformed()) {
        return Err(invalid(format!("its `{name}` is not a string")));
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
        _ => Err(invalid("its `auth` holds a user or password that is not UTF-8")),
    }
}

/// Old docker clients left NUL at the end of the encoded password; the docker CLI and podman strip
/// it from both ends (`cli/config/configfile/file.go`, `decodeAuth`). A `password` field shows
/// whether the NUL is part of the password.
fn without_nul<'a>(password: &'a str, plain: &str) -> &'a str {
    if password == plain { password } else { password.trim_matches('\0') }
}

/// Reason for an entry without a login. `docker login` leaves an empty entry if a helper program
/// stores the credential.
fn without_login(entry: &Entry, config: &Config) -> Skip {
    if !entry.identity_token.text().is_empty() {
        (
            SkipReason::IdentityToken,
            "it holds an identity token instead of a password: create an access token at the registry and use it"
                .into(),
        )
    } else if !entry.registry_token.text().is_empty() {
        (
            SkipReason::RegistryToken,
            "it holds a bearer token instead of a password: create an access token at the registry and use it".into(),
        )
    } else if let Some(helper) = config.helpers.iter().find(|helper| helper.registry == entry.key) {
        (SkipReason::CredHelpers, helper_detail(&helper.name, &entry.key).into())
    } else if let Some(name) = &config.store {
        (SkipReason::CredsStore, helper_detail(name, &entry.key).into())
    } else {
        (SkipReason::Empty, "it lacks a user or a password".into())
    }
}

fn invalid(detail: impl Into<Cow<'static, str>>) -> Skip {
    (SkipReason::InvalidEntry, detail.into())
}
