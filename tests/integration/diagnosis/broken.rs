//! Broken set-ups, each with its verdict and its fix; applied literally, the fix leads to `ok`.

use std::net::SocketAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use sqlx::PgPool;

use super::setup::{
    Doctor, deployment, document, login, namespace_with, pod, pull_secret, references, secret, workload,
};
use crate::{
    pull_secrets::{declaration, put},
    support::{files::TempDir, listener::refusing_server},
    verify::{
        certificates::Ca,
        listening::{answer, serve},
        registries::{Setup, TestRegistry},
        token_service::{Deviations, TokenService},
    },
};

/// A broken set-up.
struct Case {
    what: &'static str,
    /// Pull secrets of the `ServiceAccount`.
    of_account: &'static [&'static str],
    objects: Vec<Value>,
    /// Path of the object to diagnose.
    object: &'static str,
    /// Verdict of each image, in order.
    verdicts: Vec<&'static str>,
    /// Type of the fix of the first image whose verdict is not `ok`.
    fix: Option<&'static str>,
    /// Whether the fix, applied literally, leads to `ok`.
    is_fixed: bool,
    /// Login that the fix is carried out with; that of the image's registry if absent.
    login: Option<(&'static str, &'static str)>,
    /// Part of the sentence of that image.
    sentence: String,
}

const WEB: &str = "workloads/deployment/web";

fn case(what: &'static str, objects: Vec<Value>, verdict: &'static str) -> Case {
    Case {
        what,
        of_account: &[],
        objects,
        object: WEB,
        verdicts: vec![verdict],
        fix: None,
        is_fixed: false,
        login: None,
        sentence: String::new(),
    }
}

impl Case {
    /// The fix has this type and leads to `ok`.
    fn fixed_by(self, fix: &'static str) -> Self {
        Self { fix: Some(fix), is_fixed: true, ..self }
    }

    /// As [`fixed_by`](Self::fixed_by), with this login.
    fn fixed_with(self, fix: &'static str, login: (&'static str, &'static str)) -> Self {
        Self { login: Some(login), ..self.fixed_by(fix) }
    }

    /// The fix has this type and cannot be carried out by commands.
    fn advised(self, fix: &'static str) -> Self {
        Self { fix: Some(fix), ..self }
    }

    fn says(self, sentence: impl Into<String>) -> Self {
        Self { sentence: sentence.into(), ..self }
    }
}

