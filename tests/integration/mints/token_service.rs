//! Token service of OAuth 2.0, the provider of most tests, and steps that they share.

use std::{
    io::Write,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::{
    support::{
        app::TestApp,
        eventually,
        listener::{Gate, listen, read_request},
    },
    verify::listening::{Requests, answer},
};

/// Path of the account that [`TokenService::account`] describes.
pub const PATH: &str = "/v1/registry-accounts/minted";

type Respond = Box<dyn Fn(&str) -> Vec<u8> + Send + Sync>;

/// Token service that issues `minted-1`, `minted-2` and so on, in the order of requests, unless a test
/// sets another answer.
pub struct TokenService {
    pub address: SocketAddr,
    /// Holds answers to requests for `/token`, and to no others.
    pub gate: Arc<Gate>,
    pub requests: Requests,
    respond: Arc<Mutex<Option<Respond>>>,
}

impl TokenService {
    pub fn start() -> Self {
        let (gate, requests) = (Arc::new(Gate::default()), Requests::default());
        let respond: Arc<Mutex<Option<Respond>>> = Arc::default();
        let (held, recorded, set) = (Arc::clone(&gate), requests.clone(), Arc::clone(&respond));
        let issued = AtomicUsize::new(0);
        let address = listen(move |mut stream| {
            let request = read_request(&stream);
            recorded.push(request.clone());
            let response = set.lock().as_ref().map(|respond| respond(&request));
            let response = response.unwrap_or_else(|| {
                let token = format!("minted-{}", issued.fetch_add(1, Ordering::SeqCst) + 1);
                answer("200 OK", &[], &json!({"access_token": token, "expires_in": 3600}).to_string())
            });
            if request.starts_with("POST /token ") {
                held.pass();
            }
            // regcred closes the connection early if the answer is too long.
            let _ = stream.write_all(&response);
        });
        Self { address, gate, requests, respond }
    }

    /// Refuses requests with this status, or issues tokens again.
    pub fn refuse(&self, status: Option<&'static str>) {
        let refusal = |status| -> Respond { Box::new(move |_| answer(status, &[("Retry-After", "7")], "canary")) };
        *self.respond.lock() = status.map(refusal);
    }

    /// Answers requests by a function of their text.
    pub fn respond_by(&self, respond: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) {
        *self.respond.lock() = Some(Box::new(respond));
    }

    /// Source with another path than `/token`, whose requests are never held.
    pub fn source_at(&self, path: &str) -> Value {
        json!({
            "type": "oauth2", "tokenUrl": format!("http://{}/{path}", self.address), "username": "robot",
            "identity": {"type": "clientSecret", "clientId": "regcred", "clientSecret": "canary-secret"},
        })
    }

    pub fn source(&self) -> Value {
        self.source_at("token")
    }

    pub fn account(&self) -> Value {
        json!({"name": "minted", "registry": "registry.example.com", "plainHttp": true, "source": self.source()})
    }
}

/// Starts regcred, which may call token services, and one of these.
pub async fn spawn(pool: PgPool) -> (TestApp, TokenService) {
    (TestApp::configured(pool, &[("REGCRED_MINT_ALLOW", "127.0.0.1")]).await, TokenService::start())
}

/// Rendered password of the account.
pub async fn password(app: &TestApp) -> String {
    let answer = app.admin().post("/v1/docker-configs", &json!({"accounts": ["minted"]})).await.expect(200);
    let auths = answer["config"]["auths"].as_object().expect("auths").clone();
    let entry = auths.values().next().expect("an entry");
    entry["password"].as_str().expect("a password").to_owned()
}

/// Makes the mints of all accounts due.
pub async fn make_due(app: &TestApp) {
    sqlx::query("UPDATE account_mints SET next_attempt_at = now()").execute(&app.pool).await.expect("due");
}

/// Waits until a member of the account's mint has a value, and returns the account.
pub async fn until_mint(app: &TestApp, member: &str, value: Value) -> Value {
    eventually("the mint changes", async || {
        let account = app.admin().get(PATH).await.expect(200);
        (account["mint"][member] == value).then_some(account)
    })
    .await
}
