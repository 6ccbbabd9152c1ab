use std::sync::Arc;

use rstest::rstest;
use secrecy::SecretSlice;
use serde_json::{Value, json};

use super::*;
use crate::domain::{
    cluster::ServiceAccountRef,
    names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
    verification::VerificationResult,
};

fn pod(subject: Subject, images: &[&str], pull_secrets: &[&str]) -> PodFacts {
    let container = |(index, image): (usize, &&str)| Container {
        name: Name::parse(&format!("c{index}")).unwrap(),
        kind: ContainerKind::Container,
        image: (*image).to_owned(),
        waiting: None,
        event: None,
        has_started: false,
    };
    PodFacts {
        subject,
        namespace: NamespaceName::parse("team-a").unwrap(),
        uid: None,
        containers: images.iter().enumerate().map(container).collect(),
        pull_secrets: names(pull_secrets),
        has_invalid_reference: false,
        service_account: ServiceAccountName::parse("default").unwrap(),
        nodes: NodeChoice::default(),
    }
}

fn names(names: &[&str]) -> Vec<SecretName> {
    names.iter().map(|name| SecretName::parse(name).unwrap()).collect()
}

fn bare_pod() -> Subject {
    Subject::Pod { name: PodName::parse("web").unwrap(), controller: None }
}

/// Pod of a workload `web`, of which it is known whether it has a list.
fn controlled_pod(kind: WorkloadKind, has_own_list: Option<bool>) -> Subject {
    let workload = Some((kind, PodName::parse("web").unwrap()));
    let controller = Some(Controller { workload, has_own_list });
    Subject::Pod { name: PodName::parse("web-7d9").unwrap(), controller }
}

fn deployment() -> Subject {
    Subject::Workload { kind: WorkloadKind::Deployment, name: PodName::parse("web").unwrap() }
}

fn value(document: &Value) -> Lookup<SecretValue> {
    Lookup::Found(secret_value(&document.to_string()))
}

fn secret_value(document: &str) -> SecretValue {
    SecretValue {
        secret_type: "kubernetes.io/dockerconfigjson".to_owned(),
        dockerconfigjson: Some(SecretSlice::from(document.as_bytes().to_vec())),
        dockercfg: None,
        has_other_data: false,
        has_owner: false,
        pull_secret_id: None,
        resource_version: Some("7".to_owned()),
    }
}

fn login(key: &str) -> Lookup<SecretValue> {
    value(&json!({"auths": {key: {"username": "u", "password": "p"}}}))
}

fn secret(name: &str, found: Lookup<SecretValue>) -> Arc<ReadSecret> {
    Arc::new(ReadSecret::of(SecretName::parse(name).unwrap(), found))
}

/// Examination in a cluster without nodes.
fn examine(pod: PodFacts, service_account: &Lookup<Vec<SecretName>>, secrets: Vec<Arc<ReadSecret>>) -> Examination {
    Examination::new(pod, service_account, secrets, &Lookup::Found(Vec::new()))
}

fn report(result: VerificationResult, manifest: ManifestState) -> PullReport {
    PullReport::new(result, "detail", manifest)
}

/// Diagnosis with these answers for every candidate, and for a client without a login.
fn diagnose(examination: &Examination, with_login: &PullReport, anonymous: &PullReport) -> Diagnosis {
    let answers: Vec<_> = examination
        .questions()
        .map(|(_, _, candidates)| ImageAnswers {
            attempts: candidates.iter().map(|one| one.question().map(|_| with_login.clone())).collect(),
            anonymous: Some(anonymous.clone()),
            is_of_node: false,
        })
        .collect();
    examination.conclude(&answers, &[], Vec::new(), None)
}

fn refused() -> PullReport {
    report(VerificationResult::NoAccess, ManifestState::Unknown)
}

fn verdict_of(examination: &Examination, with_login: &PullReport) -> (Verdict, Option<FixType>) {
    let image = diagnose(examination, with_login, &refused()).images.swap_remove(0);
    (image.verdict, image.fix.map(|fix| fix.kind))
}

#[test]
fn new_pod_without_list_gets_that_of_its_service_account() {
    let of_account = Lookup::Found(names(&["a", "b", "a"]));
    let from = |subject: Subject, own: &[&str]| {
        let (from, found) = pull_secret_names(&pod(subject, &[], own), &of_account);
        (from, found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    };
    assert_eq!(from(deployment(), &[]), (PullSecretsFrom::ServiceAccount, "a b".to_owned()));
    assert_eq!(from(deployment(), &["own"]), (PullSecretsFrom::Pod, "own".to_owned()));
    assert_eq!(from(bare_pod(), &[]), (PullSecretsFrom::None, String::new()));
    assert_eq!(from(bare_pod(), &["own", "own"]), (PullSecretsFrom::Pod, "own".to_owned()));
}

#[rstest]
#[case::works(VerificationResult::Valid, ManifestState::Found, Verdict::Ok, None)]
#[case::open(VerificationResult::Anonymous, ManifestState::Found, Verdict::Ok, None)]
#[case::wrong(
    VerificationResult::Invalid,
    ManifestState::Unknown,
    Verdict::CredentialInvalid,
    Some(FixType::ReplaceSecret)
)]
#[case::no_access(VerificationResult::NoAccess, ManifestState::Unknown, Verdict::NoAccess, Some(FixType::GrantAccess))]
#[case::no_image(
    VerificationResult::Valid,
    ManifestState::Missing,
    Verdict::ImageNotFound,
    Some(FixType::CorrectImage)
)]
#[case::limit(VerificationResult::RateLimited, ManifestState::Unknown, Verdict::RateLimited, Some(FixType::RetryLater))]
#[case::tls(VerificationResult::TlsError, ManifestState::Unknown, Verdict::TlsError, Some(FixType::TrustCertificate))]
#[case::down(
    VerificationResult::Unreachable,
    ManifestState::Unknown,
    Verdict::RegistryUnreachable,
    Some(FixType::CheckRegistry)
)]
fn answer_of_the_registry_decides(
    #[case] result: VerificationResult,
    #[case] manifest: ManifestState,
    #[case] verdict: Verdict,
    #[case] fix: Option<FixType>,
) {
    let pod = pod(deployment(), &["reg.io/app"], &["pull"]);
    let examination = examine(pod, &Lookup::Missing, vec![secret("pull", login("reg.io"))]);
    assert_eq!(verdict_of(&examination, &report(result, manifest)), (verdict, fix));
}