async fn check(doctor: &Doctor, case: Case) {
    let Case { what, of_account, objects, object, verdicts, fix, is_fixed, login, sentence } = case;
    let namespace = namespace_with(of_account, objects).await;

    let diagnosis = doctor.diagnose(&namespace, object).await;

    let images = diagnosis["images"].as_array().expect("images");
    let found: Vec<&str> = images.iter().map(|image| image["verdict"].as_str().expect("a verdict")).collect();
    assert_eq!(found, verdicts, "{what}: {diagnosis:#}");
    assert_eq!(diagnosis["ok"], json!(verdicts.iter().all(|verdict| *verdict == "ok")), "{what}: {diagnosis:#}");
    let wrong = images.iter().find(|image| image["verdict"] != "ok");
    let Some(wrong) = wrong else {
        assert_eq!(fix, None, "{what}");
        return;
    };
    assert_eq!(wrong["fix"]["type"].as_str(), fix, "{what}: {diagnosis:#}");
    let said = wrong["sentence"].as_str().expect("a sentence");
    assert!(said.contains(&sentence), "{what}: {said}");
    if is_fixed {
        // The registry of the image that failed.
        let registry = if wrong["image"].as_str().is_some_and(|image| image.starts_with(&doctor.b.address)) {
            &doctor.b
        } else {
            &doctor.a
        };
        let login = login.unwrap_or((registry.username.as_str(), registry.password.as_str()));
        doctor.apply(&wrong["fix"], login).await;
        let after = doctor.diagnose(&namespace, object).await;
        assert_eq!(after["ok"], true, "{what}: after the fix: {after:#}\n{:#}", wrong["fix"]);
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn lists_of_pull_secrets_are_diagnosed(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (a, b) = (&doctor.a, &doctor.b);
    let (at_a, at_b) = (Doctor::image_of(a), Doctor::image_of(b));
    let (at_a, at_b) = (at_a.as_str(), at_b.as_str());
    let mut of_account = case("the list of the ServiceAccount", vec![login("k", a), deployment(&[at_a], &[])], "ok");
    of_account.of_account = &["k"];
    let mut missing_of_account = case("its Secret is missing", vec![deployment(&[at_a], &[])], "secretMissing");
    missing_of_account.of_account = &["k"];
    let mut own_list = case(
        "an own list hides that of the ServiceAccount",
        vec![login("k", a), deployment(&[at_a], &["x"])],
        "secretMissing",
    );
    own_list.of_account = &["k"];
    let mut old_pod = case("a pod older than the list", vec![login("k", a), pod(&[at_a], &[])], "noSecret");
    old_pod.of_account = &["k"];
    old_pod.object = "pods/web";
    let mut bare =
        case("a pod without a list, as after `docker login` on the node", vec![pod(&[at_a], &[])], "noSecret");
    bare.object = "pods/web";
    let mut missing_of_pod = case("a missing Secret of a pod", vec![pod(&[at_a], &["gone"])], "secretMissing");
    missing_of_pod.object = "pods/web";
    let mut two_registries = case(
        "two registries, two Secrets",
        vec![login("k1", a), login("k2", b), deployment(&[at_a, at_b], &["k1", "k2"])],
        "ok",
    );
    two_registries.verdicts = vec!["ok", "ok"];
    let mut one_of_two =
        case("two registries, one Secret", vec![login("k1", a), deployment(&[at_a, at_b], &["k1"])], "ok");
    one_of_two.verdicts = vec!["ok", "noMatchingEntry"];
    let mut merged_document = document(&a.address, &a.username, &a.password);
    merged_document["auths"][&b.address] = document(&b.address, &b.username, &b.password)["auths"][&b.address].clone();
    let mut merged = case(
        "one Secret for two registries",
        vec![pull_secret("k", &merged_document), deployment(&[at_a, at_b], &["k"])],
        "ok",
    );
    merged.verdicts = vec!["ok", "ok"];
    for case in [
        case("the right Secret", vec![login("k", a), deployment(&[at_a], &["k"])], "ok"),
        case("no Secret", vec![deployment(&[at_a], &[])], "noSecret").fixed_by("attachServiceAccount"),
        case("a missing Secret", vec![deployment(&[at_a], &["registrykey-2.6.2"])], "secretMissing")
            .fixed_by("createSecret")
            .says("registrykey-2.6.2 does not exist"),
        case("a missing and a right one", vec![login("k", a), deployment(&[at_a], &["gone", "k"])], "ok"),
        of_account,
        missing_of_account.fixed_by("createSecret"),
        own_list.fixed_by("createSecret"),
        old_pod.advised("recreatePod").says("created before the ServiceAccount"),
        bare.advised("attachServiceAccount").says("`docker login` on a node is of no use"),
        missing_of_pod.fixed_by("createSecret"),
        two_registries,
        one_of_two.fixed_by("addPullSecret").says("the entry has port"),
        merged,
    ] {
        check(&doctor, case).await;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn unreadable_secrets_are_diagnosed(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let at_a = Doctor::image_of(a);
    let good = document(&a.address, &a.username, &a.password);
    let (text, entries) = (good.to_string(), good["auths"].to_string());
    let broken = |what, secret: Value, sentence: &str| {
        let objects = vec![secret, deployment(&[&at_a], &["k"])];
        case(what, objects, "secretUnreadable").fixed_by("replaceSecret").says(sentence)
    };
    let key = ".dockerconfigjson";
    let auth = |auth: &str| pull_secret("k", &json!({"auths": {&a.address: {"auth": auth}}}));
    let legacy = "kubernetes.io/dockercfg";
    let mut two = document("quay.io", "u", "p");
    two["auths"][&a.address] = json!({"auth": "!"});
    let two_entries = vec![pull_secret("k", &two), deployment(&[&at_a], &["k"])];
    let both = |other: Value| vec![login("good", a), other, deployment(&[&at_a], &["good", "k"])];
    for case in [
        broken("type Opaque", secret("k", "Opaque", key, &text), "its type is not"),
        broken("a stray `#`", secret("k", "Opaque", key, &format!("{text}#")), "a stray `#` follows"),
        broken("no docker config at all", secret("k", "Opaque", key, "letmein"), "the text is not JSON"),
        broken("base64 twice", secret("k", "Opaque", key, &BASE64_STANDARD.encode(&text)), "base64 of base64"),
        broken("a byte order mark", secret("k", "Opaque", key, &format!("\u{feff}{text}")), "byte order mark"),
        broken("`auth` is no base64", auth("!"), "not base64"),
        broken("`auth` without colon", auth(&BASE64_STANDARD.encode("martin")), "no colon"),
        broken(
            "a number as password",
            pull_secret("k", &json!({"auths": {&a.address: {"password": 1}}})),
            "not a string",
        ),
        broken("an entry without login", pull_secret("k", &json!({"auths": {&a.address: {}}})), "it is empty"),
        broken("an empty document", pull_secret("k", &json!({"auths": {}})), "no entry"),
        broken(
            "the legacy form",
            secret("k", "kubernetes.io/dockerconfigjson", key, &entries),
            "form of the other type",
        ),
        broken("`auths` in the legacy type", secret("k", legacy, ".dockercfg", &text), "form of the other type"),
        case("the legacy type", vec![secret("k", legacy, ".dockercfg", &entries), deployment(&[&at_a], &["k"])], "ok"),
        case(
            "line breaks of Windows",
            vec![
                secret("k", "kubernetes.io/dockerconfigjson", key, &text.replace(',', ",\r\n")),
                deployment(&[&at_a], &["k"]),
            ],
            "ok",
        ),
        // Something else may use this file, so the Secret stays.
        case(
            "a wrong key",
            vec![secret("k", "Opaque", "config.json", &text), deployment(&[&at_a], &["k"])],
            "secretUnreadable",
        )
        .fixed_by("addPullSecret")
        .says("has no `.dockerconfigjson`"),
        case("a bad `auth` beside a good entry", two_entries, "secretUnreadable").fixed_by("addPullSecret"),
        case("a broken Secret beside the right one", both(auth("!")), "secretUnreadable")
            .fixed_by("replaceSecret")
            .says("every pull of the pod fails"),
        case("an ignored Secret beside the right one", both(secret("k", "Opaque", key, &text)), "ok"),
    ] {
        check(&doctor, case).await;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn entries_that_do_not_match_or_do_not_work_are_diagnosed(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let (a, b) = (&doctor.a, &doctor.b);
    let at_a = Doctor::image_of(a);
    let port = a.address.rsplit(':').next().expect("a port");
    let with = |key: &str, password: &str, image: &str| {
        vec![pull_secret("k", &document(key, &a.username, password)), deployment(&[image], &["k"])]
    };
    let under = |key: &str| with(key, &a.password, &at_a);
    let near = |what, key: &str| case(what, under(key), "noMatchingEntry").fixed_by("addPullSecret");
    let of_localhost = with(&format!("LocalHost:{port}"), &a.password, &format!("localhost:{port}/os/alpine:3"));
    let several = {
        let mut several = document("mirror.example.com", "u", "p");
        several["auths"]["other.example.com"] = json!({"auth": "dTpw"});
        several
    };
    let crlf = pull_secret("k", &json!({"auths": {&a.address: {"auth": BASE64_STANDARD.encode("martin:xxx1\r\n")}}}));
    let wrong = pull_secret("old", &document(&a.address, &a.username, "old"));
    let mut of_pod =
        case("another port, of a pod", vec![pull_secret("k", &several), pod(&[&at_a], &["k"])], "noMatchingEntry");
    of_pod.object = "pods/web";
    for case in [
        near("another port", &b.address).says("the entry has port"),
        near("no port", "127.0.0.1").says("the entry has no port"),
        near("a path elsewhere", &format!("{}/team", a.address)).says("is not below the path `team`"),
        case("a path", under(&format!("{}/os", a.address)), "ok"),
        case("the repository", under(&format!("{}/os/alpine", a.address)), "ok"),
        case("a scheme and an API root", under(&format!("http://{}/v2/", a.address)), "ok"),
        case("another case", of_localhost, "noMatchingEntry").fixed_by("addPullSecret").says("case-sensitively"),
        case("a mirror", vec![pull_secret("k", &several), deployment(&[&at_a], &["k"])], "noMatchingEntry")
            .fixed_by("addPullSecret"),
        of_pod.fixed_by("addPullSecret"),
        case("a wrong password", with(&a.address, "wrong", &at_a), "credentialInvalid").fixed_by("replaceSecret"),
        case("a line break after the password", vec![crlf, deployment(&[&at_a], &["k"])], "credentialInvalid")
            .fixed_by("replaceSecret")
            .says("white space at the end of the password"),
        case("an old and a new password", vec![wrong, login("new", a), deployment(&[&at_a], &["old", "new"])], "ok"),
    ] {
        check(&doctor, case).await;
    }
}

/// Login that the token service accepts.
const MARTIN: (&str, &str) = ("martin", "canary-password");

/// A registry whose images have a manifest list with one platform.
pub fn arm64_image() -> SocketAddr {
    let list = json!({"manifests": [{"platform": {"os": "linux", "architecture": "arm64"}}]}).to_string();
    let (address, _) = serve(move |request| {
        let media_type = ("Content-Type", "application/vnd.oci.image.index.v1+json");
        if request.contains("/manifests/") {
            answer("200 OK", &[media_type], &list)
        } else {
            answer("200 OK", &[], "{}")
        }
    });
    address
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn failures_of_registries_are_diagnosed(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let tls = TestRegistry::start(Setup { tls: Some(&Ca::new().certify()), ..Setup::default() }).await;
    let open = TestRegistry::start(Setup::default()).await;
    let service = TokenService::start(Deviations::default());
    let folder = TempDir::new();
    let token_service = Some((service.realm(), service.write_certificate(folder.path())));
    let tokens = TestRegistry::start(Setup { token_service, ..Setup::default() }).await;
    let (limited, _) = serve(|_| answer("429 Too Many Requests", &[("Retry-After", "60")], "{}"));
    let (web, _) = serve(|_| answer("200 OK", &[], "<html>canary</html>"));
    let multi = arm64_image();
    let down = refusing_server();
    let down = down.trim_start_matches("http://");
    let at = |image: &str| vec![login("k", a), deployment(&[image], &["k"])];
    let with = |address: &str, username: &str, image: &str| {
        let secret = pull_secret("k", &document(address, username, "canary-password"));
        vec![secret, deployment(&[&format!("{address}/{image}")], &["k"])]
    };
    let on = |architecture: &str| {
        let mut deployment = deployment(&[&format!("{multi}/app:1")], &[]);
        deployment["spec"]["template"]["spec"]["nodeSelector"] = json!({"kubernetes.io/arch": architecture});
        vec![deployment]
    };
    let token_address = tokens.address.to_string();
    let of_tokens = format!("{token_address}/os/alpine:3");
    for case in [
        case("no such tag", at(&format!("{}/os/alpine:missing", a.address)), "imageNotFound").advised("correctImage"),
        case("no such repository", at(&format!("{}/os/nothing:1", a.address)), "imageNotFound").advised("correctImage"),
        case("an invalid reference", at("https://reg.io/App"), "unknown").advised("correctImage"),
        case("no listener", at(&format!("{down}/app:1")), "registryUnreachable").advised("checkRegistry"),
        case("a forbidden address", at("10.1.2.3:5000/app:1"), "registryUnreachable")
            .advised("checkRegistry")
            .says("REGCRED_OUTBOUND_ALLOW"),
        case("a web site", at(&format!("{web}/app:1")), "registryUnreachable").advised("checkRegistry"),
        case("a private CA", at(&format!("{}/os/alpine:3", tls.address)), "tlsError").advised("trustCertificate"),
        case("a rate limit", at(&format!("{limited}/app:1")), "rateLimited").advised("retryLater"),
        case(
            "an open registry and a missing Secret",
            vec![deployment(&[&format!("{}/os/alpine:3", open.address)], &["gone"])],
            "ok",
        ),
        case("an open registry and a login", with(&open.address.to_string(), "martin", "os/alpine:3"), "ok"),
        case("a login without access", with(&token_address, "lena", "os/alpine:3"), "noAccess").advised("grantAccess"),
        case("a wrong login at a token service", with(&token_address, "wrong", "os/alpine:3"), "credentialInvalid")
            .fixed_with("replaceSecret", MARTIN),
        case("an expired robot account", with(&token_address, "harbor", "os/alpine:3"), "credentialInvalid")
            .fixed_with("replaceSecret", MARTIN),
        case("no Secret for a token service", vec![deployment(&[&of_tokens], &[])], "noSecret")
            .fixed_with("attachServiceAccount", MARTIN),
        case("a missing Secret for a token service", vec![deployment(&[&of_tokens], &["gone"])], "secretMissing")
            .fixed_with("createSecret", MARTIN),
        case("a login at a token service", with(&token_address, "martin", "os/alpine:3"), "ok"),
        case("another architecture", on("s390x"), "architectureMismatch").advised("buildPlatform"),
        case("the right architecture", on("arm64"), "ok"),
    ] {
        check(&doctor, case).await;
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn every_kind_of_workload_is_diagnosed(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let at_a = Doctor::image_of(&doctor.a);
    for (kind, object) in [
        ("StatefulSet", "workloads/statefulset/web"),
        ("DaemonSet", "workloads/DaemonSet/web"),
        ("CronJob", "workloads/cronjob/web"),
        ("Job", "workloads/job/web"),
    ] {
        let several = json!({"auths": {"x.example.com": {"auth": "dTpw"}, "y.example.com": {"auth": "dTpw"}}});
        let objects = vec![pull_secret("k", &several), workload(kind, &[&at_a], &["k"])];
        let mut case = case("a workload", objects, "noMatchingEntry").fixed_by("addPullSecret");
        case.object = object;
        check(&doctor, case).await;
    }
    // Pods of a Job that use the list of the ServiceAccount keep it, too.
    let mut of_account = case("a Job", vec![workload("Job", &[&at_a], &[])], "noSecret");
    of_account.object = "workloads/job/web";
    check(&doctor, of_account.fixed_by("attachServiceAccount")).await;
    let namespace = namespace_with(&[], Vec::new()).await;
    let path = |object: &str| format!("/v1/clusters/dev/namespaces/{namespace}/{object}/diagnose");
    for object in ["pods/web", "pods/A", "workloads/deployment/web", "workloads/cronjob/web"] {
        doctor.admin.post(&path(object), &Value::Null).await.problem(404, "not-found");
    }
    let refused = doctor.admin.post(&path("workloads/replicaset/web"), &Value::Null).await;
    refused.problem(422, "invalid-request");
    assert_eq!(refused.fields(), ["kind"]);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn missing_service_account_prevents_the_pod(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let at_a = Doctor::image_of(a);
    for (pull_secrets, verdict) in [(&["k"][..], "ok"), (&[], "noSecret")] {
        let mut web = deployment(&[&at_a], pull_secrets);
        web["spec"]["template"]["spec"]["serviceAccountName"] = json!("builder");
        let namespace = namespace_with(&[], vec![login("k", a), web]).await;

        let found = doctor.diagnose(&namespace, "workloads/deployment/web").await;

        assert_eq!((&found["ok"], &found["images"][0]["verdict"]), (&json!(false), &json!(verdict)), "{found:#}");
        assert_eq!(found["problems"][0]["type"], "serviceAccountMissing", "{found:#}");
        let fix = if verdict == "ok" { &found["problems"][0]["fix"] } else { &found["images"][0]["fix"] };
        doctor.apply(fix, (&a.username, &a.password)).await;
        let after = doctor.diagnose(&namespace, "workloads/deployment/web").await;
        assert_eq!(after["ok"], true, "{after:#}");
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn spec_is_diagnosed_before_it_is_created(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    let at_a = Doctor::image_of(a);
    let namespace = namespace_with(&["k"], vec![login("k", a)]).await;
    let spec = |pull_secrets: &[&str]| json!({"images": [at_a], "imagePullSecrets": references(pull_secrets)});

    let of_account = doctor.diagnose_spec(&namespace, &spec(&[])).await;
    assert_eq!((&of_account["ok"], &of_account["pullSecretsFrom"]), (&json!(true), &json!("serviceAccount")));
    let missing = doctor.diagnose_spec(&namespace, &spec(&["gone"])).await;
    assert_eq!(missing["images"][0]["verdict"], "secretMissing");
    doctor.apply(&missing["images"][0]["fix"], (&a.username, &a.password)).await;
    assert_eq!(doctor.diagnose_spec(&namespace, &spec(&["gone"])).await["ok"], true);

    let path = format!("/v1/clusters/dev/namespaces/{namespace}/diagnose");
    let with_name = |name: &str| json!({"containers": [{"name": name, "image": at_a}]});
    for (body, field, detail) in [
        (with_name("rbd-rest-api-2.6.2"), "containers[0].name", "write `rbd-rest-api-2-6-2`"),
        (json!({"images": ["https://reg.io/app"]}), "images[0]", "no scheme"),
        (json!({"images": []}), "images", "1 to 50"),
        (json!({}), "images", "is missing"),
        (json!({"images": [at_a], "containers": []}), "containers", "must be omitted"),
        (json!({"images": [at_a], "imagePullSecrets": [{"name": "A"}]}), "imagePullSecrets[0].name", "lower-case"),
        (json!({"images": [at_a], "serviceAccountName": "A"}), "serviceAccountName", "lower-case"),
        (json!({"images": [at_a], "architecture": "x y"}), "architecture", "arm64"),
    ] {
        let refused = doctor.admin.post(&path, &body).await;
        let problem = refused.problem(422, "invalid-request");
        let errors = problem["errors"].as_array().expect("errors");
        let error = errors.iter().find(|error| error["field"] == field);
        assert!(
            error.is_some_and(|error| error["detail"].as_str().is_some_and(|text| text.contains(detail))),
            "{problem}"
        );
    }
    assert_eq!(doctor.admin.post(&path, &with_name("web")).await.expect(200)["ok"], true);
}

/// regcred has an account for the image, so it delivers the Secret itself.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn fix_by_regcred_delivers_a_granted_account(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    doctor.app.register_account("prod", &a.address, &a.username, &a.password).await;
    let at_a = Doctor::image_of(a);
    let namespace = namespace_with(&[], vec![deployment(&[&at_a], &["pull"])]).await;

    let found = doctor.diagnose(&namespace, WEB).await;

    let step = &found["images"][0]["fix"]["steps"][0];
    assert_eq!((&step["type"], &step["body"]["accounts"]), (&json!("request"), &json!(["prod"])), "{found:#}");
    doctor.apply(&found["images"][0]["fix"], ("unused", "unused")).await;
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);

    // An account that is not granted is not named.
    let grants = json!({"accounts": ["x-*"], "clusters": ["dev"], "namespaces": [namespace]});
    let narrow = doctor.app.caller("narrow", "operator", Some(grants)).await;
    let other = namespace_with(&[], Vec::new()).await;
    narrow
        .post(&format!("/v1/clusters/dev/namespaces/{other}/diagnose"), &json!({"images": [at_a]}))
        .await
        .problem(404, "namespace-not-found");
    let path = format!("/v1/clusters/dev/namespaces/{namespace}/diagnose");
    let body = json!({"images": [at_a], "imagePullSecrets": [{"name": "gone"}]});
    let seen = narrow.post(&path, &body).await.expect(200);
    assert!(!seen.to_string().contains("prod"), "{seen}");
}

/// The pull secret of a Secret, its state, and the fix of a wrong password.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn managed_secret_names_its_pull_secret(pool: PgPool) {
    let doctor = Doctor::new(pool).await;
    let a = &doctor.a;
    doctor.app.register_account("prod", &a.address, &a.username, "wrong").await;
    let namespace = namespace_with(&[], vec![deployment(&[&Doctor::image_of(a)], &["team-a-pull"])]).await;
    let declared = declaration(&["prod"], "dev", &[&namespace]);
    put(&doctor.admin, "team-a", &declared).await.expect(201);
    let settled = || doctor.admin.request("GET", "/v1/pull-secrets/team-a").header("Prefer", "wait=30");
    doctor.admin.send(settled()).await.expect(200);

    let found = doctor.diagnose(&namespace, WEB).await;

    let managed = &found["pullSecrets"][0]["managedBy"];
    assert_eq!(managed, &json!({"pullSecret": "team-a", "state": "synced", "lastError": null}), "{found:#}");
    let image = &found["images"][0];
    assert_eq!((&image["verdict"], &image["fix"]["type"]), (&json!("credentialInvalid"), &json!("rotateAccount")));
    let path = "/v1/registry-accounts/prod";
    let description = image["fix"]["description"].as_str().expect("a text");
    assert!(description.contains(&format!("PATCH {path} with `password`")), "{description}");
    doctor.admin.patch(path, &json!({"password": a.password})).await.expect(200);
    doctor.admin.send(settled()).await.expect(200);
    assert_eq!(doctor.diagnose(&namespace, WEB).await["ok"], true);
}
