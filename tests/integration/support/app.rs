//! The service, put together by its own composition root, in this process.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Once},
    thread::{self, JoinHandle},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, TimeDelta, Utc};
use regcred::{
    app::App,
    config::Reader,
    crypto::{api_key::Pepper, audit::AuditKey},
    domain::{
        caller::{Actor, ActorKind, NewApiKey},
        names::Name,
    },
    service::{ServiceError, api_keys, audit::TransactionalAudit},
    shutdown::Signals,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::oneshot;

use super::{client::Client, given, kubernetes, postgres};

/// A regcred of one test, on a port and a database of its own. It stops when it is dropped.
pub struct TestApp {
    /// The database, to look at past the code under test.
    pub pool: PgPool,
    pub address: SocketAddr,
    admin: Client,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestApp {
    pub async fn spawn(pool: PgPool) -> Self {
        Self::configured(pool, &[]).await
    }

    /// Starts with further variables, or others than usual.
    pub async fn configured(pool: PgPool, variables: &[(&str, &str)]) -> Self {
        let mut app = Self::start(pool, variables).await;
        let key = app.new_key("admin", None).await;
        app.admin = app.admin.with_key(&key);
        app
    }

    async fn start(pool: PgPool, variables: &[(&str, &str)]) -> Self {
        once_for_the_process();
        let mut environment = HashMap::from(
            [
                ("REGCRED_DATABASE_URL", postgres::service_url(&pool).await),
                ("REGCRED_DATABASE_MAX_CONNECTIONS", "8".to_owned()),
                ("REGCRED_HTTP_WORKERS", "2".to_owned()),
                ("REGCRED_MASTER_KEYS", format!("test:{}", BASE64_STANDARD.encode([1; 32]))),
                ("REGCRED_API_KEY_PEPPER", pepper_text()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        environment.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let lookup = |name: &str| environment.get(name).cloned();
        let config = Reader::new(&lookup).serve().expect("a good configuration");

        let (started, address) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        // On a runtime of its own, as in production; and everything of it is gone before the database is.
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
                let app = App::build(config, listener, false).await.expect("it starts");
                started.send(app.address).expect("the test waits");
                tokio::select! {
                    ended = app.run(Signals::listen().expect("signals")) => panic!("it ended by itself: {ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        let address = address.await.expect("it starts");
        let anonymous = Client::new(format!("http://{address}"), None);
        Self { pool, address, admin: anonymous, stop: Some(stop), thread: Some(thread) }
    }

    /// Starts another replica on the same database.
    pub async fn beside(other: &Self) -> Self {
        let mut app = Self::start(other.pool.clone(), &[]).await;
        app.admin = Client::new(format!("http://{}", app.address), None).with_key(other.admin.key());
        app
    }

    /// Somebody who may do everything.
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// Somebody without a key.
    pub fn anonymous(&self) -> Client {
        Client::new(format!("http://{}", self.address), None)
    }

    /// Makes an API key; its text.
    pub async fn new_key(&self, name: &str, expires_at: Option<DateTime<Utc>>) -> String {
        // Of the past where a test wants one that has expired.
        let now = expires_at.unwrap_or_default() - TimeDelta::hours(1);
        let new = NewApiKey::parse(name, "admin", None, expires_at, now).expect("a good key");
        let (_, key) = api_keys::create(&self.pool, &self.audit(), &somebody(), &pepper(), &new).await.expect("a key");
        key.text.expose_secret().to_owned()
    }

    /// Revokes an API key past the API.
    pub async fn revoke_key(&self, name: &str, even_last_admin: bool) -> Result<(), ServiceError> {
        let (name, audit) = (Name::parse(name).expect("a name"), self.audit());
        if even_last_admin {
            return api_keys::revoke_even_last_admin(&self.pool, &audit, &somebody(), &name).await;
        }
        api_keys::revoke(&self.pool, &audit, &somebody(), &name).await
    }

    fn audit(&self) -> TransactionalAudit {
        TransactionalAudit::open(&self.pool, Arc::new(audit_key()))
    }

    /// Makes an API key through the API; a client that uses it.
    pub async fn caller(&self, name: &str, role: &str, grants: Option<Value>) -> Client {
        let body = json!({"name": name, "role": role, "grants": grants});
        let created = self.admin.post("/v1/api-keys", &body).await.expect(201);
        self.admin.with_key(created["key"].as_str().expect("a key"))
    }

    /// Registers an account and answers what the API does.
    pub async fn register_account(&self, name: &str, registry: &str, username: &str, password: &str) -> Value {
        let body = json!({"name": name, "registry": registry, "username": username, "password": password});
        self.admin.post("/v1/registry-accounts", &body).await.expect(201)
    }

    /// Registers the Kubernetes cluster of these tests under this name, with its administrator's token.
    pub async fn register_cluster(&self, name: &str) -> Value {
        let token = given("REGCRED_TEST_KUBE_ADMIN_TOKEN");
        self.register_cluster_with(name, &json!({"type": "token", "token": token})).await
    }

    /// Registers the Kubernetes cluster of these tests with other credentials.
    pub async fn register_cluster_with(&self, name: &str, auth: &Value) -> Value {
        let body = json!({
            "name": name, "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": auth,
        });
        self.admin.post("/v1/clusters", &body).await.expect(201)
    }

    /// How many rows each table has: accounts, clusters, API keys.
    pub async fn rows(&self) -> [i64; 3] {
        let counted = sqlx::query_as(
            "SELECT (SELECT count(*) FROM registry_accounts), (SELECT count(*) FROM clusters), (SELECT count(*) FROM api_keys)",
        );
        let (accounts, clusters, keys) = counted.fetch_one(&self.pool).await.expect("counts");
        [accounts, clusters, keys]
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().map(JoinHandle::join);
        if let Some(Err(_)) = ended
            && !thread::panicking()
        {
            panic!("the app panicked");
        }
    }
}

fn pepper_text() -> String {
    BASE64_STANDARD.encode([2; 32])
}

fn pepper() -> Pepper {
    Pepper::parse(&SecretString::from(pepper_text())).expect("a pepper")
}

/// What links the audit record of every [`TestApp`].
pub fn audit_key() -> AuditKey {
    AuditKey::of(&pepper())
}

fn somebody() -> Actor {
    Actor { kind: ActorKind::CommandLine, id: None, name: "somebody".to_owned() }
}

/// What `main` does for the binary; and a signal ends this process, though each app listens for signals too.
fn once_for_the_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Another test may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let signal = runtime.block_on(async { Signals::listen().expect("signals").next().await });
            eprintln!("ended by {signal}");
            std::process::exit(130);
        });
    });
}
