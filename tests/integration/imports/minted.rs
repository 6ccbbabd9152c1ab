//! Imports over minted accounts.

use super::*;
use crate::{
    mints::token_service::{self, TokenService},
    verify::listening::{self, answer},
};

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn minted_account_is_skipped(pool: PgPool) {
    let (app, provider) = token_service::spawn(pool).await;
    let mut account = provider.account();
    account["name"] = json!("registry-example-com");
    let created = app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    let login = || json!({"username": "dev", "password": "imported"});
    let document = json!({"auths": {"registry.example.com": login(), "static.example.com": login()}}).to_string();
    let expected = |outcome| {
        rows(&[
            ["registry.example.com", "-", "skipped", "minted"],
            ["static.example.com", "static-example-com", outcome, "-"],
        ])
    };

    let tried = import(&app.admin(), "?dryRun=true", JSON, document.clone()).await;
    let imported = import(&app.admin(), "", JSON, document).await;

    assert_eq!((outcomes(&tried), outcomes(&imported)), (expected("wouldCreate"), expected("created")));
    let detail = imported.json()["items"][0]["detail"].to_string();
    assert!(detail.contains("`registry-example-com` is minted"), "{detail}");
    assert_eq!(app.admin().get("/v1/registry-accounts/registry-example-com").await.expect(200), created);
    let rendered = rendered(&app).await;
    assert_eq!(rendered["registry.example.com"]["password"], "minted-1");
    assert_eq!(rendered["static.example.com"]["password"], "imported");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn login_for_a_minted_account_is_not_verified(pool: PgPool) {
    let allow = [("REGCRED_MINT_ALLOW", "127.0.0.1"), ("REGCRED_OUTBOUND_ALLOW", "127.0.0.1")];
    let (app, provider) = (TestApp::configured(pool, &allow).await, TokenService::start());
    let (registry, requests) = listening::serve(|_| answer("200 OK", &[], "{}"));
    let name = registry.to_string().replace(['.', ':'], "-");
    let mut account = provider.account();
    account["name"] = json!(name);
    account["registry"] = json!(registry.to_string());
    app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    let document = json!({"auths": {registry.to_string(): {"username": "dev", "password": "imported"}}}).to_string();

    let imported = import(&app.admin(), "?verify=true&plainHttp=true", JSON, document.clone()).await;

    assert_eq!(outcomes(&imported), rows(&[[&registry.to_string(), "-", "skipped", "minted"]]));
    assert_eq!(requests.count(), 0);
    // A static account's is.
    assert_eq!(app.admin().delete(&format!("/v1/registry-accounts/{name}")).await.status, 204);
    import(&app.admin(), "?verify=true&plainHttp=true", JSON, document).await.expect(200);
    assert!(requests.count() > 0);
}
