//! The Kubernetes client against a real kube-apiserver, as started by `dev/with-services`, and
//! against listeners that do what a healthy API server does not: hang, close early, redirect,
//! present a wrong certificate.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use k8s_openapi::{
    ByteString,
    api::{
        authentication::v1::{TokenRequest, TokenRequestSpec},
        core::v1::{Namespace, ResourceQuota, Secret, ServiceAccount},
        rbac::v1::{PolicyRule, Role, RoleBinding, RoleRef, Subject},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use regcred::{
    clients::{
        cluster::{
            AccessReviews, Change, Check, ClusterClient, ClusterClientConfig, ClusterError, Interruption,
            SecretMetadata, Watched, kubeconfig, resolve_in_cluster,
        },
        outbound::{AllowList, Guard, SystemResolver},
    },
    domain::{
        cluster::{ClusterAuth, ClusterConnection},
        names::{NamespaceName, SecretName},
        secret::{SecretContent, SecretManifest, SecretType},
    },
};
use secrecy::SecretString;
use serde_json::json;

use crate::support::{
    files::TempDir,
    given,
    kubernetes::{self, admin, new_namespace, server},
    listener::{listen, read_request, refusing_server},
};

const DOCUMENT: &str = r#"{"auths":{"registry.example.com:5000":{"username":"dev","password":"canary-document"}}}"#;
const SECRET_TYPE: &str = "kubernetes.io/dockerconfigjson";
const DATA_KEY: &str = ".dockerconfigjson";

// ---- The real API server ----

fn config() -> ClusterClientConfig {
    ClusterClientConfig::default()
}

fn token(token: impl Into<SecretString>) -> ClusterAuth {
    ClusterAuth::Token { token: token.into() }
}

fn admin_token() -> ClusterAuth {
    token(given("REGCRED_TEST_KUBE_ADMIN_TOKEN"))
}

fn connection(auth: ClusterAuth) -> ClusterConnection {
    ClusterConnection::new(Some(&server()), Some(&kubernetes::file("ca.crt")), None, auth, false)
        .expect("a good connection")
}

fn connect(auth: ClusterAuth) -> ClusterClient {
    ClusterClient::connect(&connection(auth), &config()).expect("a client")
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
}

async fn read_secret(namespace: &str, name: &str) -> Option<Secret> {
    Api::<Secret>::namespaced(admin(), namespace).get_opt(name).await.expect("the API server answers")
}

/// Secret named `pull` to create.
struct NewSecret {
    namespace: NamespaceName,
    document: SecretString,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl NewSecret {
    async fn create(&self, client: &ClusterClient, dry_run: bool) -> Result<SecretMetadata, ClusterError> {
        let manifest = SecretManifest {
            name: &SecretName::parse("pull").expect("a name"),
            namespace: None,
            labels: &self.labels,
            annotations: &self.annotations,
            resource_version: None,
            content: &SecretContent::new(SecretType::DockerConfigJson, &self.document),
        };
        client.create_secret(&self.namespace, &manifest, dry_run).await
    }
}

fn new_secret(namespace: &str) -> NewSecret {
    NewSecret {
        namespace: NamespaceName::parse(namespace).expect("a namespace"),
        document: DOCUMENT.into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
    }
}

async fn create(client: &ClusterClient, secret: &NewSecret) -> Result<SecretMetadata, ClusterError> {
    secret.create(client, false).await
}

/// Grants `subject` these verbs on Secrets of one namespace.
async fn allow_secrets(namespace: &str, verbs: &[&str], subject: Subject) {
    let rights = PolicyRule {
        api_groups: Some(vec![String::new()]),
        resources: Some(vec!["secrets".to_owned()]),
        verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
        ..PolicyRule::default()
    };
    let role = Role { metadata: named("secrets"), rules: Some(vec![rights]) };
    let role_ref = RoleRef {
        api_group: Some("rbac.authorization.k8s.io".to_owned()),
        kind: "Role".to_owned(),
        name: "secrets".to_owned(),
    };
    let binding = RoleBinding { metadata: named("secrets"), role_ref, subjects: Some(vec![subject]) };
    let post = PostParams::default();
    Api::namespaced(admin(), namespace).create(&post, &role).await.expect("a role");
    Api::namespaced(admin(), namespace).create(&post, &binding).await.expect("a role binding");
}

fn user(name: &str) -> Subject {
    Subject {
        api_group: Some("rbac.authorization.k8s.io".to_owned()),
        kind: "User".to_owned(),
        name: name.to_owned(),
        namespace: None,
    }
}

#[tokio::test]
async fn secret_is_created_as_requested() {
    let namespace = new_namespace().await;
    let client = connect(admin_token());
    let mut secret = new_secret(&namespace);
    secret.labels.insert("app.kubernetes.io/managed-by".to_owned(), "regcred".to_owned());
    secret.annotations.insert("regcred.dev/accounts".to_owned(), "dev-5000".to_owned());

    let created = create(&client, &secret).await.expect("created");

    let stored = read_secret(&namespace, "pull").await.expect("stored");
    assert_eq!(stored.type_.as_deref(), Some(SECRET_TYPE));
    assert_eq!(stored.data, Some(BTreeMap::from([(DATA_KEY.to_owned(), ByteString(DOCUMENT.into()))])));
    assert_eq!(stored.metadata.labels, Some(secret.labels));
    assert_eq!(stored.metadata.annotations, Some(secret.annotations));
    let managers = stored.metadata.managed_fields.expect("managed fields");
    assert_eq!(managers.iter().filter_map(|entry| entry.manager.as_deref()).collect::<Vec<_>>(), ["regcred"]);
    assert_eq!((created.uid, created.resource_version), (stored.metadata.uid, stored.metadata.resource_version));
    let stored_at = stored.metadata.creation_timestamp.expect("a time").0.as_second();
    assert_eq!(created.creation_timestamp.expect("a time").timestamp(), stored_at);
}

#[tokio::test]
async fn client_certificate_authenticates() {
    let namespace = new_namespace().await;
    let auth = ClusterAuth::ClientCertificate {
        certificate: kubernetes::file("admin.crt"),
        key: kubernetes::file("admin.key").into(),
    };
    create(&connect(auth), &new_secret(&namespace)).await.expect("created");
}

#[tokio::test]
async fn kubectl_proxy_needs_no_credential() {
    let namespace = new_namespace().await;
    let proxy = given("REGCRED_TEST_KUBE_HTTP");
    let connection =
        ClusterConnection::new(Some(&proxy), None, None, ClusterAuth::None, true).expect("a good connection");
    let client = ClusterClient::connect(&connection, &config()).expect("a client");

    create(&client, &new_secret(&namespace)).await.expect("created");

    assert!(
        client
            .check(&mut AccessReviews::default(), &[])
            .await
            .expect("a result")
            .permissions
            .iter()
            .all(|permission| permission.allowed)
    );
}

#[tokio::test]
async fn service_account_of_a_pod_authenticates() {
    let namespace = new_namespace().await;
    let accounts: Api<ServiceAccount> = Api::namespaced(admin(), &namespace);
    let account = ServiceAccount { metadata: named("regcred"), ..ServiceAccount::default() };
    accounts.create(&PostParams::default(), &account).await.expect("a ServiceAccount");
    let subject = Subject {
        api_group: None,
        kind: "ServiceAccount".to_owned(),
        name: "regcred".to_owned(),
        namespace: Some(namespace.clone()),
    };
    allow_secrets(&namespace, &["create"], subject).await;
    let spec = TokenRequestSpec { expiration_seconds: Some(600), ..TokenRequestSpec::default() };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let minted = accounts.create_token_request("regcred", &PostParams::default(), &request).await.expect("a token");
    let dir = TempDir::new();
    fs::write(dir.path().join("token"), minted.status.and_then(|status| status.token).expect("a token"))
        .expect("written");
    fs::write(dir.path().join("ca.crt"), kubernetes::file("ca.crt")).expect("written");
    let address = server().trim_start_matches("https://").to_owned();
    let (host, port) = address.split_once(':').expect("host and port");
    let config = ClusterClientConfig {
        service_account_dir: dir.path().to_owned(),
        service_host: Some(host.to_owned()),
        service_port: Some(port.to_owned()),
        ..config()
    };
    let connection =
        ClusterConnection::new(None, None, None, ClusterAuth::InCluster, false).expect("a good connection");
    let client = ClusterClient::connect(&connection, &config).expect("a client");

    create(&client, &new_secret(&namespace)).await.expect("created");

    let elsewhere = create(&client, &new_secret("default")).await.expect_err("not its namespace");
    assert_eq!(elsewhere.slug(), "cluster-forbidden");

    // A host that is a name is looked up by the guard's resolver. The system does not know
    // `api.example`, so only a client that is pinned gets as far as its certificate.
    let resolver = SystemResolver::with_look_up(|_| Ok(vec![IpAddr::from([127, 0, 0, 1])]));
    let guard = Guard::with_resolver(AllowList::default(), Arc::new(resolver));
    for (host, problem) in [("localhost", None), ("api.example", Some("certificate"))] {
        let config = ClusterClientConfig { service_host: Some(host.to_owned()), ..config.clone() };
        let addresses = resolve_in_cluster(&guard, &config).await.expect("an address");
        let client = ClusterClient::connect_at(&connection, addresses.first().copied(), &config).expect("a client");
        let found = client.check(&mut AccessReviews::default(), &[]).await.expect("a result");
        assert_eq!(found.reachable, problem.is_none(), "{found:?}");
        let detail = found.problem.map(|problem| problem.detail).unwrap_or_default();
        assert!(problem.is_none_or(|words| detail.contains(words)), "{detail}");
    }
    assert_eq!(resolve_in_cluster(&guard, &config).await, Ok(Vec::new()));
}

#[tokio::test]
async fn kubeconfig_authenticates() {
    let namespace = new_namespace().await;
    let connection = kubeconfig::parse(&kubernetes::file("kubeconfig").into(), None, false).expect("a good kubeconfig");
    let client = ClusterClient::connect(&connection, &config()).expect("a client");
    create(&client, &new_secret(&namespace)).await.expect("created");
}

#[tokio::test]
async fn dry_run_checks_everything_and_stores_nothing() {
    let namespace = new_namespace().await;
    let client = connect(admin_token());

    new_secret(&namespace).create(&client, true).await.expect("it would be created");

    assert_eq!(read_secret(&namespace, "pull").await, None);
    create(&client, &new_secret(&namespace)).await.expect("created");
    let again = new_secret(&namespace).create(&client, true).await;
    assert_eq!(again, Err(ClusterError::SecretExists));
}

#[tokio::test]
async fn name_in_use_is_reported() {
    let namespace = new_namespace().await;
    let client = connect(admin_token());
    create(&client, &new_secret(&namespace)).await.expect("created");
    assert_eq!(create(&client, &new_secret(&namespace)).await, Err(ClusterError::SecretExists));
}

#[tokio::test]
async fn absent_namespace_is_reported() {
    let created = create(&connect(admin_token()), &new_secret("nowhere-at-all")).await;
    assert_eq!(created, Err(ClusterError::NamespaceNotFound));
}

#[tokio::test]
async fn terminating_namespace_is_reported() {
    let namespace = new_namespace().await;
    let namespaces: Api<Namespace> = Api::all(admin());
    // No controller finalizes namespaces here. With one, this finalizer would keep the namespace
    // Terminating.
    let keep = json!({"metadata": {"finalizers": ["regcred.dev/test"]}});
    namespaces.patch(&namespace, &PatchParams::default(), &Patch::Merge(keep)).await.expect("patched");
    namespaces.delete(&namespace, &DeleteParams::default()).await.expect("deleted");

    let created = create(&connect(admin_token()), &new_secret(&namespace)).await;

    let release = json!({"metadata": {"finalizers": null}});
    namespaces.patch(&namespace, &PatchParams::default(), &Patch::Merge(release)).await.expect("patched");
    assert_eq!(created, Err(ClusterError::NamespaceTerminating));
}

#[tokio::test]
async fn validation_error_names_the_field() {
    let namespace = new_namespace().await;
    let client = connect(admin_token());
    let good = || new_secret(&namespace);
    let label = |key: &str, value: &str| BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let cases = [
        (NewSecret { labels: label("team", "not a label canary"), ..good() }, "metadata.labels"),
        (NewSecret { annotations: label("not a key", "x"), ..good() }, "metadata.annotations"),
        (NewSecret { document: "canary, not JSON".into(), ..good() }, "data[.dockerconfigjson]"),
        (NewSecret { document: "[\"canary\"]".into(), ..good() }, "data[.dockerconfigjson]"),
        (NewSecret { document: " ".repeat(1024 * 1024 + 1).into(), ..good() }, "data"),
    ];
    for (secret, expected) in cases {
        let refused = create(&client, &secret).await.expect_err("refused");
        let ClusterError::InvalidSecret { field, detail } = &refused else { panic!("{expected}: {refused:?}") };
        assert_eq!(field.as_deref(), Some(expected), "{detail}");
        assert!(!detail.contains("canary"), "{detail}");
        assert_eq!(read_secret(&namespace, "pull").await, None);
    }
}

#[tokio::test]
async fn document_of_exactly_one_mebibyte_is_accepted() {
    let namespace = new_namespace().await;
    let client = connect(admin_token());
    let largest = format!("{{\"auths\":{{}}}}{}", " ".repeat(1024 * 1024 - 12));
    assert_eq!(largest.len(), 1024 * 1024);

    create(&client, &NewSecret { document: largest.clone().into(), ..new_secret(&namespace) }).await.expect("created");

    // The client's limit is the API server's limit.
    let larger = Secret {
        metadata: named("larger"),
        type_: Some(SECRET_TYPE.to_owned()),
        data: Some(BTreeMap::from([(DATA_KEY.to_owned(), ByteString(format!("{largest} ").into_bytes()))])),
        ..Secret::default()
    };
    let refused =
        Api::namespaced(admin(), &namespace).create(&PostParams::default(), &larger).await.expect_err("refused");
    let kube::Error::Api(status) = refused else { panic!("{refused:?}") };
    assert_eq!(status.code, 422);
}

#[tokio::test]
async fn unknown_token_is_unauthorized() {
    let client = connect(token("canary-token"));
    assert_eq!(create(&client, &new_secret("default")).await, Err(ClusterError::Unauthorized));
    let check = client.check(&mut AccessReviews::default(), &[]).await.expect("a result");
    assert_eq!((check.reachable, problem(&check)), (true, "cluster-unauthorized"));
}

#[tokio::test]
async fn expired_client_certificate_is_unauthorized() {
    let ca_key = KeyPair::from_pem(&kubernetes::file("ca.key")).expect("the CA's key");
    let issuer = Issuer::new(with_name("regcred-sandbox"), ca_key);
    let key = KeyPair::generate().expect("a key");
    let mut params = with_name("admin");
    params.distinguished_name.push(DnType::OrganizationName, "system:masters");
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    let certificate = params.signed_by(&key, &issuer).expect("a certificate").pem();

    let client = connect(ClusterAuth::ClientCertificate { certificate, key: key.serialize_pem().into() });

    assert_eq!(create(&client, &new_secret("default")).await, Err(ClusterError::Unauthorized));
}

#[tokio::test]
async fn missing_right_is_forbidden() {
    let namespace = new_namespace().await;
    for auth in [token(given("REGCRED_TEST_KUBE_STRANGER_TOKEN")), ClusterAuth::None] {
        let refused = create(&connect(auth), &new_secret(&namespace)).await.expect_err("refused");
        let ClusterError::Forbidden { detail } = refused else { panic!("{refused:?}") };
        assert!(detail.contains(&namespace), "{detail}");
    }
}

#[tokio::test]
async fn quota_is_not_reported_as_a_missing_right() {
    let namespace = new_namespace().await;
    let quotas: Api<ResourceQuota> = Api::namespaced(admin(), &namespace);
    let quota = json!({"metadata": {"name": "none"}, "spec": {"hard": {"secrets": "0"}}});
    let quota: ResourceQuota = serde_json::from_value(quota).expect("a quota");
    quotas.create(&PostParams::default(), &quota).await.expect("created");
    // No controller runs here that would set the status.
    let status = json!({"status": {"hard": {"secrets": "0"}, "used": {"secrets": "0"}}});
    quotas.patch_status("none", &PatchParams::default(), &Patch::Merge(status)).await.expect("patched");
    let client = connect(admin_token());

    // The API server applies a quota after a short delay.
    let mut answer = new_secret(&namespace).create(&client, true).await;
    for _ in 0..50 {
        if answer.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        answer = new_secret(&namespace).create(&client, true).await;
    }

    let refused = answer.expect_err("over quota");
    assert_eq!(refused.slug(), "secret-refused", "{refused}");
}

#[tokio::test]
async fn check_reports_version_and_rights() {
    let check = connect(admin_token()).check(&mut AccessReviews::default(), &[]).await.expect("a result");

    assert!(check.reachable && check.problem.is_none(), "{check:?}");
    assert!(check.version.expect("a version").starts_with("v1."));
    assert!(check.latency_ms.is_some());
    let reviewed: Vec<String> =
        check.permissions.iter().map(|permission| format!("{} {}", permission.verb, permission.resource)).collect();
    assert_eq!(
        reviewed,
        [
            "create secrets",
            "get secrets",
            "patch secrets",
            "delete secrets",
            "get serviceaccounts",
            "patch serviceaccounts",
            "list namespaces",
            "watch namespaces"
        ]
    );
    assert!(check.permissions.iter().all(|permission| permission.allowed && permission.namespace.is_none()));
}

#[tokio::test]
async fn check_reports_rights_of_single_namespaces() {
    let (granted, other) = (new_namespace().await, new_namespace().await);
    allow_secrets(&granted, &["create", "get"], user("broker")).await;
    let client = connect(token(given("REGCRED_TEST_KUBE_BROKER_TOKEN")));

    let check = client.check(&mut AccessReviews::default(), &[&granted, &other]).await.expect("a result");

    let allowed: Vec<_> = check
        .permissions
        .iter()
        .filter(|permission| permission.allowed)
        .map(|permission| (permission.verb.as_str(), permission.namespace.as_deref()))
        .collect();
    assert_eq!(allowed, [("create", Some(granted.as_str())), ("get", Some(granted.as_str()))]);
    assert_eq!(check.permissions.len(), 6 + 6 + 2);
    assert!(
        client
            .check(&mut AccessReviews::default(), &[])
            .await
            .expect("a result")
            .permissions
            .iter()
            .all(|permission| !permission.allowed)
    );
}

#[tokio::test]
async fn check_without_credential_is_forbidden() {
    let check = connect(ClusterAuth::None).check(&mut AccessReviews::default(), &[]).await.expect("a result");
    assert_eq!((check.reachable, problem(&check)), (true, "cluster-forbidden"));
}

#[tokio::test]
async fn check_serializes_as_in_the_api() {
    let check = connect(token(given("REGCRED_TEST_KUBE_STRANGER_TOKEN")))
        .check(&mut AccessReviews::default(), &[])
        .await
        .expect("a result");
    let shape = serde_json::to_value(&check).expect("JSON");
    assert_eq!(shape["reachable"], true);
    assert!(shape["latencyMs"].is_u64() && shape["version"].is_string());
    assert_eq!(
        shape["permissions"][0],
        json!({"verb": "create", "resource": "secrets", "namespace": null, "allowed": false})
    );
    assert!(shape.get("problem").is_none());

    let check =
        client_of(&refusing_server(), &config()).check(&mut AccessReviews::default(), &[]).await.expect("a result");
    let shape = serde_json::to_value(&check).expect("JSON");
    assert_eq!((&shape["reachable"], &shape["problem"]["type"]), (&json!(false), &json!("cluster-unreachable")));
    assert!(shape["problem"]["detail"].is_string());
}

// ---- Certificates ----

#[tokio::test]
async fn certificate_of_an_unknown_ca_is_refused() {
    let (foreign, _) = certificate_authority();
    let connection = |ca: Option<&str>| {
        ClusterConnection::new(Some(&server()), ca, None, token("canary-token"), false).expect("a good connection")
    };
    let cases = [(Some(foreign.as_str()), "is not signed by the given caCertificate"), (None, "set caCertificate")];
    for (ca, words) in cases {
        let client = ClusterClient::connect(&connection(ca), &config()).expect("a client");
        let refused = create(&client, &new_secret("default")).await.expect_err("refused");
        let ClusterError::Tls { detail } = &refused else { panic!("{refused:?}") };
        assert!(detail.contains(words) && detail.contains(&server()), "{detail}");
        assert_eq!(client.check(&mut AccessReviews::default(), &[]).await.expect("a result"), Check::failed(&refused));
    }
}

#[tokio::test]
async fn certificate_must_be_valid_for_the_name() {
    let connect = |name: &str| {
        let connection = ClusterConnection::new(
            Some(&server()),
            Some(&kubernetes::file("ca.crt")),
            Some(name),
            admin_token(),
            false,
        );
        ClusterClient::connect(&connection.expect("a good connection"), &config()).expect("a client")
    };
    assert!(connect("localhost").check(&mut AccessReviews::default(), &[]).await.expect("a result").problem.is_none());
    let refused = create(&connect("other.example.com"), &new_secret("default")).await.expect_err("refused");
    let ClusterError::Tls { detail } = refused else { panic!("{refused:?}") };
    assert!(detail.contains("is not valid for other.example.com: set tlsServerName"), "{detail}");
}

#[tokio::test]
async fn expired_server_certificate_is_reported() {
    let (ca, issuer) = certificate_authority();
    let key = KeyPair::generate().expect("a key");
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).expect("a name");
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    let certificate = params.signed_by(&key, &issuer).expect("a certificate");
    let server_config = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().expect("a key"))
        .expect("a TLS configuration");
    let server_config = Arc::new(server_config);
    let address = listen(move |mut stream| {
        let mut tls = rustls::ServerConnection::new(Arc::clone(&server_config)).expect("a TLS connection");
        while tls.is_handshaking() && tls.complete_io(&mut stream).is_ok() {}
    });
    let url = format!("https://localhost:{}", address.port());
    let connection = ClusterConnection::new(Some(&url), Some(&ca), None, token("canary-token"), false);
    let client = ClusterClient::connect(&connection.expect("a good connection"), &config()).expect("a client");

    let refused = create(&client, &new_secret("default")).await.expect_err("refused");

    assert_eq!(refused, ClusterError::Tls { detail: format!("the certificate of {url} has expired") });
}

