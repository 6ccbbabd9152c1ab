//! Imports of generated and hostile documents.

use std::{
    fs,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use proptest::{
    prelude::any,
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{JSON, TEXT, W1, YAML, auth, import, outcomes, rendered};
use crate::support::{app::TestApp, process::Installation};

/// Generates expected logins, and a document of any form that contains them.
fn documents() -> impl Strategy<Value = (Value, String, &'static str)> {
    let scope = "(docker\\.io|reg[a-c]\\.example\\.com(:[1-9][0-9]{3})?)(/[a-z0-9]{1,3}){0,2}";
    let username = any::<String>().prop_map(|text| {
        let text: String = text.chars().filter(|c| *c != ':' && !c.is_control()).take(20).collect();
        format!("u{text}")
    });
    let password = any::<String>().prop_map(|text| {
        let text: String = text.chars().filter(|c| *c != '\0').take(40).collect();
        format!("p{text}")
    });
    let entries = proptest::collection::btree_map(scope, (username, password, 0..3), 1..6);
    (entries, 0..6).prop_map(|(entries, form)| {
        let mut expected = json!({});
        let mut auths = json!({});
        for (scope, (username, password, look)) in entries {
            let login = auth(&format!("{username}:{password}"));
            let key = if scope == "docker.io" { "https://index.docker.io/v1/" } else { &scope };
            expected[key] = json!({"username": username, "password": password, "auth": login});
            auths[&scope] = match look {
                0 => json!({"auth": login}),
                1 => json!({"username": username, "password": password}),
                _ => json!({"auth": login.trim_end_matches('=')}),
            };
        }
        let document = json!({"auths": auths});
        let secret = |key: &str, value: &Value| json!({"kind": "Secret", "data": {key: auth(&value.to_string())}});
        let (text, media_type) = match form {
            0 => (document.to_string(), JSON),
            1 => (serde_json::to_string_pretty(&document).expect("JSON"), TEXT),
            2 => (auths.to_string(), JSON),
            3 => (auth(&document.to_string()), TEXT),
            4 => (secret(".dockerconfigjson", &document).to_string(), YAML),
            _ => (secret(".dockercfg", &auths).to_string(), JSON),
        };
        (expected, text, media_type)
    })
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn imported_logins_round_trip_in_every_form(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let (documents, mut runner) = (documents(), TestRunner::deterministic());
    for _ in 0..64 {
        let (expected, document, media_type) = documents.new_tree(&mut runner).expect("a document").current();

        let imported = import(&app.admin(), "", media_type, document.clone()).await;

        let found = outcomes(&imported);
        assert!(found.iter().all(|[_, _, outcome, _]| outcome == "created"), "{found:?}: {document}");
        let given_back = rendered(&app).await;
        // Next to an account for a path on Docker Hub, the account for all of it has a second key
        // for the kubelet.
        let mut expected = expected;
        let hub = expected["https://index.docker.io/v1/"].clone();
        let has_part = expected.as_object().expect("an object").keys().any(|key| key.starts_with("docker.io/"));
        if has_part && hub.is_object() {
            expected["docker.io"] = hub;
        }
        expected.as_object_mut().expect("an object").retain(|_, entry| !entry.is_null());
        assert_eq!(given_back, expected, "{document}");
        sqlx::query("DELETE FROM registry_accounts").execute(&app.pool).await.expect("deleted");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn arbitrary_bytes_are_imported_or_rejected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut runner = TestRunner::deterministic();
    let bytes = proptest::collection::vec(any::<u8>(), 0..300);
    let alike = "[{}\\[\\]\":,.# \na-zA-Z0-9+/=&*!|>-]{0,120}".prop_map(String::into_bytes);
    let spoilt = (any::<u8>(), 0..W1.len()).prop_map(|(byte, at)| {
        let mut document = W1.as_bytes().to_vec();
        document[at] = byte;
        document
    });
    let client = app.admin();
    for round in 0..300 {
        let input = match round % 3 {
            0 => bytes.new_tree(&mut runner).expect("bytes").current(),
            1 => alike.new_tree(&mut runner).expect("text").current(),
            _ => spoilt.new_tree(&mut runner).expect("a document").current(),
        };
        let media_type = [JSON, YAML, TEXT][round / 3 % 3];
        let shown = String::from_utf8_lossy(&input).into_owned();
        let imported = import(&client, "?dryRun=true", media_type, input).await;
        assert!(matches!(imported.status, 200 | 422), "{imported:?}: {shown:?}");
        assert!(imported.status == 200 || imported.slug() == "invalid-request", "{imported:?}");
        let body = json!({"image": "reg.example.com/team/app", "config": shown});
        let explained = client.post("/v1/docker-configs/explain", &body).await;
        assert!(matches!(explained.status, 200 | 422), "{explained:?}: {shown:?}");
    }
    assert_eq!(app.rows().await[0], 0);
}

/// Returns the current and the peak resident memory of a process, in KiB.
fn memory_kib(process: u32) -> [u64; 2] {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process lives");
    ["VmRSS:", "VmHWM:"].map(|field| {
        let line = status.lines().find(|line| line.starts_with(field)).expect("the field");
        line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
    })
}

/// Runs the binary, because the memory of the test process includes other tests.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn deeply_nested_mebibyte_is_rejected_fast_in_bounded_memory(pool: PgPool) {
    const MIB: usize = 1024 * 1024;
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
    let service = installation.serve().await;
    let client = service.client(&installation.new_key("admin").await);
    let repeated = |part: &str| part.repeat(MIB / part.len());
    let rung = |at: usize| format!("a{at}: &a{at} [{}]\n", vec![format!("*a{}", at - 1); 10].join(","));
    let ladder = (1..40).map(rung).collect::<Vec<_>>().concat();
    let inputs = [
        (JSON, repeated("{\"a\":")),
        (JSON, format!("{{\"auths\":{{\"reg.io\":{{\"auth\":{}", "[".repeat(MIB - 40))),
        (JSON, format!("{{\"auths\":{}{}}}", "[".repeat(MIB / 2 - 10), "]".repeat(MIB / 2 - 10))),
        (JSON, repeated("[")),
        (TEXT, auth(&"{\"a\":".repeat(MIB / 8))),
        (YAML, repeated("- ")),
        (YAML, repeated("a: ")),
        (YAML, repeated("? ")),
        (YAML, repeated("{")),
        (YAML, format!("a0: &a0 x\n{ladder}")),
        (YAML, format!("a: &a \"{}\"\nb: [{}]\n", "x".repeat(100_000), vec!["*a"; 100_000].join(","))),
    ];
    // Warms up, so that one-time allocations are not counted.
    import(&client, "?dryRun=true", JSON, W1).await.expect(200);
    let [before, _] = memory_kib(service.process.id());

    let begin = Instant::now();
    for (media_type, input) in &inputs {
        let refused = import(&client, "", media_type, input.clone()).await;
        refused.problem(422, "invalid-request");
        let explained = client.post("/v1/docker-configs/explain", &json!({"image": "nginx", "config": input})).await;
        explained.problem(422, "invalid-request");
    }
    let took = begin.elapsed();
    // In parallel as well, as an attacker would.
    let all = inputs.iter().cycle().take(64).map(|(media_type, input)| import(&client, "", media_type, input.clone()));
    for answer in join_all(all).await {
        answer.problem(422, "invalid-request");
    }

    // 22 requests of one mebibyte take 0.3 s on an idle machine. Quadratic work would take minutes.
    assert!(took < Duration::from_secs(30), "{took:?}");
    // 64 documents of one mebibyte at once. The wiping allocator copies a buffer that grows.
    let [_, most] = memory_kib(service.process.id());
    assert!(most.saturating_sub(before) < 768 * 1024, "from {before} KiB to {most} KiB");
    // Documents above the size limit are rejected unread.
    let long = import(&client, "", JSON, " ".repeat(2 * MIB + 1)).await;
    long.problem(413, "body-too-large");
    let longer_than_a_secret = import(&client, "", JSON, format!("{{}}{}", " ".repeat(MIB))).await;
    longer_than_a_secret.problem(422, "invalid-request");
    import(&client, "?dryRun=true", JSON, W1).await.expect(200);
}
