//! Authentication by tokens: of OIDC issuers that the tests run, and of `ServiceAccount`s of a real
//! API server.

mod attacks;
pub mod cluster;
pub mod issuer;
pub mod keys;
mod outages;
mod recipes;
mod resource;
mod rules;

use serde_json::{Value, json};
use sqlx::PgPool;

use self::issuer::TestIssuer;
use crate::support::{
    app::TestApp,
    client::{Answer, Client},
};

/// Allows the loopback addresses of the test issuers.
const ALLOW: (&str, &str) = ("REGCRED_ISSUER_ALLOW", "127.0.0.0/8");

async fn spawn(pool: PgPool) -> TestApp {
    TestApp::configured(pool, &[ALLOW]).await
}

/// Creates a provider for the issuer. Its subject `ci` is a viewer.
async fn trust(app: &TestApp, name: &str, issuer: &TestIssuer) -> Value {
    trust_with(app, name, issuer, json!([{"claims": {"sub": "ci"}, "role": "viewer"}])).await
}

async fn trust_with(app: &TestApp, name: &str, issuer: &TestIssuer, rules: Value) -> Value {
    let body = json!({"name": name, "type": "oidc", "issuer": issuer.url(), "audience": "regcred", "rules": rules});
    app.admin().post("/v1/identity-providers", &body).await.expect(201)
}

fn bearer(app: &TestApp, token: &str) -> Client {
    app.anonymous().with_key(token)
}

async fn me(app: &TestApp, token: &str) -> Answer {
    bearer(app, token).get("/v1/me").await
}

/// Returns a counter of `/metrics`.
async fn counted(app: &TestApp, name: &str, result: &str) -> u64 {
    let metrics = app.operations().get("/metrics").await.body;
    let wanted = format!("regcred_{name}_total{{result=\"{result}\"}} ");
    let line =
        metrics.lines().find_map(|line| line.strip_prefix(&wanted)).unwrap_or_else(|| panic!("{name}: {metrics}"));
    line.parse().expect("a number")
}
