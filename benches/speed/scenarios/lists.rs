//! A6 large lists: latency of any page of any list at 100,000 accounts and 100,000 targets, and the
//! throughput of reads against that at 1,000.

use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;
use sqlx::AssertSqlSafe;

use super::Stage;
use crate::{
    load::{self, on_this_thread},
    process::Server,
    report::{Goals, Rounds, progress, row, table},
    sandbox::Sandbox,
};

/// Number of accounts and of targets.
const FEW: usize = 1_000;
const MANY: usize = 100_000;
/// Time that each page is requested for, on one connection.
const PER_PAGE: Duration = Duration::from_millis(700);
/// Rounds and duration of each measurement of throughput.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(1);
const CONNECTIONS: usize = 4;

/// Lists with their filters and orders.
const LISTS: [(&str, &[&str]); 4] = [
    (
        "/v1/registry-accounts",
        &[
            "sort=name",
            "sort=-name",
            "sort=createdAt",
            "sort=-createdAt",
            "sort=expiresAt",
            "q=account-0",
            "q=no-such-part",
            "q=no-such-part&sort=-createdAt",
            "result=valid",
            "result=invalid&sort=createdAt",
            "expiresWithin=30d",
            "expiresWithin=30d&sort=expiresAt",
            "label=team%3Drare",
            "label=team%3Dmany",
        ],
    ),
    (
        "/v1/targets",
        &[
            "sort=pullSecret",
            "state=failed",
            "state=failed&state=conflict&state=pending",
            "state=synced",
            "cluster=dev",
            "cluster=rare",
            "namespace=n-77",
            "pullSecret=p-3",
            "account=account-000001",
        ],
    ),
    ("/v1/pull-secrets/p-3/targets", &["limit=50", "state=failed", "cluster=dev", "namespace=n-77"]),
    ("/v1/pull-secrets", &["sort=name", "sort=-createdAt", "state=conflict", "cluster=dev", "namespace=n-7"]),
];

/// A6 large lists.
pub fn large_lists(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let sandbox = Sandbox::new()?;
    let key = sandbox.prepare()?;
    let server = sandbox.serve()?;
    fill(&sandbox, 0, FEW)?;
    let few = throughput(&server, &key)?;
    progress("A6 large lists: filling the tables");
    fill(&sandbox, FEW, MANY)?;
    let many = throughput(&server, &key)?;
    for ((what, few), (_, many)) in few.iter().zip(&many) {
        goals.at_least(&format!("A6 throughput at 100,000 rows against 1,000: {what}"), 0.9, many / few);
    }
    let mut rows = vec![row(["Page", "p50, ms", "p99, ms"])];
    let mut most: f64 = 0.0;
    for (path, queries) in LISTS {
        for query in queries {
            progress(&format!("A6 large lists: {path}?{query}"));
            for (place, cursor) in places(&server, &key, path, query)? {
                let path = format!("{path}?{query}{cursor}");
                let load = load::run(server.address, &load::request("GET", &path, Some(&key), ""), 1, PER_PAGE)?;
                let [p50, p99] = [0.5, 0.99].map(|share| load.quantile(share).as_secs_f64() * 1e3);
                most = most.max(p99);
                let shown = path.split("&cursor").next().unwrap_or_default();
                rows.push(row([&format!("{shown} {place}"), &format!("{p50:.2}"), &format!("{p99:.2}")]));
            }
        }
    }
    let summary = load::run(server.address, &load::request("GET", "/v1/summary", Some(&key), ""), 1, PER_PAGE)?;
    let p99 = summary.quantile(0.99).as_secs_f64() * 1e3;
    table("Pages at 100,000 accounts and 100,000 targets", &rows)?;
    goals.at_most("A6 any page at 100,000 rows, p99, ms", 50.0, most);
    goals.at_most("A6 summary at 100,000 rows, p99, ms", 50.0, p99);
    Ok(())
}