#[tokio::test]
async fn mixing_up_https_and_http_is_reported() {
    let plain = given("REGCRED_TEST_KUBE_HTTP").replace("http://", "https://");
    let connection = ClusterConnection::new(Some(&plain), Some(&kubernetes::file("ca.crt")), None, token("t"), false);
    let client = ClusterClient::connect(&connection.expect("a good connection"), &config()).expect("a client");
    let refused = create(&client, &new_secret("default")).await.expect_err("refused");
    assert_eq!(refused, ClusterError::Tls { detail: format!("{plain} does not speak TLS: is it an http:// server?") });

    let client = client_of(&server().replace("https://", "http://"), &config());
    let refused = create(&client, &new_secret("default")).await.expect_err("refused");
    assert_eq!(refused.slug(), "cluster-unreachable", "{refused}");
}

#[tokio::test]
async fn in_cluster_reports_what_is_missing() {
    let connection =
        ClusterConnection::new(None, None, None, ClusterAuth::InCluster, false).expect("a good connection");
    let dir = TempDir::new();
    let in_a_pod = ClusterClientConfig {
        service_account_dir: dir.path().to_owned(),
        service_host: Some("10.96.0.1".to_owned()),
        service_port: Some("443".to_owned()),
        ..config()
    };
    let missing = |config: &ClusterClientConfig| {
        ClusterClient::connect(&connection, config).map(|_| ()).expect_err("misconfigured").to_string()
    };
    assert!(missing(&config()).contains("KUBERNETES_SERVICE_HOST"));
    assert!(missing(&in_a_pod).contains("ca.crt"));
    fs::write(dir.path().join("ca.crt"), kubernetes::file("ca.crt")).expect("written");
    assert!(missing(&in_a_pod).contains("token"));
    fs::write(dir.path().join("token"), "canary\nX: y").expect("written");
    assert!(missing(&in_a_pod).contains("one line"));
    fs::write(dir.path().join("token"), "a.b.c").expect("written");
    let client = ClusterClient::connect(&connection, &in_a_pod).expect("a client");
    assert_eq!(client.server(), "https://10.96.0.1:443");
}

