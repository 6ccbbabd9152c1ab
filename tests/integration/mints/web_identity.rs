//! Sources whose identity is a `ServiceAccount` of a cluster, with a real API server. AWS is a listener
//! that accepts every token.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use chrono::Utc;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::{
    pull_secrets::{Broker, service_account},
    support::{
        app::TestApp,
        client::{Answer, Client},
        eventually, kubernetes,
        process::Installation,
    },
    verify::listening::{Requests, answer, serve},
};

const PATH: &str = "/v1/registry-accounts/minted";

/// STS and ECR in one.
pub struct Aws {
    url: String,
    requests: Requests,
}

impl Aws {
    pub fn start() -> Self {
        let issued = Arc::new(AtomicUsize::new(0));
        let (address, requests) = serve(move |request| {
            if request.contains("Action=AssumeRoleWithWebIdentity") {
                let key = "<AccessKeyId>ASIA1</AccessKeyId><SecretAccessKey>one</SecretAccessKey>";
                let key = format!("<Credentials>{key}<SessionToken>two</SessionToken></Credentials>");
                return answer("200 OK", &[], &format!("<Answer><Result>{key}</Result></Answer>"));
            }
            let login = format!("AWS:minted-{}", issued.fetch_add(1, Ordering::SeqCst) + 1);
            let login = json!({
                "authorizationToken": BASE64_STANDARD.encode(login), "expiresAt": Utc::now().timestamp() + 43_200,
            });
            let now = Utc::now().to_rfc2822();
            answer("200 OK", &[("Date", &now)], &json!({"authorizationData": [login]}).to_string())
        });
        Self { url: format!("http://{address}"), requests }
    }

    /// Claims of the last token that was presented.
    fn last_claims(&self) -> Value {
        let text = self.requests.text();
        let token = text.rsplit("WebIdentityToken=").next().expect("a token").lines().next().expect("a token");
        let claims = token.split('.').nth(1).expect("claims");
        serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("JSON")
    }
}

/// An account whose provider is the listener.
pub fn account(aws: &Aws, identity: &Value) -> Value {
    json!({
        "name": "minted", "registry": "registry.example.com", "plainHttp": true,
        "source": {
            "type": "ecr", "region": "eu-central-1", "endpoint": aws.url, "stsEndpoint": aws.url,
            "assumeRole": {"roleArn": "arn:aws:iam::123456789012:role/pull"}, "identity": identity,
        },
    })
}

