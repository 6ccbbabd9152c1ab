//! Sealed values and their destinations: a database writer that redirects a secret gets one that
//! does not open.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use base64::{Engine, prelude::BASE64_STANDARD};
use regcred::{
    crypto::{
        ring::Ring as _,
        sealer::{KeyRing, Sealer},
    },
    domain::sealed::{RegistryDestination, SealForm},
    storage::sealed::SealedColumn,
};
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};
use uuid::Uuid;

use crate::{
    lifecycle::{render, store_accounts},
    mints::token_service::{PATH, TokenService},
    support::{
        app::TestApp,
        client::Client,
        eventually, kubernetes,
        listener::listen,
        postgres::{service_url, superuser},
        process::{Installation, Service},
    },
};

async fn execute(pool: &PgPool, sql: &'static str) {
    sqlx::query(sql).execute(pool).await.expect(sql);
}

/// Executes a statement as superuser, which triggers let pass.
async fn force(pool: &PgPool, sql: &'static str) {
    sqlx::query(sql).execute(&mut superuser(pool).await).await.expect(sql);
}

/// Marks a database as bound so long ago that unbound values are refused.
async fn settle(pool: &PgPool) {
    execute(pool, "INSERT INTO sealed_values_binding (completed_at) VALUES (now() - interval '1 hour')").await;
}

/// Whether each value is bound: accounts by name, then clusters by name.
async fn forms(pool: &PgPool) -> Vec<(String, bool)> {
    let rows = sqlx::query_as(
        "SELECT name, password_key_id LIKE '%+bound' FROM (
             SELECT 1 AS place, name, password_key_id FROM registry_accounts
             UNION ALL SELECT 2, name, credential_key_id FROM clusters WHERE credential IS NOT NULL
         ) AS one ORDER BY place, name COLLATE \"C\"",
    );
    rows.fetch_all(pool).await.expect("rows")
}

fn all(names: &[&str], is_bound: bool) -> Vec<(String, bool)> {
    names.iter().map(|name| ((*name).to_owned(), is_bound)).collect()
}

fn installation(pool: &PgPool) -> Installation {
    Installation::new(pool.connect_options().to_url_lossy().as_str())
}

/// Returns key id, state, rows and bound rows of `master-key list`, and its summary.
async fn list(installation: &Installation) -> (Vec<[String; 4]>, String) {
    let exit = installation.run(&["master-key", "list"]).await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    let lines = exit.stdout.lines().skip(1).map(|line| {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        words.try_into().expect("four columns")
    });
    (lines.collect(), exit.stderr)
}

async fn password_of(client: &Client, account: &str) -> Option<String> {
    let answer = client.post("/v1/docker-configs", &json!({"accounts": [account]})).await;
    if answer.status == 500 {
        answer.problem(500, "internal");
        return None;
    }
    let config = &answer.expect(200)["config"]["auths"];
    let entry = config.as_object().expect("auths").values().next().expect("an entry");
    Some(entry["password"].as_str().expect("a password").to_owned())
}