// ---- Listeners that act as broken servers and networks ----

#[tokio::test]
async fn call_to_a_hung_server_ends_at_the_timeout() {
    // Accepts the request and never answers.
    let hung = listen(|stream| {
        read_request(&stream);
        thread::sleep(Duration::from_mins(1));
    });
    // Answers 201 and hangs in the middle of the body.
    let half = listen(|mut stream| {
        read_request(&stream);
        stream.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\n{").expect("sent");
        thread::sleep(Duration::from_mins(1));
    });
    let config = ClusterClientConfig { timeout: Duration::from_millis(300), ..config() };
    for address in [hung, half] {
        let client = client_of(&format!("http://{address}"), &config);
        let start = Instant::now();
        let refused = create(&client, &new_secret("default")).await.expect_err("no answer");
        assert_eq!(refused.slug(), "cluster-timeout", "{refused}");
        assert_eq!(
            problem(&client.check(&mut AccessReviews::default(), &[]).await.expect("a result")),
            "cluster-timeout"
        );
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    }
}

#[tokio::test]
async fn hung_tls_handshake_ends_at_the_connect_timeout() {
    let hung = listen(|_stream| thread::sleep(Duration::from_mins(1)));
    let config = ClusterClientConfig { connect_timeout: Duration::from_millis(300), ..config() };
    let connection = ClusterConnection::new(Some(&format!("https://{hung}")), None, None, token("t"), false);
    let client = ClusterClient::connect(&connection.expect("a good connection"), &config).expect("a client");
    let start = Instant::now();

    let refused = create(&client, &new_secret("default")).await.expect_err("no connection");

    assert_eq!(
        refused,
        ClusterError::Timeout { detail: format!("https://{hung} did not accept a connection in time") }
    );
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn refused_connection_is_unreachable() {
    let server = refusing_server();
    let refused = create(&client_of(&server, &config()), &new_secret("default")).await;
    let detail = format!("{server} refused the connection: no server listens on this port");
    assert_eq!(refused, Err(ClusterError::Unreachable { detail }));
}

#[tokio::test]
async fn unknown_host_is_unreachable() {
    let client = client_of("http://regcred-test.invalid", &config());
    let refused = create(&client, &new_secret("default")).await.expect_err("no such host");
    assert!(matches!(refused.slug(), "cluster-unreachable" | "cluster-timeout"), "{refused}");
}

#[tokio::test]
async fn status_decides_if_the_body_is_incomplete() {
    let cases = [
        ("401 Unauthorized", "cluster-unauthorized"),
        ("403 Forbidden", "cluster-forbidden"),
        ("409 Conflict", "secret-exists"),
        ("422 Unprocessable Entity", "invalid-secret"),
        ("429 Too Many Requests", "cluster-unreachable"),
        ("500 Internal Server Error", "cluster-unreachable"),
        ("503 Service Unavailable", "cluster-unreachable"),
        ("504 Gateway Timeout", "cluster-timeout"),
        // Without its body, a 404 may come from any server.
        ("404 Not Found", "cluster-unreachable"),
        ("302 Found", "cluster-unreachable"),
        ("200 OK", "cluster-unreachable"),
        ("201 Created", "cluster-unreachable"),
    ];
    for (status, slug) in cases {
        let broken =
            answering(&format!("HTTP/1.1 {status}\r\nContent-Length: 1000\r\n\r\n{{\"kind\":\"Status\",\"canary"));
        let refused = create(&broken.client(), &new_secret("default")).await.expect_err(status);
        assert_eq!(refused.slug(), slug, "{status}: {refused:?}");
        assert!(!format!("{refused:?}").contains("canary"), "{refused:?}");
    }
}

#[tokio::test]
async fn post_is_sent_once() {
    for status in
        ["429 Too Many Requests\r\nRetry-After: 7", "503 Service Unavailable\r\nRetry-After: 1", "504 Gateway Timeout"]
    {
        let busy = answering(&format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"));
        let refused = create(&busy.client(), &new_secret("default")).await.expect_err(status);
        assert_eq!(busy.requests().len(), 1, "{refused}");
        if status.starts_with("429") {
            assert_eq!(refused, ClusterError::Overloaded { retry_after: Some(Duration::from_secs(7)) });
        }
    }
    let vanishing = answering("");
    let refused = create(&vanishing.client(), &new_secret("default")).await.expect_err("no answer");
    assert_eq!((refused.slug(), vanishing.requests().len()), ("cluster-unreachable", 1), "{refused}");
}

#[tokio::test]
async fn redirect_is_not_followed() {
    let elsewhere = answering("HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n");
    let location = format!("http://{}/api", elsewhere.address);
    let redirecting =
        answering(&format!("HTTP/1.1 307 Temporary Redirect\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"));

    let refused = create(&redirecting.client(), &new_secret("default")).await.expect_err("redirected");

    assert_eq!(refused.slug(), "cluster-unreachable");
    assert!(elsewhere.requests().is_empty());
}

#[tokio::test]
async fn server_that_is_not_an_api_server_is_reported() {
    let page = "<html>canary</html>";
    for status in ["200 OK", "404 Not Found", "400 Bad Request"] {
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{page}", page.len());
        let web_server = answering(&answer);
        let refused = create(&web_server.client(), &new_secret("default")).await.expect_err(status);
        assert_eq!(refused.slug(), "cluster-unreachable", "{refused}");
        let check = web_server.client().check(&mut AccessReviews::default(), &[]).await.expect("a result");
        assert_eq!((check.reachable, problem(&check)), (false, "cluster-unreachable"));
        assert!(!format!("{refused:?}{check:?}").contains("canary"));
    }
}

#[tokio::test]
async fn endless_response_is_aborted() {
    let announced = answering(&format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{{", u64::MAX / 2));
    let refused = create(&announced.client(), &new_secret("default")).await.expect_err("too long");
    assert_eq!(refused.slug(), "cluster-unreachable", "{refused}");

    // Sends chunks while the client reads them.
    let endless = listen(|mut stream| {
        read_request(&stream);
        let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x10000));
        let head = "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n";
        let mut sent = stream.write_all(head.as_bytes());
        while sent.is_ok() {
            sent = stream.write_all(chunk.as_bytes());
        }
    });
    let start = Instant::now();
    let client = client_of(&format!("http://{endless}"), &config());
    let refused = create(&client, &new_secret("default")).await.expect_err("too long");
    assert_eq!(refused.slug(), "cluster-unreachable", "{refused}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn create_request_has_the_documented_form() {
    let recorder = answering("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n");
    let url = format!("http://{}/k8s/clusters/c-1/", recorder.address);
    let connection =
        ClusterConnection::new(Some(&url), None, None, token("the-token"), true).expect("a good connection");
    let client = ClusterClient::connect(&connection, &config()).expect("a client");

    new_secret("team-a").create(&client, true).await.expect_err("unauthorized");

    let request = recorder.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").expect("a whole request");
    let mut lines = head.lines();
    assert_eq!(
        lines.next(),
        Some("POST /k8s/clusters/c-1/api/v1/namespaces/team-a/secrets?&dryRun=All&fieldManager=regcred HTTP/1.1")
    );
    let headers: BTreeMap<String, &str> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .collect();
    assert_eq!(headers["authorization"], "Bearer the-token");
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["accept"], "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1");
    assert!(headers["user-agent"].starts_with("regcred/"));
    let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(
        body,
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": SECRET_TYPE,
            "metadata": {"name": "pull", "namespace": "team-a"},
            "data": {DATA_KEY: base64::Engine::encode(&base64::engine::general_purpose::STANDARD, DOCUMENT)},
        })
    );
}

// ---- Runtimes ----

#[test]
fn connections_outlive_the_runtime_of_their_first_caller() {
    let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    // Like a worker of actix-web.
    let worker = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let config = ClusterClientConfig { runtime: Some(own.handle().clone()), ..config() };

    let first = worker();
    let (namespace, client) = first.block_on(async {
        let client = ClusterClient::connect(&connection(admin_token()), &config).expect("a client");
        let namespace = new_namespace().await;
        create(&client, &new_secret(&namespace)).await.expect("created");
        (namespace, client)
    });
    drop(first);

    let again = worker().block_on(create(&client, &new_secret(&namespace)));
    assert_eq!(again, Err(ClusterError::SecretExists));
}

// ---- Secrecy ----

/// Captured log at the most verbose level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("the log").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn neither_log_nor_debug_contains_a_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_span_events(tracing_subscriber::fmt::format::FmtSpan::FULL)
        .with_writer(move || writer.clone())
        .finish();
    // With a single subscriber in the process, tracing-core caches the interest of the thread that
    // reaches a callsite first, which may be a test without a subscriber. With two subscribers it
    // consults both.
    let _second = tracing::Dispatch::new(tracing_subscriber::registry());
    // The runtime of this test has one thread, so the subscriber sees everything.
    let _guard = tracing::subscriber::set_default(subscriber);
    let namespace = new_namespace().await;
    let canary = || token("canary-token");
    let echo = format!("{{\"kind\":\"Secret\",\"data\":\"canary-echo {DOCUMENT:?}\"");

    let mut outputs = Vec::new();
    let good = connect(admin_token());
    outputs.push(format!("{:?}", create(&good, &new_secret(&namespace)).await));
    outputs.push(format!("{:?}", create(&good, &new_secret(&namespace)).await));
    outputs
        .push(format!("{:?}", create(&good, &NewSecret { document: "canary".into(), ..new_secret(&namespace) }).await));
    outputs.push(format!("{:?}", create(&connect(canary()), &new_secret(&namespace)).await));
    for status in
        ["201 Created", "200 OK", "400 Bad Request", "403 Forbidden", "422 Unprocessable", "500 Internal Server Error"]
    {
        for (length, body) in [(echo.len(), &echo), (echo.len() + 50, &echo)] {
            let broken = answering(&format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}"));
            let connection =
                ClusterConnection::new(Some(&format!("http://{}", broken.address)), None, None, canary(), true);
            let client = ClusterClient::connect(&connection.expect("a good connection"), &config()).expect("a client");
            outputs.push(format!("{client:?} {:?}", create(&client, &new_secret(&namespace)).await));
            outputs.push(format!(
                "{:?}",
                client.check(&mut AccessReviews::default(), &[&namespace]).await.expect("a result")
            ));
        }
    }
    outputs.push(format!("{:?}", SecretContent::new(SecretType::DockerConfigJson, &"canary".into())));

    let logged = String::from_utf8(log.0.lock().expect("the log").clone()).expect("UTF-8");
    assert!(logged.contains("cluster.create_secret") && logged.contains("requesting"), "the log was not captured");
    for text in [&logged, &outputs.join("\n")] {
        assert!(!text.contains("canary"), "{text}");
        assert!(!text.contains("admin-token"), "{text}");
    }
}

// ---- Helpers ----

fn problem(check: &Check) -> &str {
    check.problem.as_ref().map_or("", |problem| problem.slug.as_str())
}

fn client_of(url: &str, config: &ClusterClientConfig) -> ClusterClient {
    let connection = ClusterConnection::new(Some(url), None, None, ClusterAuth::None, true).expect("a good connection");
    ClusterClient::connect(&connection, config).expect("a client")
}

/// Listener that sends the same bytes for every request and closes the connection.
struct Answering {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Answering {
    fn client(&self) -> ClusterClient {
        client_of(&format!("http://{}", self.address), &config())
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("requests").clone()
    }
}

fn answering(bytes: &str) -> Answering {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let (recorded, bytes) = (Arc::clone(&requests), bytes.to_owned());
    let address = listen(move |mut stream| {
        let request = read_request(&stream);
        recorded.lock().expect("requests").push(request);
        // The client may have disconnected.
        let _ = stream.write_all(bytes.as_bytes());
    });
    Answering { address, requests }
}

fn with_name(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn certificate_authority() -> (String, Issuer<'static, KeyPair>) {
    let key = KeyPair::generate().expect("a key");
    let mut params = with_name("a CA of its own");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).expect("a certificate").pem();
    (pem, Issuer::new(params, key))
}

// ---- Watches ----

fn namespace_object(name: &str, version: u32) -> serde_json::Value {
    json!({
        "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
        "metadata": {"name": name, "resourceVersion": version.to_string()},
    })
}

/// Uses a double: no healthy API server forgets a version so soon.
#[tokio::test]
async fn ended_watch_is_resumed_and_expired_watch_starts_over() {
    let list = |name: &str, version: u32| {
        json!({
            "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList",
            "metadata": {"resourceVersion": version.to_string()}, "items": [namespace_object(name, version)],
        })
        .to_string()
    };
    let event = |kind: &str, object: serde_json::Value| format!("{}\n", json!({"type": kind, "object": object}));
    let bookmark = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"resourceVersion": "15", "creationTimestamp": null},
    });
    let gone = json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "reason": "Expired", "code": 410,
        "message": "canary-message", "metadata": {}});
    let answers = Mutex::new(
        vec![
            list("a", 10),
            event("ADDED", namespace_object("b", 11)) + &event("BOOKMARK", bookmark),
            event("ERROR", gone),
            list("c", 20),
        ]
        .into_iter(),
    );
    let targets = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&targets);
    let address = listen(move |mut stream| {
        let request = read_request(&stream);
        let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
        seen.lock().expect("requests").push(target);
        let Some(body) = answers.lock().expect("answers").next() else { return };
        let answer = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        // The client may have disconnected.
        let _ = stream.write_all(answer.as_bytes());
    });
    let connection = ClusterConnection::new(Some(&format!("http://{address}")), None, None, ClusterAuth::None, true);
    let client = ClusterClient::connect(&connection.expect("a good connection"), &config()).expect("a client");

    let changes: Vec<_> = client.watch(Watched::Namespaces).take(4).collect().await;

    let namespace = |name: &str| Change::Namespace(name.to_owned());
    let [Ok(first), Ok(second), Err(Interruption::Broken), Ok(third)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!([first, second, third], [&namespace("a"), &namespace("b"), &namespace("c")]);
    let targets = targets.lock().expect("requests");
    let versions: Vec<Option<&str>> = targets
        .iter()
        .map(|target| {
            let is_watch = target.contains("watch=true");
            assert!(!is_watch || target.contains("allowWatchBookmarks=true"), "{target}");
            is_watch.then(|| target.split("resourceVersion=").nth(1).and_then(|rest| rest.split('&').next())).flatten()
        })
        .collect();
    // The list, the watch from its version, the watch from the bookmark, and the list again.
    assert_eq!(versions, [None, Some("10"), Some("15"), None], "{targets:?}");
}

#[tokio::test]
async fn forbidden_watch_is_reported_without_the_text_of_the_cluster() {
    let client = connect(token(given("REGCRED_TEST_KUBE_STRANGER_TOKEN")));

    let change = client.watch(Watched::Secrets).next().await;

    let Some(Err(Interruption::Refused(error @ ClusterError::Forbidden { .. }))) = change else { panic!("{change:?}") };
    assert!(!error.to_string().contains("User \""), "{error}");
}
