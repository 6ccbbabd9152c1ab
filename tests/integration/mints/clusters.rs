//! Sources whose identity is a `ServiceAccount` of a cluster: which ones regcred refuses, records and
//! reviews. No cluster is needed, or a listener is one.

use std::fs;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::web_identity::{Aws, account, register_issuing_cluster};
use crate::{
    pull_secrets::declaration,
    support::{
        app::TestApp,
        client::{Answer, Client},
        files::TempDir,
    },
    verify::listening::{Requests, answer, serve},
};

/// URL of an API server that does not answer.
const SERVER: &str = "https://127.0.0.1:1";

/// Unsigned token of a `ServiceAccount`.
fn token_of(namespace: &str, name: &str) -> String {
    let claims = json!({"sub": format!("system:serviceaccount:{namespace}:{name}")}).to_string();
    format!("e30.{}.c2ln", BASE64_URL_SAFE_NO_PAD.encode(claims))
}

async fn register(app: &TestApp, name: &str, auth: &Value) {
    let cluster = json!({"name": name, "server": SERVER, "auth": auth});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
}

/// Creates an account in a dry run, which calls no cluster and no provider.
async fn try_to_create(client: &Client, cluster: &str, service_account: &str, audience: &str) -> Answer {
    let identity = json!({
        "type": "webIdentity", "cluster": cluster, "namespace": "regcred", "serviceAccount": service_account,
        "audience": audience,
    });
    let role = json!({"roleArn": "arn:aws:iam::123456789012:role/pull"});
    let source = json!({"type": "ecr", "region": "eu-central-1", "assumeRole": role, "identity": identity});
    let registry = "123456789012.dkr.ecr.eu-central-1.amazonaws.com";
    let body = json!({"name": "minted", "registry": registry, "source": source});
    client.post("/v1/registry-accounts?dryRun=true", &body).await
}

