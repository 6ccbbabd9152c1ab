//! Lists of pull secrets for callers that may see some of them.

use std::collections::BTreeSet;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use regcred::{
    domain::{
        caller::Role,
        grants::Grants,
        listing::{ListRequest, Next, Position, ResourceSort, Sort},
    },
    storage::{
        self,
        pull_secrets::listing::{PullSecretFilter, list},
    },
};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::declaration;
use crate::support::{
    app::TestApp,
    client::{Answer, Client},
};

/// Inserts pull secrets of another team, with names from `m-00001` on, and three of team `a` among
/// them.
async fn fill(pool: &PgPool, foreign: i32) {
    let rows = r#"INSERT INTO pull_secrets (id, name, declaration)
        SELECT gen_random_uuid(), name, jsonb_build_object(
            'accounts', jsonb_build_array(team), 'secret', '{"name": "pull", "type": "kubernetes.io/dockerconfigjson"}'::jsonb,
            'targets', jsonb_build_array(jsonb_build_object('cluster', 'dev', 'namespaces', jsonb_build_array(team || '-ns'))),
            'serviceAccounts', '[]'::jsonb, 'deletionPolicy', 'delete', 'adopt', false)
        FROM (
            SELECT 'm-' || lpad(n::text, 5, '0') AS name, 'b' AS team FROM generate_series(1, $1) AS n
            UNION ALL SELECT name, 'a' FROM unnest(ARRAY['a-first', 'm-01200-own', 'z-last']) AS name
        ) AS every"#;
    sqlx::query(rows).bind(foreign).execute(pool).await.expect("inserted");
}

async fn resources(app: &TestApp) {
    for name in ["a", "b"] {
        app.register_account(name, &format!("{name}.example.com"), "dev", "secret").await;
    }
    let cluster = json!({"name": "dev", "server": "https://127.0.0.1:1", "auth": {"type": "none"}});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
}

fn grants_of_a() -> Value {
    json!({"accounts": ["a"], "clusters": ["dev"], "namespaces": ["a-*"]})
}

/// Names on a page, and the decoded cursor of the next one.
fn page(answer: &Answer) -> (Vec<String>, Option<(String, String)>) {
    let page = answer.expect(200);
    let items = page["items"].as_array().expect("items");
    let names = items.iter().map(|item| item["name"].as_str().expect("a name").to_owned()).collect();
    let next = page["next"].as_str().map(|next| {
        let decoded = BASE64_URL_SAFE_NO_PAD.decode(next).expect("base64");
        (next.to_owned(), String::from_utf8(decoded).expect("UTF-8"))
    });
    (names, next)
}

