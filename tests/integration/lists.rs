//! Lists: orders, filters, what grants hide, the summary, and the plans of all of them.

use std::collections::BTreeSet;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::{
    pull_secrets::put,
    support::{app::TestApp, client::Client},
};

mod plans;
mod summary;

/// Inserts accounts: names, times of creation and of expiry, results and labels vary by number.
pub async fn insert_accounts(pool: &PgPool, count: i32) {
    let rows = r#"INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id, labels,
            created_at, expires_at, last_verified_at, last_verification_result, last_verification_detail)
        SELECT gen_random_uuid(), 'account-' || lpad((n * 7919 % $1)::text, 6, '0'), 'reg.example.com', 'dev', '\x00', 'k-1',
            CASE WHEN n % 1000 = 0 THEN '{"team": "rare"}'::jsonb ELSE '{"team": "many"}'::jsonb END,
            now() - (n / 3) * interval '1 minute',
            CASE n % 4 WHEN 0 THEN now() + (n - 20) * interval '1 hour' END,
            CASE WHEN n % 5 > 0 THEN now() END,
            CASE WHEN n % 1000 = 7 THEN 'invalid' WHEN n % 5 > 0 THEN 'valid' END,
            CASE WHEN n % 5 > 0 THEN 'detail' END
        FROM generate_series(0, $1 - 1) AS n"#;
    sqlx::query(rows).bind(count).execute(pool).await.expect("inserted");
}

/// Inserts a cluster and returns its id.
pub async fn insert_cluster(pool: &PgPool, name: &str) -> Uuid {
    let row = "INSERT INTO clusters (id, name, server, auth_type) VALUES ($1, $2, 'https://127.0.0.1:1', 'none')";
    let id = Uuid::now_v7();
    sqlx::query(row).bind(id).bind(name).execute(pool).await.expect("inserted");
    id
}

/// Inserts a pull secret of an account in namespaces of a cluster, without targets, and returns its
/// id.
pub async fn insert_pull_secret(pool: &PgPool, name: &str, account: &str, cluster: &str) -> Uuid {
    let declaration = json!({
        "accounts": [account], "secret": {"name": "pull", "type": "kubernetes.io/dockerconfigjson"},
        "targets": [{"cluster": cluster, "namespaces": ["n-0"]}], "serviceAccounts": [], "deletionPolicy": "delete",
        "adopt": false,
    });
    let id = Uuid::now_v7();
    let row = "INSERT INTO pull_secrets (id, name, declaration) VALUES ($1, $2, $3)";
    sqlx::query(row).bind(id).bind(name).bind(declaration).execute(pool).await.expect("inserted");
    let clusters = "INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
                    SELECT $1, id, false FROM clusters WHERE name = $2";
    let accounts = "INSERT INTO pull_secret_accounts (pull_secret_id, account_id)
                    SELECT $1, id FROM registry_accounts WHERE name = $2";
    for (link, named) in [(clusters, cluster), (accounts, account)] {
        sqlx::query(link).bind(id).bind(named).execute(pool).await.expect("inserted");
    }
    id
}

/// Inserts targets of a pull secret in a cluster, in namespaces from `n-0` on. Every 50th one failed,
/// every 70th one is pending, and every 90th one in conflict. None is due, so the worker leaves them
/// alone.
pub async fn insert_targets(pool: &PgPool, pull_secret: Uuid, cluster: Uuid, count: i32) {
    let rows =
        "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, next_attempt_at, state, pending_since)
        SELECT $1, $2, 'n-' || n, 1, now() + interval '1 day', state, CASE WHEN state <> 'synced' THEN now() - n * interval '1 second' END
        FROM (
            SELECT n, CASE WHEN n % 50 = 1 THEN 'failed' WHEN n % 70 = 2 THEN 'pending' WHEN n % 90 = 3 THEN 'conflict'
                ELSE 'synced' END AS state
            FROM generate_series(0, $3 - 1) AS n
        ) AS every";
    sqlx::query(rows).bind(pull_secret).bind(cluster).bind(count).execute(pool).await.expect("inserted");
}

/// All items of a list, page by page, and the decoded cursors.
pub async fn all(client: &Client, path: &str, query: &str, limit: usize) -> (Vec<Value>, Vec<String>) {
    let (mut items, mut cursors, mut cursor) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = client.get(&format!("{path}?limit={limit}{query}{cursor}")).await.expect(200);
        let found = page["items"].as_array().expect("items");
        assert!(found.len() <= limit);
        items.extend(found.iter().cloned());
        let Some(next) = page["next"].as_str() else { return (items, cursors) };
        let decoded = BASE64_URL_SAFE_NO_PAD.decode(next).expect("base64");
        cursors.push(String::from_utf8(decoded).expect("UTF-8"));
        cursor = format!("&cursor={next}");
    }
}