async fn operator(app: &TestApp) -> Client {
    let grants = json!({"accounts": ["minted"], "clusters": ["*"], "namespaces": ["regcred"]});
    app.caller("narrow", "operator", Some(grants)).await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn own_service_account_is_refused_however_regcred_authenticates(pool: PgPool) {
    let dir = TempDir::new();
    fs::write(dir.path().join("token"), token_of("regcred", "pod")).expect("written");
    let path = dir.path().to_str().expect("a path");
    let app = TestApp::configured(pool, &[("REGCRED_CLUSTER_SERVICE_ACCOUNT_DIR", path)]).await;
    register(&app, "static", &json!({"type": "token", "token": token_of("regcred", "broker")})).await;
    let renewed =
        json!({"type": "serviceAccount", "token": token_of("regcred", "one"), "namespace": "regcred", "name": "two"});
    register(&app, "renewed", &renewed).await;
    let here = json!({"name": "here", "auth": {"type": "inCluster"}});
    app.admin().post("/v1/clusters", &here).await.expect(201);

    let operator = operator(&app).await;
    for (cluster, service_account, is_own) in [
        ("static", "broker", true),
        ("static", "pod", true),
        ("static", "pull", false),
        ("renewed", "one", true),
        ("renewed", "two", true),
        ("renewed", "pull", false),
        ("here", "pod", true),
        ("here", "pull", false),
    ] {
        let answer = try_to_create(&operator, cluster, service_account, "sts.amazonaws.com").await;
        if is_own {
            answer.problem(422, "invalid-request");
            assert_eq!(answer.fields(), ["source.identity.serviceAccount"], "{cluster} {service_account}");
        } else {
            answer.expect(200);
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn refused_identity_does_not_tell_what_reserves_it(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register(&app, "dev", &json!({"type": "token", "token": token_of("regcred", "broker")})).await;
    let provider = json!({
        "name": "pods", "type": "tokenReview", "cluster": "dev", "audience": "regcred-pods",
        "rules": [{"claims": {"namespace": "a"}, "role": "viewer"}],
    });
    app.admin().post("/v1/identity-providers", &provider).await.expect(201);
    let operator = operator(&app).await;
    operator.get("/v1/identity-providers").await.problem(403, "forbidden");

    try_to_create(&operator, "dev", "pull", "regcred-pod").await.expect(200);
    let mut details = Vec::new();
    for (service_account, audience) in [
        ("pull", "kubernetes"),
        ("pull", "https://container.googleapis.com/v1/projects/p"),
        ("pull", SERVER),
        ("pull", "regcred-pods"),
        ("broker", "sts.amazonaws.com"),
    ] {
        let problem = try_to_create(&operator, "dev", service_account, audience).await.problem(422, "invalid-request");
        let errors = problem["errors"].as_array().expect("errors");
        assert_eq!(errors.len(), 1, "{problem}");
        details.push(errors[0]["detail"].clone());
    }
    assert!(details[0].is_string() && details.iter().all(|detail| *detail == details[0]), "{details:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn audit_log_tells_whose_token_goes_where(pool: PgPool) {
    let app = TestApp::configured(pool, super::ALLOW).await;
    let (aws, admin) = (Aws::start(), app.admin());
    register_issuing_cluster(&app).await;
    let identity = json!({"type": "webIdentity", "cluster": "dev", "namespace": "a", "serviceAccount": "pull"});
    let mut body = account(&aws, &identity);
    admin.post("/v1/registry-accounts", &body).await.expect(201);
    body["source"]["assumeRole"]["roleArn"] = json!("arn:aws:iam::123456789012:role/other");
    body["source"]["identity"]["serviceAccount"] = json!("push");
    admin.patch("/v1/registry-accounts/minted", &json!({"source": body["source"]})).await.expect(200);

    let events = admin.get("/v1/audit-events?resource=registry-accounts/minted").await.expect(200);
    let events = events["items"].as_array().expect("events");
    let changed = |action: &str| {
        let event = events.iter().find(|event| event["action"] == action).expect("an event");
        let changes = event["details"]["changes"].as_array().expect("changes");
        changes.iter().find(|change| change["field"] == "source").expect("the source").clone()
    };
    let (created, updated) = (changed("registryAccount.create"), changed("registryAccount.rotate"));
    for (member, first, second) in [
        ("type", "ecr", "ecr"),
        ("identity", "webIdentity", "webIdentity"),
        ("cluster", "dev", "dev"),
        ("namespace", "a", "a"),
        ("serviceAccount", "pull", "push"),
        ("roleArn", "arn:aws:iam::123456789012:role/pull", "arn:aws:iam::123456789012:role/other"),
    ] {
        let values = [&created["new"][member], &updated["old"][member], &updated["new"][member]];
        assert_eq!(values, [first, first, second], "{member}");
    }
}

/// Registers a cluster that answers access reviews. Requests to write Secrets get the same answers,
/// and fail.
async fn register_reviewing_cluster(app: &TestApp, is_allowed: fn(&str) -> bool) -> Requests {
    let (address, requests) = serve(move |request| {
        if request.starts_with("GET /version ") {
            return answer("200 OK", &[], r#"{"gitVersion":"v1.36.0"}"#);
        }
        let body = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "metadata": {}, "spec": {},
            "status": {"allowed": is_allowed(request)},
        });
        answer("201 Created", &[("Content-Type", "application/json")], &body.to_string())
    });
    let server = format!("http://{address}");
    let cluster = json!({"name": "dev", "server": server, "auth": {"type": "none"}, "allowPlainHttp": true});
    app.admin().post("/v1/clusters", &cluster).await.expect(201);
    requests
}

/// Stores minted accounts `PREFIX-0001` and so on of the cluster `dev`. In the name of the
/// `ServiceAccount`, `N` is the number of the account.
async fn store_accounts(app: &TestApp, (prefix, count): (&str, i32), service_account: &str, labels: &Value) {
    let stored = sqlx::query(
        r"WITH account AS (
               INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id, labels)
               SELECT gen_random_uuid(), $1 || '-' || lpad(n::text, 4, '0'), 'registry.example.com', 'AWS', '\x00', 'k-1', $4
               FROM generate_series(1, $2) AS n
               RETURNING id, name
           )
           INSERT INTO account_mints
               (account_id, source, cluster_id, secret, secret_key_id, valid_until, refresh_at, next_attempt_at)
           SELECT account.id, json_build_object('type', 'ecr', 'identity', json_build_object('type', 'webIdentity',
                   'namespace', 'a', 'serviceAccount', replace($3, 'N', right(account.name, 4))))::text,
               clusters.id, '\x00', 'k-1', now() + interval '1 day', now() + interval '1 day', now() + interval '1 day'
           FROM account, clusters WHERE clusters.name = 'dev'",
    );
    let stored = stored.bind(prefix).bind(count).bind(service_account).bind(labels).execute(&app.pool).await;
    assert_eq!(stored.expect("accounts").rows_affected(), u64::try_from(count).expect("a number"));
}

async fn check(client: &Client) -> Value {
    let check = client.post("/v1/clusters/dev/check", &json!({})).await.expect(200);
    assert_eq!(check.get("problem"), None, "{check}");
    check
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn check_tells_that_it_did_not_review_all_minted_accounts(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    register_reviewing_cluster(&app, |review| review.contains(r#""namespace":"#)).await;
    store_accounts(&app, ("many", 700), "pull-N", &json!({})).await;
    app.register_account("dev-user", "registry.example.com", "dev", "one").await;
    let declaration = declaration(&["dev-user"], "dev", &["a"]);
    let request = app.admin().request("PUT", "/v1/pull-secrets/team-a").json(&declaration);
    app.admin().send(request).await.expect(201);

    let check = check(&app.admin()).await;

    // The limit admits 600 reviews at once, of which the pull secret has the first.
    assert_eq!((&check["pullSecrets"], &check["pullSecretsCut"]), (&json!([]), &json!(false)), "{check}");
    assert_eq!((&check["registryAccounts"], &check["registryAccountsCut"]), (&json!([]), &json!(true)), "{check}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn check_covers_the_accounts_of_its_caller_whatever_others_have(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let requests = register_reviewing_cluster(&app, |_| false).await;
    store_accounts(&app, ("many", 1001), "pull", &json!({})).await;
    store_accounts(&app, ("other", 1), "other", &json!({"team": "z"})).await;

    let of_all = check(&app.admin()).await;
    let accounts = of_all["registryAccounts"].as_array().expect("accounts").iter();
    let names: Vec<_> = accounts.map(|account| account["name"].as_str().expect("a name").to_owned()).collect();
    let expected: Vec<_> = (1..=100).map(|number| format!("many-{number:04}")).collect();
    assert_eq!((names, &of_all["registryAccountsCut"]), (expected, &json!(true)));
    // One review of each right and ServiceAccount, not of each account.
    assert!(requests.count() < 50, "{}", requests.count());

    let missing = json!({"verb": "create", "resource": "serviceaccounts/token", "name": "other", "namespace": "a"});
    let own = json!([{"name": "other-0001", "missing": [missing]}]);
    for (name, accounts) in [("by-name", json!(["other-*"])), ("by-label", json!([{"matchLabels": {"team": "z"}}]))] {
        let grants = json!({"accounts": accounts, "clusters": ["dev"], "namespaces": ["*"]});
        let check = check(&app.caller(name, "viewer", Some(grants)).await).await;
        assert_eq!((&check["registryAccounts"], &check["registryAccountsCut"]), (&own, &json!(false)), "{name}");
    }
    let nothing = json!({"accounts": ["dev-*"], "clusters": ["dev"], "namespaces": ["*"]});
    let check = check(&app.caller("nothing", "viewer", Some(nothing)).await).await;
    assert_eq!((&check["registryAccounts"], &check["registryAccountsCut"]), (&json!([]), &json!(false)));

    // Another release may store an identity that this one cannot read.
    let changed = sqlx::query(
        "UPDATE account_mints SET source = '{\"type\":\"newer\"}'
         WHERE account_id = (SELECT id FROM registry_accounts WHERE name = 'other-0001')",
    );
    changed.execute(&app.pool).await.expect("updated");
    let grants = json!({"accounts": ["other-*"], "clusters": ["dev"], "namespaces": ["*"]});
    let check = self::check(&app.caller("newer", "viewer", Some(grants)).await).await;
    assert_eq!((&check["registryAccounts"], &check["registryAccountsCut"]), (&json!([]), &json!(true)));
}
