//! `ServiceAccount` tokens, issued and reviewed by a real API server.

use std::time::{Duration, Instant};

use chrono::Utc;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::ServiceAccount,
};
use kube::{
    Api,
    api::{DeleteParams, ObjectMeta, PostParams},
};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{ALLOW, counted, issuer::TestIssuer, keys::TestKey, me, trust};
use crate::{
    support::{
        app::TestApp,
        eventually, given, kubernetes,
        listener::{Gate, refusing_server},
        process::Installation,
    },
    verify::listening::{answer, serve},
};

/// Creates a `ServiceAccount` in a new namespace and returns the namespace.
pub async fn new_account(name: &str) -> String {
    let namespace = kubernetes::new_namespace().await;
    add_account(&namespace, name).await;
    namespace
}

pub async fn add_account(namespace: &str, name: &str) {
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    let account = ServiceAccount { metadata, ..ServiceAccount::default() };
    let accounts: Api<ServiceAccount> = Api::namespaced(kubernetes::admin(), namespace);
    accounts.create(&PostParams::default(), &account).await.expect("a ServiceAccount");
}

/// Requests a token for a `ServiceAccount` from the API server.
pub async fn token(namespace: &str, name: &str, audience: &str, seconds: i64) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(kubernetes::admin(), namespace);
    let spec = TokenRequestSpec {
        audiences: Some(vec![audience.to_owned()]),
        expiration_seconds: Some(seconds),
        ..TokenRequestSpec::default()
    };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let made = accounts.create_token_request(name, &PostParams::default(), &request).await.expect("a token");
    made.status.expect("a status").token.expect("a token")
}

fn provider(cluster: &str, namespace: &str) -> Value {
    json!({
        "name": format!("{cluster}-pods"), "type": "tokenReview", "cluster": cluster, "audience": format!("regcred-{cluster}"),
        "rules": [{"claims": {"namespace": namespace, "serviceAccount": "ci"}, "role": "viewer"}],
    })
}

async fn trust_cluster(app: &TestApp, cluster: &str, namespace: &str) {
    app.admin().post("/v1/identity-providers", &provider(cluster, namespace)).await.expect(201);
}

/// Returns the signing key of the API server, to forge tokens.
pub fn server_key() -> TestKey {
    let pem = kubernetes::file("sa.key");
    match PrivateKeyDer::from_pem_slice(pem.as_bytes()).expect("a key") {
        PrivateKeyDer::Pkcs8(key) => TestKey::rsa_from("", key.secret_pkcs8_der()),
        PrivateKeyDer::Pkcs1(key) => TestKey::rsa_from_pkcs1("", key.secret_pkcs1_der()),
        _ => panic!("an RSA key"),
    }
}

