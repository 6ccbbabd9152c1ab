//! A caller that may diagnose cannot have a credential of a foreign Secret sent to a host of its
//! choice.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Doctor, document, namespace_with, pod, pull_secret};
use crate::verify::listening::{Trap, answer, bearer, serve};

const PASSWORD: &str = "canary-password";

/// A registry of the attacker that requests a login.
fn challenge() -> Vec<u8> {
    answer("401 Unauthorized", &[("WWW-Authenticate", "Basic realm=x")], "")
}

async fn namespace_of(key: &str) -> String {
    namespace_with(&["k"], vec![pull_secret("k", &document(key, "martin", PASSWORD))]).await
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn wildcard_entry_is_not_sent_to_a_host_of_the_request(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (evil, requests) = serve(|_| challenge());
    let namespace = namespace_of(&format!("*.0.0.1:{}", evil.port())).await;

    let found = doctor.diagnose_spec(&namespace, &json!({"images": [format!("{evil}/app")]})).await;

    let image = &found["images"][0];
    assert_eq!((&image["verdict"], &image["attempts"][0]["skipped"]), (&json!("unknown"), &json!("wildcard")));
    assert!(requests.count() > 0 && !requests.text().contains("authorization"), "{}", requests.text());

    // An object of the cluster names the registry: the kubelet has sent the login there already.
    let web = pod(&[&format!("{evil}/app")], &["k"]);
    let secret = pull_secret("k", &document(&format!("*.0.0.1:{}", evil.port()), "martin", PASSWORD));
    let namespace = namespace_with(&[], vec![secret, web]).await;
    let found = doctor.diagnose(&namespace, "pods/web").await;
    assert_eq!(found["images"][0]["verdict"], "credentialInvalid", "{found:#}");
    assert!(requests.text().contains("authorization: Basic"));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn entry_of_another_registry_is_not_sent(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (evil, requests) = serve(|_| challenge());
    let good = &doctor.a.address;
    for key in [good.as_str(), "127.0.0.1", "https://index.docker.io/v1/"] {
        let namespace = namespace_of(key).await;
        // The path repeats the host of the entry.
        let images = json!([format!("{evil}/app"), format!("{evil}/{}/app", good.replace([':', '.'], "-"))]);
        let found = doctor.diagnose_spec(&namespace, &json!({"images": images})).await;
        assert_eq!(found["images"][0]["attempts"], json!([]), "{found:#}");
    }
    assert!(requests.count() > 0 && !requests.text().contains("authorization"), "{}", requests.text());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn redirect_and_foreign_realm_get_no_login(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (elsewhere, requests) = serve(|_| challenge());
    let location = format!("http://{elsewhere}/v2/app/manifests/latest");
    let (redirecting, _) = serve(move |request| {
        if request.contains("authorization") {
            answer("307 Temporary Redirect", &[("Location", &location)], "")
        } else {
            challenge()
        }
    });
    // An inner address that the guard does not admit.
    let trap = Trap::set();
    let realm = format!("http://[::2]:{}/token", trap.port);
    let (pointing, _) = serve(move |_| bearer(&realm));
    for address in [redirecting.to_string(), pointing.to_string()] {
        let namespace = namespace_of(&address).await;
        let found = doctor.diagnose_spec(&namespace, &json!({"images": [format!("{address}/app")]})).await;
        assert!(found["images"][0]["verdict"].is_string(), "{found:#}");
    }
    assert_eq!((requests.count(), trap.caught()), (0, 0));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn diagnosis_is_audited_with_the_secrets_that_it_reads(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let web = pod(&["127.0.0.1:1/app"], &["k", "gone"]);
    let secret = pull_secret("k", &document("127.0.0.1:1", "martin", PASSWORD));
    let namespace = namespace_with(&[], vec![secret, web]).await;
    doctor.diagnose(&namespace, "pods/web").await;
    doctor.diagnose_spec(&namespace, &json!({"images": ["127.0.0.1:1/app"]})).await;

    let events = doctor.admin.get("/v1/audit-events?action=pod.diagnose").await.expect(200);

    let shown: Vec<Value> = events["items"]
        .as_array()
        .expect("events")
        .iter()
        .map(|event| json!([event["resource"], event["related"], event["outcome"]]))
        .collect();
    let at = |rest: &str| format!("clusters/dev/namespaces/{namespace}{rest}");
    let expected =
        [json!([at(""), [], "success"]), json!([at("/pods/web"), [at("/secrets/k"), at("/secrets/gone")], "success"])];
    assert_eq!(shown, expected);
}