#[rstest]
#[case::port("reg.io:5000", "reg.io:6000/app", Verdict::NoMatchingEntry)]
#[case::path("reg.io/other", "reg.io/team/app", Verdict::NoMatchingEntry)]
#[case::case_differs("Reg.io", "reg.io/app", Verdict::NoMatchingEntry)]
#[case::hub("registry.hub.docker.com", "nginx", Verdict::NoMatchingEntry)]
#[case::glob("*.reg.io", "a.b.reg.io/app", Verdict::NoMatchingEntry)]
#[case::other("quay.io", "reg.io/app", Verdict::NoMatchingEntry)]
#[case::path_prefix("reg.io/te", "reg.io/team/app", Verdict::Ok)]
#[case::scheme("https://reg.io/v2/", "reg.io/app", Verdict::Ok)]
fn key_must_match(#[case] key: &str, #[case] image: &str, #[case] verdict: Verdict) {
    let pod = pod(deployment(), &[image], &["pull"]);
    let examination = examine(pod, &Lookup::Missing, vec![secret("pull", login(key))]);
    let works = report(VerificationResult::Valid, ManifestState::Found);
    assert_eq!(verdict_of(&examination, &works).0, verdict);
}

/// The attack: a request names a host, and the credential of a foreign Secret is sent there.
#[test]
fn login_is_sent_only_to_a_registry_that_its_entry_names() {
    let asked = |subject: Subject, key: &str, image: &str| {
        let pod = pod(subject, &[image], &["pull"]);
        let examination = examine(pod, &Lookup::Missing, vec![secret("pull", login(key))]);
        let (_, _, candidates) = examination.questions().next().unwrap();
        (candidates.len(), candidates.iter().filter(|one| one.question().is_some()).count())
    };
    assert_eq!(asked(Subject::Spec, "reg.io", "reg.io/app"), (1, 1));
    assert_eq!(asked(Subject::Spec, "*.reg.io", "evil.reg.io/app"), (1, 0));
    assert_eq!(asked(Subject::Spec, "*.io", "evil.io/app"), (1, 0));
    assert_eq!(asked(deployment(), "*.reg.io", "a.reg.io/app"), (1, 1));
    for subject in [Subject::Spec, deployment(), bare_pod()] {
        assert_eq!(asked(subject.clone(), "https://index.docker.io/v1/", "localhost/app"), (1, 0));
        assert_eq!(asked(subject, "reg.io", "evil.io/reg.io/app"), (0, 0));
    }
}

#[test]
fn unreadable_secret_fails_every_image_of_the_pod() {
    let broken = value(&json!({"auths": {"quay.io": {"auth": "!"}}}));
    let secrets = vec![secret("good", login("reg.io")), secret("broken", broken)];
    let pod = pod(deployment(), &["reg.io/app", "quay.io/app"], &["good", "broken"]);
    let examination = examine(pod, &Lookup::Missing, secrets);
    assert!(examination.questions().all(|(_, _, candidates)| candidates.iter().all(|one| one.question().is_none())));
    let works = report(VerificationResult::Valid, ManifestState::Found);
    let diagnosis = diagnose(&examination, &works, &works);
    assert!(diagnosis.images.iter().all(|image| image.verdict == Verdict::SecretUnreadable), "{diagnosis:?}");
    assert_eq!(diagnosis.images[0].fix.as_ref().and_then(|fix| fix.secret.as_deref()), Some("broken"));
}

#[test]
fn wrong_login_does_not_hide_a_right_one() {
    let secrets = vec![secret("old", login("reg.io")), secret("new", login("reg.io"))];
    let examination = examine(pod(deployment(), &["reg.io/app"], &["old", "new"]), &Lookup::Missing, secrets);
    let attempts = vec![
        Some(report(VerificationResult::Invalid, ManifestState::Unknown)),
        Some(report(VerificationResult::Valid, ManifestState::Found)),
    ];
    let answers = [ImageAnswers { attempts, ..ImageAnswers::default() }];
    let diagnosis = examination.conclude(&answers, &[], Vec::new(), None);
    assert_eq!(diagnosis.images[0].verdict, Verdict::Ok);
    assert!(diagnosis.images[0].collisions.is_empty(), "equal logins do not collide");
}

#[test]
fn missing_secret_hides_no_image_that_needs_no_login() {
    let pod = pod(deployment(), &["reg.io/app"], &["gone"]);
    let examination = examine(pod, &Lookup::Missing, vec![secret("gone", Lookup::Missing)]);
    assert_eq!(verdict_of(&examination, &refused()), (Verdict::SecretMissing, Some(FixType::CreateSecret)));
    let public = report(VerificationResult::Anonymous, ManifestState::Found);
    assert_eq!(diagnose(&examination, &refused(), &public).images[0].verdict, Verdict::Ok);
}

