//! Import of a kubeconfig: one of its contexts becomes a [`ClusterConnection`].
//!
//! A kubeconfig can make a client run programs, read files, impersonate users or skip checks. A
//! server must do none of this for a caller's kubeconfig. So everything but a self-contained
//! credential is refused by name, never ignored. No refusal repeats a value.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::IgnoredAny};

use crate::domain::{
    cluster::{ClusterAuth, ClusterConnection, ServerUrl},
    invalid::FieldError,
};

/// Maximum length of a kubeconfig, in bytes.
const LENGTH_MAX: usize = 1024 * 1024;
/// Maximum length of a name in a message, in characters.
const NAME_MAX: usize = 64;
/// Texts that `kubectl config view` prints in place of secrets and certificates.
const REDACTED: [&str; 2] = ["REDACTED", "DATA+OMITTED"];
/// Commands that make a credential without a program. docs/CLUSTERS.md explains them.
const TOKEN_COMMANDS: &str = "kubectl create namespace regcred; kubectl create serviceaccount regcred -n regcred; \
                              kubectl create token regcred -n regcred --duration 24h. Send that token as auth.token, \
                              with server and caCertificate; see docs/CLUSTERS.md";
/// Maximum number of contexts in a message.
const CONTEXTS_MAX: usize = 10;

/// Parses the connection of one context: `context`, or else the current context.
///
/// # Errors
///
/// All problems of the context, under the fields `kubeconfig` and `context`.
pub fn parse(
    kubeconfig: &SecretString,
    context: Option<&str>,
    allow_plain_http: bool,
) -> Result<ClusterConnection, Vec<FieldError>> {
    let text = kubeconfig.expose_secret();
    if text.len() > LENGTH_MAX {
        return Err(vec![problem("must not be longer than 1 MiB")]);
    }
    let file: Kubeconfig = serde_saphyr::from_str(text).map_err(|error| vec![unreadable(&error)])?;
    let selected = file.select(context).map_err(|refusal| vec![refusal])?;
    selected.connection(allow_plain_http)
}

#[derive(Deserialize)]
struct Kubeconfig {
    kind: Option<String>,
    #[serde(rename = "current-context")]
    current_context: Option<String>,
    contexts: Option<Vec<NamedContext>>,
    clusters: Option<Vec<NamedCluster>>,
    users: Option<Vec<NamedUser>>,
}

#[derive(Deserialize)]
struct NamedContext {
    name: String,
    context: Option<Context>,
}

#[derive(Deserialize)]
struct Context {
    cluster: Option<String>,
    user: Option<String>,
}

