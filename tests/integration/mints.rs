//! Mints against peers that check what a provider checks.

mod api;
mod aws;
mod azure;
mod clusters;
mod configuration;
mod destinations;
mod ecr_public;
mod engine;
mod fakes;
mod google;
mod hostile;
mod metrics;
mod oauth2;
mod peers;
mod pulls;
mod requests;
mod stored;
pub mod token_service;
mod web_identity;

use std::time::Duration;

use regcred::{
    clients::{
        mint::{MintClient, MintClientConfig, MintOrder, MintTrigger},
        outbound::Guard,
    },
    domain::{
        cluster::CaCertificate,
        mint::{MintError, Minted, NewSource, Source},
        registry::RegistryScope,
    },
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio::time::Instant;
use url::form_urlencoded;

use crate::support::{app::TestApp, client::Answer};

/// Allows the loopback addresses of providers and registries.
const ALLOW: &[(&str, &str)] = &[("REGCRED_MINT_ALLOW", "127.0.0.1"), ("REGCRED_OUTBOUND_ALLOW", "127.0.0.1")];

/// Creates an account with a source, and returns its user name, its password and the end of its login
/// in Unix time.
async fn created_login(app: &TestApp, body: &Value) -> (String, String, f64) {
    let created = app.admin().post("/v1/registry-accounts", body).await.expect(201);
    assert_eq!((&created["mint"]["state"], &created["mint"]["serial"]), (&json!("valid"), &json!(1)), "{created}");
    let name = created["name"].as_str().expect("a name");
    let rendered = app.admin().post("/v1/docker-configs", &json!({"accounts": [name]})).await.expect(200);
    let entries = rendered["config"]["auths"].as_object().expect("auths");
    let entry = entries.values().next().expect("an entry");
    let text = |member: &str| entry[member].as_str().expect("text").to_owned();
    let valid_until = serde_json::from_value(created["mint"]["validUntil"].clone());
    let valid_until: chrono::DateTime<chrono::Utc> = valid_until.expect("a time");
    #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
    let valid_until = valid_until.timestamp() as f64;
    (text("username"), text("password"), valid_until)
}

/// Asserts that a mint failed with this code of the provider, and that nothing secret is shown.
#[track_caller]
fn assert_mint_refused(answer: &Answer, code: &str) {
    let problem = answer.problem(502, "mint-failed");
    let detail = problem["detail"].as_str().unwrap_or_default();
    assert!(detail.contains(code), "{detail}");
    assert!(!answer.body.contains("canary"), "{detail}");
}

/// Mints without the API, for identities that come from fixed addresses. Returns the password too.
///
/// With a CA, hosts that the source names are called over TLS.
async fn direct_mint(
    config: MintClientConfig,
    source: &Value,
    web_identity: Option<&str>,
    registry: &str,
    ca: Option<&str>,
) -> Result<(Minted, String), MintError> {
    let client = MintClient::new(|| Guard::new("127.0.0.1".parse().expect("an address")), config);
    mint_by(&client, source, web_identity, registry, ca).await
}

async fn mint_by(
    client: &MintClient,
    source: &Value,
    web_identity: Option<&str>,
    registry: &str,
    ca: Option<&str>,
) -> Result<(Minted, String), MintError> {
    let document = serde_json::from_value(source.clone()).expect("a source");
    let NewSource { source, secret } = Source::parse(document).expect("a source");
    let web_identity = web_identity.map(SecretString::from);
    let registry = RegistryScope::parse(registry).expect("a registry");
    let ca = ca.map(|pem| CaCertificate::parse(pem).expect("a CA"));
    let order = MintOrder {
        source: &source,
        secret: &secret,
        web_identity: web_identity.as_ref(),
        registry: &registry,
        plain_http: ca.is_none(),
        ca_certificate: ca.as_ref(),
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    let minted = client.mint_until(&order, MintTrigger::Request, deadline).await?;
    let password = minted.password.secret().expose_secret().to_owned();
    Ok((minted, password))
}

/// Posts a form to a fake, to which clients send valid ones only. Returns status and body.
async fn post_form(url: &str, form: &[(&str, &str)]) -> (u16, Value) {
    let body = form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let request = client.post(url).header("content-type", "application/x-www-form-urlencoded").body(body);
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    (status, response.json().await.expect("JSON"))
}
