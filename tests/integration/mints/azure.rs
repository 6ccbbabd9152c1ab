//! Azure: regcred, azure-identity and azure-containerregistry call the same fake.

use std::sync::Arc;

use chrono::Utc;
use regcred::{
    clients::mint::{AmbientConfig, AzureEnvironment, MetadataConfig, MintClientConfig},
    domain::mint::{MintError, Minted},
};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW, assert_mint_refused, created_login, direct_mint,
    fakes::{
        self,
        azure::{Azure, CLIENT, MANAGED, REPOSITORY, SECRET, TAG, TENANT, USERNAME},
        jwt::{ClientKey, TrustedIssuer},
    },
    peers::{assert_vendor_refused, vendor_calls},
    post_form,
};
use crate::{
    identity_providers::cluster::{add_account, new_account, server_key, token},
    support::{app::TestApp, files::TempDir},
    verify::certificates::Ca,
};

/// Lifetimes of logins, in seconds.
const UNSCOPED: f64 = 10_800.0;
const SCOPED: f64 = 4_500.0;

/// A fake over TLS, and over plain HTTP as metadata service.
struct Cloud {
    azure: Arc<Azure>,
    /// `host:port`
    host: String,
    metadata: String,
    ca: Ca,
    folder: TempDir,
}

impl Cloud {
    fn start(azure: Azure) -> Self {
        let (ca, azure) = (Ca::new(), Arc::new(azure));
        let host = fakes::serve_tls(&azure, &ca.certify()).to_string();
        azure.host.set(host.clone()).expect("set once");
        let metadata = fakes::serve(&azure);
        Self { azure, host, metadata, ca, folder: TempDir::new() }
    }

    fn source(&self, identity: &Value) -> Value {
        let authority = format!("https://{}", self.host);
        json!({"type": "azureContainerRegistry", "tenantId": TENANT, "authority": authority, "identity": identity})
    }

    fn account(&self, identity: &Value) -> Value {
        json!({
            "name": "minted", "registry": self.host, "caCertificate": self.ca.pem, "source": self.source(identity),
        })
    }

    /// Call of a vendor's client: it pulls a manifest.
    fn call(&self, call: &str, members: &Value) -> Value {
        let ca = self.folder.write("ca.pem", &self.ca.pem);
        let mut call = json!({
            "call": call, "tenant": TENANT, "client": CLIENT, "host": self.host, "repository": REPOSITORY, "tag": TAG,
            "variables": {"REQUESTS_CA_BUNDLE": ca, "AZURE_POD_IDENTITY_AUTHORITY_HOST": self.metadata},
        });
        call.as_object_mut().expect("an object").extend(members.as_object().expect("an object").clone());
        call
    }

    /// Mints with the identity of a host or pod.
    async fn ambient_mint(&self, environment: AzureEnvironment, client: &str) -> Result<(Minted, String), MintError> {
        let metadata = MetadataConfig {
            instance: self.metadata.clone(),
            containers: Vec::new(),
            allowed: "127.0.0.1".parse().expect("an address"),
        };
        let ambient = AmbientConfig { azure: Some(environment), ..AmbientConfig::default() };
        let config = MintClientConfig { ambient, metadata, ..MintClientConfig::default() };
        let mut source = self.source(&json!({"type": "ambient", "clientId": client}));
        source.as_object_mut().expect("an object").remove("tenantId");
        direct_mint(config, &source, None, &self.host, Some(&self.ca.pem)).await
    }

    /// Asserts that an account has a login of the registry, valid for this long.
    async fn assert_login(&self, app: &TestApp, body: &Value, kind: &str, lifetime: f64) {
        let (username, password, valid_until) = created_login(app, body).await;
        assert_eq!(username, USERNAME);
        assert!(self.azure.find(kind, &password).is_some(), "{:?}", self.azure.kinds());
        #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
        let remaining = valid_until - Utc::now().timestamp() as f64;
        assert!((lifetime - 60.0..=lifetime + 10.0).contains(&remaining), "{remaining}");
    }
}