#[test]
fn pod_that_is_older_than_the_list_is_recreated() {
    let examination = examine(pod(bare_pod(), &["reg.io/app"], &[]), &Lookup::Found(names(&["pull"])), Vec::new());
    assert_eq!(verdict_of(&examination, &refused()), (Verdict::NoSecret, Some(FixType::RecreatePod)));
    let examination = examine(pod(bare_pod(), &["reg.io/app"], &[]), &Lookup::Found(Vec::new()), Vec::new());
    assert_eq!(verdict_of(&examination, &refused()), (Verdict::NoSecret, Some(FixType::AttachServiceAccount)));
}

#[rstest]
#[case("arm64", Verdict::Ok)]
#[case("s390x", Verdict::ArchitectureMismatch)]
fn required_architecture_must_be_in_the_list(#[case] architecture: &str, #[case] verdict: Verdict) {
    let mut pod = pod(deployment(), &["reg.io/app"], &["pull"]);
    pod.nodes = NodeChoice::of_architecture(architecture);
    let examination = examine(pod, &Lookup::Missing, vec![secret("pull", login("reg.io"))]);
    assert!(examination.wants_platforms());
    let mut works = report(VerificationResult::Valid, ManifestState::Found);
    works.platforms = vec![Platform::parse("linux", "amd64").unwrap(), Platform::parse("linux", "arm64").unwrap()];
    assert_eq!(verdict_of(&examination, &works).0, verdict);
}

/// Fix of the only image, for a caller that is granted the account `prod` for it.
fn fix_with_account(examination: &Examination, pull_secret: PullSecretName) -> Fix {
    let context = context(vec![Some("prod")], vec![pull_secret]);
    let mut diagnosis = examination.conclude(&[without_login(refused())], &[], Vec::new(), Some(&context));
    diagnosis.images.swap_remove(0).fix.unwrap()
}

fn context(accounts: Vec<Option<&str>>, pull_secrets: Vec<PullSecretName>) -> RegcredContext {
    let name = |name: &str| Name::parse(name).unwrap();
    let tried = |account| FixAccount { name: name(account), is_tried: true };
    let accounts = accounts.into_iter().map(|account| account.map(tried)).collect();
    RegcredContext { cluster: name("dev"), accounts, pull_secrets, service_account: None }
}

fn without_login(answer: PullReport) -> ImageAnswers {
    ImageAnswers { anonymous: Some(answer), ..ImageAnswers::default() }
}

/// Command lines of a fix.
fn commands(fix: &Fix) -> Vec<&str> {
    let lines = fix.steps.iter().map(|step| match step {
        Step::Command { command } => command.as_str(),
        Step::Request { path, .. } => path.as_str(),
    });
    lines.collect()
}

fn delivery(secret: &str) -> Step {
    let path = "/v1/clusters/dev/namespaces/team-a/secrets".to_owned();
    Step::request("POST", path, json!({"name": secret, "accounts": ["prod"]}))
}

#[test]
fn regcred_delivers_the_missing_secret() {
    let examination =
        examine(pod(deployment(), &["reg.io/app"], &["gone"]), &Lookup::NotRead, vec![secret("gone", Lookup::Missing)]);
    let fix = fix_with_account(&examination, PullSecretName::Taken);
    assert_eq!((fix.kind, &fix.steps[..]), (FixType::CreateSecret, &[delivery("gone")][..]));
    let accounts = vec![Name::parse("prod").unwrap()];
    assert_eq!(fix.change, Some(Change::Deliver { secret: "gone".to_owned(), accounts }));
}

#[test]
fn missing_secret_gets_the_accounts_of_all_images_that_lack_it() {
    let pod = pod(deployment(), &["reg.io/app", "quay.io/app", "open.io/app"], &["gone"]);
    let examination = examine(pod, &Lookup::NotRead, vec![secret("gone", Lookup::Missing)]);
    let context = context(vec![Some("reg"), Some("quay"), Some("open")], vec![PullSecretName::Taken; 3]);
    let answer = without_login;
    let open = report(VerificationResult::Anonymous, ManifestState::Found);
    let diagnosis =
        examination.conclude(&[answer(refused()), answer(refused()), answer(open)], &[], Vec::new(), Some(&context));
    let accounts = ["reg", "quay"].map(|name| Name::parse(name).unwrap()).to_vec();
    let expected = Change::Deliver { secret: "gone".to_owned(), accounts };
    for image in &diagnosis.images[..2] {
        assert_eq!(image.fix.as_ref().and_then(|fix| fix.change.as_ref()), Some(&expected));
    }
    assert_eq!(diagnosis.images[2].verdict, Verdict::Ok);
}

