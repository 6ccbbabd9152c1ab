//! Content of snapshots, and what they say of accounts and pull secrets.

use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{Survey, apply, group, items, named, namespace_in};
use crate::{
    diagnosis::setup::{deployment, document, login, pod, pull_secret, workload},
    pull_secrets::{declaration, put, settled},
    support::kubernetes::SECOND,
};

const MANAGED: &str = "team-a-pull";

/// A namespace with a managed Secret, one by hand, and workloads that use them or not.
async fn mixed(survey: &Survey) -> (String, String) {
    let (a, b) = (&survey.a, &survey.b);
    survey.app.register_account("prod-a", &a.address, &a.username, &a.password).await;
    let (image_a, image_b) = (format!("{}/os/alpine:3", a.address), format!("{}/os/alpine:3", b.address));
    let objects = vec![
        login("by-hand", b),
        login("idle", b),
        named(deployment(&[&image_a, &image_b], &[MANAGED, "by-hand"]), "both"),
        named(workload("CronJob", &[&image_a], &[MANAGED]), "nightly"),
        named(deployment(&[&image_a], &[]), "without"),
        named(pod(&[&image_b], &["by-hand"]), "debug"),
        named(deployment(&[&image_a], &["gone"]), "missing"),
    ];
    let namespace = namespace_in(SECOND, &[], objects).await;
    put(&survey.admin, "team-a", &declaration(&["prod-a"], "prod", &[&namespace])).await.expect(201);
    settled(&survey.admin, "team-a").await;
    (namespace, format!("{}/os/alpine", a.address))
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn snapshot_has_the_verdict_and_the_account_of_each_group(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let (namespace, in_a) = mixed(&survey).await;
    let in_b = format!("{}/os/alpine", survey.b.address);

    let coverage = survey.run().await;

    let groups = survey.groups(&namespace).await;
    let verdict = |repository: &str, secrets: &[&str]| group(&groups, repository, secrets)["verdict"].clone();
    assert_eq!(verdict(&in_a, &[MANAGED, "by-hand"]), "ok", "{groups:#?}");
    assert_eq!(verdict(&in_b, &[MANAGED, "by-hand"]), "ok");
    assert_eq!(verdict(&in_b, &["by-hand"]), "ok");
    assert_eq!(verdict(&in_a, &[]), "noSecret");
    assert_eq!(verdict(&in_a, &["gone"]), "secretMissing");
    let nightly = group(&groups, &in_a, &[MANAGED]);
    assert_eq!(nightly["workloads"], json!([{"kind": "cronjob", "count": 1}]));
    let credential = json!({"secret": MANAGED, "key": survey.a.address, "works": true, "account": "prod-a",
        "pullSecret": "team-a"});
    assert_eq!(nightly["credential"], credential);
    let by_hand = &group(&groups, &in_b, &["by-hand"])["credential"];
    assert_eq!((&by_hand["account"], &by_hand["pullSecret"]), (&Value::Null, &Value::Null));
    let without = group(&groups, &in_a, &[]);
    assert_eq!(without["failsAt"], json!(["newNode"]));
    assert_eq!(without["example"], json!({"kind": "deployment", "name": "without"}));
    let summary = &coverage["snapshot"]["summary"];
    assert_eq!((&summary["missing"], &coverage["snapshot"]["changes"]), (&json!([]), &Value::Null), "{coverage:#}");
    assert!(summary["groups"].as_u64() >= Some(6) && summary["groupsOk"].as_u64() >= Some(4), "{summary:#}");

    // The metrics of the worker, and the filters of the list.
    let metrics = survey.app.operations().get("/metrics").await.body;
    let counted = r#"regcred_coverage_workloads{cluster="prod",kind="cronjob",verdict="ok"}"#;
    assert!(metrics.contains(counted) && metrics.contains("regcred_coverage_snapshot_timestamp_seconds"), "{metrics}");
    let path = format!("/v1/clusters/prod/coverage/groups?namespace={namespace}");
    let failing = items(&survey.admin, &format!("{path}&verdict=noSecret&verdict=secretMissing")).await;
    assert_eq!(failing.len(), 2, "{failing:#?}");
    assert_eq!(items(&survey.admin, &format!("{path}&account=prod-a")).await.len(), 2);
    let users = async |filter: &str| {
        let found = items(&survey.admin, &format!("{path}&{filter}")).await;
        assert!(!found.iter().any(|group| group["pullSecrets"] == json!(["gone"])), "{found:#?}");
        found.len()
    };
    // Two of both images, one of the CronJob; and two of both images, one of the pod.
    assert_eq!((users("pullSecret=team-a").await, users("secret=by-hand").await), (3, 3));
    assert_eq!(users("pullSecret=team-a&secret=by-hand").await, 2);
    assert_eq!((users("pullSecret=other").await, users("secret=idle").await), (0, 0));
    survey.admin.get(&format!("{path}&pullSecret=A")).await.problem(422, "invalid-request");
    survey.admin.get(&format!("{path}&verdict=bad")).await.problem(422, "invalid-request");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn users_of_accounts_and_pull_secrets_are_counted(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let (namespace, _) = mixed(&survey).await;
    let unknown = survey.admin.get("/v1/pull-secrets/team-a").await.expect(200);
    assert_eq!(unknown.get("usedBy"), None, "{unknown:#}");

    survey.run().await;

    let accounts = items(&survey.admin, "/v1/coverage/accounts").await;
    assert_eq!(accounts, [json!({"account": "prod-a", "workloads": 2, "namespaces": 1, "clusters": 1})]);
    let shown = survey.admin.get("/v1/pull-secrets/team-a").await.expect(200);
    let used = &shown["usedBy"];
    let counts = ["workloads", "namespaces", "clusters"].map(|field| used[field].as_u64());
    assert_eq!(counts, [Some(2), Some(1), Some(1)], "{shown:#}");
    // The answer of GET may be sent back.
    put(&survey.admin, "team-a", &shown).await.expect(200);
    let grants = json!({"accounts": ["*"], "clusters": ["*"], "namespaces": [namespace]});
    let narrow = survey.app.caller("narrow", "viewer", Some(grants)).await;
    let answer = narrow.get("/v1/pull-secrets/team-a").await;
    assert!(!answer.body.contains("usedBy"), "{answer:?}");

    let secrets = survey.secrets(&namespace).await;
    let of = |name: &str| secrets.iter().find(|secret| secret["name"] == name).expect("a pull secret");
    assert_eq!((&of(MANAGED)["owner"], &of(MANAGED)["workloads"]), (&json!("pullSecret"), &json!(2)));
    assert_eq!((&of("gone")["state"], &of("gone")["workloads"]), (&json!("missing"), &json!(1)));
    let idle = of("idle");
    assert_eq!((&idle["workloads"], &idle["state"], &idle["adoption"]), (&json!(0), &json!("notRead"), &Value::Null));
    let by_hand = of("by-hand");
    assert_eq!((&by_hand["adoptable"], &by_hand["pods"]), (&json!(true), &json!(1)), "{by_hand:#}");
    let path = format!("/v1/clusters/prod/coverage/secrets?namespace={namespace}&used=false");
    let unused = items(&survey.admin, &path).await;
    let names: Vec<Value> = unused.into_iter().map(|secret| secret["name"].clone()).collect();
    assert_eq!(names, ["idle"]);
}

/// The steps of an adoption, carried out literally, lead to a managed Secret.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn adoption_makes_a_managed_secret(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let image = format!("{}/os/alpine:3", survey.b.address);
    let namespace =
        namespace_in(SECOND, &["by-hand"], vec![login("by-hand", &survey.b), deployment(&[&image], &[])]).await;
    survey.run().await;
    let [secret] = &survey.secrets(&namespace).await[..] else { panic!("one pull secret") };
    let adoption = &secret["adoption"];
    let steps = adoption["steps"].as_array().expect("steps");
    let command = steps[0]["command"].as_str().expect("a command");
    let url = format!("http://{}", survey.app.address);
    let shell = || {
        let mut shell = std::process::Command::new("sh");
        shell.args(["-ec", command]).env("KUBECONFIG", SECOND.path("kubeconfig"));
        shell.env("REGCRED_URL", &url).env("REGCRED_TOKEN", survey.admin.key());
        shell
    };
    let output = shell().output().expect("a shell");
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    let path = steps[1]["path"].as_str().expect("a path");
    assert_eq!(steps[1]["headers"], json!({"If-None-Match": "*"}));
    let put = || {
        let request = survey.admin.request("PUT", path).header("Prefer", "wait=30").header("If-None-Match", "*");
        request.json(&steps[1]["body"])
    };
    let declared = survey.admin.send(put()).await.expect(201);
    assert_eq!(declared["status"]["synced"], 1, "{declared:#}");
    // Neither step changes what was created meanwhile.
    survey.admin.send(put()).await.problem(412, "stale-version");
    let again = shell().output().expect("a shell");
    assert!(String::from_utf8_lossy(&again.stdout).contains("stale-version"), "{again:?}");

    survey.run().await;

    let groups = survey.groups(&namespace).await;
    assert_eq!(groups[0]["credential"]["account"], adoption["accounts"][0], "{groups:#?}");
    assert_eq!((&groups[0]["verdict"], &groups[0]["previousVerdict"]), (&json!("ok"), &json!("ok")));
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn snapshot_is_compared_with_the_one_before(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let (a, image) = (&survey.a, format!("{}/os/alpine:3", survey.a.address));
    let repository = format!("{}/os/alpine", a.address);
    let wrong = |name: &str| pull_secret(name, &document(&a.address, &a.username, "wrong"));
    let objects = vec![
        login("first", a),
        wrong("second"),
        named(deployment(&[&image], &["first"]), "first"),
        named(deployment(&[&image], &["second"]), "second"),
        named(deployment(&[&image], &["first", "second"]), "both"),
    ];
    let namespace = namespace_in(SECOND, &[], objects).await;
    survey.run().await;
    let groups = survey.groups(&namespace).await;
    assert_eq!(group(&groups, &repository, &["second"])["verdict"], "credentialInvalid");
    assert!(groups.iter().all(|group| group["previousVerdict"].is_null()), "{groups:#?}");

    apply(SECOND, &namespace, &[wrong("first"), login("second", a)]);
    SECOND.kubectl(&["delete", "deployment", "both", "-n", &namespace], "");
    apply(SECOND, &namespace, &[named(deployment(&[&image], &[]), "new")]);
    let coverage = survey.run().await;

    let groups = survey.groups(&namespace).await;
    let change = |secrets: &[&str]| {
        let group = group(&groups, &repository, secrets);
        (group["previousVerdict"].clone(), group["verdict"].clone())
    };
    assert_eq!(change(&["first"]), (json!("ok"), json!("credentialInvalid")));
    assert_eq!(change(&["second"]), (json!("credentialInvalid"), json!("ok")));
    assert_eq!(change(&[]), (Value::Null, json!("noSecret")));
    // Other tests may change the cluster, too.
    let changes = &coverage["snapshot"]["changes"];
    for field in ["added", "removed", "broken", "fixed"] {
        assert!(changes[field].as_u64() >= Some(1), "{field}: {changes:#}");
    }
    let path = format!("/v1/clusters/prod/coverage/groups?namespace={namespace}&changed=true");
    assert_eq!(items(&survey.admin, &path).await.len(), 3);

    survey.run().await;
    let kept: i64 = sqlx::query_scalar("SELECT count(*) FROM coverage_snapshots")
        .fetch_one(&survey.app.pool)
        .await
        .expect("a count");
    assert_eq!(kept, 2);
}

/// A page is of the snapshot of the page before, as long as that is kept.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn pages_are_of_one_snapshot(pool: PgPool) {
    let survey = Survey::new(pool).await;
    let images = ["127.0.0.1:1/a", "127.0.0.1:1/b", "127.0.0.1:1/c"];
    let namespace = namespace_in(SECOND, &[], vec![pod(&images, &[])]).await;
    survey.run().await;
    let path = format!("/v1/clusters/prod/coverage/groups?namespace={namespace}&limit=2");
    let first = survey.admin.get(&path).await.expect(200);
    let next = format!("{path}&cursor={}", first["next"].as_str().expect("a cursor"));
    SECOND.kubectl(&["delete", "pod", "web", "-n", &namespace, "--force", "--grace-period=0"], "");
    survey.run().await;
    assert_eq!(survey.groups(&namespace).await, Vec::<Value>::new());

    let second = survey.admin.get(&next).await.expect(200);

    assert_eq!(second["items"].as_array().map(Vec::len), Some(1), "{second:#}");
    survey.run().await;
    let gone = survey.admin.get(&next).await.expect(200);
    assert_eq!(gone, json!({"items": [], "next": null}));
}
