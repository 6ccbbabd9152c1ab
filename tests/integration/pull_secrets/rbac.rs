//! RBAC rules: `regcred cluster rbac` prints exactly the required ones, and `check` lists the
//! missing ones.

use k8s_openapi::api::core::v1::{Secret, ServiceAccount};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams},
};
use regcred::{
    clients::cluster::ClusterError,
    domain::names::{NamespaceName, SecretName},
};
use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use super::{
    Broker, declaration, entries, find_secret, label, labelled_namespace, password, put, service_account, settled,
    sync, target,
};
use crate::support::{
    app::TestApp,
    client::{Client, assert_holds},
    eventually, kubernetes,
    listener::refusing_server,
    process::Installation,
};

/// An app whose cluster credential has no role yet.
struct Setup {
    app: TestApp,
    admin: Client,
    broker: Broker,
    /// Part of the names of the printed roles, so unique per test.
    cluster: String,
    installation: Installation,
}

impl Setup {
    async fn new(pool: PgPool, variables: &[(&str, &str)]) -> Self {
        let installation = Installation::new(pool.connect_options().to_url_lossy().as_str());
        let app = TestApp::configured(pool, variables).await;
        let broker = Broker::without_rights().await;
        let cluster = broker.namespace.clone();
        app.register_cluster_with(&cluster, &broker.auth()).await;
        app.register_account("dev-user", "registry.example.com:5000", "dev-user", "one").await;
        let admin = app.admin();
        Self { app, admin, broker, cluster, installation }
    }

    /// Prints the manifests for the broker.
    async fn print(&self, more: &[&str]) -> String {
        let subject = format!("{}/{}", self.broker.namespace, self.broker.name);
        let arguments = ["cluster", "rbac", "--cluster", &self.cluster, "--service-account", &subject];
        self.installation.must_run(&[&arguments[..], more].concat()).await
    }

    async fn rotate(&self, password: &str) {
        self.admin.patch("/v1/registry-accounts/dev-user", &json!({"password": password})).await.expect(200);
    }

    /// Syncs until exactly `count` targets are synced. The API server enforces new rules with a
    /// delay.
    async fn until_synced(&self, count: usize) {
        eventually(&format!("{count} targets are synced"), async || {
            let status = &sync(&self.admin, "team-a").await["status"];
            (status["synced"] == count && status["desired"] == count && status["removing"] == 0).then_some(())
        })
        .await;
    }

    /// Checks until the missing rights are these. Results are remembered for seconds.
    async fn until_check_shows(&self, expected: Value) {
        eventually(&format!("the check shows {expected}"), async || (self.check().await == expected).then_some(()))
            .await;
    }

    async fn check(&self) -> Value {
        let check = self.admin.post(&format!("/v1/clusters/{}/check", self.cluster), &json!({})).await.expect(200);
        assert_eq!((check.get("problem"), &check["pullSecretsCut"]), (None, &json!(false)), "{check}");
        check["pullSecrets"].clone()
    }
}

fn apply(yaml: &str) {
    kubernetes::kubectl(&["apply", "-f", "-"], yaml);
}

/// Replaces one verb in manifests by `bind`, which has no effect on the resource.
fn without(yaml: &str, verb: &str, resource: &str) -> String {
    let (of_resource, word) = (format!("  resources: [\"{resource}\"]"), format!("\"{verb}\""));
    let mut lines: Vec<String> = yaml.lines().map(str::to_owned).collect();
    let (mut taken, mut is_of_resource) = (0, false);
    for line in &mut lines {
        if line.starts_with("  resources:") {
            is_of_resource = *line == of_resource;
        } else if is_of_resource && line.starts_with("  verbs:") && line.contains(&word) {
            *line = line.replace(&word, "\"bind\"");
            taken += 1;
        }
    }
    assert!(taken > 0, "{verb} {resource} is not in {yaml}");
    lines.join("\n")
}