#[test]
fn regcred_declares_a_pull_secret_for_the_service_account() {
    let new = |subject: Subject| examine(pod(subject, &["reg.io/app"], &[]), &Lookup::Found(Vec::new()), Vec::new());
    let name = PullSecretName::of(&NamespaceName::parse("team-a").unwrap(), "pull-reg-io").unwrap();
    assert_eq!(new(deployment()).new_secret(0).as_deref(), Some("pull-reg-io"));

    let free = fix_with_account(&new(deployment()), PullSecretName::Free(name.clone()));
    let Step::Request { method: "PUT", path, headers, body } = &free.steps[0] else { panic!("{free:?}") };
    assert_eq!(headers.get("If-None-Match"), Some(&"*"));
    assert_eq!(path, "/v1/pull-secrets/team-a-pull-reg-io");
    // Its pods keep their empty list.
    assert_eq!(commands(&free)[1..], ["kubectl rollout restart 'deployment/web' -n 'team-a'"]);
    let targets = json!([{"cluster": "dev", "namespaces": ["team-a"]}]);
    assert_eq!((&body["serviceAccounts"], &body["targets"]), (&json!(["default"]), &targets));
    assert_eq!((free.kind, free.applicable, free.applied), (FixType::AttachServiceAccount, true, false));
    // A pod that exists keeps its empty list.
    let of_pod = fix_with_account(&new(bare_pod()), PullSecretName::Free(name.clone()));
    assert!(matches!(&of_pod.steps[..], [Step::Request { .. }, Step::Command { .. }]), "{of_pod:?}");

    let declared = fix_with_account(&new(deployment()), PullSecretName::Declared(name.clone()));
    assert_eq!((declared.kind, declared.change), (FixType::SyncPullSecret, Some(Change::Sync { name })));
    let taken = fix_with_account(&new(deployment()), PullSecretName::Taken);
    assert_eq!((&taken.steps[0], taken.applicable, taken.steps.len()), (&delivery("pull-reg-io"), false, 3));
}

#[test]
fn fix_tells_which_login_could_not_be_tried() {
    let pod = pod(deployment(), &["reg.io/app", "quay.io/app"], &["gone"]);
    let examination = examine(pod, &Lookup::NotRead, vec![secret("gone", Lookup::Missing)]);
    let mut context = context(vec![Some("reg"), Some("quay")], vec![PullSecretName::Taken; 2]);
    let description = |context: &RegcredContext| {
        let answers = [without_login(refused()), without_login(refused())];
        let mut diagnosis = examination.conclude(&answers, &[], Vec::new(), Some(context));
        diagnosis.images.swap_remove(0).fix.unwrap().description
    };
    assert!(!description(&context).contains("could not be asked"));

    context.accounts[1] = Some(FixAccount { name: Name::parse("quay").unwrap(), is_tried: false });

    let told = description(&context);
    assert!(told.ends_with("whether it accepts the login of quay: verify it first"), "{told}");
}

/// A command that creates a Secret fails if the namespace has one of its name.
#[test]
fn name_of_another_secret_is_not_proposed() {
    let images = ["reg.io/app", "quay.io/app", "reg.io/other"];
    let mut examination = examine(pod(deployment(), &images, &[]), &Lookup::Found(Vec::new()), Vec::new());
    let open = report(VerificationResult::Anonymous, ManifestState::Found);
    let answers = [without_login(refused()), without_login(refused()), without_login(open)];
    let lacking: Vec<usize> = examination.lacking(&answers).into_iter().map(|(index, _)| index).collect();
    assert_eq!(lacking, [0, 1]);

    examination.reserve(SecretName::parse("pull-reg-io").unwrap());

    let names: Vec<_> = (0..3).filter_map(|index| examination.new_secret(index)).collect();
    assert_eq!(names, ["pull-reg-io-2", "pull-quay-io", "pull-reg-io-2"]);
}

#[test]
fn platforms_of_the_nodes_are_compared_with_the_list() {
    let node = |architecture: &str| Node {
        name: architecture.to_owned(),
        labels: [("kubernetes.io/os", "linux"), ("kubernetes.io/arch", architecture)]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
    };
    let mut works = report(VerificationResult::Anonymous, ManifestState::Found);
    works.platforms = vec![Platform::parse("linux", "arm64").unwrap()];
    for (architectures, verdict, sentence) in [
        (&["arm64"][..], Verdict::Ok, "it needs no login"),
        (&["amd64", "arm64"], Verdict::Ok, "not by nodes with linux/amd64"),
        (&["amd64"], Verdict::ArchitectureMismatch, "no manifest for linux/amd64"),
    ] {
        let nodes = Lookup::Found(architectures.iter().map(|one| node(one)).collect());
        let pod = pod(deployment(), &["reg.io/app"], &[]);
        let examination = Examination::new(pod, &Lookup::Found(Vec::new()), Vec::new(), &nodes);
        let image = diagnose(&examination, &works, &works).images.swap_remove(0);
        assert!(image.verdict == verdict && image.sentence.contains(sentence), "{image:?}");
    }
}

/// Verdict and fix of the first image, without an answer for a login.
fn first(examination: &Examination) -> (Verdict, String, Fix) {
    let mut diagnosis = diagnose(examination, &refused(), &refused());
    let image = diagnosis.images.swap_remove(0);
    (image.verdict, image.sentence, image.fix.unwrap())
}

fn deletes(fix: &Fix) -> bool {
    commands(fix).iter().any(|line| line.contains(" delete secret "))
}

