//! Verification of minted logins.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use serde_json::{Value, json};
use sqlx::PgPool;

use super::listening::{answer, serve};
use crate::{
    mints::token_service::{PATH, TokenService, until_mint},
    support::{app::TestApp, listener::Gate},
};

/// A minted account of a registry that rejects all logins, unless it is told to accept them.
struct Setup {
    app: TestApp,
    _provider: TokenService,
    /// Holds requests with a login.
    gate: Arc<Gate>,
    accepts: Arc<AtomicBool>,
}

impl Setup {
    async fn new(pool: PgPool) -> Self {
        let allow = [("REGCRED_MINT_ALLOW", "127.0.0.1"), ("REGCRED_OUTBOUND_ALLOW", "127.0.0.1")];
        let (app, provider) = (TestApp::configured(pool, &allow).await, TokenService::start());
        let (gate, accepts) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
        let (held, accepting) = (Arc::clone(&gate), Arc::clone(&accepts));
        let (registry, _) = serve(move |request| {
            if request.contains("authorization") {
                held.pass();
                if accepting.load(Ordering::SeqCst) {
                    return answer("200 OK", &[], "{}");
                }
            }
            answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
        });
        let mut account = provider.account();
        account["registry"] = json!(registry.to_string());
        app.admin().post("/v1/registry-accounts", &account).await.expect(201);
        Self { app, _provider: provider, gate, accepts }
    }

    async fn account(&self) -> Value {
        self.app.admin().get(PATH).await.expect(200)
    }

    async fn execute(&self, sql: &'static str) {
        sqlx::query(sql).execute(&self.app.pool).await.expect("a statement");
    }

    /// Verifies the login, and returns the result.
    async fn verify(&self) -> Value {
        self.app.admin().post(&format!("{PATH}/verify"), &json!({})).await.expect(200)["result"].clone()
    }

    /// Verifies the login, which asks for no mint: one would make the account due.
    async fn verify_without_mint(&self) -> Value {
        let before = self.account().await["mint"].clone();
        let result = self.verify().await;
        assert_eq!(self.account().await["mint"], before);
        result
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn result_for_a_replaced_login_is_not_stored(pool: PgPool) {
    let setup = Setup::new(pool).await;
    setup.gate.close();
    let client = setup.app.admin();
    let verifying = tokio::spawn(async move { client.post(&format!("{PATH}/verify"), &json!({})).await });
    setup.gate.until_waiting(1).await;
    setup.app.admin().post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    // So old that a rejected login would be replaced.
    setup.execute("UPDATE account_mints SET minted_at = minted_at - interval '6 minutes'").await;
    let before = setup.account().await;
    assert_eq!((&before["mint"]["serial"], &before["lastVerificationResult"]), (&json!(2), &Value::Null));

    setup.gate.open();

    assert_eq!(verifying.await.expect("an answer").expect(200)["result"], "invalid");
    assert_eq!(setup.account().await, before);
    // That of the present login is.
    setup.accepts.store(true, Ordering::SeqCst);
    assert_eq!(setup.verify().await, "valid");
    assert_eq!(setup.account().await["lastVerificationResult"], "valid");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn rejected_login_is_replaced_every_five_minutes_at_most(pool: PgPool) {
    let setup = Setup::new(pool).await;
    let age = async || setup.execute("UPDATE account_mints SET minted_at = minted_at - interval '3 minutes'").await;
    age().await;
    age().await;
    setup.accepts.store(true, Ordering::SeqCst);
    assert_eq!(setup.verify_without_mint().await, "valid");
    setup.accepts.store(false, Ordering::SeqCst);

    assert_eq!(setup.verify().await, "invalid");

    until_mint(&setup.app, "serial", json!(2)).await;
    assert_eq!(setup.verify_without_mint().await, "invalid");
    age().await;
    assert_eq!(setup.verify_without_mint().await, "invalid");
    age().await;
    assert_eq!(setup.verify().await, "invalid");
    until_mint(&setup.app, "serial", json!(3)).await;

    // The backoff of a failing mint decides.
    age().await;
    age().await;
    setup.execute("UPDATE account_mints SET error_reason = 'denied', error_detail = 'refused'").await;
    assert_eq!(setup.verify_without_mint().await, "invalid");
}
