//! Import of a kubeconfig: the one context that is wanted becomes a [`ClusterConnection`].
//!
//! A kubeconfig may make a client run programs, read files, act as others or skip checks. A server that reads the kubeconfig of somebody
//! else does none of this: whatever is not a self-contained credential is refused by name, never ignored. No refusal repeats a value.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, de::IgnoredAny};

use crate::domain::{
    cluster::{ClusterAuth, ClusterConnection, ServerUrl},
    invalid::FieldError,
};

const MAX_LENGTH: usize = 1024 * 1024;
const MAX_NAME_SHOWN: usize = 64;
const MAX_CONTEXTS_SHOWN: usize = 10;

/// Reads the connection of one context, the current one if none is named.
///
/// # Errors
///
/// Every problem of the chosen context at once, under the fields `kubeconfig` and `context`.
pub fn parse(
    kubeconfig: &SecretString,
    context: Option<&str>,
    allow_plain_http: bool,
) -> Result<ClusterConnection, Vec<FieldError>> {
    let text = kubeconfig.expose_secret();
    if text.len() > MAX_LENGTH {
        return Err(vec![problem("must not be longer than 1 MiB")]);
    }
    let file: Kubeconfig = serde_saphyr::from_str(text).map_err(|error| vec![unreadable(&error)])?;
    let chosen = file.choose(context).map_err(|refusal| vec![refusal])?;
    chosen.connection(allow_plain_http)
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

/// The parts that a context joins, and their names.
struct Chosen {
    cluster_name: String,
    cluster: Cluster,
    user_name: String,
    user: User,
}

impl Kubeconfig {
    fn choose(self, wanted: Option<&str>) -> Result<Chosen, FieldError> {
        if self.kind.as_deref().is_some_and(|kind| kind != "Config") {
            return Err(problem("is not a kubeconfig: its kind is not Config"));
        }
        let contexts = self.contexts.unwrap_or_default();
        if contexts.is_empty() {
            return Err(problem("is not a kubeconfig: it has no contexts"));
        }
        let known = list_names(&contexts);
        let wanted = match wanted.or(self.current_context.as_deref()).filter(|name| !name.is_empty()) {
            Some(name) => name.to_owned(),
            None => {
                return Err(FieldError::new(
                    "context",
                    format!("is required: the kubeconfig has no current-context; {known}"),
                ));
            }
        };
        let named = only(contexts, |context| context.name == wanted)
            .map_err(|found| FieldError::new("context", format!("{} in the kubeconfig; {known}", found.describe())))?;
        let context = named.context.ok_or_else(|| FieldError::new("context", "is empty in the kubeconfig"))?;

        let cluster_name = context.cluster.filter(|name| !name.is_empty());
        let cluster_name = cluster_name.ok_or_else(|| problem("names no cluster in the chosen context"))?;
        let shown_cluster = shown(&cluster_name);
        let cluster = only(self.clusters.unwrap_or_default(), |cluster| cluster.name == cluster_name)
            .map_err(|found| problem(&format!("clusters[{shown_cluster}] {}", found.describe())))?
            .cluster
            .ok_or_else(|| problem(&format!("clusters[{shown_cluster}].cluster is empty")))?;

        let user_name = context.user.unwrap_or_default();
        let user = if user_name.is_empty() {
            User::default()
        } else {
            only(self.users.unwrap_or_default(), |user| user.name == user_name)
                .map_err(|found| problem(&format!("users[{}] {}", shown(&user_name), found.describe())))?
                .user
                .unwrap_or_default()
        };
        Ok(Chosen { cluster_name: shown_cluster, cluster, user_name: shown(&user_name), user })
    }
}

impl Chosen {
    fn connection(self, allow_plain_http: bool) -> Result<ClusterConnection, Vec<FieldError>> {
        let Self { cluster_name, cluster, user_name, user } = self;
        let at_cluster = |key: &str| format!("clusters[{cluster_name}].cluster.{key}");
        let at_user = |key: &str| {
            if key.is_empty() { format!("users[{user_name}].user") } else { format!("users[{user_name}].user.{key}") }
        };

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
                    let place = match refusal.field.as_str() {
                        "server" => at_cluster("server"),
                        "caCertificate" => at_cluster("certificate-authority-data"),
                        "tlsServerName" => at_cluster("tls-server-name"),
                        "auth.token" => at_user("token"),
                        "auth.certificate" => at_user("client-certificate-data"),
                        "auth.key" => at_user("client-key-data"),
                        _ => at_user(""),
                    };
                    problem(&format!("{place} {}", refusal.detail))
                }));
                Err(problems)
            }
        }
    }
}