/// A list of a pod may name any Secret, and the fix must not delete it.
#[test]
fn fix_deletes_only_what_it_replaces() {
    let invalid = |value: SecretValue| {
        let secrets = vec![secret("k", Lookup::Found(value))];
        first(&examine(pod(deployment(), &["reg.io/app"], &["k"]), &Lookup::Missing, secrets))
    };
    let one = r#"{"auths":{"reg.io":{"auth":"!"}}}"#;
    let (verdict, _, fix) = invalid(secret_value(one));
    assert_eq!((verdict, fix.kind, deletes(&fix)), (Verdict::SecretUnreadable, FixType::ReplaceSecret, true));
    let of_type = |secret_type: &str, value: SecretValue| SecretValue { secret_type: secret_type.to_owned(), ..value };
    let no_document = || SecretValue { dockerconfigjson: None, has_other_data: true, ..secret_value("") };
    for value in [
        of_type("kubernetes.io/tls", no_document()),
        of_type("Opaque", SecretValue { has_other_data: true, ..secret_value(one) }),
        SecretValue { has_owner: true, ..secret_value(one) },
        secret_value(r#"{"auths":{"reg.io":{"auth":"!"},"quay.io":{"auth":"dTpw"}}}"#),
        of_type("Opaque", secret_value(r#"{"auths":{"reg.io":{"auth":"dTpw"},"quay.io":{"auth":"dTpw"}}}#"#)),
        secret_value(r#"{"auths":{"reg.io":"#),
    ] {
        let (verdict, sentence, fix) = invalid(value);
        assert_eq!((verdict, fix.kind), (Verdict::SecretUnreadable, FixType::AddPullSecret), "{sentence}");
        assert!(!deletes(&fix), "{fix:?}");
    }
}

/// A Secret that fails every pull leaves the list, whose other entries stay.
#[test]
fn failing_secret_with_other_logins_leaves_the_list() {
    let several = json!({"auths": {"reg.io": {"auth": "!"}, "quay.io": {"auth": "dTpw"}}});
    let secrets = || vec![secret("k", value(&several))];
    let own = examine(pod(deployment(), &["reg.io/app"], &["k"]), &Lookup::Missing, secrets());
    let fix = first(&own).2;
    let patch = r#"'{"spec":{"template":{"spec":{"imagePullSecrets":[{"$patch":"delete","name":"k"},{"name":"pull-reg-io"}]}}}}'"#;
    assert!(commands(&fix)[1].ends_with(patch), "{fix:?}");
    let of_account = Lookup::Found(names(&["other", "k"]));
    let fix = first(&examine(pod(deployment(), &["reg.io/app"], &[]), &of_account, secrets())).2;
    let patch = r#"[{"op":"test","path":"/imagePullSecrets/1/name","value":"k"},{"op":"replace","path":"/imagePullSecrets/1","value":{"name":"pull-reg-io"}}]"#;
    assert!(commands(&fix)[1].contains(patch), "{fix:?}");
}

#[test]
fn fixes_of_several_images_do_not_undo_each_other() {
    let images = ["reg.io/app", "quay.io/app"];
    let secrets = |found| vec![secret("k", found)];
    // The broken entry is for one of them.
    let broken = value(&json!({"auths": {"quay.io": {"auth": "!"}}}));
    let examination = examine(pod(deployment(), &images, &["k"]), &Lookup::NotRead, secrets(broken));
    let diagnosis = diagnose(&examination, &refused(), &refused());
    let fixes: Vec<&Fix> = diagnosis.fixes().collect();
    assert_eq!(fixes[0], fixes[1]);
    assert!(commands(fixes[0])[1].contains("--docker-server='quay.io'"), "{fixes:?}");
    // A command creates a Secret for one registry only.
    let examination = examine(pod(deployment(), &images, &["k"]), &Lookup::NotRead, secrets(Lookup::Missing));
    let diagnosis = diagnose(&examination, &refused(), &refused());
    let fixes: Vec<_> = diagnosis.fixes().map(|fix| (fix.kind, fix.secret.as_deref())).collect();
    assert_eq!(fixes, [(FixType::CreateSecret, Some("k")), (FixType::AddPullSecret, Some("pull-quay-io"))]);
    // Images of one registry share a new Secret, and names that are alike do not.
    let examination = examine(
        pod(deployment(), &["reg.io/a", "reg-io.example/b", "reg.io-example/c", "reg.io/d"], &[]),
        &Lookup::Found(Vec::new()),
        Vec::new(),
    );
    let new: Vec<_> = (0..4).filter_map(|index| examination.new_secret(index)).collect();
    assert_eq!(new, ["pull-reg-io", "pull-reg-io-example", "pull-reg-io-example-2", "pull-reg-io"]);
}

/// Another host in the same domain explains nothing.
#[test]
fn far_entry_hides_no_cause() {
    let secrets = vec![secret("pull-a", login("registry-a.example.com")), secret("pull-b", Lookup::Missing)];
    let web = pod(deployment(), &["registry-b.example.com/app"], &["pull-a", "pull-b"]);
    let (verdict, sentence, fix) = first(&examine(web, &Lookup::Missing, secrets));
    assert_eq!(
        (verdict, fix.kind, fix.secret.as_deref()),
        (Verdict::SecretMissing, FixType::CreateSecret, Some("pull-b"))
    );
    assert!(sentence.contains("pull-b"), "{sentence}");
    // Other pods may use the entry.
    for key in ["registry-a.example.com", "registry-b.example.com:5000"] {
        let web = pod(deployment(), &["registry-b.example.com/app"], &["pull-a"]);
        let (verdict, _, fix) = first(&examine(web, &Lookup::Missing, vec![secret("pull-a", login(key))]));
        assert_eq!((verdict, fix.kind), (Verdict::NoMatchingEntry, FixType::AddPullSecret));
        assert!(!deletes(&fix), "{fix:?}");
    }
}

#[test]
fn printed_commands_name_the_kubeconfig_and_the_context() {
    let secrets = vec![secret("k", value(&json!({"auths": {"reg.io": {"auth": "!"}}})))];
    let examination = examine(pod(bare_pod(), &["reg.io/app", "quay.io/app"], &["k"]), &Lookup::Missing, secrets);
    let examination = examination.with_kubectl(Kubectl::with_options(Some("/a b"), Some("it's; rm")));
    let diagnosis = diagnose(&examination, &refused(), &refused());
    for command in diagnosis.fixes().flat_map(commands) {
        for call in command.split(" | ") {
            let expected = r"kubectl --kubeconfig='/a b' --context='it'\''s; rm' ";
            assert!(call.starts_with(expected), "{command}");
        }
    }
    assert!(diagnosis.fixes().count() > 0);
}

fn managed(name: &str, by: ManagedBy) -> [(SecretName, ManagedBy); 1] {
    [(SecretName::parse(name).unwrap(), by)]
}

/// Pull secret `team-a` with the accounts `wide`, `prod` and `minted`.
fn managed_by(state: &str, is_as_written: bool) -> ManagedBy {
    let account = |name: &str, key: &str, is_minted| ManagedAccount {
        name: Name::parse(name).unwrap(),
        key: key.to_owned(),
        is_minted,
    };
    let accounts = vec![
        account("wide", "reg.io", false),
        account("prod", "reg.io/team", false),
        account("minted", "quay.io", true),
    ];
    let (pull_secret, state) = (Some("team-a".to_owned()), Some(state.to_owned()));
    ManagedBy { pull_secret, state, last_error: None, is_as_written, accounts }
}

/// A delivery would be a conflict for the pull secret that places the Secret.
#[test]
fn missing_secret_of_a_pull_secret_is_delivered_by_it() {
    let examination =
        examine(pod(deployment(), &["reg.io/app"], &["gone"]), &Lookup::NotRead, vec![secret("gone", Lookup::Missing)]);
    let context = context(vec![Some("prod")], vec![PullSecretName::Taken]);
    let fix = |by: ManagedBy| {
        let answers = [without_login(refused())];
        let mut diagnosis = examination.conclude(&answers, &managed("gone", by), Vec::new(), Some(&context));
        diagnosis.images.swap_remove(0).fix.unwrap()
    };
    let seen = fix(managed_by("synced", false));
    assert_eq!(
        (seen.kind, seen.change),
        (FixType::SyncPullSecret, Some(Change::Sync { name: Name::parse("team-a").unwrap() }))
    );
    let hidden = fix(ManagedBy { pull_secret: None, ..managed_by("synced", false) });
    assert_eq!((hidden.kind, hidden.steps.len(), hidden.applicable), (FixType::SyncPullSecret, 0, false));
}

#[test]
fn wrong_login_of_a_pull_secret_is_traced_to_its_account() {
    let fix = |key: &str, image: &str, by: ManagedBy| {
        let labelled = SecretValue {
            pull_secret_id: Some(uuid::Uuid::nil()),
            ..secret_value(&json!({"auths": {key: {"username": "u", "password": "p"}}}).to_string())
        };
        let secrets = vec![secret("k", Lookup::Found(labelled))];
        let examination = examine(pod(deployment(), &[image], &["k"]), &Lookup::NotRead, secrets);
        let invalid = report(VerificationResult::Invalid, ManifestState::Unknown);
        let answers = [ImageAnswers { attempts: vec![Some(invalid)], ..ImageAnswers::default() }];
        let context = context(vec![Some("wide")], vec![PullSecretName::Taken]);
        let mut diagnosis = examination.conclude(&answers, &managed("k", by), Vec::new(), Some(&context));
        diagnosis.images.swap_remove(0).fix.unwrap()
    };
    let own = fix("reg.io/team", "reg.io/team/app", managed_by("synced", true));
    assert_eq!((own.kind, own.steps.len()), (FixType::RotateAccount, 0));
    assert!(own.description.contains("PATCH /v1/registry-accounts/prod "), "{own:?}");
    let minted = fix("quay.io", "quay.io/app", managed_by("synced", true));
    assert_eq!(commands(&minted), ["/v1/registry-accounts/minted/mint"]);
    for by in [managed_by("failed", true), managed_by("synced", false)] {
        assert_eq!(fix("reg.io", "reg.io/app", by).kind, FixType::SyncPullSecret);
    }
}

#[test]
fn right_is_granted_to_the_subject_of_the_credential() {
    let examination =
        examine(pod(deployment(), &["reg.io/app"], &["k"]), &Lookup::Missing, vec![secret("k", Lookup::Forbidden)]);
    let command = |service_account| {
        let context = RegcredContext { service_account, ..context(vec![None], vec![PullSecretName::Taken]) };
        let mut diagnosis = examination.conclude(&[without_login(refused())], &[], Vec::new(), Some(&context));
        let fix = diagnosis.images.swap_remove(0).fix.unwrap();
        assert_eq!(fix.kind, FixType::GrantRights);
        commands(&fix)[0].to_owned()
    };
    let account = ServiceAccountRef {
        namespace: NamespaceName::parse("tools").unwrap(),
        name: ServiceAccountName::parse("broker").unwrap(),
    };
    let begin = "regcred cluster rbac --cluster 'dev' '--doctor=team-a' --service-account ";
    assert!(command(Some(account)).starts_with(&format!("{begin}'tools/broker' |")));
    assert!(command(None).starts_with(&format!("{begin}\"$REGCRED_SERVICE_ACCOUNT\" |")));
}

/// A change of the pod alone would be lost with it.
#[test]
fn list_of_a_controlled_pod_is_changed_where_it_comes_from() {
    let fix = |subject: Subject, of_account: &Lookup<Vec<SecretName>>| {
        let secrets = vec![secret("k", login("quay.io"))];
        first(&examine(pod(subject, &["reg.io/app"], &["k"]), of_account, secrets)).2
    };
    let delete = "kubectl delete pod 'web-7d9' -n 'team-a' --ignore-not-found";
    let of_template = fix(controlled_pod(WorkloadKind::Deployment, Some(true)), &Lookup::NotRead);
    let lines = commands(&of_template);
    assert!(lines[1].starts_with("kubectl patch deployment 'web' "), "{lines:?}");
    assert_eq!((lines.len(), lines[2]), (3, delete));
    let of_account = fix(controlled_pod(WorkloadKind::StatefulSet, Some(false)), &Lookup::Found(names(&["k"])));
    let lines = commands(&of_account);
    assert!(lines[1].starts_with("kubectl patch serviceaccount 'default' "), "{lines:?}");
    assert_eq!((of_account.kind, lines.len(), lines[2]), (FixType::AttachServiceAccount, 3, delete));
    for (kind, has_own_list, said) in [
        (WorkloadKind::Job, Some(true), "the controller of the pod"),
        (WorkloadKind::Deployment, None, "the controller of the pod"),
    ] {
        let unknown = fix(controlled_pod(kind, has_own_list), &Lookup::NotRead);
        assert!(unknown.steps.len() == 1 && unknown.description.contains(said), "{unknown:?}");
    }
    let job = Subject::Workload { kind: WorkloadKind::Job, name: PodName::parse("web").unwrap() };
    let job = fix(job, &Lookup::Missing);
    assert!(job.steps.len() == 1 && job.description.contains("create the Job anew"), "{job:?}");
}

/// What was not read could make every pull fail.
#[test]
fn pull_that_works_is_unknown_beside_what_was_not_read() {
    let works = report(VerificationResult::Valid, ManifestState::Found);
    let many: serde_json::Map<String, Value> =
        (0..501).map(|number| (format!("r{number}.io"), json!({"auth": "dTpw"}))).collect();
    for (other, verdict) in [
        (Lookup::Forbidden, Verdict::Unknown),
        (Lookup::NotRead, Verdict::Unknown),
        (value(&json!({"auths": many})), Verdict::Unknown),
        (Lookup::Missing, Verdict::Ok),
    ] {
        let secrets = vec![secret("k", login("reg.io")), secret("other", other)];
        let examination = examine(pod(deployment(), &["reg.io/app"], &["k", "other"]), &Lookup::Missing, secrets);
        let found = diagnose(&examination, &works, &works).images.swap_remove(0);
        assert_eq!(found.verdict, verdict, "{}", found.sentence);
        assert_eq!(found.sentence.contains("but "), verdict == Verdict::Unknown, "{}", found.sentence);
    }
    for (of_account, verdict) in [(Lookup::Forbidden, Verdict::Unknown), (Lookup::Missing, Verdict::Ok)] {
        let examination = examine(pod(deployment(), &["reg.io/app"], &[]), &of_account, Vec::new());
        assert_eq!(diagnose(&examination, &works, &works).images[0].verdict, verdict);
    }
}

#[test]
fn registry_on_the_node_is_unknown() {
    let examination = examine(pod(deployment(), &["localhost:5000/app"], &[]), &Lookup::Found(Vec::new()), Vec::new());
    let answers = [ImageAnswers { is_of_node: true, ..ImageAnswers::default() }];
    let diagnosis = examination.conclude(&answers, &[], Vec::new(), None);
    let image = &diagnosis.images[0];
    assert_eq!((image.verdict, &image.fix), (Verdict::Unknown, &None));
    assert!(image.sentence.contains("the node's own host"), "{}", image.sentence);
}

/// An editor of the namespace decides about all of this.
#[test]
fn work_and_answer_are_bounded() {
    let many: serde_json::Map<String, Value> =
        (0..600).map(|number| (format!("{number}@reg.io"), json!({"auth": "dTpw"}))).collect();
    let long = format!("reg.io/{}", "x".repeat(700_000));
    let images: Vec<String> = (0..80).map(|number| format!("reg.io/app:{number}")).collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let secrets = vec![secret("many", value(&json!({"auths": many}))), secret("long", login(&long))];
    let examination = examine(pod(deployment(), &images, &["many", "long"]), &Lookup::NotRead, secrets);
    assert!(examination.questions().count() == 20);
    assert!(examination.questions().all(|(_, _, candidates)| candidates.len() == 20));
    let diagnosis = diagnose(&examination, &refused(), &refused());
    assert_eq!((diagnosis.images.len(), diagnosis.pull_secrets[0].keys.len(), diagnosis.ok), (50, 50, false));
    assert_eq!(diagnosis.problems[0].kind, PodProblemKind::TooManyImages);
    assert_eq!(diagnosis.images[0].verdict, Verdict::Unknown);
    let far =
        examine(pod(deployment(), &["reg.io/app"], &["long"]), &Lookup::NotRead, vec![secret("long", login(&long))]);
    let shown = serde_json::to_string(&(diagnosis, diagnose(&far, &refused(), &refused()))).unwrap();
    assert!(shown.len() < 200_000, "{}", shown.len());
}

/// In every cloud, nodes without pull secrets pull their images.
#[test]
fn nodes_may_have_logins_of_their_own() {
    const ECR: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/app";
    let found = |image: &str, waiting: Option<WaitingReason>, has_started: bool| {
        let mut pod = pod(bare_pod(), &[image], &[]);
        (pod.containers[0].waiting, pod.containers[0].has_started) = (waiting, has_started);
        let examination = examine(pod, &Lookup::Found(Vec::new()), Vec::new());
        let image = diagnose(&examination, &refused(), &refused()).images.swap_remove(0);
        (image.verdict, image.sentence)
    };
    let (verdict, sentence) = found(ECR, None, false);
    assert!(verdict == Verdict::Unknown && sentence.contains("credential provider"), "{sentence}");
    assert_eq!(found(ECR, Some(WaitingReason::ErrImagePull), false).0, Verdict::NoSecret);
    let (verdict, sentence) = found("reg.io/app", None, true);
    assert!(verdict == Verdict::NoSecret && sentence.contains("a login of its own"), "{sentence}");
    assert_eq!(found("reg.io/app", None, false).0, Verdict::NoSecret);
}

/// `imagePullSecrets: [{}]` is a list, so the API server adds none, and the kubelet ignores the entry.
#[test]
fn reference_without_a_name_is_a_note() {
    let mut web = pod(deployment(), &["reg.io/app"], &[]);
    web.has_invalid_reference = true;
    let of_account = Lookup::Found(names(&["k"]));
    assert_eq!(pull_secret_names(&web, &of_account), (PullSecretsFrom::None, Vec::new()));
    let examination = examine(web, &of_account, Vec::new());
    let public = report(VerificationResult::Anonymous, ManifestState::Found);
    let diagnosis = diagnose(&examination, &refused(), &public);
    assert!(diagnosis.ok && diagnosis.problems[0].kind == PodProblemKind::InvalidReference, "{diagnosis:?}");
    let (verdict, _, fix) = first(&examination);
    assert_eq!((verdict, fix.kind, fix.steps.len()), (Verdict::NoSecret, FixType::AddPullSecret, 1));
}

/// The kubelet sends no login for such an entry, in its place.
#[test]
fn entry_without_a_login_is_tried_without_one() {
    let document = json!({"auths": {"reg.io": {"auth": "dTpw"}, "reg.io/app": {}, "reg.io/ap": {"auth": "OnA="}}});
    let secrets = vec![secret("k", value(&document))];
    let examination = examine(pod(deployment(), &["reg.io/app"], &["k"]), &Lookup::Missing, secrets);
    let (_, _, candidates) = examination.questions().next().unwrap();
    let kinds: Vec<_> = candidates.iter().map(|one| matches!(one.question(), Some(Question::Anonymous))).collect();
    assert_eq!(kinds, [true, true, false]);
    let public = report(VerificationResult::Anonymous, ManifestState::Found);
    let conclude = |attempts| {
        let answers = [ImageAnswers { attempts, anonymous: Some(refused()), is_of_node: false }];
        examination.conclude(&answers, &[], Vec::new(), None).images.swap_remove(0).verdict
    };
    assert_eq!(conclude(vec![Some(public)]), Verdict::Ok);
    let invalid = report(VerificationResult::Invalid, ManifestState::Unknown);
    assert_eq!(conclude(vec![Some(refused()), Some(refused()), Some(invalid)]), Verdict::CredentialInvalid);
}

#[test]
fn limit_of_one_login_hides_no_other_one() {
    let secrets = vec![secret("old", login("reg.io")), secret("new", login("reg.io"))];
    let examination = examine(pod(deployment(), &["reg.io/app"], &["old", "new"]), &Lookup::Missing, secrets);
    let limited = report(VerificationResult::RateLimited, ManifestState::Unknown);
    let conclude = |second| {
        let answers = [ImageAnswers { attempts: vec![Some(limited.clone()), second], ..ImageAnswers::default() }];
        examination.conclude(&answers, &[], Vec::new(), None).images.swap_remove(0).verdict
    };
    assert_eq!(conclude(Some(report(VerificationResult::Valid, ManifestState::Found))), Verdict::Ok);
    assert_eq!(conclude(Some(limited.clone())), Verdict::RateLimited);
}

#[test]
fn spellings_of_one_key_collide() {
    let other = value(&json!({"auths": {"https://reg.io": {"username": "v", "password": "q"}}}));
    let secrets = vec![secret("one", login("reg.io")), secret("other", other)];
    let examination = examine(pod(deployment(), &["reg.io/app"], &["one", "other"]), &Lookup::Missing, secrets);
    assert_eq!(diagnose(&examination, &refused(), &refused()).images[0].collisions, ["one", "other"]);
}

/// A note stands before the problem that fails the pod.
#[test]
fn sentence_quotes_the_problem_that_fails_the_pod() {
    let document = json!({"auths": {"a.io": {}, "b.io": {"auth": "!"}}});
    let secrets = vec![secret("k", value(&document))];
    let (_, sentence, _) = first(&examine(pod(deployment(), &["reg.io/app"], &["k"]), &Lookup::Missing, secrets));
    assert!(sentence.contains("base64") && !sentence.contains("empty"), "{sentence}");
}

#[test]
fn diagnosis_contains_no_login() {
    let document = json!({"auths": {
        "reg.io": {"username": "CANARY", "password": "CANARY", "email": "CANARY"},
        "u:CANARY@quay.io": {"auth": "Q0FOQVJZOkNBTkFSWQ=="},
        "x CANARY": {"auth": "CANARY!"},
    }});
    let pod = pod(deployment(), &["reg.io/app", "https://CANARY@reg.io/app"], &["pull"]);
    let examination = examine(pod, &Lookup::Missing, vec![secret("pull", value(&document))]);
    let diagnosis = diagnose(&examination, &refused(), &refused());
    let shown = serde_json::to_string(&diagnosis).unwrap();
    assert!(!shown.contains("CANARY") && !shown.contains("Q0FOQVJZ"), "{shown}");
}
