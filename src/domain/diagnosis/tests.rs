use std::sync::Arc;

use rstest::rstest;
use secrecy::SecretSlice;
use serde_json::{Value, json};

use super::*;
use crate::domain::{
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
    };
    PodFacts {
        subject,
        namespace: NamespaceName::parse("team-a").unwrap(),
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
    Subject::Pod { name: PodName::parse("web").unwrap(), is_controlled: false }
}

fn deployment() -> Subject {
    Subject::Workload { kind: WorkloadKind::Deployment, name: PodName::parse("web").unwrap() }
}

fn value(document: &Value) -> Lookup<SecretValue> {
    Lookup::Found(SecretValue {
        secret_type: "kubernetes.io/dockerconfigjson".to_owned(),
        dockerconfigjson: Some(SecretSlice::from(document.to_string().into_bytes())),
        dockercfg: None,
        pull_secret_id: None,
    })
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
    let answers = [ImageAnswers { attempts, anonymous: None }];
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
    let accounts = vec![vec![Name::parse("prod").unwrap()]];
    let context = RegcredContext { cluster: Name::parse("dev").unwrap(), accounts, pull_secrets: vec![pull_secret] };
    let answers = [ImageAnswers { attempts: Vec::new(), anonymous: Some(refused()) }];
    let mut diagnosis = examination.conclude(&answers, &[], Vec::new(), Some(&context));
    diagnosis.images.swap_remove(0).fix.unwrap()
}

fn delivery(secret: &str) -> Step {
    Step::Request {
        method: "POST",
        path: "/v1/clusters/dev/namespaces/team-a/secrets".to_owned(),
        body: json!({"name": secret, "accounts": ["prod"]}),
    }
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
    let accounts = ["reg", "quay", "open"].map(|name| vec![Name::parse(name).unwrap()]);
    let context = RegcredContext {
        cluster: Name::parse("dev").unwrap(),
        accounts: accounts.to_vec(),
        pull_secrets: vec![PullSecretName::Taken; 3],
    };
    let answer = |anonymous| ImageAnswers { attempts: Vec::new(), anonymous: Some(anonymous) };
    let open = report(VerificationResult::Anonymous, ManifestState::Found);
    let diagnosis =
        examination.conclude(&[answer(refused()), answer(refused()), answer(open)], &[], Vec::new(), Some(&context));
    let expected = Change::Deliver { secret: "gone".to_owned(), accounts: accounts[..2].concat() };
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
    let Step::Request { method: "PUT", path, body } = &free.steps[0] else { panic!("{free:?}") };
    assert_eq!((path.as_str(), free.steps.len()), ("/v1/pull-secrets/team-a-pull-reg-io", 1));
    let targets = json!([{"cluster": "dev", "namespaces": ["team-a"]}]);
    assert_eq!((&body["serviceAccounts"], &body["targets"]), (&json!(["default"]), &targets));
    assert_eq!((free.kind, free.applicable, free.applied), (FixType::AttachServiceAccount, true, false));
    // A pod that exists keeps its empty list.
    let of_pod = fix_with_account(&new(bare_pod()), PullSecretName::Free(name.clone()));
    assert!(matches!(&of_pod.steps[..], [Step::Request { .. }, Step::Command { .. }]), "{of_pod:?}");

    let declared = fix_with_account(&new(deployment()), PullSecretName::Declared(name.clone()));
    assert_eq!((declared.kind, declared.change), (FixType::SyncPullSecret, Some(Change::Sync { name })));
    let taken = fix_with_account(&new(deployment()), PullSecretName::Taken);
    assert_eq!((&taken.steps[0], taken.applicable, taken.steps.len()), (&delivery("pull-reg-io"), false, 2));
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
