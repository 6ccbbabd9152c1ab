use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rstest::rstest;

use super::*;
use crate::domain::cluster::AuthType;

/// A CA certificate, a client certificate and its key, base64-encoded.
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

/// Kubeconfig with these fields in its cluster and its user.
fn kubeconfig(cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
             clusters: [{{name: k, cluster: {{{cluster}}}}}]\nusers: [{{name: u, user: {{{user}}}}}]\n"
    )
}

#[test]
fn kubeconfig_of_kind_is_accepted() {
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
fn kubeconfig_of_k3s_is_accepted() {
    let (ca, certificate, key) = material();
    let text = format!(
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: {ca}\n    server: https://127.0.0.1:6443\n  name: default\n\
             contexts:\n- context:\n    cluster: default\n    user: default\n  name: default\ncurrent-context: default\nkind: Config\n\
             preferences: {{}}\nusers:\n- name: default\n  user:\n    client-certificate-data: {certificate}\n    client-key-data: {key}\n"
    );
    assert_eq!(parse_text(&text, Some("default")).unwrap().auth.auth_type(), AuthType::ClientCertificate);
}

#[test]
fn kubeconfig_of_minikube_with_embedded_certificates_is_accepted() {
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
fn kubeconfig_of_minikube_is_refused_for_every_file_path() {
    let text = kubeconfig(
        "server: 'https://192.168.49.2:8443', certificate-authority: /home/me/.minikube/ca.crt",
        "client-certificate: /home/me/.minikube/profiles/minikube/client.crt, client-key: /home/me/.minikube/profiles/minikube/client.key",
    );
    let details: Vec<String> = refusals(&text).into_iter().map(|refusal| refusal.detail).collect();
    assert_eq!(details.len(), 3, "{details:?}");
    assert!(details[0].starts_with("clusters[k].cluster.certificate-authority is a file path"), "{details:?}");
    assert!(details[1].starts_with("users[u].user.client-certificate is a file path"), "{details:?}");
    assert!(details[2].starts_with("users[u].user.client-key is a file path"), "{details:?}");
}

#[test]
fn kubeconfig_of_eks_is_refused_for_its_program() {
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
    assert!(refused[0].detail.contains(".user.exec runs a program"), "{refused:?}");
    assert!(!refused[0].detail.contains("canary"));
}

#[rstest]
#[case::gke(
    "exec: {apiVersion: client.authentication.k8s.io/v1beta1, command: gke-gcloud-auth-plugin, provideClusterInfo: true}",
    "exec"
)]
#[case::gke_legacy("auth-provider: {name: gcp, config: {cmd-path: gcloud}}", "auth-provider")]
#[case::token_file("tokenFile: /var/run/token", "tokenFile")]
#[case::user_name("username: admin", "username")]
#[case::password("token: t, password: canary", "password")]
#[case::impersonation("token: t, as: root", "as")]
#[case::impersonated_groups("token: t, as-groups: [system:masters]", "as-groups")]
#[case::impersonated_uid("token: t, as-uid: '1'", "as-uid")]
#[case::impersonated_extra("token: t, as-user-extra: {a: [b]}", "as-user-extra")]
#[case::exec_beside_token("token: t, exec: {command: aws}", "exec")]
fn user_without_self_contained_credential_is_refused(#[case] user: &str, #[case] key: &str) {
    let refused = refusals(&kubeconfig("server: 'https://k8s'", user));
    assert_eq!(refused[0].field, "kubeconfig");
    assert!(refused.iter().any(|refusal| refusal.detail.starts_with(&format!("users[u].user.{key} "))), "{refused:?}");
    assert!(!format!("{refused:?}").contains("canary"));
}

#[rstest]
#[case::skip_tls("server: 'https://k8s', insecure-skip-tls-verify: true", "insecure-skip-tls-verify is not supported")]
#[case::proxy("server: 'https://k8s', proxy-url: 'http://proxy:3128'", "proxy-url is not supported")]
#[case::no_server("tls-server-name: k8s", "server must be")]
#[case::bad_server("server: 'k8s:6443'", "server must be")]
#[case::bad_name("server: 'https://k8s', tls-server-name: 'a b'", "tls-server-name must be")]
#[case::bad_base64(
    "server: 'https://k8s', certificate-authority-data: '%%%'",
    "certificate-authority-data is not a base64-encoded PEM text"
)]
#[case::bad_pem(
    "server: 'https://k8s', certificate-authority-data: aGVsbG8=",
    "certificate-authority-data must contain"
)]
fn cluster_that_cannot_be_called_safely_is_refused(#[case] cluster: &str, #[case] refusal: &str) {
    let refused = refusals(&kubeconfig(cluster, "token: t"));
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].detail.starts_with(&format!("clusters[k].cluster.{refusal}")), "{refused:?}");
}

#[rstest]
#[case::nothing("", "has no supported credential")]
#[case::empty("token: ''", "has no supported credential")]
#[case::key_is_missing("client-certificate-data: aGVsbG8=", "has a client certificate without its key")]
#[case::certificate_is_missing("client-key-data: aGVsbG8=", "has a client key without its certificate")]
#[case::both("token: t, client-certificate-data: aGVsbG8=", "has both a token and a client certificate")]
#[case::bad_token("token: 'a b'", "token must be one line")]
#[case::bad_key("client-certificate-data: aGVsbG8=, client-key-data: aGVsbG8=", "client-certificate-data must contain")]
fn user_needs_exactly_one_complete_credential(#[case] user: &str, #[case] refusal: &str) {
    let refused = refusals(&kubeconfig("server: 'https://k8s'", user));
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].detail.contains(refusal), "{refused:?}");
}

