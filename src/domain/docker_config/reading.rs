//! How each consumer reads an entry.

use std::borrow::Cow;

use super::{
    Consumer, auth,
    parse::{Entry, Field},
};

/// Result of a consumer reading an entry. The text continues a sentence about the entry and never
/// contains a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
    /// Logs in with user and password.
    Login,
    /// Logs in with a token.
    Token,
    /// Finds no credential.
    Nothing(Cow<'static, str>),
    /// Fails for images that match this entry.
    Fails(Cow<'static, str>),
    /// Fails for the complete document, for any image.
    FailsAll(Cow<'static, str>),
}

/// Reads an entry as the consumer does.
#[must_use]
pub fn read(consumer: Consumer, entry: &Entry) -> Reading {
    if entry.is_malformed {
        return Reading::FailsAll("it is not an object".into());
    }
    match consumer {
        Consumer::Kubernetes => kubelet(entry),
        Consumer::K8schain => k8schain(entry),
        Consumer::Docker => docker(entry),
        Consumer::DockerAuthConfig => docker_auth_config(entry),
        Consumer::Podman => podman(entry),
    }
}

/// `pkg/credentialprovider/config.go`, `DockerConfigEntry.UnmarshalJSON`: a non-empty `auth` takes
/// precedence, tokens are not supported. An error fails the Secret, and with it the pull
/// (`MakeDockerKeyring`).
fn kubelet(entry: &Entry) -> Reading {
    let fields =
        [("username", &entry.username), ("password", &entry.password), ("email", &entry.email), ("auth", &entry.auth)];
    match malformed(&fields).or_else(|| auth_in_secret(entry)) {
        Some(reading) => reading,
        None if has_login(entry) => Reading::Login,
        None if has_token(entry) => {
            Reading::Nothing("it holds only a token, which the kubelet does not support".into())
        }
        None => nothing(),
    }
}

/// go-containerregistry, `pkg/authn/authn.go`, `AuthConfig.UnmarshalJSON`: like the kubelet, but
/// with tokens.
fn k8schain(entry: &Entry) -> Reading {
    let fields = [
        ("username", &entry.username),
        ("password", &entry.password),
        ("auth", &entry.auth),
        ("identitytoken", &entry.identity_token),
        ("registrytoken", &entry.registry_token),
    ];
    match malformed(&fields).or_else(|| auth_in_secret(entry)) {
        Some(Reading::Login) | None if has_token(entry) => Reading::Token,
        Some(reading) => reading,
        None if has_login(entry) => Reading::Login,
        None => nothing(),
    }
}

/// How both read a non-empty `auth`.
fn auth_in_secret(entry: &Entry) -> Option<Reading> {
    let auth = Some(entry.auth.text()).filter(|auth| !auth.is_empty())?;
    Some(match auth::decode_leniently(auth) {
        Ok(_) => Reading::Login,
        Err(problem) => Reading::FailsAll(problem.to_string().into()),
    })
}

/// `cli/config/configfile/file.go`, `LoadFromReader`: a non-empty `auth` takes precedence. An error
/// ends loading; the docker CLI warns and keeps the entries read so far, in random order. Releases
/// before 29 also read `email`.
fn docker(entry: &Entry) -> Reading {
    let fields = [
        ("username", &entry.username),
        ("password", &entry.password),
        ("email", &entry.email),
        ("auth", &entry.auth),
        ("identitytoken", &entry.identity_token),
        ("registrytoken", &entry.registry_token),
    ];
    if let Some(malformed) = malformed(&fields) {
        return malformed;
    }
    if !entry.auth.text().is_empty()
        && let Err(problem) = auth::decode_strictly(entry.auth.text())
    {
        return Reading::FailsAll(problem.to_string().into());
    }
    if has_token(entry) {
        Reading::Token
    } else if !entry.auth.text().is_empty() || has_login(entry) {
        Reading::Login
    } else {
        nothing()
    }
}

/// `cli/config/configfile/file.go`, `configEnvAuth`: only `auth` is accepted.
fn docker_auth_config(entry: &Entry) -> Reading {
    let other_fields = [
        ("username", &entry.username),
        ("password", &entry.password),
        ("email", &entry.email),
        ("identitytoken", &entry.identity_token),
        ("registrytoken", &entry.registry_token),
    ];
    let other_fields = other_fields.iter().filter(|(_, field)| field.is_present()).map(|(name, _)| *name);
    if let Some(name) = other_fields.chain(entry.others.iter().map(String::as_str)).next() {
        return Reading::FailsAll(
            format!("it has the field `{name}`, but DOCKER_AUTH_CONFIG accepts only `auth`").into(),
        );
    }
    if let Some(malformed) = malformed(&[("auth", &entry.auth)]) {
        return malformed;
    }
    if entry.auth.text().is_empty() {
        return Reading::FailsAll("it has no `auth`".into());
    }
    match auth::decode_strictly(entry.auth.text()) {
        Ok(_) => Reading::Login,
        Err(problem) => Reading::FailsAll(problem.to_string().into()),
    }
}

/// `pkg/docker/config/config.go`, `decodeDockerAuth`: reads `auth` and `identitytoken`. Without a
/// colon it skips the entry and the token; without user or password `getCredentialsWithHomeDir`
/// skips it.
fn podman(entry: &Entry) -> Reading {
    if let Some(malformed) = malformed(&[("auth", &entry.auth), ("identitytoken", &entry.identity_token)]) {
        return malformed;
    }
    let has_token = !entry.identity_token.text().is_empty();
    match auth::decode_padded(entry.auth.text()) {
        Ok(_) if has_token => Reading::Token,
        Ok(login) if login.username.is_empty() || login.password.is_empty() => {
            Reading::Nothing("podman ignores an `auth` without user or password".into())
        }
        Ok(_) => Reading::Login,
        Err(auth::AuthProblem::NoColon) if entry.auth.text().is_empty() && has_login(entry) => {
            Reading::Nothing("podman reads `auth` only, not `username` and `password`".into())
        }
        Err(auth::AuthProblem::NoColon) if entry.auth.text().is_empty() => nothing(),
        Err(problem @ auth::AuthProblem::NoColon) => Reading::Nothing(problem.to_string().into()),
        Err(problem) => Reading::Fails(problem.to_string().into()),
    }
}

fn malformed(fields: &[(&str, &Field)]) -> Option<Reading> {
    let (name, _) = fields.iter().find(|(_, field)| field.is_malformed())?;
    Some(Reading::FailsAll(format!("its `{name}` is not a string").into()))
}

fn has_login(entry: &Entry) -> bool {
    !entry.username.text().is_empty() || !entry.password.text().is_empty()
}

fn has_token(entry: &Entry) -> bool {
    !entry.identity_token.text().is_empty() || !entry.registry_token.text().is_empty()
}

fn nothing() -> Reading {
    Reading::Nothing("it is empty".into())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::domain::docker_config::parse::Config;

    /// How a consumer reads an entry, as one letter: Login, Token, Nothing, `f`ails for this entry,
    /// `F`ails completely.
    fn letter(consumer: Consumer, entry: &Entry) -> char {
        match read(consumer, entry) {
            Reading::Login => 'L',
            Reading::Token => 'T',
            Reading::Nothing(_) => 'N',
            Reading::Fails(_) => 'f',
            Reading::FailsAll(_) => 'F',
        }
    }

    /// Columns in the order of [`Consumer::ALL`]: kubelet, k8schain, docker CLI,
    /// `DOCKER_AUTH_CONFIG`, podman.
    #[rstest]
    #[case::auth_is_read_by_all(r#"{"auth":"dTpw"}"#, "LLLLL")]
    #[case::user_and_password(r#"{"username":"u","password":"p"}"#, "LLLFN")]
    #[case::as_kubectl_writes_it(r#"{"username":"u","password":"p","email":"e","auth":"dTpw"}"#, "LLLFL")]
    #[case::valid_auth_beside_malformed_username(r#"{"username":5,"auth":"dTpw"}"#, "FFFFL")]
    #[case::invalid_auth_beside_password(r#"{"username":"u","password":"p","auth":"!"}"#, "FFFFf")]
    #[case::padded(r#"{"auth":"dXU6cA=="}"#, "LLLLL")]
    #[case::unpadded(r#"{"auth":"dXU6cA"}"#, "LLFFf")]
    #[case::with_line_breaks(r#"{"auth":"dXU6\r\ncA==\n"}"#, "LLLLL")]
    #[case::with_a_space(r#"{"auth":"dXU6 cA=="}"#, "FFFFf")]
    #[case::trailing_bits(r#"{"auth":"dXU6cB=="}"#, "LLLLL")]
    #[case::url_safe(r#"{"auth":"dTo_Pz8_"}"#, "FFFFf")]
    #[case::standard(r#"{"auth":"dTo/Pz8/"}"#, "LLLLL")]
    #[case::no_colon(r#"{"auth":"dXNlcg=="}"#, "FFFFN")]
    #[case::no_user(r#"{"auth":"OnA="}"#, "LLFFN")]
    #[case::no_password(r#"{"auth":"dTo="}"#, "LLLLN")]
    #[case::identity_token(r#"{"identitytoken":"t"}"#, "NTTFN")]
    #[case::auth_and_identity_token(r#"{"auth":"dTpw","identitytoken":"t"}"#, "LTTFT")]
    #[case::registry_token(r#"{"registrytoken":"t"}"#, "NTTFN")]
    #[case::empty(r"{}", "NNNFN")]
    #[case::null("null", "NNNFN")]
    #[case::null_auth(r#"{"auth":null}"#, "NNNFN")]
    #[case::empty_auth(r#"{"auth":""}"#, "NNNFN")]
    #[case::email_of_a_wrong_type(r#"{"auth":"dTpw","email":1}"#, "FLFFL")]
    #[case::auth_of_a_wrong_type(r#"{"auth":["dTpw"]}"#, "FFFFF")]
    #[case::unknown_field(r#"{"auth":"dTpw","serveraddress":"reg.io"}"#, "LLLFL")]
    #[case::names_in_another_case(r#"{"Auth":"dTpw"}"#, "LLLLL")]
    #[case::a_text("\"dTpw\"", "FFFFF")]
    fn consumers_differ_in_the_fields_they_read(#[case] entry: &str, #[case] expected: &str) {
        let config = Config::parse(format!(r#"{{"auths":{{"reg.io":{entry}}}}}"#).as_bytes()).unwrap();
        let found: String = Consumer::ALL.into_iter().map(|consumer| letter(consumer, &config.entries[0])).collect();
        assert_eq!(found, expected);
    }
}
