//! A registry that knows minted logins only. The provider writes each one that it issues into the
//! registry's htpasswd file.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{
    ALLOW,
    fakes::{
        self,
        aws::{Aws, USER},
    },
};
use crate::{
    pull_secrets::{declaration, find_secret, put},
    support::{
        app::TestApp,
        eventually, kubernetes,
        registry::{assert_refused, skopeo_reads},
    },
    verify::registries::{Setup, TAGGED, TestRegistry, htpasswd},
};

/// Refreshes after the first mint.
const REFRESHES: i64 = 3;

/// Replaces a file, which the registry reads while it is in use.
fn replace(file: &Path, content: &str) {
    let new = file.with_extension("new");
    fs::write(&new, content).expect("written");
    fs::rename(new, file).expect("renamed");
}

/// Docker config in the cluster, and the user name in it.
async fn delivered(namespace: &str) -> Option<(String, String)> {
    let document = kubernetes::document(&find_secret(namespace, "team-a-pull").await?);
    let parsed: Value = serde_json::from_str(&document).expect("JSON");
    let entry = parsed["auths"].as_object().and_then(|auths| auths.values().next()).expect("an entry");
    let username = entry["username"].as_str().expect("a user name").to_owned();
    Some((document, username))
}

/// Waits until the account has this serial, and the cluster the login with this number.
async fn until_delivered(app: &TestApp, namespace: &str, serial: i64) -> String {
    eventually("account and Secret agree", async || {
        let account = app.admin().get("/v1/registry-accounts/minted").await.expect(200);
        let (document, username) = delivered(namespace).await?;
        (account["mint"]["serial"] == serial && username == format!("AWS-{serial}")).then_some(document)
    })
    .await
}

/// User name of a pull, and its result.
type Pull = (String, Result<(), String>);

/// Pulls of a node: with the Secret that is in the cluster at that moment, one after the other.
struct Puller {
    pulled: Arc<Mutex<Vec<Pull>>>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Puller {
    fn start(namespace: &str, image: &str) -> Self {
        let (pulled, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (results, stopped) = (Arc::clone(&pulled), Arc::clone(&stop));
        let (namespace, image) = (namespace.to_owned(), image.to_owned());
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::SeqCst) {
                let (document, username) = delivered(&namespace).await.expect("the Secret is there");
                let image = image.clone();
                let pull = tokio::task::spawn_blocking(move || skopeo_reads(&document, &image)).await;
                results.lock().push((username, pull.expect("skopeo runs")));
            }
        });
        Self { pulled, stop, task }
    }

    /// Waits until an image was pulled with this user name.
    async fn until_pulled(&self, username: &str) {
        eventually("an image is pulled", async || {
            self.pulled.lock().iter().any(|(user, _)| user == username).then_some(())
        })
        .await;
    }

    async fn stop(self) -> Vec<Pull> {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("the pulls end");
        std::mem::take(&mut self.pulled.lock())
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn registry_accepts_every_pull_while_logins_are_replaced(pool: PgPool) {
    let app = TestApp::configured(pool, ALLOW).await;
    let registry = TestRegistry::start(Setup { users: &[("other", "canary-other")], ..Setup::default() }).await;
    let file = registry.htpasswd();
    let aws = Arc::new(Aws::issuing(None, move |number| {
        let (username, password) = (format!("AWS-{number}"), format!("canary-login-{number}"));
        let known = fs::read_to_string(&file).expect("an htpasswd file");
        replace(&file, &(known + &htpasswd(&username, &password)));
        (username, password)
    }));
    let endpoint = fakes::serve(&aws);
    let image = format!("{}/{TAGGED}:3", registry.address);
    app.register_cluster("dev").await;
    let namespace = kubernetes::new_namespace().await;
    let identity = json!({"type": "accessKey", "accessKeyId": USER.id, "secretAccessKey": USER.secret});
    let account = json!({
        "name": "minted", "registry": registry.address.to_string(), "plainHttp": true,
        "source": {"type": "ecr", "region": "eu-central-1", "endpoint": endpoint, "identity": identity},
    });
    app.admin().post("/v1/registry-accounts", &account).await.expect(201);
    put(&app.admin(), "team-a", &declaration(&["minted"], "dev", &[&namespace])).await.expect(201);
    let first = until_delivered(&app, &namespace, 1).await;

    let puller = Puller::start(&namespace, &image);
    puller.until_pulled("AWS-1").await;
    for serial in 2..=1 + REFRESHES {
        let due = sqlx::query("UPDATE account_mints SET next_attempt_at = now()").execute(&app.pool).await;
        assert_eq!(due.expect("due").rows_affected(), 1);
        until_delivered(&app, &namespace, serial).await;
        puller.until_pulled(&format!("AWS-{serial}")).await;
    }
    let pulled = puller.stop().await;
    let failed: Vec<_> = pulled.iter().filter(|(_, pull)| pull.is_err()).collect();
    assert!(failed.is_empty(), "{} of {}: {failed:?}", failed.len(), pulled.len());

    // The registry forgets all logins but the last, which is the one in the cluster.
    let last = until_delivered(&app, &namespace, 1 + REFRESHES).await;
    let file = registry.htpasswd();
    let known = fs::read_to_string(&file).expect("an htpasswd file");
    replace(&file, known.lines().last().expect("a line"));
    assert_refused(skopeo_reads(&first, &image));
    skopeo_reads(&last, &image).expect("the last login");
}