/// Inserts accounts and targets with the numbers from `from` to before `to`.
fn fill(sandbox: &Sandbox, from: usize, to: usize) -> anyhow::Result<()> {
    let clusters = "INSERT INTO clusters (id, name, server, auth_type)
        SELECT gen_random_uuid(), name, 'https://127.0.0.1:1', 'none' FROM unnest(ARRAY['dev', 'rare']) AS name
        ON CONFLICT DO NOTHING";
    let accounts = format!(
        r#"INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id, labels, created_at,
               expires_at, last_verified_at, last_verification_result, last_verification_detail)
           SELECT gen_random_uuid(), 'account-' || lpad(n::text, 6, '0'), 'reg.example.com', 'dev', '\x00', 'bench',
               CASE WHEN n % 1000 = 0 THEN '{{"team": "rare"}}'::jsonb ELSE '{{"team": "many"}}'::jsonb END,
               now() - (n % 9973) * interval '1 minute', CASE n % 4 WHEN 0 THEN now() + n * interval '1 minute' END, now(),
               CASE WHEN n % 1000 = 7 THEN 'invalid' ELSE 'valid' END, 'detail'
           FROM generate_series({from}, {to} - 1) AS n"#
    );
    let pull_secrets = r#"INSERT INTO pull_secrets (id, name, declaration)
        SELECT gen_random_uuid(), 'p-' || n, jsonb_build_object(
            'accounts', '["account-000001"]'::jsonb, 'secret', '{"name": "pull", "type": "kubernetes.io/dockerconfigjson"}'::jsonb,
            'targets', '[{"cluster": "dev", "namespaces": ["n-0"]}]'::jsonb, 'serviceAccounts', '[]'::jsonb,
            'deletionPolicy', 'delete', 'adopt', false)
        FROM generate_series(0, 9) AS n ON CONFLICT DO NOTHING"#;
    let links = "INSERT INTO pull_secret_clusters (pull_secret_id, cluster_id, selects)
        SELECT pull_secrets.id, clusters.id, false FROM pull_secrets, clusters WHERE clusters.name = 'dev' ON CONFLICT DO NOTHING";
    let named = "INSERT INTO pull_secret_accounts (pull_secret_id, account_id)
        SELECT pull_secrets.id, one.id FROM pull_secrets, registry_accounts AS one WHERE one.name = 'account-000001'
        ON CONFLICT DO NOTHING";
    // Not due: the worker leaves them alone.
    let targets = format!(
        "INSERT INTO pull_secret_targets (pull_secret_id, cluster_id, namespace, generation, state, pending_since, next_attempt_at)
         SELECT pull_secrets.id, clusters.id, 'n-' || n / 10, 1, state,
             CASE WHEN state <> 'synced' THEN now() END, now() + interval '10 years'
         FROM (
             SELECT n, CASE WHEN n % 500 = 1 THEN 'failed' WHEN n % 700 = 2 THEN 'pending' WHEN n % 900 = 3 THEN 'conflict'
                 ELSE 'synced' END AS state
             FROM generate_series({from}, {to} - 1) AS n
         ) AS every
         JOIN pull_secrets ON pull_secrets.name = 'p-' || n % 10
         JOIN clusters ON clusters.name = CASE WHEN n % 1000 = 5 THEN 'rare' ELSE 'dev' END"
    );
    on_this_thread(async {
        let mut conn = sandbox.connect().await?;
        for statement in [clusters, &accounts, pull_secrets, links, named, &targets, "VACUUM ANALYZE"] {
            sqlx::query(AssertSqlSafe(statement)).execute(&mut conn).await?;
        }
        Ok(())
    })
}

/// Rates of reads that should not depend on the number of rows: the median of some rounds.
fn throughput(server: &Server, key: &str) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let reads = [
        ("one account", "/v1/registry-accounts/account-000500"),
        ("a page of accounts", "/v1/registry-accounts?limit=50"),
        ("a page of accounts, newest first", "/v1/registry-accounts?limit=50&sort=-createdAt"),
        ("a page of targets", "/v1/targets?limit=50"),
    ];
    let rates = reads.into_iter().map(|(what, path)| {
        let request = load::request("GET", path, Some(key), "");
        let rounds: anyhow::Result<Rounds> =
            (0..ROUNDS).map(|_| Ok(load::run(server.address, &request, CONNECTIONS, ROUND)?.rate)).collect();
        Ok((what, rounds?.median()))
    });
    rates.collect()
}

/// Cursors of the first, the middle and the last page of a list.
fn places(server: &Server, key: &str, path: &str, query: &str) -> anyhow::Result<Vec<(&'static str, String)>> {
    let (mut cursors, mut cursor) = (Vec::new(), String::new());
    loop {
        let query = query.replace("limit=50", "");
        let request =
            load::request("GET", &format!("{path}?limit=500&{query}{cursor}").replace("&&", "&"), Some(key), "");
        let (status, body) = load::once(server.address, &request)?;
        ensure!(status == 200, "{path}?{query}: {status} {body}");
        let page: Value = serde_json::from_str(&body).context("a page")?;
        let Some(next) = page["next"].as_str() else { break };
        cursor = format!("&cursor={next}");
        cursors.push(cursor.clone());
    }
    let mut places = vec![("first", String::new())];
    if let Some(last) = cursors.last() {
        places.push(("middle", cursors[cursors.len() / 2].clone()));
        places.push(("last", last.clone()));
    }
    Ok(places)
}