#[track_caller]
fn assert_pulled(result: &Value) {
    assert!(result["digest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{result}");
}

fn client_secret(secret: &str) -> Value {
    json!({"type": "clientSecret", "clientId": CLIENT, "clientSecret": secret})
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn azure_client_secret_is_exchanged_for_a_login(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let cloud = Cloud::start(Azure::default());

    let calls = json!([
        cloud.call("azure_secret", &json!({"client_secret": SECRET})),
        cloud.call("azure_secret", &json!({"client_secret": "canary-wrong"}))
    ]);
    let vendor = vendor_calls(&calls);
    assert_pulled(&vendor[0]);
    assert_eq!(cloud.azure.kinds(), ["entra", "refresh", "access"]);
    assert_vendor_refused(&vendor[1], "AADSTS7000215");

    let refused = app.admin().post("/v1/registry-accounts", &cloud.account(&client_secret("canary-wrong"))).await;
    assert_mint_refused(&refused, "AADSTS7000215");
    cloud.assert_login(&app, &cloud.account(&client_secret(SECRET)), "refresh", UNSCOPED).await;
    assert_eq!(cloud.azure.kinds()[3..], ["entra", "refresh"]);
    // The login pulls as docker's clients do.
    let verified = app.admin().post("/v1/registry-accounts/minted/verify", &json!({"repository": REPOSITORY})).await;
    assert_eq!(verified.expect(200)["result"], "valid");

    let mut scoped = cloud.account(&client_secret(SECRET));
    scoped["name"] = json!("scoped");
    scoped["source"]["repositories"] = json!([REPOSITORY, "team/app"]);
    cloud.assert_login(&app, &scoped, "access", SCOPED).await;
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn azure_client_certificate_is_exchanged_for_a_login(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let (key, other) = (ClientKey::new(), ClientKey::new());
    let (pem, der) = key.certificate();
    let (other_pem, _) = other.certificate();
    let cloud = Cloud::start(Azure::with_certificate(der, key.public()));
    let identity = |key: &ClientKey, certificate: &str| json!({"type": "clientCertificate", "clientId": CLIENT, "certificate": certificate, "privateKey": key.pem()});

    let vendor = vendor_calls(&json!([
        cloud.call("azure_certificate", &json!({"pem": format!("{}{pem}", key.pem())})),
        cloud.call("azure_certificate", &json!({"pem": format!("{}{other_pem}", other.pem())})),
    ]));
    assert_pulled(&vendor[0]);
    assert_vendor_refused(&vendor[1], "AADSTS700027");

    let refused = app.admin().post("/v1/registry-accounts", &cloud.account(&identity(&other, &other_pem))).await;
    assert_mint_refused(&refused, "AADSTS700027");
    // A registered certificate with another key.
    let refused = app.admin().post("/v1/registry-accounts", &cloud.account(&identity(&other, &pem))).await;
    assert_mint_refused(&refused, "AADSTS700027");
    cloud.assert_login(&app, &cloud.account(&identity(&key, &pem)), "refresh", UNSCOPED).await;
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn azure_trusts_a_service_account_of_a_cluster(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    app.register_cluster("dev").await;
    let namespace = new_account("pull").await;
    add_account(&namespace, "other").await;
    let issuer = TrustedIssuer {
        issuer: "https://kubernetes.default.svc",
        key: server_key().public_der(),
        subject: format!("system:serviceaccount:{namespace}:pull"),
    };
    let cloud = Cloud::start(Azure::with_issuer(issuer));
    let identity = |name: &str, audience: Option<&str>| {
        json!({
            "type": "webIdentity", "clientId": CLIENT, "cluster": "dev", "namespace": namespace,
            "serviceAccount": name, "audience": audience,
        })
    };

    let audience = "api://AzureADTokenExchange";
    let call = async |name: &str, audience: &str| {
        let token = token(&namespace, name, audience, 3_600).await;
        let file = cloud.folder.write(&format!("token-{name}-{}", audience.len()), token);
        cloud.call("azure_web_identity", &json!({"token_file": file}))
    };
    let calls = json!([call("pull", audience).await, call("other", audience).await, call("pull", "vault").await]);
    let vendor = vendor_calls(&calls);
    assert_pulled(&vendor[0]);
    assert_vendor_refused(&vendor[1], "AADSTS700213");
    assert_vendor_refused(&vendor[2], "AADSTS700212");

    let refused = app.admin().post("/v1/registry-accounts", &cloud.account(&identity("other", None))).await;
    assert_mint_refused(&refused, "AADSTS700213");
    let refused = app.admin().post("/v1/registry-accounts", &cloud.account(&identity("pull", Some("vault")))).await;
    assert_mint_refused(&refused, "invalid_client");
    cloud.assert_login(&app, &cloud.account(&identity("pull", None)), "refresh", UNSCOPED).await;
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn azure_managed_identity_is_exchanged_for_a_login() {
    let cloud = Cloud::start(Azure::default());
    let mint = async |client: &str| cloud.ambient_mint(AzureEnvironment::default(), client).await;
    let vendor = vendor_calls(&json!([
        cloud.call("azure_managed_identity", &json!({"client": MANAGED})),
        cloud.call("azure_managed_identity", &json!({"client": CLIENT})),
    ]));
    assert_pulled(&vendor[0]);
    assert_vendor_refused(&vendor[1], "Identity not found");

    let (minted, password) = mint(MANAGED).await.expect("a login");
    assert!(cloud.azure.find("refresh", &password).is_some());
    assert!((minted.validity.lifetime.as_secs_f64() - UNSCOPED).abs() < 10.0, "{:?}", minted.validity.lifetime);
    let error = mint(CLIENT).await.expect_err("a refusal");
    assert!(error.detail.contains("invalid_request"), "{}", error.detail);
    // The header that keeps browsers and proxies away is required.
    let resource = "https%3A%2F%2Fcontainerregistry.azure.net";
    let path = format!("/metadata/identity/oauth2/token?api-version=2019-08-01&resource={resource}");
    let plain = reqwest::get(format!("{}{path}", cloud.metadata)).await.expect("an answer");
    assert_eq!(plain.status(), 400);
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn azure_trusts_the_token_file_of_a_pod() {
    let (key, issuer) = (ClientKey::new(), "https://issuer.example");
    let subject = "system:serviceaccount:regcred:pull";
    let cloud =
        Cloud::start(Azure::with_issuer(TrustedIssuer { issuer, key: key.public(), subject: subject.to_owned() }));
    let write = |subject: &str| {
        let now = Utc::now().timestamp();
        let audience = "api://AzureADTokenExchange";
        let claims = json!({"iss": issuer, "aud": audience, "sub": subject, "iat": now, "exp": now + 600});
        cloud.folder.write("token", key.signer().sign(&json!({"alg": "RS256"}), &claims))
    };
    let file = write(subject);
    let environment = AzureEnvironment {
        client_id: Some(CLIENT.to_owned()),
        tenant_id: Some(TENANT.to_owned()),
        federated_token_file: Some(file.clone()),
        authority_host: Some(format!("https://{}", cloud.host)),
    };

    let call = || vendor_calls(&json!([cloud.call("azure_web_identity", &json!({"token_file": file}))])).remove(0);
    assert_pulled(&call());
    let (_, password) = cloud.ambient_mint(environment.clone(), CLIENT).await.expect("a login");
    assert!(cloud.azure.find("refresh", &password).is_some());
    // The platform replaces the file: it is read at every mint.
    write("system:serviceaccount:regcred:other");
    let error = cloud.ambient_mint(environment, CLIENT).await.expect_err("a refusal");
    assert!(error.detail.contains("AADSTS700213"), "{}", error.detail);
    assert_vendor_refused(&call(), "AADSTS700213");
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn azure_fake_refuses_what_entra_id_refuses() {
    let key = ClientKey::new();
    let (_, der) = key.certificate();
    let thumbprint = regcred::crypto::jwt_signer::thumbprint(&der);
    let cloud = Cloud::start(Azure::with_certificate(der, key.public()));
    // The same fake without TLS: these requests are the test's own.
    let token_url = format!("{}/{TENANT}/oauth2/v2.0/token", cloud.metadata);
    let now = Utc::now().timestamp();
    let assertion = |change: Value| {
        let mut claims = json!({
            "aud": format!("https://{}/{TENANT}/oauth2/v2.0/token", cloud.host), "iss": CLIENT, "sub": CLIENT,
            "jti": "1", "nbf": now, "exp": now + 300,
        });
        claims.as_object_mut().expect("claims").extend(change.as_object().expect("claims").clone());
        key.signer().sign(&json!({"alg": "PS256", "x5t#S256": thumbprint}), &claims)
    };
    let post = async |change: &[(&str, &str)]| {
        let good = assertion(json!({}));
        let mut form = vec![
            ("grant_type", "client_credentials"),
            ("client_id", CLIENT),
            ("scope", "https://containerregistry.azure.net/.default"),
            ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            ("client_assertion", good.as_str()),
        ];
        form.retain(|(name, _)| !change.iter().any(|(changed, _)| changed == name));
        form.extend(change);
        let (_, body) = post_form(&token_url, &form).await;
        body["error_codes"][0].as_u64()
    };

    assert_eq!(post(&[]).await, None);
    for (change, code) in [
        (json!({"aud": "https://login.example.com"}), 700_023),
        (json!({"iss": MANAGED}), 700_021),
        (json!({"sub": MANAGED}), 700_021),
        (json!({"jti": ""}), 700_021),
        (json!({"exp": now + 3_600}), 700_024),
        (json!({"nbf": now - 900, "exp": now - 600}), 700_024),
    ] {
        assert_eq!(post(&[("client_assertion", assertion(change.clone()).as_str())]).await, Some(code), "{change}");
    }
    let forged = ClientKey::new().signer().sign(&json!({"alg": "PS256", "x5t#S256": thumbprint}), &json!({}));
    for (change, code) in [
        (("grant_type", "password"), 70_003),
        (("client_id", MANAGED), 700_016),
        (("client_assertion_type", ""), 900_144),
        (("client_assertion", "e30.e30.e30"), 700_027),
        (("client_assertion", forged.as_str()), 700_027),
        (("client_assertion", ""), 7_000_218),
        (("scope", "https://management.azure.com/.default"), 500_011),
        (("scope", "openid"), 1_002_012),
    ] {
        assert_eq!(post(&[change]).await, Some(code), "{change:?}");
    }
}

#[ignore = "make mint-test"]
#[tokio::test]
async fn azure_registry_fake_exchanges_tokens_of_entra_id_only() {
    let cloud = Cloud::start(Azure::default());
    let exchange = format!("{}/oauth2/exchange", cloud.metadata);
    for (grant, service, token, status) in [
        ("access_token", cloud.host.as_str(), "other", 401),
        ("access_token", "other.azurecr.io", "other", 400),
        ("password", cloud.host.as_str(), "other", 400),
    ] {
        let form = [("grant_type", grant), ("service", service), ("access_token", token)];
        assert_eq!(post_form(&exchange, &form).await.0, status, "{form:?}");
    }
}
