//! The service, built by its own composition root inside the test process.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Once},
    thread::{self, JoinHandle},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, TimeDelta, Utc};
use regcred::{
    app::{App, Listeners, Role},
    config::Reader,
    crypto::{
        audit::AuditKey,
        pepper::{Pepper, Peppers},
    },
    domain::{
        caller::{Actor, ActorKind, ApiKeyFields, NewApiKey},
        names::Name,
    },
    service::{ServiceError, api_keys, audit::TransactionalAudit},
    shutdown::Signals,
    storage,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::sync::oneshot;

use super::{
    client::Client,
    given, kubernetes, postgres,
    registry::{self, Registry},
};

/// A regcred instance for one test, with its own port and database. Stops when dropped.
pub struct TestApp {
    /// Direct access to the database, bypassing the code under test.
    pub pool: PgPool,
    pub address: SocketAddr,
    operations: SocketAddr,
    admin: Client,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestApp {
    pub async fn spawn(pool: PgPool) -> Self {
        Self::configured(pool, &[]).await
    }

    /// Starts the service with extra or overridden environment variables.
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
                ("REGCRED_OPERATIONS_LISTEN", "127.0.0.1:0".to_owned()),
                ("REGCRED_MASTER_KEYS", format!("test:{}", BASE64_STANDARD.encode([1; 32]))),
                ("REGCRED_API_KEY_PEPPER", pepper_text()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        environment.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let lookup = |name: &str| environment.get(name).cloned();
        let config = Reader::new(&lookup).serve().expect("a good configuration");

        let (started, addresses) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        // A separate runtime, as in production. The thread is joined before the database is
        // dropped.
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = || TcpListener::bind("127.0.0.1:0").expect("a free port");
                let operations = config.http.operations_listen.map(|_| listener());
                let listeners = Listeners { api: listener(), operations };
                let app = App::build(config, listeners, Role::All).await.expect("the app builds");
                let operations = app.operations_address.expect("the listener is on");
                started.send([app.address, operations]).expect("the test waits");
                tokio::select! {
                    ended = app.run(Signals::listen().expect("signals")) => panic!("the app ended by itself: {ended:?}"),
                    _ = stopped => {}
                }
            });
        });
        let [address, operations] = addresses.await.expect("the app starts");
        let anonymous = Client::new(format!("http://{address}"), None);
        Self { pool, address, operations, admin: anonymous, stop: Some(stop), thread: Some(thread) }
    }

    /// Starts another replica on the same database.
    pub async fn beside(other: &Self) -> Self {
        let mut app = Self::start(other.pool.clone(), &[]).await;
        app.admin = Client::new(format!("http://{}", app.address), None).with_key(other.admin.key());
        app
    }

    /// Client with the admin role and no restrictions.
    pub fn admin(&self) -> Client {
        self.admin.clone()
    }

    /// Client without a key.
    pub fn anonymous(&self) -> Client {
        Client::new(format!("http://{}", self.address), None)
    }

    /// Client of the operations listener.
    pub fn operations(&self) -> Client {
        Client::new(format!("http://{}", self.operations), None)
    }

    /// The database, for functions of the code under test.
    pub fn storage(&self) -> storage::PgPool {
        self.pool.clone().into()
    }

    /// Creates an admin API key in the database and returns its text.
    pub async fn new_key(&self, name: &str, expires_at: Option<DateTime<Utc>>) -> String {
        // Lies before `expires_at`, so that a test can create a key that has expired.
        let now = expires_at.unwrap_or_default() - TimeDelta::hours(1);
        let fields = ApiKeyFields { name, role: "admin", expires_at, ..ApiKeyFields::default() };
        let new = NewApiKey::parse(fields, now, None).expect("a good key");
        let (_, key) =
            api_keys::create(&self.storage(), &self.audit(), &command_line(), &pepper(), &new).await.expect("a key");
        key.text.expose_secret().to_owned()
    }

    /// Revokes an API key in the database, bypassing the API.
    pub async fn revoke_key(&self, name: &str, even_last_admin: bool) -> Result<(), ServiceError> {
        let (name, audit) = (Name::parse(name).expect("a name"), self.audit());
        if even_last_admin {
            return api_keys::revoke_even_last_admin(&self.storage(), &audit, &command_line(), &name).await;
        }
        api_keys::revoke(&self.storage(), &audit, &command_line(), &name, None).await
    }

    fn audit(&self) -> TransactionalAudit {
        TransactionalAudit::open(&self.storage(), peppers())
    }

    /// Creates an API key through the API and returns a client that uses it.
    pub async fn caller(&self, name: &str, role: &str, grants: Option<Value>) -> Client {
        let body = json!({"name": name, "role": role, "grants": grants});
        let created = self.admin.post("/v1/api-keys", &body).await.expect(201);
        self.admin.with_key(created["key"].as_str().expect("a key"))
    }

    /// Registers an account and returns the response.
    pub async fn register_account(&self, name: &str, registry: &str, username: &str, password: &str) -> Value {
        let body = json!({"name": name, "registry": registry, "username": username, "password": password});
        self.admin.post("/v1/registry-accounts", &body).await.expect(201)
    }

    /// Registers both test registries as accounts `a` and `b`.
    pub async fn register_registries(&self) -> (Registry, Registry) {
        let (a, b) = (registry::a(), registry::b());
        for (name, registry) in [("a", &a), ("b", &b)] {
            self.register_account(name, &registry.address, &registry.username, &registry.password).await;
        }
        (a, b)
    }

    /// Registers the first test cluster under this name, with its administrator's token.
    pub async fn register_cluster(&self, name: &str) -> Value {
        let token = given("REGCRED_TEST_KUBE_ADMIN_TOKEN");
        self.register_cluster_with(name, &json!({"type": "token", "token": token})).await
    }

    /// Registers the first test cluster with the given credentials.
    pub async fn register_cluster_with(&self, name: &str, auth: &Value) -> Value {
        let body = json!({
            "name": name, "server": kubernetes::server(), "caCertificate": kubernetes::file("ca.crt"), "auth": auth,
        });
        self.admin.post("/v1/clusters", &body).await.expect(201)
    }

    /// Row counts of accounts, clusters and API keys.
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

/// Peppers of every [`TestApp`].
pub fn peppers() -> Arc<Peppers> {
    Arc::new(Peppers::new(pepper().into(), None))
}

/// Key of the audit log of every [`TestApp`].
pub fn audit_key() -> AuditKey {
    AuditKey::of(&pepper())
}

fn command_line() -> Actor {
    Actor { kind: ActorKind::CommandLine, id: None, name: "test".to_owned() }
}

/// Initializes the process as `main` does, and ends it on a signal: each app replaces the default
/// action.
fn once_for_the_process() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Fails if another test was first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            let signal = runtime.block_on(async { Signals::listen().expect("signals").next().await });
            eprintln!("ended by {signal}");
            std::process::exit(130);
        });
    });
}