fn field(items: &[Value], field: &str) -> Vec<String> {
    items.iter().map(|item| item[field].as_str().unwrap_or("~").to_owned()).collect()
}

/// Asserts that the pages of a list in an order are the whole list, sorted by a field and then by
/// the unique one.
async fn assert_order(client: &Client, path: &str, sort: &str, unique: &str) {
    let (mut expected, _) = all(client, path, "", 500).await;
    let key = sort.trim_start_matches('-');
    // Times have as many digits as they need, so their texts do not sort.
    let sortable = |text: &str| match text.parse::<chrono::DateTime<chrono::Utc>>() {
        Ok(time) => format!("{:020}", time.timestamp_micros()),
        Err(_) => text.to_owned(),
    };
    let keys = |item: &Value| (sortable(item[key].as_str().unwrap_or("~")), item[unique].as_str().map(str::to_owned));
    expected.sort_by_key(keys);
    if sort.starts_with('-') {
        expected.reverse();
    }
    for limit in [1, 3, 500] {
        let (found, _) = all(client, path, &format!("&sort={sort}"), limit).await;
        assert_eq!(field(&found, unique), field(&expected, unique), "{path} {sort} {limit}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_order_pages_through_the_whole_list(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 20).await;
    for name in ["dev", "prod", "edge"] {
        insert_cluster(&pool, name).await;
    }
    for name in ["p-2", "p-1", "p-3"] {
        insert_pull_secret(&pool, name, "account-000001", "dev").await;
    }
    // Names of API keys are not unique, and times of expiry may be equal, in the past or none.
    for (name, expires_at) in [("ci", "2090-01-01"), ("ci", "2090-01-01"), ("ops", "2020-01-01"), ("bot", "infinity")] {
        let row = "INSERT INTO api_keys (id, name, role, mac, hash, expires_at, revoked_at)
                   VALUES (gen_random_uuid(), $1, 'viewer', '', '', $2::text::timestamptz, now())";
        sqlx::query(row).bind(name).bind(expires_at).execute(&pool).await.expect("inserted");
    }
    for name in ["gitlab", "github"] {
        let provider = json!({"name": name, "type": "oidc", "issuer": "https://issuer.example.com", "audience": name,
            "rules": [{"claims": {"sub": "ci"}, "role": "viewer"}]});
        app.admin().post("/v1/identity-providers", &provider).await.expect(201);
    }
    let by_name = ["name", "-name", "createdAt", "-createdAt"];
    for path in ["/v1/clusters", "/v1/pull-secrets", "/v1/identity-providers"] {
        for sort in by_name {
            assert_order(&app.admin(), path, sort, "name").await;
        }
    }
    for sort in by_name.into_iter().chain(["expiresAt"]) {
        assert_order(&app.admin(), "/v1/registry-accounts", sort, "name").await;
    }
    for sort in ["name", "-name", "expiresAt"] {
        assert_order(&app.admin(), "/v1/api-keys", sort, "id").await;
    }
    // Without an order, a list has the one that it always had.
    let (by_default, _) = all(&app.admin(), "/v1/registry-accounts", "", 3).await;
    assert!(field(&by_default, "name").is_sorted());
    let (by_default, _) = all(&app.admin(), "/v1/api-keys", "", 3).await;
    assert!(field(&by_default, "id").is_sorted());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_cursor_of_another_order_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 20).await;
    let sorts = ["name", "-name", "createdAt", "-createdAt", "expiresAt"];
    for sort in sorts {
        let page = app.admin().get(&format!("/v1/registry-accounts?limit=1&sort={sort}")).await.expect(200);
        let cursor = page["next"].as_str().expect("more follow").to_owned();
        for other in sorts {
            let answer = app.admin().get(&format!("/v1/registry-accounts?sort={other}&cursor={cursor}")).await;
            if other == sort {
                answer.expect(200);
            } else {
                answer.problem(422, "invalid-request");
                assert_eq!(answer.fields(), ["cursor"], "{sort} in {other}");
            }
        }
    }
    let answer = app.admin().get("/v1/registry-accounts?sort=password&q=%25&result=fine").await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["sort", "q", "result"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn filters_of_accounts_and_keys_combine_with_every_order(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 40).await;
    let (every, _) = all(&app.admin(), "/v1/registry-accounts", "", 500).await;
    let names = |filter: &dyn Fn(&Value) -> bool| {
        let kept = every.iter().filter(|account| filter(account));
        kept.map(|account| account["name"].as_str().expect("a name").to_owned()).collect::<BTreeSet<_>>()
    };
    let has_part = |account: &Value| account["name"].as_str().is_some_and(|name| name.contains("t-00001"));
    let is_valid = |account: &Value| account["lastVerificationResult"] == "valid";
    let expires = |account: &Value| {
        let expires_at = account["expiresAt"].as_str().and_then(|at| at.parse::<chrono::DateTime<chrono::Utc>>().ok());
        expires_at.is_some_and(|at| at <= regcred::clock::now())
    };
    let cases: [(&str, BTreeSet<String>); 6] = [
        ("&q=T-00001", names(&has_part)),
        ("&result=valid", names(&is_valid)),
        ("&expiresWithin=0h", names(&expires)),
        ("&q=t-00001&result=valid", names(&|one| has_part(one) && is_valid(one))),
        ("&q=t-00001&label=team=many", names(&|one| has_part(one) && one["labels"]["team"] == "many")),
        ("&q=nothing", BTreeSet::new()),
    ];
    for (query, expected) in cases {
        assert!(query == "&q=nothing" || !expected.is_empty() && expected.len() < 40, "{query} selects some");
        for sort in ["name", "-name", "createdAt", "-createdAt", "expiresAt"] {
            let (found, _) = all(&app.admin(), "/v1/registry-accounts", &format!("{query}&sort={sort}"), 3).await;
            assert_eq!(found.len(), expected.len(), "{query} {sort}");
            assert_eq!(field(&found, "name").into_iter().collect::<BTreeSet<_>>(), expected, "{query} {sort}");
        }
    }

    let soon = regcred::clock::now() + chrono::TimeDelta::days(5);
    app.new_key("soon", Some(soon)).await;
    app.new_key("gone", None).await;
    app.revoke_key("gone", true).await.expect("revoked");
    let expired = "INSERT INTO api_keys (id, name, role, mac, hash, expires_at) VALUES (gen_random_uuid(), 'late', 'viewer', '', '', now() - interval '1 day')";
    sqlx::query(expired).execute(&pool).await.expect("inserted");
    for (query, expected) in [
        ("&state=revoked", vec!["gone"]),
        ("&state=expired", vec!["late"]),
        ("&state=active&q=SOO", vec!["soon"]),
        ("&expiresWithin=10d&sort=expiresAt", vec!["late", "soon"]),
        ("&expiresWithin=1d", vec!["late"]),
    ] {
        let (found, _) = all(&app.admin(), "/v1/api-keys", query, 1).await;
        assert_eq!(field(&found, "name"), expected, "{query}");
    }
}

/// A selector counts by its expressions too, and what a narrowed caller may not read is counted.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn accounts_are_listed_with_the_number_of_pull_secrets_that_use_them(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_deliveries(&pool).await;
    for (name, operator) in [("selects", "In"), ("excludes", "NotIn")] {
        let expressions = json!([{"key": "team", "operator": operator, "values": ["many", "few"]}]);
        let body = json!({
            "accountSelector": {"matchLabels": {}, "matchExpressions": expressions},
            "secret": {"name": name},
            "targets": [{"cluster": "dev", "namespaces": ["team-a"]}],
        });
        put(&app.admin(), name, &body).await.expect(201);
    }
    let grants = json!({"accounts": ["account-000001"], "clusters": ["prod"], "namespaces": ["nothing"]});
    let narrowed = app.caller("narrowed", "viewer", Some(grants)).await;
    for (client, expected) in [(app.admin(), vec![1, 3, 2, 1, 1]), (narrowed, vec![3])] {
        let (listed, _) = all(&client, "/v1/registry-accounts", "&usedBy=true", 2).await;
        let counts = listed.iter().map(|account| account["usedBy"]["pullSecrets"].as_u64().expect("a number"));
        assert_eq!(counts.collect::<Vec<_>>(), expected);
    }
    let (listed, _) = all(&app.admin(), "/v1/registry-accounts", "", 2).await;
    assert!(listed.iter().all(|account| account.get("usedBy").is_none()));
}

/// Three pull secrets in two clusters with targets in every state, and the account of each.
async fn insert_deliveries(pool: &PgPool) -> [Uuid; 3] {
    insert_accounts(pool, 5).await;
    let (dev, prod) = (insert_cluster(pool, "dev").await, insert_cluster(pool, "prod").await);
    let one = insert_pull_secret(pool, "one", "account-000001", "dev").await;
    let two = insert_pull_secret(pool, "two", "account-000002", "prod").await;
    let all_synced = insert_pull_secret(pool, "quiet", "account-000001", "prod").await;
    insert_targets(pool, one, dev, 120).await;
    insert_targets(pool, two, prod, 30).await;
    insert_targets(pool, two, dev, 2).await;
    insert_targets(pool, all_synced, prod, 1).await;
    [one, two, all_synced]
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn targets_are_found_across_pull_secrets(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_deliveries(&pool).await;
    let admin = app.admin();
    let mut every = Vec::new();
    for name in ["one", "two", "quiet"] {
        every.extend(all(&admin, &format!("/v1/pull-secrets/{name}/targets"), "", 500).await.0);
    }
    assert_eq!(every.len(), 153);
    let key = |target: &Value| ["pullSecret", "cluster", "namespace", "state"].map(|name| target[name].to_string());
    let expected =
        |filter: &dyn Fn(&Value) -> bool| every.iter().filter(|one| filter(one)).map(key).collect::<BTreeSet<_>>();
    let cases: [(&str, BTreeSet<_>); 8] = [
        ("", expected(&|_| true)),
        ("&state=failed&state=conflict", expected(&|one| one["state"] == "failed" || one["state"] == "conflict")),
        ("&state=synced&state=failed", expected(&|one| one["state"] == "failed" || one["state"] == "synced")),
        ("&cluster=dev&state=pending", expected(&|one| one["cluster"] == "dev" && one["state"] == "pending")),
        ("&namespace=n-1", expected(&|one| one["namespace"] == "n-1")),
        ("&pullSecret=two&cluster=dev", expected(&|one| one["pullSecret"] == "two" && one["cluster"] == "dev")),
        (
            "&account=account-000001&state=failed",
            expected(&|one| one["pullSecret"] != "two" && one["state"] == "failed"),
        ),
        ("&account=account-000001&pullSecret=two", BTreeSet::new()),
    ];
    for (query, expected) in cases {
        for limit in [1, 7, 500] {
            let (found, _) = all(&admin, "/v1/targets", query, limit).await;
            assert_eq!(found.len(), expected.len(), "{query} {limit}");
            assert_eq!(found.iter().map(key).collect::<BTreeSet<_>>(), expected, "{query} {limit}");
        }
    }
    // A name that does not exist is refused: an empty list would look healthy.
    let answer = admin.get("/v1/targets?cluster=typo&account=typo&pullSecret=typo").await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["cluster", "account", "pullSecret"]);

    // The list of one pull secret takes the same filters.
    let (found, _) = all(&admin, "/v1/pull-secrets/two/targets", "&cluster=dev&state=failed&state=synced", 1).await;
    assert_eq!(field(&found, "namespace"), ["n-0", "n-1"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pull_secrets_are_found_by_state_place_and_account(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    let [_, two, _] = insert_deliveries(&pool).await;
    let names = async |query: &str| field(&all(&app.admin(), "/v1/pull-secrets", query, 1).await.0, "name");
    for (query, expected) in [
        ("", vec!["one", "quiet", "two"]),
        ("&state=conflict", vec!["one", "two"]),
        ("&state=synced", vec!["quiet"]),
        ("&state=failed", vec![]),
        ("&cluster=dev", vec!["one"]),
        ("&cluster=prod&namespace=n-29", vec!["two"]),
        ("&namespace=n-0&sort=-name", vec!["two", "quiet", "one"]),
        ("&account=account-000001", vec!["one", "quiet"]),
        ("&account=account-000001&state=synced", vec!["quiet"]),
        ("&q=UIE", vec!["quiet"]),
    ] {
        assert_eq!(names(query).await, expected, "{query}");
    }
    for (change, state) in [
        ("UPDATE pull_secret_targets SET state = 'failed' WHERE pull_secret_id = $1 AND state = 'conflict'", "failed"),
        ("UPDATE pull_secret_targets SET state = 'pending' WHERE pull_secret_id = $1 AND state = 'failed'", "pending"),
        ("UPDATE pull_secret_targets SET state = 'synced' WHERE pull_secret_id = $1", "synced"),
        ("UPDATE pull_secrets SET deleted_at = now() WHERE id = $1", "deleting"),
    ] {
        sqlx::query(change).bind(two).execute(&pool).await.expect("changed");
        assert!(names(&format!("&state={state}")).await.contains(&"two".to_owned()), "{state}");
        let shown = app.admin().get("/v1/pull-secrets/two").await.expect(200);
        assert_eq!(shown["status"]["state"], state, "the filter and the status agree");
    }
    let selecting = json!({"accountSelector": {"matchLabels": {"team": "many"}}, "secret": {"name": "pull"},
        "targets": [{"cluster": "dev", "namespaces": ["n-0"]}]});
    app.admin().send(app.admin().request("PUT", "/v1/pull-secrets/selecting").json(&selecting)).await.expect(201);
    assert_eq!(names("&account=account-000003").await, ["selecting"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn lists_contain_what_is_granted_in_every_order_and_name_nothing_else(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 2_500).await;
    for number in 0..1_200 {
        insert_cluster(&pool, &format!("c-{number:04}")).await;
    }
    let grants = json!({"accounts": ["account-00001*", {"matchLabels": {"team": "rare"}}], "clusters": ["c-11*"], "namespaces": ["*"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    for query in ["", "&result=valid", "&q=00001", "&expiresWithin=5d"] {
        let (every, _) = all(&app.admin(), "/v1/registry-accounts", query, 500).await;
        let is_granted = |one: &&Value| {
            one["labels"]["team"] == "rare"
                || one["name"].as_str().is_some_and(|name| name.starts_with("account-00001"))
        };
        let expected: BTreeSet<String> =
            field(&every.iter().filter(is_granted).cloned().collect::<Vec<_>>(), "name").into_iter().collect();
        assert!(!expected.is_empty(), "{query}");
        for sort in ["name", "-name", "createdAt", "-createdAt", "expiresAt"] {
            let (found, cursors) = all(&viewer, "/v1/registry-accounts", &format!("{query}&sort={sort}"), 4).await;
            assert_eq!(field(&found, "name").into_iter().collect::<BTreeSet<_>>(), expected, "{query} {sort}");
            assert_eq!(found.len(), expected.len(), "{query} {sort}");
            for cursor in cursors {
                let names_item = expected.iter().any(|name| cursor.ends_with(name.as_str()));
                assert!(cursor.starts_with('~') || names_item, "{query} {sort}: {cursor} names a hidden row");
            }
        }
    }
    for sort in ["name", "-name", "createdAt", "-createdAt"] {
        let (found, _) = all(&viewer, "/v1/clusters", &format!("&sort={sort}&q=c-11"), 30).await;
        assert_eq!(found.len(), 100, "{sort}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn targets_of_hidden_pull_secrets_are_not_listed(pool: PgPool) {
    let app = TestApp::spawn(pool.clone()).await;
    insert_accounts(&pool, 5).await;
    let dev = insert_cluster(&pool, "dev").await;
    let pull_secrets = r#"INSERT INTO pull_secrets (id, name, declaration)
        SELECT ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'p-' || lpad(n::text, 4, '0'), jsonb_build_object(
            'accounts', jsonb_build_array(CASE n % 100 WHEN 50 THEN 'account-000001' ELSE 'account-000002' END),
            'secret', '{"name": "pull", "type": "kubernetes.io/dockerconfigjson"}'::jsonb,
            'targets', '[{"cluster": "dev", "namespaces": ["n-0"]}]'::jsonb, 'serviceAccounts', '[]'::jsonb,
            'deletionPolicy', 'delete', 'adopt', false)
        FROM generate_series(0, 1099) AS n"#;
    sqlx::query(pull_secrets).execute(&pool).await.expect("inserted");
    let targets = "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, next_attempt_at, state)
        SELECT id, $1, 'n-' || n, 1, now() + interval '1 day', CASE n WHEN 1 THEN 'failed' ELSE 'synced' END FROM pull_secrets, generate_series(0, 2) AS n";
    sqlx::query(targets).bind(dev).execute(&pool).await.expect("inserted");
    let grants = json!({"accounts": ["account-000001"], "clusters": ["dev"], "namespaces": ["n-0"]});
    let viewer = app.caller("viewer", "viewer", Some(grants)).await;
    let expected: Vec<String> = (0..11).map(|number| format!("p-{:04}", number * 100 + 50)).collect();
    for limit in [1, 2, 3, 500] {
        let (found, _) = all(&viewer, "/v1/targets", "", limit).await;
        let mut names = field(&found, "pullSecret");
        assert_eq!(names.len(), 33, "{limit}");
        names.dedup();
        assert_eq!(names, expected, "{limit}");
        let (failed, _) = all(&viewer, "/v1/targets", "&state=failed", limit).await;
        assert_eq!(field(&failed, "pullSecret"), expected, "{limit}");
    }
    let answer = viewer.get("/v1/targets?pullSecret=p-0000&account=account-000002").await;
    answer.problem(422, "invalid-request");
    assert_eq!(answer.fields(), ["account", "pullSecret"], "hidden names look unknown");
}