// ---- Redirection ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn password_of_a_redirected_account_does_not_open(pool: PgPool) {
    settle(&pool).await;
    let called = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&called);
    let attacker = listen(move |_| {
        counter.fetch_add(1, Ordering::SeqCst);
    });
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let registry = json!({"name": "a", "registry": "127.0.0.1:1/team", "username": "robot", "password": "canary"});
    app.admin().post("/v1/registry-accounts", &registry).await.expect(201);
    assert_eq!(password_of(&app.admin(), "a").await.as_deref(), Some("canary"));
    let verify = async || app.admin().post("/v1/registry-accounts/a/verify", &json!({})).await;
    // Nothing listens at the registry.
    assert_eq!(verify().await.expect(200)["result"], "unreachable");

    // Another path at the same registry is the same destination.
    execute(&app.pool, "UPDATE registry_accounts SET registry = '127.0.0.1:1'").await;
    assert_eq!(verify().await.expect(200)["result"], "unreachable");

    for redirect in [
        format!("registry = '{attacker}'"),
        "plain_http = true".to_owned(),
        format!("ca_certificate = '{}'", kubernetes::file("ca.crt").trim()),
    ] {
        let mut tx = app.pool.begin().await.expect("a transaction");
        let sql = sqlx::AssertSqlSafe(format!("UPDATE registry_accounts SET {redirect}"));
        sqlx::raw_sql(sql).execute(&mut *tx).await.expect("redirected");
        tx.commit().await.expect("committed");
        verify().await.problem(500, "internal");
        if redirect.starts_with("registry") {
            // The cached row of the old registry is evicted.
            eventually("the password does not open", async || {
                password_of(&app.admin(), "a").await.is_none().then_some(())
            })
            .await;
        }
        let restore =
            "UPDATE registry_accounts SET registry = '127.0.0.1:1', plain_http = false, ca_certificate = NULL";
        execute(&app.pool, restore).await;
        assert_eq!(verify().await.expect(200)["result"], "unreachable", "{redirect}");
    }
    assert_eq!(called.load(Ordering::SeqCst), 0, "the attacker's registry was called");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn credential_of_a_redirected_cluster_does_not_open(pool: PgPool) {
    settle(&pool).await;
    let app = TestApp::spawn(pool).await;
    app.register_cluster("dev").await;
    app.register_account("a", "ghcr.io", "robot", "x").await;
    let second = kubernetes::SECOND.server();
    let namespace = kubernetes::new_namespace().await;
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/secrets");
    let deliver = async |name: &str| app.admin().post(&path, &json!({"name": name, "accounts": ["a"]})).await;
    deliver("before").await.expect(201);
    let stored: (String, String) =
        sqlx::query_as("SELECT server, ca_certificate FROM clusters").fetch_one(&app.pool).await.expect("the cluster");

    for (column, value) in [
        ("server", second.as_str()),
        ("ca_certificate", kubernetes::SECOND.file("ca.crt").trim()),
        ("tls_server_name", "attacker.example"),
    ] {
        // A new version, so that the cached client is not used.
        let sql = sqlx::AssertSqlSafe(format!("UPDATE clusters SET {column} = $1, version = version + 1"));
        sqlx::query(sql).bind(value).execute(&app.pool).await.expect("redirected");
        deliver("redirected").await.problem(500, "internal");
        let restored = sqlx::query(
            "UPDATE clusters SET server = $1, ca_certificate = $2, tls_server_name = NULL, version = version + 1",
        );
        restored.bind(&stored.0).bind(&stored.1).execute(&app.pool).await.expect("restored");
    }

    deliver("after").await.expect(201);
    assert_eq!(kubernetes::secret_names(&namespace).await, ["after", "before"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn value_moved_to_another_row_does_not_open_in_either_form(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let swap = "UPDATE registry_accounts SET password = other.password, password_key_id = other.password_key_id
                FROM registry_accounts AS other WHERE other.id <> registry_accounts.id";
    for (form, names) in [("unbound", ["a", "b"]), ("bound", ["c", "d"])] {
        execute(&app.pool, "DELETE FROM registry_accounts").await;
        if form == "bound" {
            execute(&app.pool, "INSERT INTO sealed_values_binding DEFAULT VALUES").await;
        }
        for name in names {
            app.register_account(name, "ghcr.io", "robot", name).await;
        }
        assert_eq!(forms(&app.pool).await, all(&names, form == "bound"));
        execute(&app.pool, swap).await;
        for name in names {
            eventually("the value does not open", async || {
                password_of(&app.admin(), name).await.is_none().then_some(())
            })
            .await;
        }
        execute(&app.pool, swap).await;
        eventually("the value opens again", async || {
            (password_of(&app.admin(), names[0]).await? == names[0]).then_some(())
        })
        .await;
    }
}

// ---- Changes ----

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn changed_destination_without_a_new_secret_is_sealed_again(pool: PgPool) {
    settle(&pool).await;
    let app = TestApp::spawn(pool).await;
    let admin = app.admin();
    let account = json!({
        "name": "a", "registry": "reg.example.com/one", "username": "robot", "password": "kept", "plainHttp": true,
    });
    admin.post("/v1/registry-accounts", &account).await.expect(201);
    for change in
        [json!({"registry": "reg.example.com/two"}), json!({"plainHttp": false}), json!({"username": "other"})]
    {
        admin.patch("/v1/registry-accounts/a", &change).await.expect(200);
        assert_eq!(password_of(&admin, "a").await.as_deref(), Some("kept"), "{change}");
    }
    let moved = json!({"registry": "other.example.com", "password": "new"});
    admin.patch("/v1/registry-accounts/a", &moved).await.expect(200);
    assert_eq!(password_of(&admin, "a").await.as_deref(), Some("new"));

    // An import finds an unchanged password, and replaces a changed one.
    let import = async |password: &str| {
        let document = json!({"auths": {"import.example.com": {"username": "u", "password": password}}});
        let request = admin.request("POST", "/v1/registry-accounts:import").json(&document);
        admin.send(request).await.expect(200)["items"][0]["outcome"].clone()
    };
    assert_eq!([import("x").await, import("x").await, import("y").await], ["created", "unchanged", "updated"]);

    let cluster = json!({"name": "c", "server": "https://k", "auth": {"type": "token", "token": "t"}});
    admin.post("/v1/clusters", &cluster).await.expect(201);
    assert_eq!(admin.patch("/v1/clusters/c", &json!({"allowPlainHttp": true})).await.expect(200)["version"], 2);
    let moved = json!({"server": "https://l", "auth": {"type": "token", "token": "t2"}});
    assert_eq!(admin.patch("/v1/clusters/c", &moved).await.expect(200)["version"], 3);
    assert_eq!(admin.patch("/v1/clusters/c", &json!({"allowPlainHttp": false})).await.expect(200)["version"], 4);
    assert!(forms(&app.pool).await.iter().all(|(_, is_bound)| *is_bound));
}

// ---- The mark ----

async fn register(client: &Client, name: &str, password: &str) {
    let registry = format!("{name}.example.com");
    let body = json!({"name": name, "registry": registry, "username": "robot", "password": password});
    client.post("/v1/registry-accounts", &body).await.expect(201);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn running_service_seals_bound_values_from_the_mark_on(pool: PgPool) {
    let installation = installation(&pool);
    let services: [Service; 2] = [installation.serve().await, installation.serve().await];
    let key = installation.new_key("admin").await;
    let [one, other] = services.each_ref().map(|service| service.client(&key));
    register(&one, "a", "a").await;
    let cluster = json!({"name": "k", "server": "https://k", "auth": {"type": "token", "token": "t"}});
    one.post("/v1/clusters", &cluster).await.expect(201);
    assert_eq!(forms(&pool).await, all(&["a", "k"], false));
    let (keys, summary) = list(&installation).await;
    assert_eq!(keys[0][1..], ["seals", "2", "0"]);
    assert!(summary.contains("2 values are not bound") && summary.contains("rotate --bind"), "{summary}");
    // Plain rotation leaves the form.
    installation.must_run(&["master-key", "generate", "--file", &ring_file(&installation)]).await;
    installation.must_run(&["master-key", "rotate"]).await;
    assert_eq!(forms(&pool).await, all(&["a", "k"], false));

    installation.must_run(&["master-key", "rotate", "--bind"]).await;

    assert_eq!(forms(&pool).await, all(&["a", "k"], true));
    assert_eq!(password_of(&one, "a").await.as_deref(), Some("a"));
    assert_eq!(password_of(&other, "a").await.as_deref(), Some("a"));
    // Without a pause: the mark is read in the transaction that seals.
    register(&one, "b", "b").await;
    other.patch("/v1/registry-accounts/a", &json!({"password": "a2"})).await.expect(200);
    other.patch("/v1/clusters/k", &json!({"allowPlainHttp": true})).await.expect(200);
    assert_eq!(forms(&pool).await, all(&["a", "b", "k"], true));
    let (keys, summary) = list(&installation).await;
    assert_eq!(keys[0][1..], ["seals", "3", "3"]);
    assert_eq!(summary, "All values are bound to their destination.\n");
    // Plain rotation keeps the form of a marked database.
    installation.must_run(&["master-key", "generate", "--file", &ring_file(&installation)]).await;
    installation.must_run(&["master-key", "rotate"]).await;
    assert_eq!(forms(&pool).await, all(&["a", "b", "k"], true));
    let (keys, _) = list(&installation).await;
    assert_eq!([&keys[0][2..], &keys[1][2..]], [["3", "3"], ["0", "0"]]);
    assert_eq!(password_of(&one, "a").await.as_deref(), Some("a2"));
}

fn ring_file(installation: &Installation) -> String {
    installation.variable("REGCRED_MASTER_KEYS_FILE")
}

/// A transaction that sealed an unbound value commits before the values are bound.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn mark_waits_for_transactions_that_did_not_see_it(pool: PgPool) {
    let installation = installation(&pool);
    store_accounts(&pool, &installation, 2).await;
    let mut tx = pool.begin().await.expect("a transaction");
    let is_marked: bool =
        sqlx::query_scalar("SELECT lock_sealed_values_mark()").fetch_one(&mut *tx).await.expect("unmarked");
    assert!(!is_marked);
    let command = installation.spawn(&["master-key", "rotate", "--bind"]);
    let waiting = "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database
                   WHERE datname = current_database() AND locktype = 'advisory' AND NOT granted";
    eventually("the command waits", async || {
        let count: i64 = sqlx::query_scalar(waiting).fetch_one(&pool).await.expect("locks");
        (count > 0).then_some(())
    })
    .await;
    // As a service that sealed it in this transaction.
    sqlx::query("UPDATE registry_accounts SET version = version + 1").execute(&mut *tx).await.expect("written");
    assert_eq!(forms(&pool).await, all(&["account-0", "account-1"], false));

    tx.commit().await.expect("committed");

    let exit = command.wait().await;
    assert_eq!(exit.code, Some(0), "{exit:?}");
    assert_eq!(forms(&pool).await, all(&["account-0", "account-1"], true));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn killed_binding_loses_nothing_and_can_be_repeated(pool: PgPool) {
    const COUNT: usize = 1_200;
    let installation = installation(&pool);
    store_accounts(&pool, &installation, COUNT).await;
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    // A lock on the last row blocks the last batch.
    let mut lock = pool.begin().await.expect("a transaction");
    let last = sqlx::query("SELECT id FROM registry_accounts ORDER BY id DESC LIMIT 1 FOR UPDATE");
    last.fetch_one(&mut *lock).await.expect("the last row");
    let command = installation.spawn(&["master-key", "rotate", "--bind"]);
    eventually("two batches committed", async || command.stderr().contains("1000 values").then_some(())).await;

    command.signal("KILL");

    assert_eq!(command.wait().await.code, None);
    lock.rollback().await.expect("released");
    let (keys, summary) = list(&installation).await;
    assert_eq!(keys[0][2..], ["1200", "1000"]);
    assert!(summary.contains("200 older ones are not"), "{summary}");
    // Both forms open, and new values are bound.
    render(&client, 700..COUNT).await;
    for password in ["another", "password-1199"] {
        client.patch("/v1/registry-accounts/account-1199", &json!({"password": password})).await.expect(200);
    }

    let repeated = installation.run(&["master-key", "rotate", "--bind"]).await;

    assert!(repeated.code == Some(0) && repeated.stderr.contains("199 values"), "{repeated:?}");
    assert_eq!(list(&installation).await.0[0][2..], ["1200", "1200"]);
    render(&client, 700..COUNT).await;
    let again = installation.run(&["master-key", "rotate", "--bind"]).await;
    assert!(again.code == Some(0) && again.stderr.contains("0 values"), "{again:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unbound_value_is_refused_once_all_values_are_bound(pool: PgPool) {
    let installation = installation(&pool);
    store_accounts(&pool, &installation, 3).await;
    execute(&pool, "CREATE TABLE stolen AS SELECT id, password, password_key_id FROM registry_accounts").await;
    installation.must_run(&["master-key", "rotate", "--bind"]).await;
    force(&pool, "UPDATE sealed_values_binding SET completed_at = now() - interval '1 hour'").await;
    let service = installation.serve().await;
    let key = installation.new_key("admin").await;
    let client = service.client(&key);
    render(&client, 0..3).await;

    let redirect = "UPDATE registry_accounts AS one
        SET password = stolen.password, password_key_id = stolen.password_key_id, registry = 'attacker.example'
        FROM stolen WHERE stolen.id = one.id AND one.name = 'account-1'";
    execute(&pool, redirect).await;

    eventually("the value is refused", async || password_of(&client, "account-1").await.is_none().then_some(())).await;
    render(&client, 0..1).await;
    // No command makes it open.
    for arguments in [&["master-key", "rotate", "--bind"][..], &["master-key", "rotate"]] {
        let exit = installation.run(arguments).await;
        assert!(exit.code == Some(1) && exit.stderr.contains("1 skipped"), "{exit:?}");
    }
    let (keys, summary) = list(&installation).await;
    assert_eq!(keys[0][2..], ["3", "2"]);
    assert!(summary.starts_with("1 values are not bound to their destination and do not open"), "{summary}");
    // The role of the service cannot remove the mark. If another one does, a running process does not
    // forget.
    let role = PgPool::connect(&service_url(&pool).await).await.expect("the role of the service");
    for sql in ["DELETE FROM sealed_values_binding", "UPDATE sealed_values_binding SET completed_at = NULL"] {
        let refused = sqlx::query(sql).execute(&role).await.expect_err(sql).to_string();
        assert!(refused.contains("not allowed"), "{refused}");
    }
    role.close().await;
    force(&pool, "DELETE FROM sealed_values_binding").await;
    assert_eq!(password_of(&client, "account-1").await, None);
    // A new one knows by its configuration.
    let pinned = installation.with("REGCRED_REQUIRE_BOUND_VALUES", "true");
    let service = pinned.serve().await;
    assert_eq!(password_of(&service.client(&key), "account-1").await, None);
    let metrics = service.operations().get("/metrics").await;
    let counted = metrics.body.lines().find(|line| line.starts_with("regcred_sealed_values_unbound "));
    assert_eq!(counted, Some("regcred_sealed_values_unbound 1"), "{}", metrics.body);
    register(&service.client(&key), "new", "x").await;
    assert_eq!(forms(&pool).await.last(), Some(&("new".to_owned(), true)));
    // The remedy.
    let body = json!({"password": "set-again", "registry": "account-1.example.com"});
    service.client(&key).patch("/v1/registry-accounts/account-1", &body).await.expect(200);
    assert_eq!(password_of(&service.client(&key), "account-1").await.as_deref(), Some("set-again"));
}

/// Values of several keys and of both forms, as an operator may leave them.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn binding_also_reseals_values_of_older_keys(pool: PgPool) {
    let installation = installation(&pool);
    store_accounts(&pool, &installation, 2).await;
    installation.must_run(&["master-key", "generate", "--file", &ring_file(&installation)]).await;
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    register(&client, "new", "x").await;
    let rows = |keys: &[[String; 4]]| -> Vec<Value> { keys.iter().map(|key| json!([key[2], key[3]])).collect() };
    assert_eq!(rows(&list(&installation).await.0), [json!(["1", "0"]), json!(["2", "0"])]);

    installation.must_run(&["master-key", "rotate", "--bind"]).await;

    assert_eq!(rows(&list(&installation).await.0), [json!(["3", "3"]), json!(["0", "0"])]);
    let ring = fs::read_to_string(ring_file(&installation)).expect("a ring");
    fs::write(ring_file(&installation), ring.lines().next().expect("the new key")).expect("written");
    drop(service);
    let service = installation.serve().await;
    render(&service.client(&installation.new_key("admin-2").await), 0..2).await;
}

// ---- Secrets of sources ----

/// Rows and bound rows of each key of `master-key list`.
fn counts(keys: &[[String; 4]]) -> Vec<[&str; 2]> {
    keys.iter().map(|key| [key[2].as_str(), key[3].as_str()]).collect()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn secret_of_a_source_is_sealed_again_with_a_new_key(pool: PgPool) {
    let installation = installation(&pool).with("REGCRED_MINT_ALLOW", "127.0.0.1");
    let (key, provider) = (installation.new_key("admin").await, TokenService::start());
    let service = installation.serve().await;
    let mut account = provider.account();
    // A part of the destination that the rotation reads as a digest.
    account["caCertificate"] = json!(kubernetes::file("ca.crt"));
    service.client(&key).post("/v1/registry-accounts", &account).await.expect(201);
    // The password and the secret, which is bound from the start.
    let (keys, summary) = list(&installation).await;
    assert_eq!(counts(&keys), [["2", "1"]]);
    assert!(summary.starts_with("1 values are not bound"), "{summary}");

    installation.must_run(&["master-key", "generate", "--file", &ring_file(&installation)]).await;
    assert_eq!(counts(&list(&installation).await.0), [["0", "0"], ["2", "1"]]);
    installation.must_run(&["master-key", "rotate"]).await;
    assert_eq!(counts(&list(&installation).await.0), [["2", "1"], ["0", "0"]]);
    installation.must_run(&["master-key", "rotate", "--bind"]).await;
    let (keys, summary) = list(&installation).await;
    assert_eq!(counts(&keys), [["2", "2"], ["0", "0"]]);
    assert_eq!(summary, "All values are bound to their destination.\n");

    // The old key is not needed any more, and the provider gets the same secret.
    let ring = fs::read_to_string(ring_file(&installation)).expect("a ring");
    fs::write(ring_file(&installation), ring.lines().next().expect("the new key")).expect("written");
    drop(service);
    let service = installation.serve().await;
    let minted = service.client(&key).post(&format!("{PATH}/mint"), &json!({})).await.expect(200);
    assert_eq!(minted["mint"]["serial"], 2);
    let secret = BASE64_STANDARD.encode("regcred:canary-secret");
    assert_eq!(provider.requests.text().matches(&secret).count(), 2);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unbound_secret_of_a_source_is_counted_and_refused(pool: PgPool) {
    let installation =
        installation(&pool).with("REGCRED_MINT_ALLOW", "127.0.0.1").with("REGCRED_REQUIRE_BOUND_VALUES", "true");
    let (key, provider) = (installation.new_key("admin").await, TokenService::start());
    let service = installation.serve().await;
    service.client(&key).post("/v1/registry-accounts", &provider.account()).await.expect(201);
    drop(service);
    // In the form that no release writes.
    let ring = fs::read_to_string(ring_file(&installation)).expect("a ring");
    let sealer = Sealer::new(KeyRing::parse(&SecretString::from(ring)).expect("a ring"), None);
    let (id, source): (Uuid, String) =
        sqlx::query_as("SELECT account_id, source FROM account_mints").fetch_one(&pool).await.expect("a row");
    let destination = RegistryDestination { authority: "registry.example.com", plain_http: true, ca: None };
    let slot = SealedColumn::mint_secret(id, &source, &destination);
    let sealed = sealer.seal(SealForm::Unbound, &slot, &SecretString::from("canary-secret")).expect("sealed");
    let unbound = sqlx::query("UPDATE account_mints SET secret = $1, secret_key_id = $2");
    unbound.bind(sealed.bytes).bind(sealed.key_id).execute(&pool).await.expect("stored");

    let service = installation.serve().await;

    let refused = service.client(&key).post(&format!("{PATH}/mint"), &json!({})).await;
    let detail = refused.problem(502, "mint-failed")["detail"].to_string();
    assert!(detail.contains("(misconfigured)") && detail.contains("does not open"), "{detail}");
    assert_eq!(provider.requests.count(), 1);
    // Counted in the background.
    eventually("the value is counted", async || {
        let metrics = service.operations().get("/metrics").await.body;
        let counted = metrics.lines().find(|line| line.starts_with("regcred_sealed_values_unbound "))?;
        assert_eq!(counted, "regcred_sealed_values_unbound 1");
        Some(())
    })
    .await;
    // No command makes it open.
    let exit = installation.run(&["master-key", "rotate"]).await;
    assert!(exit.code == Some(1) && exit.stderr.contains("1 skipped"), "{exit:?}");
    assert_eq!(counts(&list(&installation).await.0), [["2", "1"]]);
}