fn claims(namespace: &str, audience: &str, exp: i64) -> Value {
    let account = json!({"name": "ci", "uid": "0"});
    json!({
        "iss": "https://kubernetes.default.svc", "aud": [audience], "exp": exp, "iat": Utc::now().timestamp(),
        "sub": format!("system:serviceaccount:{namespace}:ci"),
        "kubernetes.io": {"namespace": namespace, "serviceaccount": account},
    })
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn service_account_token_with_our_audience_authenticates(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_cluster("dev").await;
    let namespace = new_account("ci").await;
    add_account(&namespace, "other").await;
    trust_cluster(&app, "dev", &namespace).await;

    let good = token(&namespace, "ci", "regcred-dev", 3600).await;
    let who = me(&app, &good).await.expect(200);
    assert_eq!(who["name"], format!("dev-pods/system:serviceaccount:{namespace}:ci"));
    assert_eq!((&who["type"], &who["role"]), (&json!("identityProvider"), &json!("viewer")));
    let ends: chrono::DateTime<Utc> = serde_json::from_value(who["expiresAt"].clone()).expect("a time");
    assert!((Utc::now()..Utc::now() + Duration::from_secs(3700)).contains(&ends), "{ends}");

    let other = token(&namespace, "other", "regcred-dev", 3600).await;
    me(&app, &other).await.problem(403, "no-matching-rule");
    let elsewhere = new_account("ci").await;
    let foreign = token(&elsewhere, "ci", "regcred-dev", 3600).await;
    me(&app, &foreign).await.problem(403, "no-matching-rule");
    let for_the_server = token(&namespace, "ci", "https://kubernetes.default.svc", 3600).await;
    me(&app, &for_the_server).await.problem(401, "invalid-token");
    let for_vault = token(&namespace, "ci", "vault", 3600).await;
    me(&app, &for_vault).await.problem(401, "invalid-token");
    assert_eq!(counted(&app, "tokens", "unknownProvider").await, 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn forged_service_account_token_is_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    app.register_cluster("dev").await;
    let namespace = new_account("ci").await;
    trust_cluster(&app, "dev", &namespace).await;
    let good = token(&namespace, "ci", "regcred-dev", 3600).await;
    let (start, signature) = good.rsplit_once('.').expect("a token");
    let now = Utc::now().timestamp();
    let header = json!({"alg": "RS256"});
    let (own, servers) = (TestKey::rsa("own"), server_key());

    for (what, token) in [
        ("another key", own.sign(&header, &claims(&namespace, "regcred-dev", now + 300))),
        (
            "an account of this name that was deleted",
            servers.sign(&header, &claims(&namespace, "regcred-dev", now + 300)),
        ),
        ("another signature", format!("{start}.AAAAAAAA{}", &signature[8..])),
        ("no signature", format!("{start}.")),
    ] {
        let answer = me(&app, &token).await;
        assert_eq!((answer.status, answer.slug().as_str()), (401, "invalid-token"), "{what}: {answer:?}");
    }
    assert_eq!(counted(&app, "tokens", "notVouchedFor").await, 4);
    // An expired token is not sent to the cluster.
    me(&app, &servers.sign(&header, &claims(&namespace, "regcred-dev", now - 1))).await.problem(401, "invalid-token");
    assert_eq!((counted(&app, "tokens", "expired").await, counted(&app, "tokens", "notVouchedFor").await), (1, 4));
    me(&app, &good).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deleted_service_account_is_rejected_after_the_review_ttl(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_TOKEN_REVIEW_SECONDS", "1")]).await;
    app.register_cluster("dev").await;
    let namespace = new_account("ci").await;
    trust_cluster(&app, "dev", &namespace).await;
    let good = token(&namespace, "ci", "regcred-dev", 3600).await;
    me(&app, &good).await.expect(200);

    let accounts: Api<ServiceAccount> = Api::namespaced(kubernetes::admin(), &namespace);
    accounts.delete("ci", &DeleteParams::default()).await.expect("deleted");

    let start = Instant::now();
    eventually("it is refused", async || (me(&app, &good).await.status == 401).then_some(())).await;
    // The API server has a cache of its own, with a TTL of 10 seconds.
    assert!(start.elapsed() < Duration::from_mins(1), "{:?}", start.elapsed());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unavailable_cluster_affects_only_its_own_tokens(pool: PgPool) {
    let app = TestApp::configured(pool, &[ALLOW, ("REGCRED_CLUSTER_TIMEOUT_SECONDS", "2")]).await;
    let gone = json!({"name": "gone", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &gone).await.expect(201);
    let (gate, hangs) = Gate::cluster("hangs");
    app.admin().post("/v1/clusters", &hangs).await.expect(201);
    let unprivileged = given("REGCRED_TEST_KUBE_STRANGER_TOKEN");
    app.register_cluster_with("unprivileged", &json!({"type": "token", "token": unprivileged})).await;
    let key = TestKey::rsa("a");
    let issuer = TestIssuer::start(&[&key]);
    trust(&app, "oidc", &issuer).await;
    let end = Utc::now().timestamp() + 300;
    for cluster in ["gone", "hangs", "unprivileged"] {
        trust_cluster(&app, cluster, "a").await;
        let token = key.sign(&json!({"alg": "RS256"}), &claims("a", &format!("regcred-{cluster}"), end));
        let answer = me(&app, &token).await;
        assert_eq!((answer.status, answer.slug().as_str()), (503, "issuer-unavailable"), "{cluster}: {answer:?}");
        assert_eq!(answer.header("retry-after"), "5");
    }
    me(&app, &issuer.token(&key, json!({}))).await.expect(200);
    app.admin().get("/v1/me").await.expect(200);
    gate.open();
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn review_is_cached_and_must_confirm_our_audience(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    // API server that confirms every token for the requested audience. `old` returns no audiences,
    // like an API server without audience support.
    let key = TestKey::rsa("a");
    let end = Utc::now().timestamp() + 300;
    let mut asked = Vec::new();
    // An accepted token is also reviewed for the API server itself.
    for (cluster, audiences, status, reviews) in
        [("old", Value::Null, 401, 1), ("others", json!(["vault"]), 401, 1), ("good", json!(["regcred-good"]), 200, 2)]
    {
        let (address, requests) = serve(move |request| review(request.contains(r#""audiences""#), &audiences));
        let server = format!("http://{address}");
        let body = json!({"name": cluster, "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
        app.admin().post("/v1/clusters", &body).await.expect(201);
        trust_cluster(&app, cluster, "a").await;
        let token = key.sign(&json!({"alg": "RS256"}), &claims("a", &format!("regcred-{cluster}"), end));

        for _ in 0..5 {
            assert_eq!(me(&app, &token).await.status, status, "{cluster}");
        }
        assert_eq!(requests.count(), reviews, "{cluster}");
        // A changed connection may lead to another server, so the token is reviewed again.
        let auth = json!({"auth": {"type": "token", "token": "t"}});
        app.admin().patch(&format!("/v1/clusters/{cluster}"), &auth).await.expect(200);
        assert_eq!(me(&app, &token).await.status, status, "{cluster}");
        assert_eq!(requests.count(), 2 * reviews, "{cluster}");
        asked.push((requests, 2 * reviews));
    }
    // A token for two clusters is sent to neither.
    let mut for_two = claims("a", "", end);
    for_two["aud"] = json!(["regcred-good", "regcred-old"]);
    me(&app, &key.sign(&json!({"alg": "RS256"}), &for_two)).await.problem(401, "invalid-token");
    assert!(asked.iter().all(|(requests, reviews)| requests.count() == *reviews));
}

/// Response of an API server to a token review.
fn review(authenticated: bool, audiences: &Value) -> Vec<u8> {
    let user = json!({"username": "system:serviceaccount:a:ci", "uid": "u-1"});
    let status = json!({"authenticated": authenticated, "user": user, "audiences": audiences});
    let body = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": {"token": ""},
        "status": status,
    });
    answer("201 Created", &[("Content-Type", "application/json")], &body.to_string())
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn audience_of_the_api_server_is_refused_at_declaration(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    // The API server says which audiences regcred's own token has there.
    let (address, requests) = serve(|_| review(true, &json!(["https://cluster.example.com/own", "konnectivity"])));
    let server = format!("http://{address}");
    let auth = json!({"type": "token", "token": "own-token"});
    let cluster = json!({"name": "dev", "server": server, "auth": auth, "allowPlainHttp": true});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    let with = |audience: &str| {
        let mut body = provider("dev", "a");
        body["audience"] = json!(audience);
        body
    };

    for audience in ["https://kubernetes.default.svc", "api", &server, "https://cluster.example.com/own"] {
        let answer = admin.post("/v1/identity-providers", &with(audience)).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), ["audience"], "{audience}");
    }
    assert!(requests.text().contains("own-token"), "{}", requests.text());
    admin.post("/v1/identity-providers", &with("regcred-dev")).await.expect(201);
    let change = json!({"audience": "https://cluster.example.com/own"});
    let answer = admin.patch("/v1/identity-providers/dev-pods", &change).await;
    assert_eq!((answer.status, answer.fields()), (422, vec!["audience".to_owned()]));
    assert_eq!(admin.get("/v1/identity-providers/dev-pods").await.expect(200)["audience"], "regcred-dev");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_that_the_api_server_accepts_for_itself_is_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    // The cluster is not reachable with a token, so the declaration is accepted.
    let (address, requests) = serve(|_| review(true, &json!(["own-audience"])));
    let server = format!("http://{address}");
    let cluster = json!({"name": "dev", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
    let mut body = provider("dev", "a");
    body["audience"] = json!("own-audience");
    app.admin().post("/v1/identity-providers", &body).await.expect(201);
    let end = Utc::now().timestamp() + 300;
    let of_pod = TestKey::rsa("a").sign(&json!({"alg": "RS256"}), &claims("a", "own-audience", end));

    me(&app, &of_pod).await.problem(401, "invalid-token");
    assert_eq!((counted(&app, "tokens", "notVouchedFor").await, requests.count()), (1, 2));

    // A provider of an older version, with the real API server.
    app.register_cluster("real").await;
    let namespace = new_account("ci").await;
    let for_the_server = token(&namespace, "ci", "https://kubernetes.default.svc", 3600).await;
    trust_cluster(&app, "real", &namespace).await;
    let own = "UPDATE identity_providers SET audience = 'https://kubernetes.default.svc' WHERE name = 'real-pods'";
    sqlx::query(own).execute(&pool).await.expect("updated");
    me(&app, &for_the_server).await.problem(401, "invalid-token");
    assert_eq!(counted(&app, "tokens", "apiServerAudience").await, 1);
    // It can still be read and corrected.
    app.admin().get("/v1/identity-providers/real-pods").await.expect(200);
    app.admin().patch("/v1/identity-providers/real-pods", &json!({"audience": "regcred-real"})).await.expect(200);
    me(&app, &token(&namespace, "ci", "regcred-real", 3600).await).await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_is_not_sent_to_a_cluster_over_plain_http(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let admins_key = installation.new_key("admin").await;
    let service = installation.serve().await;
    let admin = service.client(&admins_key);
    let server = "http://192.168.255.254:8080";
    let body = json!({"name": "far", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &body).await.expect(201);
    admin.post("/v1/identity-providers", &provider("far", "a")).await.expect(201);
    let key = TestKey::rsa("a");
    let token = key.sign(&json!({"alg": "RS256"}), &claims("a", "regcred-far", Utc::now().timestamp() + 300));

    service.client(&token).get("/v1/me").await.problem(503, "issuer-unavailable");

    service.process.signal("TERM");
    let exit = service.process.wait().await;
    let message = "tokens are not sent to a cluster over http://";
    assert!(exit.stderr.contains(message) && !exit.stderr.contains(&token[token.len() - 40..]), "{exit:?}");
}