#[test]
fn token_is_imported() {
    let connection =
        parse_text(&kubeconfig("server: 'https://k8s', insecure-skip-tls-verify: false", "token: canary"), None)
            .unwrap();
    assert_eq!(connection.auth.secret().map(ExposeSecret::expose_secret), Some("canary"));
    assert!(!format!("{connection:?}").contains("canary"));
}

#[test]
fn kubeconfig_may_be_json() {
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
#[case::unknown(Some("c2"), "does not exist in the kubeconfig; it has c")]
#[case::none_given(None, "is required: the kubeconfig has no current-context; it has c")]
fn unknown_context_is_refused(#[case] context: Option<&str>, #[case] refusal: &str) {
    let text = kubeconfig("server: 'https://k8s'", "token: t").replace("current-context: c\n", "");
    let refused = parse_text(&text, context).expect_err("refused");
    assert_eq!(refused, [FieldError::new("context", refusal)]);
}

#[rstest]
#[case::cluster("clusters: [{name: k", "clusters: [{name: other", "clusters[k] does not exist")]
#[case::user("users: [{name: u", "users: [{name: other", "users[u] does not exist")]
#[case::twice("users: [", "users: [{name: u}, ", "users[u] exists more than once")]
#[case::empty_cluster(
    "clusters: [{name: k, cluster: {server: 'https://k8s'}}]",
    "clusters: [{name: k}]",
    "clusters[k].cluster is empty"
)]
#[case::kind("kind: Config", "kind: Pod", "is not a kubeconfig: its kind is not Config")]
fn dangling_name_is_refused(#[case] from: &str, #[case] to: &str, #[case] refusal: &str) {
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
fn unreadable_text_is_refused_without_its_content(#[case] text: &str, #[case] refusal: &str) {
    let refused = refusals(text);
    assert!(refused.iter().any(|problem| problem.detail.contains(refusal)), "{refused:?}");
    assert!(!format!("{refused:?}").contains("canary"), "{refused:?}");
}

#[test]
fn refusal_names_the_position_of_a_syntax_error() {
    let refused = refusals("kind: Config\nusers:\n- name: u\n  user: [canary]\n");
    assert_eq!(refused[0].detail, "is not a kubeconfig in YAML or JSON: see line 4, column 9");
}

#[test]
fn all_problems_are_reported_together() {
    let refused = refusals(&kubeconfig("server: 'k8s', proxy-url: 'http://p'", ""));
    assert_eq!(refused.len(), 3, "{refused:?}");
}

proptest! {
    #[test]
    fn arbitrary_text_is_refused(text in "\\PC{0,80}") {
        prop_assert!(parse_text(&text, None).is_err());
    }
}

#[test]
fn kubeconfig_over_a_mebibyte_is_refused() {
    let text = format!("{}\n# {}", kubeconfig("server: 'https://k8s'", "token: t"), "x".repeat(LENGTH_MAX));
    assert_eq!(refusals(&text)[0].detail, "must not be longer than 1 MiB");
}

#[test]
fn long_name_is_truncated_in_messages() {
    let strange = format!("evil\\u001b[31m{}", "x".repeat(500));
    let text = format!("contexts: [{{name: \"{strange}\"}}]");
    let refused = refusals(&text);
    assert!(refused[0].detail.len() < 200 && !refused[0].detail.contains('\u{1b}'), "{refused:?}");
}

#[rstest]
#[case::ca(
    "server: https://k, certificate-authority-data: DATA+OMITTED",
    "token: t",
    "clusters[k].cluster.certificate-authority-data"
)]
#[case::token("server: https://k", "token: REDACTED", "users[u].user.token")]
#[case::certificate(
    "server: https://k",
    "client-certificate-data: DATA+OMITTED",
    "users[u].user.client-certificate-data"
)]
#[case::key("server: https://k", "client-key-data: DATA+OMITTED", "users[u].user.client-key-data")]
#[case::older_key("server: https://k", "client-key-data: REDACTED", "users[u].user.client-key-data")]
fn redacted_kubeconfig_says_add_raw(#[case] cluster: &str, #[case] user: &str, #[case] path: &str) {
    let refused = refusals(&kubeconfig(cluster, user));
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert!(refused[0].detail.starts_with(path) && refused[0].detail.contains("add --raw"), "{refused:?}");
}

#[rstest]
#[case("exec: {apiVersion: client.authentication.k8s.io/v1, command: aws}")]
#[case("auth-provider: {name: gcp}")]
fn program_is_refused_with_the_commands_that_work(#[case] user: &str) {
    let refused = refusals(&kubeconfig("server: https://k", user));
    for command in ["kubectl create serviceaccount regcred -n regcred", "kubectl create token regcred -n regcred"] {
        assert!(refused[0].detail.contains(command), "{refused:?}");
    }
}
