//! Hostile providers: each answer leads to its state, the login stays, and nothing of the answer is
//! repeated in an answer, a log or a row.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::token_service::TokenService;
use crate::{
    leaks::{Canary, dump},
    support::{client::Client, eventually, process::Installation},
};

/// Answer to a request that contains the secret of the source, given a token to hide.
type Hostile = fn(request: &str, canary: &str) -> String;

/// Name, answer, and type of the failure.
const CASES: [(&str, Hostile, &str); 12] = [
    ("expired", |_, canary| ok(&token(canary, &json!(-346_000_000))), "expiredOnArrival"),
    ("short", |_, canary| ok(&token(canary, &json!(60))), "tooShortLived"),
    ("endless", |_, canary| ok(&json!({"access_token": canary}).to_string()), "badAnswer"),
    ("large", |_, canary| ok(&canary.repeat(10_000_000 / canary.len())), "badAnswer"),
    ("truncated", |_, canary| ok(&token(canary, &json!(3600))).replace("length: ", "length: 9"), "unreachable"),
    (
        "redirect",
        |_, canary| answer("302 Found", &format!("location: http://127.0.0.1:1/{canary}\r\n"), ""),
        "badAnswer",
    ),
    ("nul", |_, canary| ok(&token(&format!("{canary}\0"), &json!(3600))), "badAnswer"),
    ("pause", |_, canary| answer("429 Too Many Requests", "retry-after: 1000000000\r\n", canary), "throttled"),
    ("echo", |request, _| answer("400 Bad Request", "", &json!({"error": request}).to_string()), "misconfigured"),
    ("echo-ok", |request, _| ok(&json!({"error": request, "expires_in": 3600}).to_string()), "badAnswer"),
    ("denied", |_, canary| answer("403 Forbidden", "", &json!({"error": canary}).to_string()), "denied"),
    ("failure", |_, canary| answer("500 Internal Server Error", "", canary), "unreachable"),
];

fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}", body.len())
}

fn ok(body: &str) -> String {
    answer("200 OK", "", body)
}

fn token(token: &str, seconds: &Value) -> String {
    json!({"access_token": token, "expires_in": seconds}).to_string()
}

async fn shown(client: &Client, name: &str) -> Value {
    client.get(&format!("/v1/registry-accounts/{name}")).await.expect(200)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn hostile_answer_leads_to_its_state_and_is_not_repeated(pool: PgPool) {
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("REGCRED_LOG_FILTER", "trace")
        .with("REGCRED_MINT_ALLOW", "127.0.0.1");
    let key = installation.new_key("admin").await;
    let service = installation.serve().await;
    let client = service.client(&key);
    let (secret, secret_canary) = Canary::random("secret of a source");
    let (issued, issued_canary) = Canary::random("token of an answer");
    let issued = issued.replace(['"', '/'], "");
    // Each has a host of its own, because a pause is one of the host.
    let providers = CASES.map(|_| TokenService::start());
    for ((name, ..), provider) in CASES.iter().zip(&providers) {
        let mut source = provider.source();
        source["authentication"] = json!("body");
        source["identity"]["clientSecret"] = json!(secret);
        let account =
            json!({"name": name, "registry": format!("{name}.example.com"), "plainHttp": true, "source": source});
        client.post("/v1/registry-accounts", &account).await.expect(201);
    }

    for ((_, hostile, _), provider) in CASES.into_iter().zip(&providers) {
        let issued = issued.clone();
        provider.respond_by(move |request| hostile(request, &issued).into_bytes());
    }
    sqlx::query("UPDATE account_mints SET next_attempt_at = now()").execute(&pool).await.expect("due");
    let mut outputs = Vec::new();
    for (name, _, reason) in CASES {
        let account = eventually("the mint fails", async || {
            let account = shown(&client, name).await;
            (account["mint"]["state"] == "failing").then_some(account)
        })
        .await;
        let mint = &account["mint"];
        assert_eq!((&mint["lastError"]["type"], &mint["serial"]), (&json!(reason), &json!(1)), "{name}: {account}");
        let next: DateTime<Utc> = mint["nextAttemptAt"].as_str().and_then(|at| at.parse().ok()).expect("a time");
        let delay = next - Utc::now();
        let is_paused = delay > TimeDelta::minutes(50);
        assert_eq!(is_paused, name == "pause", "{name}: {delay}");
        // An hour with its jitter.
        assert!(delay <= TimeDelta::minutes(66), "{name}: {delay}");
        let config = client.post("/v1/docker-configs", &json!({"accounts": [name]})).await.expect(200);
        assert_eq!(config["config"]["auths"][format!("{name}.example.com")]["password"], "minted-1", "{config}");
        let forced = client.post(&format!("/v1/registry-accounts/{name}/mint"), &json!({})).await;
        assert!([502, 503].contains(&forced.status), "{name}: {forced:?}");
        outputs.push((format!("GET {name}"), account.to_string()));
        outputs.push((format!("POST {name}/mint"), format!("{forced:?}")));
    }
    let events = client.get("/v1/audit-events?limit=500").await.expect(200);
    outputs.push(("audit events".to_owned(), events.to_string()));
    outputs.push(("database".to_owned(), dump(&pool)));
    outputs.push(("log".to_owned(), service.process.stderr()));
    for canary in [&secret_canary, &issued_canary] {
        for (place, text) in &outputs {
            let found = canary.needles.iter().find(|(_, needle)| text.contains(needle));
            assert!(found.is_none(), "{} in {place}", found.map_or("", |(encoding, _)| encoding));
        }
    }
}