/// Missing right as the check shows it. `create` and rights to namespaces name no object.
fn missing(verb: &str, resource: &str, namespace: Option<&str>) -> Value {
    let name = match (verb, resource) {
        ("create", _) | (_, "namespaces") => None,
        (_, "secrets") => Some("team-a-pull"),
        _ => Some("default"),
    };
    json!({"verb": verb, "resource": resource, "name": name, "namespace": namespace})
}

/// Name of a resource in error messages.
fn kind(resource: &str) -> &str {
    match resource {
        "secrets" => "Secrets",
        "serviceaccounts" => "ServiceAccounts",
        other => panic!("{other}"),
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_roles_are_exactly_required_for_listed_namespaces(pool: PgPool) {
    let setup = Setup::new(pool, &[]).await;
    let admin = &setup.admin;
    let (one, two) = (kubernetes::new_namespace().await, kubernetes::new_namespace().await);
    for namespace in [&one, &two] {
        service_account(namespace, "default", &["other"]).await;
    }
    let mut body = declaration(&["dev-user"], &setup.cluster, &[&one, &two]);
    body["serviceAccounts"] = json!(["default"]);
    let shown = put(admin, "team-a", &body).await.expect(201);
    assert_holds(&shown["status"], &json!({"desired": 2, "failed": 2}));

    // Onboarding, a rotation, and a namespace that is no longer declared.
    let both = setup.print(&[]).await;
    assert_eq!(setup.print(&[]).await, both, "the output is deterministic");
    assert!(!both.contains('*') && !both.contains("ClusterRole\n"), "{both}");
    for names in [r#"resourceNames: ["team-a-pull"]"#, r#"resourceNames: ["default"]"#] {
        assert_eq!(both.matches(names).count(), 2, "{names}: {both}");
    }
    apply(&both);
    setup.until_synced(2).await;
    setup.until_check_shows(json!([])).await;
    setup.rotate("two").await;
    assert_holds(&settled(admin, "team-a").await["status"], &json!({"desired": 2, "synced": 2}));
    for namespace in [&one, &two] {
        assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), "two");
        assert_eq!(entries(namespace, "default").await, ["other", "team-a-pull"]);
    }
    body["targets"][0]["namespaces"] = json!([one]);
    let shown = put(admin, "team-a", &body).await.expect(200);
    assert_holds(&shown["status"], &json!({"desired": 1, "synced": 1, "removing": 0}));
    assert!(find_secret(&two, "team-a-pull").await.is_none());
    assert_eq!(entries(&two, "default").await, ["other"]);

    // Each missing rule fails the target, and the state and the check name it.
    let printed = setup.print(&[]).await;
    assert!(printed.contains(&one) && !printed.contains(&two), "{printed}");
    let secrets = Api::<Secret>::namespaced(kubernetes::admin(), &one);
    let accounts = Api::<ServiceAccount>::namespaced(kubernetes::admin(), &one);
    let mut rotations = 0;
    for (verb, resource) in [
        ("create", "secrets"),
        ("get", "secrets"),
        ("patch", "secrets"),
        ("get", "serviceaccounts"),
        ("patch", "serviceaccounts"),
    ] {
        apply(&without(&printed, verb, resource));
        let expected = format!("may not {verb} {} in namespace {one}", kind(resource));
        eventually(&expected, async || {
            // Trigger a call that requires the rule.
            match (verb, resource) {
                // It may be deleted already.
                ("create", "secrets") => drop(secrets.delete("team-a-pull", &DeleteParams::default()).await),
                ("patch", "secrets") => {
                    rotations += 1;
                    setup.rotate(&format!("rotated-{rotations}")).await;
                }
                ("patch", "serviceaccounts") => {
                    let patch = Patch::Merge(json!({"imagePullSecrets": [{"name": "other"}]}));
                    accounts.patch("default", &PatchParams::default(), &patch).await.expect("patched");
                }
                _ => {}
            }
            sync(admin, "team-a").await;
            let target = target(admin, "team-a").await;
            let is_so = target["lastError"]["detail"].as_str().is_some_and(|detail| detail.contains(&expected));
            (is_so && target["lastError"]["type"] == "cluster-forbidden").then_some(())
        })
        .await;
        let missing = missing(verb, resource, Some(&one));
        setup.until_check_shows(json!([{"name": "team-a", "missing": [missing]}])).await;
        apply(&printed);
        setup.until_synced(1).await;
    }
    let expected = format!("may not delete Secrets in namespace {one}");
    apply(&without(&printed, "delete", "secrets"));
    // First the API server must enforce it: there is a single attempt.
    let missing = json!([{"name": "team-a", "missing": [missing("delete", "secrets", Some(&one))]}]);
    setup.until_check_shows(missing.clone()).await;
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually(&expected, async || {
        let target = target(admin, "team-a").await;
        target["lastError"]["detail"].as_str().is_some_and(|detail| detail.contains(&expected)).then_some(())
    })
    .await;
    setup.until_check_shows(missing).await;
    // The cleanup requires fewer rules.
    let left = setup.print(&[]).await;
    assert!(left.contains(r#"verbs: ["get", "delete"]"#) && !left.contains("create"), "{left}");
    apply(&left);
    eventually("the pull secret is gone", async || {
        let poked = admin.post("/v1/pull-secrets/team-a/sync", &json!({})).await;
        (poked.status == 404).then_some(())
    })
    .await;
    assert!(find_secret(&one, "team-a-pull").await.is_none());
    assert_eq!(entries(&one, "default").await, ["other"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_cluster_role_is_exactly_required_for_selectors(pool: PgPool) {
    let setup = Setup::new(pool, &[("REGCRED_PULL_SECRETS_COMPARE_SECONDS", "1")]).await;
    let admin = &setup.admin;
    let team = format!("t{}", uuid::Uuid::now_v7().simple());
    let first = labelled_namespace(&[("team", &team)]).await;
    service_account(&first, "default", &[]).await;
    let mut body = declaration(&["dev-user"], &setup.cluster, &[]);
    body["targets"] = json!([{"cluster": setup.cluster, "namespaceSelector": {"matchLabels": {"team": team}}}]);
    body["serviceAccounts"] = json!(["default"]);
    let request = admin.request("PUT", "/v1/pull-secrets/team-a").json(&body);
    admin.send(request).await.expect(201);
    let selection = async || admin.get("/v1/pull-secrets/team-a").await.expect(200)["selections"][0].clone();
    let list_is_missing = async || {
        let error = selection().await["lastError"].clone();
        let is_named = error["detail"].as_str().is_some_and(|detail| detail.contains("may not list namespaces"));
        (is_named && error["type"] == "cluster-forbidden").then_some(())
    };
    eventually("the status reports that namespaces cannot be listed", list_is_missing).await;

    let printed = setup.print(&[]).await;
    assert_eq!(setup.print(&[]).await, printed, "the output is deterministic");
    assert!(!printed.contains('*') && !printed.contains("kind: Role\n"), "{printed}");
    apply(&printed);
    setup.until_synced(1).await;
    setup.until_check_shows(json!([])).await;
    let client = setup.broker.client();
    let read = async |name: &str| {
        let (namespace, name) =
            (NamespaceName::parse(&first).expect("a name"), SecretName::parse(name).expect("a name"));
        client.get_secret(&namespace, &name).await
    };
    assert!(matches!(read("team-a-pull").await, Ok(Some(_))));
    let other = read("another").await;
    assert!(matches!(other, Err(ClusterError::Forbidden { .. })), "another Secret can be read: {other:?}");

    // A new namespace, a rotation, and a namespace that no longer matches.
    let second = labelled_namespace(&[("team", &team)]).await;
    service_account(&second, "default", &[]).await;
    eventually("the Secret exists", async || find_secret(&second, "team-a-pull").await).await;
    setup.until_synced(2).await;
    setup.rotate("two").await;
    assert_holds(&settled(admin, "team-a").await["status"], &json!({"desired": 2, "synced": 2}));
    for namespace in [&first, &second] {
        assert_eq!(password(&kubernetes::secret(namespace, "team-a-pull").await), "two");
        assert_eq!(entries(namespace, "default").await, ["team-a-pull"]);
    }
    label(&first, &[("team", None)]).await;
    eventually("the Secret is removed", async || find_secret(&first, "team-a-pull").await.is_none().then_some(()))
        .await;
    eventually("the Secret is detached", async || entries(&first, "default").await.is_empty().then_some(())).await;

    // The check lists each missing rule.
    for (verb, resource) in [
        ("create", "secrets"),
        ("get", "secrets"),
        ("patch", "secrets"),
        ("delete", "secrets"),
        ("get", "serviceaccounts"),
        ("patch", "serviceaccounts"),
        ("watch", "namespaces"),
        ("list", "namespaces"),
    ] {
        apply(&without(&printed, verb, resource));
        setup.until_check_shows(json!([{"name": "team-a", "missing": [missing(verb, resource, None)]}])).await;
    }
    eventually("the status reports that namespaces cannot be listed", list_is_missing).await;
    apply(&printed);
    eventually("namespaces can be listed again", async || selection().await["lastError"].is_null().then_some(())).await;
    assert_eq!(admin.delete("/v1/pull-secrets/team-a").await.status, 202);
    eventually("the pull secret is gone", async || {
        (admin.get("/v1/pull-secrets/team-a").await.status == 404).then_some(())
    })
    .await;
    assert!(find_secret(&second, "team-a-pull").await.is_none());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn printed_roles_follow_the_declarations(pool: PgPool) {
    let setup = Setup::new(pool.clone(), &[]).await;
    let admin = &setup.admin;
    let nothing = setup.print(&[]).await;
    assert!(nothing.starts_with("# No pull secret") && nothing.lines().count() == 1, "{nothing}");
    let rbac = async |arguments: &[&str]| setup.installation.run(&[&["cluster", "rbac"], arguments].concat()).await;
    let unknown = rbac(&["--cluster", "nowhere"]).await;
    assert!(unknown.code == Some(1) && unknown.stderr.contains("cluster `nowhere` not found"), "{unknown:?}");
    for wrong in ["no-slash", "Upper/case", "a/b/c", "/b", "a/"] {
        let refused = rbac(&["--cluster", &setup.cluster, "--service-account", wrong]).await;
        assert!(refused.code == Some(2) && refused.stderr.contains("--service-account"), "{refused:?}");
    }
    let both = rbac(&["--cluster", &setup.cluster, "--user", "me", "--group", "us"]).await;
    assert_eq!(both.code, Some(2), "{both:?}");

    // Exactly the rules of the declaration, and of the cleanup of an earlier one.
    let away = json!({"name": "away", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &away).await.expect(201);
    let mut body = declaration(&["dev-user"], "away", &["a-dev", "a-prod"]);
    body["deletionPolicy"] = json!("retain");
    put(admin, "team-a", &body).await.expect(201);
    let print = async |more: &[&str]| {
        let arguments = ["cluster", "rbac", "--cluster", "away"];
        setup.installation.must_run(&[&arguments[..], more].concat()).await
    };
    let verbs = async |more: &[&str]| {
        let printed = print(more).await;
        let words = ["  resources:", "  resourceNames:", "  verbs:"];
        let rules = printed.lines().filter(|line| words.iter().any(|word| line.starts_with(word)));
        rules.map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    let (secrets, pull) = (r#"resources: ["secrets"]"#, r#"resourceNames: ["team-a-pull"]"#);
    let create = [secrets, r#"verbs: ["create"]"#];
    let least = [&create[..], &[secrets, pull, r#"verbs: ["get", "patch"]"#]].concat();
    assert_eq!(verbs(&[]).await, [&least[..], &least].concat());
    let printed = print(&["--group", "brokers"]).await;
    assert_eq!(printed.matches("  namespace: \"a-dev\"\n").count(), 2, "{printed}");
    assert_eq!(printed.matches("- kind: Group\n").count(), 2, "{printed}");
    assert!(print(&[]).await.contains("name: \"regcred\"\n  namespace: \"regcred\"\n"), "the default");
    let watching = [secrets, r#"verbs: ["list", "watch"]"#];
    assert_eq!(verbs(&["--watch-secrets"]).await, [&watching[..], &least, &least].concat());

    // Fences attempts in flight.
    let attached = "UPDATE pull_secret_targets SET attached = '{default}', lease_token = lease_token + 1,
        lease_until = NULL, next_attempt_at = now() + interval '1 hour' WHERE namespace = 'a-dev'";
    sqlx::query(attached).execute(&pool).await.expect("done");
    let detach = [r#"resources: ["serviceaccounts"]"#, r#"resourceNames: ["default"]"#, r#"verbs: ["get", "patch"]"#];
    assert_eq!(verbs(&[]).await, [&least[..], &detach, &least].concat());
    body["deletionPolicy"] = json!("delete");
    body["targets"][0]["namespaces"] = json!(["a-prod"]);
    admin.send(admin.request("PUT", "/v1/pull-secrets/team-a").json(&body)).await.expect(200);
    let remove = [secrets, pull, r#"verbs: ["get", "delete"]"#];
    let all = [secrets, pull, r#"verbs: ["get", "patch", "delete"]"#];
    assert_eq!(verbs(&[]).await, [&remove[..], &detach, &create, &all].concat());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn check_is_limited_to_visible_pull_secrets_and_bounded(pool: PgPool) {
    let setup = Setup::new(pool, &[]).await;
    let admin = &setup.admin;
    let cluster = setup.cluster.as_str();
    let declare = async |name: &str, namespaces: &[&str]| {
        let mut body = declaration(&["dev-user"], cluster, namespaces);
        body["secret"]["name"] = json!(name);
        let request = admin.request("PUT", &format!("/v1/pull-secrets/{name}")).json(&body);
        admin.send(request).await.expect(201);
    };
    declare("team-a", &["a-dev"]).await;
    declare("team-b", &["a-dev", "b-dev"]).await;
    let rights = |secret: &str, namespace: &str| {
        ["create", "get", "patch", "delete"].map(|verb| {
            let name = (verb != "create").then_some(secret);
            json!({"verb": verb, "resource": "secrets", "name": name, "namespace": namespace})
        })
    };
    let team_a = json!({"name": "team-a", "missing": rights("team-a", "a-dev")});
    let of_both = [rights("team-b", "a-dev"), rights("team-b", "b-dev")].concat();
    let team_b = json!({"name": "team-b", "missing": of_both});
    assert_eq!(setup.check().await, json!([team_a, team_b]));
    let grants = json!({"accounts": ["*"], "clusters": [cluster], "namespaces": ["a-*"]});
    let deliverer = setup.app.caller("ci", "deliverer", Some(grants)).await;
    let check = deliverer.post(&format!("/v1/clusters/{cluster}/check"), &json!({})).await.expect(200);
    assert_holds(&check, &json!({"pullSecrets": [team_a], "pullSecretsCut": false}));

    let many: Vec<String> = (0..150).map(|number| format!("many-{number:03}")).collect();
    declare("many", &many.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let check = admin.post(&format!("/v1/clusters/{cluster}/check"), &json!({})).await.expect(200);
    let lacking = check["pullSecrets"].as_array().expect("a list");
    assert_eq!((lacking.len(), &check["pullSecretsCut"]), (3, &json!(true)), "{check}");
    assert_eq!(lacking[0]["missing"].as_array().map(Vec::len), Some(50));

    // Nothing is known about a cluster that does not answer.
    let away = json!({"name": "away", "server": refusing_server(), "auth": {"type": "none"}, "allowPlainHttp": true});
    admin.post("/v1/clusters", &away).await.expect(201);
    let check = admin.post("/v1/clusters/away/check", &json!({})).await.expect(200);
    assert_eq!((check.get("pullSecrets"), check.get("pullSecretsCut")), (None, None), "{check}");
}