fn refused_in_cluster(cluster: &Cluster, at: impl Fn(&str) -> String) -> Vec<FieldError> {
    let no_data = !is_given(cluster.certificate_authority_data.as_deref());
    let refused = [
        (
            no_data && is_given(cluster.certificate_authority.as_deref()),
            "certificate-authority",
            "is the path of a file, which is not here: embed it as certificate-authority-data (kubectl config view --raw --flatten)",
        ),
        (
            cluster.insecure_skip_tls_verify == Some(true),
            "insecure-skip-tls-verify",
            "is never honoured: give the CA certificate as certificate-authority-data instead",
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
        "is the path of a file, which is not here: embed its content (kubectl config view --raw --flatten)";
    const PASSWORD: &str = "is not supported: API servers no longer accept passwords; use a token";
    const AS: &str = "is not supported: give a credential that has the rights itself";
    let has_certificate = is_given(user.client_certificate_data.as_deref());
    let has_key = user.client_key_data.as_ref().is_some_and(|key| !key.expose_secret().is_empty());
    let refused = [
        (
            user.exec.is_some(),
            "exec",
            "would run a program, which is not done here: use the token of a ServiceAccount in that cluster instead",
        ),
        (
            user.auth_provider.is_some(),
            "auth-provider",
            "is a plug-in, which is not supported: use the token of a ServiceAccount in that cluster instead",
        ),
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

/// The credential of a user; none if it was refused already or is refused here.
fn auth_of(
    user: User,
    plain_http: bool,
    at: impl Fn(&str) -> String,
    problems: &mut Vec<FieldError>,
) -> Option<ClusterAuth> {
    let token = user.token.filter(|token| !token.expose_secret().is_empty());
    let certificate = text_of(user.client_certificate_data.as_deref(), &at("client-certificate-data"), problems);
    let key = text_of(user.client_key_data.as_ref().map(ExposeSecret::expose_secret), &at("client-key-data"), problems);
    // With a part refused, what remains says nothing about what was meant.
    if !problems.is_empty() {
        return None;
    }
    let why = match (token, certificate, key) {
        (Some(token), None, None) => return Some(ClusterAuth::Token { token }),
        (None, Some(certificate), Some(key)) => {
            return Some(ClusterAuth::ClientCertificate { certificate, key: key.into() });
        }
        // Behind kubectl proxy no credential is needed; over TLS it is far more likely a mistake.
        (None, None, None) if plain_http => return Some(ClusterAuth::None),
        (None, None, None) => "has no credential that can be taken over: a token, or a client certificate and its key",
        (Some(_), ..) => "has both a token and a client certificate: leave one",
        (None, Some(_), None) => "has a client certificate without its key (client-key-data)",
        (None, None, Some(_)) => "has a client key without its certificate (client-certificate-data)",
    };
    problems.push(problem(&format!("{} {why}", at(""))));
    None
}

/// Decodes a `…-data` field; absent and empty are alike, as they are for kubectl.
fn text_of(base64: Option<&str>, place: &str, problems: &mut Vec<FieldError>) -> Option<String> {
    let base64: String = base64?.chars().filter(|character| !character.is_ascii_whitespace()).collect();
    if base64.is_empty() {
        return None;
    }
    let text = STANDARD.decode(base64).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    if text.is_none() {
        problems.push(problem(&format!("{place} is not the base64 form of a PEM text")));
    }
    text
}

fn is_given(value: Option<&str>) -> bool {
    value.is_some_and(|value| !value.is_empty())
}

/// Why a name does not lead to one thing.
enum Found {
    None,
    Several,
}

impl Found {
    const fn describe(&self) -> &'static str {
        match self {
            Self::None => "is not",
            Self::Several => "is there more than once",
        }
    }
}

fn only<T>(all: Vec<T>, is_wanted: impl Fn(&T) -> bool) -> Result<T, Found> {
    let mut wanted = all.into_iter().filter(is_wanted);
    match (wanted.next(), wanted.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err(Found::None),
        (Some(_), Some(_)) => Err(Found::Several),
    }
}

fn list_names(contexts: &[NamedContext]) -> String {
    let names: Vec<String> = contexts.iter().take(MAX_CONTEXTS_SHOWN).map(|context| shown(&context.name)).collect();
    let more = if contexts.len() > MAX_CONTEXTS_SHOWN { ", …" } else { "" };
    format!("it has {}{more}", names.join(", "))
}

/// A name, fit for a message.
fn shown(name: &str) -> String {
    name.chars().filter(|character| !character.is_control()).take(MAX_NAME_SHOWN).collect()
}

fn problem(detail: &str) -> FieldError {
    FieldError::new("kubeconfig", detail)
}

/// Says where reading ended, but nothing of what stands there: it could be a key.
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
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
    use rstest::rstest;

    use super::*;
    use crate::domain::cluster::AuthType;

    /// A CA certificate, a client certificate and its key, each in base64 as kubeconfigs hold them.
    fn material() -> (String, String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap().pem();
        (STANDARD.encode(&ca), STANDARD.encode(&ca), STANDARD.encode(key.serialize_pem()))
    }

    fn parse_text(text: &str, context: Option<&str>) -> Result<ClusterConnection, Vec<FieldError>> {
        parse(&text.into(), context, true)
    }

    fn refusals(text: &str) -> Vec<FieldError> {
        parse_text(text, None).expect_err("refused")
    }

    /// A kubeconfig with these keys in its cluster and its user.
    fn kubeconfig(cluster: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{{cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
        )
    }

    #[test]
    fn kind_writes_a_client_certificate() {
        let (ca, certificate, key) = material();
        let text = format!(
            "apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {ca}
    server: https://127.0.0.1:40217
  name: kind-kind
contexts:
- context:
    cluster: kind-kind
    user: kind-kind
  name: kind-kind
current-context: kind-kind
kind: Config
preferences: {{}}
users:
- name: kind-kind
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
"
        );

        let connection = parse_text(&text, None).unwrap();

        assert_eq!(connection.server.unwrap().as_str(), "https://127.0.0.1:40217");
        assert_eq!(connection.auth.auth_type(), AuthType::ClientCertificate);
        assert!(connection.ca_certificate.is_some());
    }

    #[test]
    fn k3s_calls_everything_default() {
        let (ca, certificate, key) = material();
        let text = format!(
            "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: https://127.0.0.1:6443\n  name: default\n\
             contexts:\n- context:\n    cluster: default\n    user: default\n  name: default\ncurrent-context: default\nkind: Config\n\
             preferences: {{}}\nusers:\n- name: default\n  user:\n    client-certificate-data: {certificate}\n    client-key-data: {key}\n"
        );
        assert_eq!(parse_text(&text, Some("default")).unwrap().auth.auth_type(), AuthType::ClientCertificate);
    }

    #[test]
    fn minikube_with_embedded_certificates_has_extensions() {
        let (ca, certificate, key) = material();
        let text = format!(
            "apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {ca}
    extensions:
    - extension:
        last-update: Mon, 24 Nov 2025 10:00:00 CET
        provider: minikube.sigs.k8s.io
        version: v1.37.0
      name: cluster_info
    server: https://192.168.49.2:8443
  name: minikube
contexts:
- context:
    cluster: minikube
    extensions:
    - extension: {{provider: minikube.sigs.k8s.io}}
      name: context_info
    namespace: default
    user: minikube
  name: minikube
current-context: minikube
kind: Config
users:
- name: minikube
  user: {{client-certificate-data: {certificate}, client-key-data: {key}}}
"
        );
        assert_eq!(parse_text(&text, None).unwrap().server.unwrap().host(), "192.168.49.2");
    }

    #[test]
    fn minikube_with_file_paths_is_refused_at_every_path() {
        let text = kubeconfig(
            "server: 'https://192.168.49.2:8443', certificate-authority: /home/me/.minikube/ca.crt",
            "client-certificate: /home/me/.minikube/profiles/minikube/client.crt, client-key: /home/me/.minikube/profiles/minikube/client.key",
        );
        let details: Vec<String> = refusals(&text).into_iter().map(|refusal| refusal.detail).collect();
        assert_eq!(details.len(), 3, "{details:?}");
        assert!(
            details[0].starts_with("clusters[k].cluster.certificate-authority is the path of a file"),
            "{details:?}"
        );
        assert!(details[1].starts_with("users[u].user.client-certificate is the path of a file"), "{details:?}");
        assert!(details[2].starts_with("users[u].user.client-key is the path of a file"), "{details:?}");
    }

    #[test]
    fn eks_runs_a_program_and_is_refused() {
        let (ca, ..) = material();
        let text = format!(
            "apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {ca}
    server: https://ABCDEF0123456789.gr7.eu-central-1.eks.amazonaws.com
  name: arn:aws:eks:eu-central-1:111122223333:cluster/prod
contexts:
- context:
    cluster: arn:aws:eks:eu-central-1:111122223333:cluster/prod
    user: arn:aws:eks:eu-central-1:111122223333:cluster/prod
  name: prod
current-context: prod
kind: Config
preferences: {{}}
users:
- name: arn:aws:eks:eu-central-1:111122223333:cluster/prod
  user:
    exec:
      apiVersion: client.authentication.k8s.io/v1beta1
      args: [--region, eu-central-1, eks, get-token, --cluster-name, prod, --output, json]
      command: aws
      env:
      - name: AWS_SECRET_ACCESS_KEY
        value: canary
"
        );
        let refused = refusals(&text);
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].detail.contains(".user.exec would run a program"), "{refused:?}");
        assert!(!refused[0].detail.contains("canary"));
    }

    #[rstest]
    #[case::gke_today(
        "exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: gke-gcloud-auth-plugin, provideClusterInfo: true}",
        "exec"
    )]
    #[case::gke_before("auth-provider: {name: gcp, config: {cmd-path: gcloud}}", "auth-provider")]
    #[case::token_file("tokenFile: /var/run/token", "tokenFile")]
    #[case::user_name("username: admin", "username")]
    #[case::password("token: t, password: canary", "password")]
    #[case::impersonation("token: t, as: root", "as")]
    #[case::impersonated_groups("token: t, as-groups: [system:masters]", "as-groups")]
    #[case::impersonated_uid("token: t, as-uid: '1'", "as-uid")]
    #[case::impersonated_extra("token: t, as-user-extra: {a: [b]}", "as-user-extra")]
    #[case::exec_beside_token("token: t, exec: {command: aws}", "exec")]
    fn a_user_that_needs_more_than_a_credential_is_refused(#[case] user: &str, #[case] key: &str) {
        let refused = refusals(&kubeconfig("server: 'https://k8s'", user));
        assert_eq!(refused[0].field, "kubeconfig");
        assert!(
            refused.iter().any(|refusal| refusal.detail.starts_with(&format!("users[u].user.{key} "))),
            "{refused:?}"
        );
        assert!(!format!("{refused:?}").contains("canary"));
    }

    #[rstest]
    #[case::skip_tls(
        "server: 'https://k8s', insecure-skip-tls-verify: true",
        "insecure-skip-tls-verify is never honoured: give the CA"
    )]
    #[case::proxy("server: 'https://k8s', proxy-url: 'http://proxy:3128'", "proxy-url is not supported")]
    #[case::no_server("tls-server-name: k8s", "server must be")]
    #[case::bad_server("server: 'k8s:6443'", "server must be")]
    #[case::bad_name("server: 'https://k8s', tls-server-name: 'a b'", "tls-server-name must be")]
    #[case::bad_base64(
        "server: 'https://k8s', certificate-authority-data: '%%%'",
        "certificate-authority-data is not the base64 form"
    )]
    #[case::bad_pem(
        "server: 'https://k8s', certificate-authority-data: aGVsbG8=",
        "certificate-authority-data must hold"
    )]
    fn a_cluster_that_cannot_be_called_safely_is_refused(#[case] cluster: &str, #[case] refusal: &str) {
        let refused = refusals(&kubeconfig(cluster, "token: t"));
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].detail.starts_with(&format!("clusters[k].cluster.{refusal}")), "{refused:?}");
    }

    #[rstest]
    #[case::nothing("", "has no credential")]
    #[case::empty("token: ''", "has no credential")]
    #[case::key_is_missing("client-certificate-data: aGVsbG8=", "has a client certificate without its key")]
    #[case::certificate_is_missing("client-key-data: aGVsbG8=", "has a client key without its certificate")]
    #[case::both("token: t, client-certificate-data: aGVsbG8=", "has both a token and a client certificate")]
    #[case::bad_token("token: 'a b'", "token must be one line")]
    #[case::bad_key(
        "client-certificate-data: aGVsbG8=, client-key-data: aGVsbG8=",
        "client-certificate-data must hold"
    )]
    fn a_user_without_one_whole_credential_is_refused(#[case] user: &str, #[case] refusal: &str) {
        let refused = refusals(&kubeconfig("server: 'https://k8s'", user));
        assert_eq!(refused.len(), 1, "{refused:?}");
        assert!(refused[0].detail.contains(refusal), "{refused:?}");
    }

    #[test]
    fn a_token_is_taken_over() {
        let connection =
            parse_text(&kubeconfig("server: 'https://k8s', insecure-skip-tls-verify: false", "token: canary"), None)
                .unwrap();
        assert_eq!(connection.auth.secret().map(ExposeSecret::expose_secret), Some("canary"));
        assert!(!format!("{connection:?}").contains("canary"));
    }

    #[test]
    fn json_is_a_kubeconfig_too() {
        let text = serde_json::json!({
            "kind": "Config",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": "https://k8s"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        });
        assert!(parse_text(&text.to_string(), Some("c")).is_ok());
    }

    #[test]
    fn kubectl_proxy_needs_no_user() {
        let text = "current-context: p\ncontexts: [{name: p, context: {cluster: p}}]\nclusters: [{name: p, cluster: {server: 'http://127.0.0.1:8001'}}]";
        assert_eq!(parse_text(text, None).unwrap().auth.auth_type(), AuthType::None);
        let refused = parse(&text.into(), None, false).expect_err("plain HTTP was not allowed");
        assert!(refused[0].detail.contains("allowPlainHttp"), "{refused:?}");
    }

    #[rstest]
    #[case::unknown(Some("c2"), "is not in the kubeconfig; it has c")]
    #[case::none_given(None, "is required: the kubeconfig has no current-context; it has c")]
    fn the_context_must_be_known(#[case] context: Option<&str>, #[case] refusal: &str) {
        let text = kubeconfig("server: 'https://k8s'", "token: t").replace("current-context: c\n", "");
        let refused = parse_text(&text, context).expect_err("refused");
        assert_eq!(refused, [FieldError::new("context", refusal)]);
    }

    #[rstest]
    #[case::cluster("clusters: [{name: k", "clusters: [{name: other", "clusters[k] is not")]
    #[case::user("users: [{name: u", "users: [{name: other", "users[u] is not")]
    #[case::twice("users: [", "users: [{name: u}, ", "users[u] is there more than once")]
    #[case::empty_cluster(
        "clusters: [{name: k, cluster: {server: 'https://k8s'}}]",
        "clusters: [{name: k}]",
        "clusters[k].cluster is empty"
    )]
    #[case::kind("kind: Config", "kind: Pod", "is not a kubeconfig: its kind is not Config")]
    fn dangling_names_are_refused(#[case] from: &str, #[case] to: &str, #[case] refusal: &str) {
        let text = kubeconfig("server: 'https://k8s'", "token: t");
        assert!(text.contains(from));
        assert_eq!(refusals(&text.replace(from, to))[0].detail, refusal);
    }

    #[rstest]
    #[case::not_yaml("users: [canary", "is not a kubeconfig in YAML or JSON: see line")]
    #[case::scalar("canary", "is not a kubeconfig in YAML or JSON: see line")]
    #[case::wrong_type("users: {canary: 1}", "is not a kubeconfig in YAML or JSON: see line")]
    #[case::twice_the_key("kind: Config\nkind: canary\n", "is not a kubeconfig in YAML or JSON: see line")]
    #[case::several("kind: Config\n---\nkind: canary\n", "must be a single YAML document")]
    #[case::empty("", "is not a kubeconfig")]
    #[case::bomb(
        "a: &a [canary,canary,canary,canary,canary,canary,canary,canary]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n\
         d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\ng: [*f,*f,*f,*f,*f,*f,*f,*f]\n",
        "is not a kubeconfig in YAML or JSON"
    )]
    fn what_cannot_be_read_is_refused_without_its_content(#[case] text: &str, #[case] refusal: &str) {
        let refused = refusals(text);
        assert!(refused.iter().any(|problem| problem.detail.contains(refusal)), "{refused:?}");
        assert!(!format!("{refused:?}").contains("canary"), "{refused:?}");
    }

    #[test]
    fn the_place_of_a_mistake_is_told() {
        let refused = refusals("kind: Config\nusers:\n- name: u\n  user: [canary]\n");
        assert_eq!(refused[0].detail, "is not a kubeconfig in YAML or JSON: see line 4, column 9");
    }

    #[test]
    fn problems_of_cluster_and_user_are_told_together() {
        let refused = refusals(&kubeconfig("server: 'k8s', proxy-url: 'http://p'", ""));
        assert_eq!(refused.len(), 3, "{refused:?}");
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange_to_be_refused(text in "\\PC{0,80}") {
            prop_assert!(parse_text(&text, None).is_err());
        }
    }

    #[test]
    fn more_than_a_mebibyte_is_not_even_read() {
        let text = format!("{}\n# {}", kubeconfig("server: 'https://k8s'", "token: t"), "x".repeat(MAX_LENGTH));
        assert_eq!(refusals(&text)[0].detail, "must not be longer than 1 MiB");
    }

    #[test]
    fn long_and_strange_names_do_not_flood_a_message() {
        let strange = format!("evil\\u001b[31m{}", "x".repeat(500));
        let text = format!("contexts: [{{name: \"{strange}\"}}]");
        let refused = refusals(&text);
        assert!(refused[0].detail.len() < 200 && !refused[0].detail.contains('\u{1b}'), "{refused:?}");
    }
}