/// All names of a list, and the number of its pages.
async fn names(client: &Client, limit: usize) -> (Vec<String>, usize) {
    let (mut all, mut pages, mut cursor) = (Vec::new(), 0, String::new());
    loop {
        let answer = client.get(&format!("/v1/pull-secrets?limit={limit}{cursor}")).await;
        let (names, next) = page(&answer);
        assert!(names.len() <= limit);
        all.extend(names);
        pages += 1;
        let Some((next, decoded)) = next else { return (all, pages) };
        assert!(!decoded.contains("m-0") || decoded == "m-01200-own", "the cursor names a hidden row: {decoded}");
        cursor = format!("&cursor={next}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn list_beside_many_hidden_pull_secrets_is_complete_and_names_none(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    resources(&app).await;
    fill(&app.pool, 2_500).await;
    let viewer = app.caller("viewer", "viewer", Some(grants_of_a())).await;

    let (own, pages) = names(&viewer, 50).await;
    assert_eq!((own, pages), (vec!["a-first".to_owned(), "m-01200-own".to_owned(), "z-last".to_owned()], 3));
    for limit in [1, 2, 500] {
        assert_eq!(names(&viewer, limit).await.0, ["a-first", "m-01200-own", "z-last"], "{limit}");
    }
    let none = json!({"accounts": [], "clusters": ["dev"], "namespaces": ["*"]});
    let nothing = app.caller("nothing", "viewer", Some(none)).await;
    assert_eq!(names(&nothing, 50).await, (vec![], 3));
    // A caller who may see everything gets full pages.
    let all = app.admin().get("/v1/pull-secrets?limit=500").await;
    assert_eq!(page(&all).0.len(), 500);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn forged_cursor_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    resources(&app).await;
    fill(&app.pool, 1_100).await;
    let viewer = app.caller("viewer", "viewer", Some(grants_of_a())).await;
    let (_, next) = page(&viewer.get("/v1/pull-secrets").await);
    let (next, sealed) = next.expect("more rows follow");
    viewer.get(&format!("/v1/pull-secrets?cursor={next}")).await.expect(200);
    let cut = &sealed[..sealed.len() - 1];
    for forged in ["~", "~m-00500", "Not a name", "", "\0", cut, &format!("{sealed}A")] {
        let cursor = BASE64_URL_SAFE_NO_PAD.encode(forged);
        let answer = viewer.get(&format!("/v1/pull-secrets?cursor={cursor}")).await;
        answer.problem(422, "invalid-request");
        assert_eq!(answer.fields(), ["cursor"], "{forged:?}");
    }
}

/// Rows and index entries read from a table by this session.
async fn rows_read(conn: &mut storage::PgConnection, table: &str) -> i64 {
    // This session's counts reach the view at the end of the statement.
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(&mut *conn).await.expect("flushed");
    let query = "SELECT seq_tup_read + coalesce((SELECT sum(idx_tup_read) FROM pg_stat_user_indexes AS i WHERE i.relid = t.relid), 0)::bigint
                 FROM pg_stat_user_tables AS t WHERE relname = $1";
    sqlx::query_scalar(query).bind(table).fetch_one(conn).await.expect("a sum")
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn page_reads_a_bounded_number_of_hidden_rows(pool: PgPool) {
    const WINDOW: i64 = 1_000;
    let account = "INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id)
                   SELECT gen_random_uuid(), name, 'x.example.com', 'dev', '', '' FROM unnest(ARRAY['a', 'b']) AS name";
    sqlx::query(account).execute(&pool).await.expect("inserted");
    fill(&pool, 60_000).await;
    // Without and with statistics of the table.
    for analyze in ["SELECT 1", "ANALYZE"] {
        sqlx::query(sqlx::AssertSqlSafe(analyze)).execute(&pool).await.expect("done");
        let mut conn = pool.acquire().await.expect("a connection").detach().into();
        for rules in [
            grants_of_a(),
            json!({"accounts": [{"matchLabels": {"team": "a"}}], "clusters": ["*"], "namespaces": ["*"]}),
            json!({"accounts": ["*"], "clusters": ["prod-*"], "namespaces": ["*"]}),
            json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["a-ns"]}),
        ] {
            let grants =
                Grants::parse(Role::Viewer, serde_json::from_value(rules.clone()).expect("grants")).expect("valid");
            for after in [None, Some(Position::unique("m-30000"))] {
                let before = rows_read(&mut conn, "pull_secrets").await;
                let order = ResourceSort::Name.order();
                let request = ListRequest { order, after: after.clone(), limit: 50 };
                let filter = PullSecretFilter::default();
                let found = list(&mut conn, &grants, &request, &filter).await.expect("read");
                let read = rows_read(&mut conn, "pull_secrets").await - before;
                assert!(read <= 2 * WINDOW + 100, "{rules} after {after:?}: {read} rows read");
                assert!(found.items.len() <= 1);
                assert!(matches!(found.next, Some(Next::Row(_))), "more rows follow");
            }
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn list_contains_exactly_what_the_caller_can_get(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for (name, labels) in [
        ("a-one", json!({"team": "a"})),
        ("a-two", json!({"team": "a", "tier": "prod"})),
        ("b-one", json!({"team": "b", "tier": "prod"})),
        ("shared", json!({})),
    ] {
        let body = json!({
            "name": name, "registry": format!("{name}.example.com"), "username": "dev", "password": "x", "labels": labels,
        });
        app.admin().post("/v1/registry-accounts", &body).await.expect(201);
    }
    for name in ["dev", "prod"] {
        let cluster = json!({"name": name, "server": "https://127.0.0.1:1", "auth": {"type": "none"}});
        app.admin().post("/v1/clusters", &cluster).await.expect(201);
    }
    let by_label = |labels: Value| {
        let mut declared = declaration(&[], "dev", &["a-ns"]);
        declared.as_object_mut().expect("an object").remove("accounts");
        declared["accountSelector"] = json!({"matchLabels": labels});
        declared
    };
    let with_targets = |targets: Value| {
        let mut declared = declaration(&["a-one"], "dev", &["a-ns"]);
        declared["targets"] = targets;
        declared
    };
    let everywhere = json!({"cluster": "dev", "namespaceSelector": {"matchLabels": {"team": "a"}}});
    let declarations = [
        declaration(&["a-one"], "dev", &["a-ns"]),
        declaration(&["a-one", "shared"], "dev", &["a-ns"]),
        declaration(&["a-one", "b-one"], "dev", &["a-ns"]),
        declaration(&["a-two"], "dev", &["a-ns", "b-ns"]),
        declaration(&["shared"], "prod", &["shared"]),
        by_label(json!({"team": "a"})),
        by_label(json!({"team": "a", "tier": "prod"})),
        by_label(json!({})),
        with_targets(json!([{"cluster": "dev", "namespaces": ["a-ns"]}, {"cluster": "prod", "namespaces": ["a-ns"]}])),
        with_targets(json!([everywhere])),
        with_targets(json!([{"cluster": "dev", "namespaces": ["a-ns"]}, everywhere])),
    ];
    for (number, declared) in declarations.iter().enumerate() {
        let mut declared = declared.clone();
        declared["secret"]["name"] = json!(format!("pull-{number}"));
        let request = app.admin().request("PUT", &format!("/v1/pull-secrets/p-{number:02}"));
        app.admin().send(request.json(&declared)).await.expect(201);
    }
    // One that is being deleted: its cluster cannot be reached.
    assert_eq!(app.admin().delete("/v1/pull-secrets/p-01").await.status, 202);

    let mut seen = BTreeSet::new();
    for (number, grants) in [
        json!({"accounts": ["*"], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": [], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": ["a-*"], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": ["a-one", "shared"], "clusters": ["dev"], "namespaces": ["a-*", "shared"]}),
        json!({"accounts": ["a-*", "b-*"], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": [{"matchLabels": {"team": "a"}}], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": [{"matchLabels": {"tier": "prod"}}, "a-one"], "clusters": ["*"], "namespaces": ["*"]}),
        json!({"accounts": ["*"], "clusters": ["dev"], "namespaces": ["*"]}),
        json!({"accounts": ["*"], "clusters": ["d*", "prod"], "namespaces": ["a-ns"]}),
        json!({"accounts": ["*"], "clusters": ["*"], "namespaces": []}),
        json!({"accounts": ["*"], "clusters": [], "namespaces": ["*"]}),
    ]
    .into_iter()
    .enumerate()
    {
        let viewer = app.caller(&format!("viewer-{number}"), "viewer", Some(grants.clone())).await;
        let mut visible = Vec::new();
        for number in 0..declarations.len() {
            let name = format!("p-{number:02}");
            match viewer.get(&format!("/v1/pull-secrets/{name}")).await.status {
                200 => visible.push(name),
                status => assert_eq!(status, 404),
            }
        }
        for limit in [1, 3, 50] {
            assert_eq!(names(&viewer, limit).await.0, visible, "{grants} {limit}");
        }
        seen.insert(visible);
    }
    assert!(seen.len() >= 8, "the grants differ in their effect: {seen:?}");
}