#[derive(Deserialize)]
struct NamedCluster {
    name: String,
    cluster: Option<Cluster>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: Option<String>,
    certificate_authority: Option<String>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: Option<bool>,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
struct NamedUser {
    name: String,
    user: Option<User>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
struct User {
    token: Option<SecretString>,
    #[serde(rename = "tokenFile")]
    token_file: Option<String>,
    client_certificate: Option<String>,
    client_certificate_data: Option<String>,
    client_key: Option<String>,
    client_key_data: Option<SecretString>,
    username: Option<String>,
    password: Option<SecretString>,
    exec: Option<IgnoredAny>,
    auth_provider: Option<IgnoredAny>,
    #[serde(rename = "as")]
    impersonate: Option<IgnoredAny>,
    as_uid: Option<IgnoredAny>,
    as_groups: Option<IgnoredAny>,
    as_user_extra: Option<IgnoredAny>,
}

/// Cluster and user of a context, with their names.
struct SelectedContext {
    cluster_name: String,
    cluster: Cluster,
    user_name: String,
    user: User,
}

impl Kubeconfig {
    fn select(self, context: Option<&str>) -> Result<SelectedContext, FieldError> {
        if self.kind.as_deref().is_some_and(|kind| kind != "Config") {
            return Err(problem("is not a kubeconfig: its kind is not Config"));
        }
        let contexts = self.contexts.unwrap_or_default();
        if contexts.is_empty() {
            return Err(problem("is not a kubeconfig: it has no contexts"));
        }
        let context = context.or(self.current_context.as_deref()).filter(|name| !name.is_empty());
        let context = select_context(contexts, context)?;

        let cluster_name = context.cluster.filter(|name| !name.is_empty());
        let cluster_name = cluster_name.ok_or_else(|| problem("names no cluster in the selected context"))?;
        let display_cluster = display(&cluster_name);
        let cluster = exactly_one(self.clusters.unwrap_or_default(), |cluster| cluster.name == cluster_name)
            .map_err(|count| problem(&format!("clusters[{display_cluster}] {}", count.describe())))?
            .cluster
            .ok_or_else(|| problem(&format!("clusters[{display_cluster}].cluster is empty")))?;

        let user_name = context.user.unwrap_or_default();
        let user = if user_name.is_empty() {
            User::default()
        } else {
            exactly_one(self.users.unwrap_or_default(), |user| user.name == user_name)
                .map_err(|count| problem(&format!("users[{}] {}", display(&user_name), count.describe())))?
                .user
                .unwrap_or_default()
        };
        Ok(SelectedContext { cluster_name: display_cluster, cluster, user_name: display(&user_name), user })
    }
}

fn select_context(contexts: Vec<NamedContext>, name: Option<&str>) -> Result<Context, FieldError> {
    let known = list_names(&contexts);
    let Some(name) = name else {
        let detail = format!("is required: the kubeconfig has no current-context; {known}");
        return Err(FieldError::new("context", detail));
    };
    exactly_one(contexts, |context| context.name == name)
        .map_err(|count| FieldError::new("context", format!("{} in the kubeconfig; {known}", count.describe())))?
        .context
        .ok_or_else(|| FieldError::new("context", "is empty in the kubeconfig"))
}

impl SelectedContext {
    fn connection(self, allow_plain_http: bool) -> Result<ClusterConnection, Vec<FieldError>> {
        let Self { cluster_name, cluster, user_name, user } = self;
        let at_cluster = |key: &str| format!("clusters[{cluster_name}].cluster.{key}");
        let at_user = |key: &str| {
            if key.is_empty() { format!("users[{user_name}].user") } else { format!("users[{user_name}].user.{key}") }
        };

        let redacted = redacted(&cluster, &user, at_cluster, at_user);
        if !redacted.is_empty() {
            return Err(redacted);
        }
        let mut problems = refused_in_cluster(&cluster, at_cluster);
        let ca_certificate = text_of(
            cluster.certificate_authority_data.as_deref(),
            &at_cluster("certificate-authority-data"),
            &mut problems,
        );
        let plain_http = cluster
            .server
            .as_deref()
            .is_some_and(|server| ServerUrl::parse(server).is_ok_and(|server| !server.is_https()));
        let mut user_problems = refused_in_user(&user, at_user);
        let auth = auth_of(user, plain_http, at_user, &mut user_problems);
        problems.append(&mut user_problems);

        let connection = ClusterConnection::new(
            Some(cluster.server.as_deref().unwrap_or_default()),
            ca_certificate.as_deref(),
            cluster.tls_server_name.as_deref().filter(|name| !name.is_empty()),
            auth.unwrap_or(ClusterAuth::None),
            allow_plain_http,
        );
        match connection {
            Ok(connection) if problems.is_empty() => Ok(connection),
            Ok(_) => Err(problems),
            Err(refused) => {
                problems.extend(refused.into_iter().map(|refusal| {
                    let path = match refusal.field.as_str() {
                        "server" => at_cluster("server"),
                        "caCertificate" => at_cluster("certificate-authority-data"),
                        "tlsServerName" => at_cluster("tls-server-name"),
                        "auth.token" => at_user("token"),
                        "auth.certificate" => at_user("client-certificate-data"),
                        "auth.key" => at_user("client-key-data"),
                        _ => at_user(""),
                    };
                    problem(&format!("{path} {}", refusal.detail))
                }));
                Err(problems)
            }
        }
    }
}

/// Values that kubectl left out.
fn redacted(
    cluster: &Cluster,
    user: &User,
    at_cluster: impl Fn(&str) -> String,
    at_user: impl Fn(&str) -> String,
) -> Vec<FieldError> {
    let secret =
        |secret: &Option<SecretString>| secret.as_ref().is_some_and(|secret| is_redacted(secret.expose_secret()));
    let text = |text: &Option<String>| text.as_deref().is_some_and(is_redacted);
    let found = [
        (text(&cluster.certificate_authority_data), at_cluster("certificate-authority-data")),
        (secret(&user.token), at_user("token")),
        (text(&user.client_certificate_data), at_user("client-certificate-data")),
        (secret(&user.client_key_data), at_user("client-key-data")),
        (secret(&user.password), at_user("password")),
    ];
    let paths = found.into_iter().filter(|(is_redacted, _)| *is_redacted).map(|(_, path)| path);
    paths
        .map(|path| problem(&format!("{path} is redacted: add --raw (kubectl config view --raw --minify --flatten)")))
        .collect()
}

fn is_redacted(text: &str) -> bool {
    REDACTED.contains(&text)
}

fn refused_in_cluster(cluster: &Cluster, at: impl Fn(&str) -> String) -> Vec<FieldError> {
    let no_data = !is_given(cluster.certificate_authority_data.as_deref());
    let refused = [
        (
            no_data && is_given(cluster.certificate_authority.as_deref()),
            "certificate-authority",
            "is a file path, which regcred cannot read: embed the file as certificate-authority-data (kubectl config view --raw --flatten)",
        ),
        (
            cluster.insecure_skip_tls_verify == Some(true),
            "insecure-skip-tls-verify",
            "is not supported: set certificate-authority-data instead",
        ),
        (
            is_given(cluster.proxy_url.as_deref()),
            "proxy-url",
            "is not supported: the API server must be reachable directly",
        ),
    ];
    refused
        .into_iter()
        .filter(|(found, ..)| *found)
        .map(|(_, key, why)| problem(&format!("{} {why}", at(key))))
        .collect()
}

fn refused_in_user(user: &User, at: impl Fn(&str) -> String) -> Vec<FieldError> {
    const PATH: &str =
        "is a file path, which regcred cannot read: embed the content (kubectl config view --raw --flatten)";
    const PASSWORD: &str = "is not supported: API servers no longer accept passwords. Use a token";
    const AS: &str = "is not supported: use a credential that has the rights itself";
    let exec = format!("runs a program, which is not supported. Make a token instead: {TOKEN_COMMANDS}");
    let auth_provider = format!("is a plug-in, which is not supported. Make a token instead: {TOKEN_COMMANDS}");
    let has_certificate = is_given(user.client_certificate_data.as_deref());
    let has_key = user.client_key_data.as_ref().is_some_and(|key| !key.expose_secret().is_empty());
    let refused: [(bool, &str, &str); 11] = [
        (user.exec.is_some(), "exec", &exec),
        (user.auth_provider.is_some(), "auth-provider", &auth_provider),
        (is_given(user.token_file.as_deref()), "tokenFile", PATH),
        (!has_certificate && is_given(user.client_certificate.as_deref()), "client-certificate", PATH),
        (!has_key && is_given(user.client_key.as_deref()), "client-key", PATH),
        (is_given(user.username.as_deref()), "username", PASSWORD),
        (user.password.as_ref().is_some_and(|password| !password.expose_secret().is_empty()), "password", PASSWORD),
        (user.impersonate.is_some(), "as", AS),
        (user.as_uid.is_some(), "as-uid", AS),
        (user.as_groups.is_some(), "as-groups", AS),
        (user.as_user_extra.is_some(), "as-user-extra", AS),
    ];
    refused
        .into_iter()
        .filter(|(found, ..)| *found)
        .map(|(_, key, why)| problem(&format!("{} {why}", at(key))))
        .collect()
}

/// Credential of a user. None after adding to `problems`, or if there already are some.
fn auth_of(
    user: User,
    plain_http: bool,
    at: impl Fn(&str) -> String,
    problems: &mut Vec<FieldError>,
) -> Option<ClusterAuth> {
    let token = user.token.filter(|token| !token.expose_secret().is_empty());
    let certificate = text_of(user.client_certificate_data.as_deref(), &at("client-certificate-data"), problems);
    let key = text_of(user.client_key_data.as_ref().map(ExposeSecret::expose_secret), &at("client-key-data"), problems);
    // If a part was refused, the rest does not show which credential was intended.
    if !problems.is_empty() {
        return None;
    }
    let why = match (token, certificate, key) {
        (Some(token), None, None) => return Some(ClusterAuth::Token { token }),
        (None, Some(certificate), Some(key)) => {
            return Some(ClusterAuth::ClientCertificate { certificate, key: key.into() });
        }
        // `kubectl proxy` needs no credential. Over TLS its absence is a mistake.
        (None, None, None) if plain_http => return Some(ClusterAuth::None),
        (None, None, None) => "has no supported credential: a token, or a client certificate and its key",
        (Some(_), ..) => "has both a token and a client certificate: remove one",
        (None, Some(_), None) => "has a client certificate without its key (client-key-data)",
        (None, None, Some(_)) => "has a client key without its certificate (client-certificate-data)",
    };
    problems.push(problem(&format!("{} {why}", at(""))));
    None
}

/// Decodes a `…-data` field. Empty means absent, as for kubectl.
fn text_of(base64: Option<&str>, path: &str, problems: &mut Vec<FieldError>) -> Option<String> {
    let base64: String = base64?.chars().filter(|character| !character.is_ascii_whitespace()).collect();
    if base64.is_empty() {
        return None;
    }
    let text = STANDARD.decode(base64).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    if text.is_none() {
        problems.push(problem(&format!("{path} is not a base64-encoded PEM text")));
    }
    text
}

fn is_given(value: Option<&str>) -> bool {
    value.is_some_and(|value| !value.is_empty())
}

/// Number of entries with a name, if not one.
enum Count {
    Zero,
    Several,
}

impl Count {
    const fn describe(&self) -> &'static str {
        match self {
            Self::Zero => "does not exist",
            Self::Several => "exists more than once",
        }
    }
}

fn exactly_one<T>(all: Vec<T>, matches: impl Fn(&T) -> bool) -> Result<T, Count> {
    let mut matching = all.into_iter().filter(matches);
    match (matching.next(), matching.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Count::Zero),
        (Some(_), Some(_)) => Err(Count::Several),
    }
}

fn list_names(contexts: &[NamedContext]) -> String {
    let names: Vec<String> = contexts.iter().take(CONTEXTS_MAX).map(|context| display(&context.name)).collect();
    let more = if contexts.len() > CONTEXTS_MAX { ", …" } else { "" };
    format!("it has {}{more}", names.join(", "))
}

/// A name for a message: without control characters, of limited length.
fn display(name: &str) -> String {
    name.chars().filter(|character| !character.is_control()).take(NAME_MAX).collect()
}

fn problem(detail: &str) -> FieldError {
    FieldError::new("kubeconfig", detail)
}

/// Reports the position of a syntax error, but no text from there: it could be a key.
fn unreadable(error: &serde_saphyr::Error) -> FieldError {
    match error.without_snippet() {
        serde_saphyr::Error::MultipleDocuments { .. } => problem("must be a single YAML document"),
        error => match error.location() {
            Some(location) => problem(&format!(
                "is not a kubeconfig in YAML or JSON: see line {}, column {}",
                location.line(),
                location.column()
            )),
            None => problem("is not a kubeconfig in YAML or JSON"),
        },
    }
}

#[cfg(test)]
mod tests;
