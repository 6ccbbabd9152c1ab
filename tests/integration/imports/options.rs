//! Options of imports: labels, plain HTTP, registries and verification.

use super::*;

async fn account(app: &TestApp, name: &str) -> Value {
    app.admin().get(&format!("/v1/registry-accounts/{name}")).await.expect(200)
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn options_apply_to_every_account(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let query =
        "?labels=team%3Da&labels=tier%3Dprod&plainHttp=true&onlyRegistries=index.docker.io&onlyRegistries=daocloud.io";
    let imported = import(&app.admin(), query, JSON, W1).await;
    let expected = rows(&[
        ["daocloud.io", "daocloud-io", "created", "-"],
        ["https://index.docker.io/v1/", "docker-io", "created", "-"],
        ["registry.martin.com:5000", "-", "skipped", "notSelected"],
        ["HttpHeaders", "-", "skipped", "HttpHeaders"],
    ]);
    assert_eq!(outcomes(&imported), expected);
    for name in ["daocloud-io", "docker-io"] {
        let account = account(&app, name).await;
        assert_eq!((&account["labels"], &account["plainHttp"]), (&json!({"team": "a", "tier": "prod"}), &json!(true)));
    }
    // Labels of an existing account stay.
    app.admin()
        .patch("/v1/registry-accounts/docker-io", &json!({"labels": {"own": "1", "tier": "dev"}}))
        .await
        .expect(200);
    let again = import(&app.admin(), query, JSON, W1).await;
    assert_eq!(outcome_list(&again)[..2], ["unchanged", "updated"]);
    assert_eq!(account(&app, "docker-io").await["labels"], json!({"own": "1", "team": "a", "tier": "prod"}));
    assert_eq!(outcome_list(&import(&app.admin(), query, JSON, W1).await)[..2], ["unchanged"; 2]);

    // A part of a registry is selected with the registry, and not the other way round.
    let document =
        json!({"auths": {"reg.io/a": {"auth": auth("u:p")}, "reg.io/ab": {"auth": auth("u:p")}}}).to_string();
    for (only, expected) in
        [("reg.io", ["wouldCreate"; 2]), ("reg.io/a", ["wouldCreate", "skipped"]), ("reg.io/a/b", ["skipped"; 2])]
    {
        let dry = import(&app.admin(), &format!("?dryRun=true&onlyRegistries={only}"), JSON, document.clone()).await;
        assert_eq!(outcome_list(&dry), expected, "{only}");
    }
    for (query, field) in [
        ("?labels=team", "labels"),
        ("?labels=te%20am%3Da", "labels"),
        ("?plainHttp=1", "plainHttp"),
        ("?onlyRegistries=*.io", "onlyRegistries"),
        ("?verify=yes", "verify"),
    ] {
        let refused = import(&app.admin(), query, JSON, W1).await;
        refused.problem(422, "invalid-request");
        assert_eq!(refused.fields(), [field], "{query}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn labels_of_an_import_must_belong_to_label_grants(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let grants = |accounts: Value| Some(json!({"accounts": accounts, "clusters": [], "namespaces": []}));
    let of_a = app.caller("of-a", "operator", grants(json!([{"matchLabels": {"team": "a"}}]))).await;
    let by_name = app.caller("by-name", "operator", grants(json!(["n-*"]))).await;

    let refused = import(&by_name, "?namePrefix=n-&labels=team%3Da", JSON, W1).await;
    refused.problem(403, "forbidden");
    assert_eq!(refused.fields(), ["labels.team"]);
    import(&of_a, "", JSON, W1).await.problem(403, "forbidden");
    import(&of_a, "?labels=team%3Db", JSON, W1).await.problem(403, "forbidden");
    assert_eq!(app.rows().await[0], 0);
    let imported = import(&of_a, "?labels=team%3Da", JSON, W1).await;
    assert_eq!(outcome_list(&imported)[..3], ["created"; 3]);

    // An account of another team does not become granted by the labels of an import.
    app.admin().patch("/v1/registry-accounts/docker-io", &json!({"labels": {"team": "b"}})).await.expect(200);
    let before = account(&app, "docker-io").await;
    import(&of_a, "?labels=team%3Da", JSON, W1).await.problem(409, "name-taken");
    import(&of_a, "?labels=team%3Da&dryRun=true", JSON, W1).await.problem(409, "name-taken");
    assert_eq!(account(&app, "docker-io").await, before);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn verification_skips_logins_that_do_not_work(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let (a, b) = (registry::a(), registry::b());
    let good = auth(&format!("{}:{}", a.username, a.password));
    let document = json!({"auths": {
        &a.address: {"auth": good}, &b.address: {"auth": auth("martin:CANARY\n")}, "127.0.0.1:1": {"auth": auth("u:p")},
    }});
    let name = |address: &str| address.replace(['.', ':'], "-");
    let query = "?plainHttp=true&verify=true";
    for (dry, outcome, stored) in [("&dryRun=true", "wouldCreate", 0), ("", "created", 1)] {
        let imported = import(&app.admin(), &format!("{query}{dry}"), JSON, document.to_string()).await;
        let mut found = outcomes(&imported);
        found.sort();
        let mut expected = rows(&[
            [&a.address, &name(&a.address), outcome, "-"],
            [&b.address, "-", "skipped", "verificationFailed"],
            ["127.0.0.1:1", "-", "skipped", "verificationFailed"],
        ]);
        expected.sort();
        assert_eq!(found, expected);
        assert_eq!(app.rows().await[0], stored);
        let items = imported.json()["items"].as_array().expect("items").clone();
        let detail = items.iter().find(|item| item["key"] == b.address.as_str()).expect("the entry")["detail"].clone();
        let detail = detail.as_str().expect("a text");
        assert!(detail.starts_with("invalid: ") && detail.contains("white space at the end"), "{detail}");
        assert!(!imported.body.contains("CANARY"), "{imported:?}");
    }
    assert_eq!(account(&app, &name(&a.address)).await["lastVerificationResult"], "valid");

    let many = (0..101).map(|at| (format!("r{at}.invalid"), json!({"auth": auth("u:p")})));
    let many = json!({"auths": Value::Object(many.collect())}).to_string();
    let refused = import(&app.admin(), "?verify=true", JSON, many.clone()).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["verify"]);
    let one = import(&app.admin(), "?verify=true&onlyRegistries=r1.invalid&dryRun=true", JSON, many).await;
    assert_eq!(outcome_list(&one), vec!["skipped"; 101]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn no_registry_is_called_before_grants_are_checked(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_OUTBOUND_ALLOW", "127.0.0.0/8")]).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("non-blocking");
    let address = listener.local_addr().expect("an address").to_string();
    let grants = json!({"accounts": ["n-*"], "clusters": [], "namespaces": []});
    let operator = app.caller("by-name", "operator", Some(grants)).await;
    let document = json!({"auths": {address: {"auth": auth("u:CANARY")}}}).to_string();
    import(&operator, "?plainHttp=true&verify=true", JSON, document).await.problem(403, "forbidden");
    assert!(listener.accept().is_err(), "the registry was called");
}