/// Registers the cluster `dev`, which issues a token for any audience. Its own audience, `internal`, is
/// one that no list could know.
pub async fn register_issuing_cluster(app: &TestApp) {
    let (address, _) = serve(|request| {
        let own = request.contains(r#""audiences":[]"#);
        let claims = json!({"aud": [if own { "internal" } else { "sts.amazonaws.com" }]}).to_string();
        let token = format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims));
        let status = json!({"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"});
        answer("201 Created", &[], &json!({"status": status}).to_string())
    });
    let cluster =
        json!({"name": "dev", "server": format!("http://{address}"), "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
}

/// An app with a cluster whose credential has no rights, and a `ServiceAccount` to mint with.
struct Setup {
    app: TestApp,
    admin: Client,
    aws: Aws,
    broker: Broker,
    /// Part of the names of the printed roles, so unique per test.
    cluster: String,
    namespace: String,
    installation: Installation,
}

impl Setup {
    async fn new(pool: PgPool) -> Self {
        let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
        let app = TestApp::configured(pool, &[("REGCRED_MINT_ALLOW", "127.0.0.1")]).await;
        let broker = Broker::without_rights().await;
        let cluster = broker.namespace.clone();
        app.register_cluster_with(&cluster, &broker.auth()).await;
        let namespace = kubernetes::new_namespace().await;
        service_account(&namespace, "pull", &[]).await;
        let (admin, aws) = (app.admin(), Aws::start());
        Self { app, admin, aws, broker, cluster, namespace, installation }
    }

    /// Prints the manifests for the broker.
    async fn print(&self, more: &[&str]) -> String {
        let subject = format!("{}/{}", self.broker.namespace, self.broker.name);
        let arguments = ["cluster", "rbac", "--cluster", &self.cluster, "--service-account", &subject];
        self.installation.must_run(&[&arguments[..], more].concat()).await
    }

    /// Grants the tokens of the `ServiceAccount`.
    async fn grant(&self) {
        let account = format!("{}/pull", self.namespace);
        let printed = self.print(&["--mint-service-account", &account]).await;
        kubernetes::kubectl(&["apply", "-f", "-"], &printed);
    }

    fn identity(&self) -> Value {
        let (cluster, namespace) = (&self.cluster, &self.namespace);
        json!({"type": "webIdentity", "cluster": cluster, "namespace": namespace, "serviceAccount": "pull"})
    }

    async fn create(&self, identity: &Value) -> Answer {
        self.admin.post("/v1/registry-accounts", &account(&self.aws, identity)).await
    }

    /// Creates the account. The API server enforces new rules with a delay.
    async fn until_created(&self) -> Value {
        eventually("the account is created", async || {
            let answer = self.create(&self.identity()).await;
            (answer.status == 201).then(|| answer.json())
        })
        .await
    }

    async fn check(&self, client: &Client) -> Value {
        let check = client.post(&format!("/v1/clusters/{}/check", self.cluster), &json!({})).await.expect(200);
        assert_eq!(check.get("problem"), None, "{check}");
        check["registryAccounts"].clone()
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_rule_is_exactly_required_to_mint(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let account = format!("{}/pull", setup.namespace);

    let refused = setup.create(&setup.identity()).await.problem(502, "mint-failed");
    let detail = refused["detail"].as_str().expect("a text");
    let mend = format!("regcred cluster rbac --cluster {} --mint-service-account {account}", setup.cluster);
    assert!(detail.contains("(denied)") && detail.contains(&mend), "{detail}");
    assert!(!detail.contains("127.0.0.1"), "the address of the cluster: {detail}");
    assert_eq!(setup.aws.requests.count(), 0);
    let nothing = setup.print(&[]).await;
    assert!(nothing.starts_with("# No pull secret"), "{nothing}");

    setup.grant().await;
    let created = setup.until_created().await;

    assert_eq!((&created["username"], &created["mint"]["state"]), (&json!("AWS"), &json!("valid")));
    let claims = setup.aws.last_claims();
    assert_eq!(claims["aud"], json!(["sts.amazonaws.com"]));
    assert_eq!(claims["sub"], json!(format!("system:serviceaccount:{}:pull", setup.namespace)));
    // The stored source requires the same rule.
    let printed = setup.print(&[]).await;
    assert_eq!(printed.matches("resourceNames: [\"pull\"]").count(), 1, "{printed}");
    assert!(printed.contains("required by: registry account minted."), "{printed}");
    assert!(!printed.contains('*') && !printed.contains("ClusterRole\n"), "{printed}");
    assert_eq!(setup.check(&setup.admin).await, json!([]));

    let role = format!("regcred-{}", setup.cluster);
    kubernetes::kubectl(&["delete", "role", &role, "-n", &setup.namespace], "");
    let missing =
        json!({"verb": "create", "resource": "serviceaccounts/token", "name": "pull", "namespace": setup.namespace});
    let lacking = json!([{"name": "minted", "missing": [missing]}]);
    eventually("the check shows the missing rule", async || (setup.check(&setup.admin).await == lacking).then_some(()))
        .await;
    let requests = setup.aws.requests.count();
    let refused = setup.admin.post(&format!("{PATH}/mint"), &json!({})).await.problem(502, "mint-failed");
    assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains(&mend)), "{refused}");
    assert_eq!(setup.aws.requests.count(), requests);
    let mint = setup.admin.get(PATH).await.expect(200)["mint"].clone();
    let kept = ["serial", "mintedAt", "validUntil", "refreshAt"];
    assert!(kept.iter().all(|field| mint[field] == created["mint"][field]), "{mint}");
    assert_eq!((&mint["state"], &mint["lastError"]["type"]), (&json!("failing"), &json!("denied")));
    // A caller that is not granted the account does not learn of it.
    let grants = json!({"accounts": ["other"], "clusters": [setup.cluster], "namespaces": ["*"]});
    let other = setup.app.caller("other", "operator", Some(grants)).await;
    assert_eq!(setup.check(&other).await, json!([]));

    kubernetes::kubectl(&["apply", "-f", "-"], &printed);
    eventually("the login is minted again", async || {
        (setup.admin.post(&format!("{PATH}/mint"), &json!({})).await.status == 200).then_some(())
    })
    .await;
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn token_is_of_no_use_at_regcred_or_the_cluster(pool: PgPool) {
    let setup = Setup::new(pool).await;
    setup.grant().await;
    let provider = json!({
        "name": "pods", "type": "tokenReview", "cluster": setup.cluster, "audience": "regcred-pods",
        "rules": [{"claims": {"namespace": setup.namespace}, "role": "viewer"}],
    });
    setup.admin.post("/v1/identity-providers", &provider).await.expect(201);
    let with = |member: &str, value: &str| {
        let mut identity = setup.identity();
        identity[member] = json!(value);
        identity
    };
    for audience in ["https://kubernetes.default.svc", "kubernetes", &kubernetes::server(), "regcred-pods"] {
        let refused = setup.create(&with("audience", audience)).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), ["source.identity.audience"], "{audience}");
    }
    // regcred's own ServiceAccount, whose tokens are its credential.
    let (namespace, name) = (&setup.broker.namespace, &setup.broker.name);
    let renewed = json!({
        "type": "serviceAccount", "token": setup.broker.token, "namespace": namespace, "name": name,
    });
    setup.app.register_cluster_with("renewed", &renewed).await;
    let own = json!({"type": "webIdentity", "cluster": "renewed", "namespace": namespace, "serviceAccount": name});
    let refused = setup.create(&own).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["source.identity.serviceAccount"]);
    assert_eq!(setup.aws.requests.count(), 0);

    // An audience that a provider gets later.
    setup.until_created().await;
    let requests = setup.aws.requests.count();
    let changed = json!({"audience": "sts.amazonaws.com"});
    setup.admin.patch("/v1/identity-providers/pods", &changed).await.expect(200);
    let refused = setup.admin.post(&format!("{PATH}/mint"), &json!({})).await.problem(502, "mint-failed");
    assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("(misconfigured)")), "{refused}");
    assert_eq!(setup.aws.requests.count(), requests);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn api_server_is_asked_for_its_audiences(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_MINT_ALLOW", "127.0.0.1")]).await;
    let aws = Aws::start();
    register_issuing_cluster(&app).await;
    let with_audience = |audience: &str| {
        let identity = json!({
            "type": "webIdentity", "cluster": "dev", "namespace": "a", "serviceAccount": "pull", "audience": audience,
        });
        account(&aws, &identity)
    };
    let refused = app.admin().post("/v1/registry-accounts", &with_audience("internal")).await;
    refused.problem(422, "invalid-request");
    assert_eq!((refused.fields(), aws.requests.count()), (vec!["source.identity.audience".to_owned()], 0));
    app.admin().post("/v1/registry-accounts", &with_audience("sts.amazonaws.com")).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn identity_requires_grants_of_its_cluster_and_namespace(pool: PgPool) {
    let setup = Setup::new(pool).await;
    setup.grant().await;
    setup.until_created().await;
    let requests = setup.aws.requests.count();
    let refused = async |name: &str, grants: Value, field: &str| {
        let caller = setup.app.caller(name, "operator", Some(grants)).await;
        let mut account = account(&setup.aws, &setup.identity());
        account["name"] = json!("other");
        account["registry"] = json!("123456789012.dkr.ecr.eu-central-1.amazonaws.com");
        account["plainHttp"] = json!(false);
        for member in ["endpoint", "stsEndpoint"] {
            account["source"].as_object_mut().expect("an object").remove(member);
        }
        for answer in [
            caller.post("/v1/registry-accounts", &account).await,
            caller
                .patch(PATH, &json!({"source": account["source"], "registry": account["registry"], "plainHttp": false}))
                .await,
        ] {
            let problem = answer.problem(422, "invalid-request");
            assert_eq!(answer.fields(), [field], "{problem}");
            assert!(problem["detail"].as_str().is_some_and(|detail| detail.contains("not granted")), "{problem}");
        }
    };
    let (cluster, namespace) = (&setup.cluster, &setup.namespace);
    let elsewhere = json!({"accounts": ["*"], "clusters": ["dev-*"], "namespaces": ["*"]});
    refused("elsewhere", elsewhere, "source.identity.cluster").await;
    let outside = json!({"accounts": ["*"], "clusters": [cluster], "namespaces": ["a-*"]});
    refused("outside", outside, "source.identity.namespace").await;
    // Another mint of the stored source goes where the source says.
    let grants = json!({"accounts": ["minted"], "clusters": [], "namespaces": []});
    let narrow = setup.app.caller("narrow", "operator", Some(grants)).await;
    assert_eq!(setup.aws.requests.count(), requests);
    narrow.post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    assert_eq!(setup.aws.last_claims()["sub"], json!(format!("system:serviceaccount:{namespace}:pull")));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn cluster_of_a_source_is_not_replaced_by_its_namesake(pool: PgPool) {
    let setup = Setup::new(pool).await;
    setup.grant().await;
    setup.until_created().await;
    let cluster = format!("/v1/clusters/{}", setup.cluster);
    let refused = setup.admin.delete(&cluster).await.problem(409, "in-use");
    assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("registry-accounts/minted")), "{refused}");

    // As an older release removes it, which does not know of sources.
    sqlx::query("DELETE FROM clusters").execute(&setup.app.pool).await.expect("deleted");
    setup.app.register_cluster_with(&setup.cluster, &setup.broker.auth()).await;
    let requests = setup.aws.requests.count();
    let refused = setup.admin.post(&format!("{PATH}/mint"), &json!({})).await.problem(502, "mint-failed");
    assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("was removed")), "{refused}");
    assert_eq!(setup.aws.requests.count(), requests);

    let source = &account(&setup.aws, &setup.identity())["source"];
    setup.admin.patch(PATH, &json!({"source": source})).await.expect(200);
    setup.admin.post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    assert_eq!(setup.admin.delete(PATH).await.status, 204);
    assert_eq!(setup.admin.delete(&cluster).await.status, 204);
}
