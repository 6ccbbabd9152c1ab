//! Client credentials of OAuth 2.0, from a server of others.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{ALLOW, assert_mint_refused, created_login, peers::Peer};
use crate::support::app::TestApp;

fn account(token_url: &str, authentication: &str) -> Value {
    json!({
        "name": authentication, "registry": "registry.example.com", "plainHttp": true,
        "source": {
            "type": "oauth2", "tokenUrl": token_url, "username": "robot", "scope": "pull",
            "authentication": authentication,
            "identity": {"type": "clientSecret", "clientId": "regcred", "clientSecret": "canary-secret"},
        },
    })
}

fn claims(token: &str) -> Value {
    let claims = token.split('.').nth(1).unwrap_or_else(|| panic!("no JWT: {token}"));
    serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(claims).expect("base64")).expect("JSON")
}

#[ignore = "make mint-test"]
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn oauth2_server_issues_tokens_to_a_client(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let peer = Peer::oauth2_mock_server().await;
    let token_url = format!("{}/token", peer.url);

    for authentication in ["basic", "body"] {
        let (username, token, valid_until) = created_login(&app, &account(&token_url, authentication)).await;
        assert_eq!(username, "robot");
        let claims = claims(&token);
        assert_eq!(claims["scope"], "pull", "{claims}");
        let difference = valid_until - claims["exp"].as_f64().expect("an expiry");
        assert!(difference.abs() < 60.0, "{difference}");
    }

    let nowhere = account(&format!("{}/nowhere", peer.url), "lost");
    let mut nowhere = nowhere;
    nowhere["source"]["authentication"] = json!("basic");
    let refused = app.admin().post("/v1/registry-accounts", &nowhere).await;
    assert_mint_refused(&refused, "404");
}
