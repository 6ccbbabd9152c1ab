use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use rstest::rstest;
use uuid::Uuid;

use super::*;
use crate::domain::{
    diagnosis::{
        Diagnosis, Examination, ImageAnswers, Lookup, ManifestState, PullReport, PullSecretsFrom, ReadSecret,
        SecretState, SecretValue, Step, Verdict, WorkloadKind,
    },
    names::{Name, NamespaceName, PodName, SecretName, ServiceAccountName},
    verification::VerificationResult,
};

fn namespace(name: &str) -> NamespaceName {
    NamespaceName::parse(name).unwrap()
}

fn secret_name(name: &str) -> SecretName {
    SecretName::parse(name).unwrap()
}

fn observed(source: Source, name: &str, pull_secrets: &[&str], images: &[&str]) -> Observed {
    Observed {
        source,
        name: PodName::parse(name).unwrap(),
        namespace: namespace("a"),
        service_account: ServiceAccountName::default_account(),
        pull_secrets: pull_secrets.iter().map(|name| secret_name(name)).collect(),
        images: images
            .iter()
            .map(|image| ObservedImage { image: (*image).to_owned(), policy: PullPolicy::IfNotPresent })
            .collect(),
        containers_left_out: 0,
    }
}

fn deployment(name: &str, pull_secrets: &[&str], images: &[&str]) -> Observed {
    observed(Source::Template(WorkloadKind::Deployment), name, pull_secrets, images)
}

/// Grouping in a cluster whose `ServiceAccount` `a/default` lists these pull secrets.
fn grouping(of_service_account: &[&str]) -> Grouping {
    let names = of_service_account.iter().map(|name| secret_name(name)).collect();
    let accounts = HashMap::from([((namespace("a"), ServiceAccountName::default_account()), names)]);
    Grouping::new(accounts, true)
}

/// Groups as text: pull secrets, repository, users by kind and pods.
fn groups(grouping: &mut Grouping) -> Vec<String> {
    let groups = grouping.take_groups().into_values().flatten();
    let text = groups.map(|(key, group)| {
        let names: Vec<&str> = key.pull_secrets.iter().map(SecretName::as_str).collect();
        let repository = key.repository.map_or_else(|| "-".to_owned(), |(host, path)| format!("{host}/{path}"));
        let users: Vec<String> =
            group.users_by_kind.iter().map(|(kind, count)| format!("{count} {}", kind.as_str())).collect();
        format!("[{}] {repository}: {}; {} pods", names.join(","), users.join(", "), group.pods)
    });
    text.collect()
}

#[test]
fn equal_pulls_are_one_group_and_a_workload_is_counted_once() {
    let mut grouping = grouping(&["sa"]);
    grouping.add(deployment("web", &[], &["reg.io/app:1", "reg.io/app:2", "reg.io/other"]));
    grouping.add(deployment("api", &["sa"], &["reg.io/app:1"]));
    for name in ["web-1", "web-2"] {
        grouping.add(observed(Source::PodOfTemplate, name, &["sa"], &["reg.io/app:1"]));
    }
    grouping.add(observed(Source::Pod, "debug", &["own"], &["reg.io/app:1"]));
    let users: Vec<UserKind> = grouping.users().iter().map(|user| user.kind).collect();
    assert_eq!(users, [UserKind::Deployment, UserKind::Deployment, UserKind::Pod]);
    assert_eq!((grouping.pods(), grouping.namespaces()), (3, 1));
    let expected = [
        "[own] reg.io/app: 1 pod; 1 pods",
        "[sa] reg.io/app: 2 deployment; 2 pods",
        "[sa] reg.io/other: 1 deployment; 0 pods",
    ];
    assert_eq!(groups(&mut grouping), expected);
}

#[test]
fn pods_of_an_unknown_controller_are_one_user() {
    let mut grouping = grouping(&[]);
    for name in ["rollout-1", "rollout-2"] {
        grouping.add(observed(Source::PodOfOther("ReplicaSet/rollout".to_owned()), name, &[], &["reg.io/app"]));
    }
    assert_eq!(groups(&mut grouping), ["[] reg.io/app: 1 other; 2 pods"]);
}

#[test]
fn invalid_references_are_a_group_without_a_repository() {
    let mut grouping = grouping(&[]);
    grouping.add(deployment("web", &[], &["reg.io/UPPER:x y", "https://reg.io/app"]));
    assert_eq!(groups(&mut grouping), ["[] -: 1 deployment; 0 pods"]);
}

#[test]
fn what_limits_left_out_is_missing() {
    let names: Vec<String> = (0..=PULL_SECRETS_MAX).map(|at| format!("k{at}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let images: Vec<String> = (0..1_003).map(|at| format!("reg.io/app-{at}")).collect();
    let images: Vec<&str> = images.iter().map(String::as_str).collect();
    let mut grouping = grouping(&[]);
    assert!(grouping.missing().is_empty());
    grouping.add(Observed { containers_left_out: 7, ..deployment("web", &names, &images) });
    grouping.add(Observed { namespace: namespace("b"), ..deployment("web", &[], &["reg.io/app"]) });

    let missing = grouping.missing();

    let parts: Vec<_> = missing.iter().map(|part| (part.resource.as_str(), part.count)).collect();
    assert_eq!(parts, [("containers", Some(7)), ("imagePullSecrets", Some(1)), ("groups", Some(3))]);
    assert_eq!(grouping.secrets().len(), PULL_SECRETS_MAX);
    let by_namespace: Vec<usize> = grouping.take_groups().values().map(Vec::len).collect();
    assert_eq!(by_namespace, [1_000, 1]);
}

/// A Secret with one login for a registry.
fn read_secret(name: &str, registry: &str) -> Arc<ReadSecret> {
    let document = format!(r#"{{"auths":{{"{registry}":{{"auth":"dTpw"}}}}}}"#);
    let value = SecretValue {
        secret_type: "kubernetes.io/dockerconfigjson".to_owned(),
        dockerconfigjson: Some(document.into_bytes().into()),
        dockercfg: None,
        has_other_data: false,
        has_owner: false,
        resource_version: None,
        pull_secret_id: None,
    };
    Arc::new(ReadSecret::of(secret_name(name), Lookup::Found(value)))
}

/// Answer of a registry.
fn report(result: VerificationResult) -> PullReport {
    let manifest = match result {
        VerificationResult::Valid | VerificationResult::Anonymous => ManifestState::Found,
        _ => ManifestState::Unknown,
    };
    PullReport::new(result, "said so", manifest)
}

/// Diagnosis of a group, in a cluster whose registries give every login one answer.
fn diagnose(
    grouping: &Grouping,
    (key, group): (&GroupKey, &Grouped),
    secrets: Vec<Arc<ReadSecret>>,
    result: VerificationResult,
) -> Diagnosis {
    let (facts, of_service_account) = grouping.facts(key, group);
    let examination = Examination::new(facts, &of_service_account, secrets, &Lookup::NotRead);
    let mut answers: Vec<ImageAnswers> = (0..examination.image_count()).map(|_| ImageAnswers::default()).collect();
    for (index, _, candidates) in examination.questions() {
        answers[index].attempts = candidates.iter().map(|one| one.question().map(|_| report(result))).collect();
        answers[index].anonymous = Some(report(VerificationResult::NoAccess));
    }
    examination.conclude(&answers, &[], Vec::new(), None)
}

/// The only group.
fn only(grouping: &mut Grouping) -> (GroupKey, Grouped) {
    let mut groups: Vec<_> = grouping.take_groups().into_values().flatten().collect();
    assert_eq!(groups.len(), 1, "{groups:?}");
    groups.remove(0)
}

#[rstest]
#[case::works(&["k"], "reg.io", VerificationResult::Valid, Verdict::Ok)]
#[case::rejected(&["k"], "reg.io", VerificationResult::Invalid, Verdict::CredentialInvalid)]
#[case::other_port(&["k"], "reg.io:5000", VerificationResult::Valid, Verdict::NoMatchingEntry)]
#[case::none(&[], "reg.io", VerificationResult::Valid, Verdict::NoSecret)]
fn group_has_the_verdict_of_a_diagnosis(
    #[case] pull_secrets: &[&str],
    #[case] registry: &str,
    #[case] result: VerificationResult,
    #[case] expected: Verdict,
) {
    let mut grouping = grouping(&[]);
    grouping.add(deployment("web", pull_secrets, &["reg.io/app:1", "reg.io/app:2"]));
    let (key, group) = only(&mut grouping);
    let secrets = pull_secrets.iter().map(|name| read_secret(name, registry)).collect();

    let judged = Judged::of(&diagnose(&grouping, (&key, &group), secrets, result));

    assert_eq!(judged.verdict, expected, "{judged:?}");
    let works: Vec<bool> = judged.entries.iter().map(|entry| entry.works).collect();
    let expected_works: &[bool] = match expected {
        Verdict::Ok => &[true],
        Verdict::CredentialInvalid => &[false],
        _ => &[],
    };
    assert_eq!(works, expected_works);
}

#[test]
fn pod_that_is_older_than_the_list_of_its_service_account_is_told_so() {
    let mut grouping = grouping(&["k"]);
    grouping.add(observed(Source::PodOfTemplate, "web-1", &[], &["reg.io/app"]));
    let (key, group) = only(&mut grouping);
    assert_eq!(group.from, PullSecretsFrom::None);

    let judged = Judged::of(&diagnose(&grouping, (&key, &group), Vec::new(), VerificationResult::Valid));

    assert_eq!(judged.verdict, Verdict::NoSecret);
    assert!(judged.sentence.contains("was created before"), "{}", judged.sentence);
}

#[test]
fn unknown_service_account_is_no_missing_login() {
    let mut grouping = Grouping::new(HashMap::new(), false);
    grouping.add(deployment("web", &[], &["reg.io/app"]));
    let (key, group) = only(&mut grouping);

    let judged = Judged::of(&diagnose(&grouping, (&key, &group), Vec::new(), VerificationResult::Valid));

    assert_eq!(judged.verdict, Verdict::Unknown, "{judged:?}");
}

fn judged(verdict: Verdict, entries: &[(&str, &str, bool)]) -> Judged {
    let entry = |(secret, key, works): &(&str, &str, bool)| MatchedEntry {
        secret: (*secret).to_owned(),
        key: (*key).to_owned(),
        works: *works,
    };
    Judged { verdict, sentence: String::new(), entries: entries.iter().map(entry).collect() }
}

/// The Secret of the pull secret `team` with an account for a registry.
fn known(account: Uuid, pull_secret: Uuid) -> HashMap<(NamespaceName, SecretName), Arc<KnownSecret>> {
    let accounts = HashMap::from([("reg.io".to_owned(), KnownAccount { id: account, name: "prod".to_owned() })]);
    let known = KnownSecret { pull_secret: Some((pull_secret, "team".to_owned())), accounts };
    HashMap::from([((namespace("a"), secret_name("k")), Arc::new(known))])
}

#[test]
fn account_and_pull_secret_count_their_workloads_once() {
    let (account, pull_secret) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let mut grouping = grouping(&[]);
    grouping.add(deployment("web", &["k"], &["reg.io/app", "reg.io/other", "quay.io/x"]));
    grouping.add(deployment("api", &["k"], &["reg.io/app"]));
    let mut survey = Survey::new(known(account, pull_secret), None);
    for (key, group) in grouping.take_groups().into_values().flatten() {
        let is_known = key.repository.as_ref().is_some_and(|(host, _)| host == "reg.io");
        let judged = if is_known {
            judged(Verdict::Ok, &[("k", "reg.io", true)])
        } else {
            judged(Verdict::NoMatchingEntry, &[])
        };
        survey.add(&key, &group, &judged);
    }

    assert_eq!(survey.accounts(&grouping), [Usage { id: account, workloads: 2, namespaces: 1 }]);
    assert_eq!(survey.users_of_pull_secrets(&grouping), [Usage { id: pull_secret, workloads: 2, namespaces: 1 }]);
    let used = survey.groups.iter().find(|group| group.repository.as_deref() == Some("reg.io/app")).unwrap();
    let credential = used.credential.as_ref().unwrap();
    assert_eq!((credential.account.as_deref(), credential.pull_secret.as_deref()), (Some("prod"), Some("team")));
    let summary = survey.summary(&grouping, &[], SurveyFacts::default());
    assert_eq!((summary.groups, summary.groups_ok, summary.workloads), (3, 2, 2));
    let verdicts: Vec<_> = summary.verdicts.iter().map(|one| (one.kind, one.verdict, one.count)).collect();
    let expected = [(UserKind::Deployment, Verdict::Ok, 1), (UserKind::Deployment, Verdict::NoMatchingEntry, 1)];
    assert_eq!(verdicts, expected);
}

#[rstest]
#[case(Verdict::Ok, PullPolicy::Always, Some(true), &[])]
#[case(Verdict::Unknown, PullPolicy::Always, Some(true), &[])]
#[case(Verdict::NoSecret, PullPolicy::IfNotPresent, Some(false), &[FailsAt::NewNode])]
#[case(Verdict::NoSecret, PullPolicy::IfNotPresent, None, &[FailsAt::NewNode])]
#[case(Verdict::NoSecret, PullPolicy::IfNotPresent, Some(true), &[FailsAt::NewNode, FailsAt::CachedImage])]
#[case(Verdict::ImageNotFound, PullPolicy::IfNotPresent, Some(true), &[FailsAt::NewNode])]
#[case(Verdict::CredentialInvalid, PullPolicy::Always, Some(false), &[FailsAt::NewNode, FailsAt::Restart])]
#[case(Verdict::NoAccess, PullPolicy::Never, Some(true), &[FailsAt::CachedImage])]
#[case(Verdict::NoAccess, PullPolicy::Never, Some(false), &[])]
fn occasion_of_a_failure_depends_on_policy_and_kubelet(
    #[case] verdict: Verdict,
    #[case] policy: PullPolicy,
    #[case] verifies: Option<bool>,
    #[case] expected: &[FailsAt],
) {
    let mut grouping = grouping(&[]);
    let mut web = deployment("web", &[], &["reg.io/app"]);
    web.images[0].policy = policy;
    grouping.add(web);
    let (key, group) = only(&mut grouping);
    let mut survey = Survey::new(HashMap::new(), verifies);

    survey.add(&key, &group, &judged(verdict, &[]));

    assert_eq!(survey.groups[0].fails_at, expected);
}

#[test]
fn unused_missing_and_adoptable_pull_secrets_are_told_apart() {
    let mut grouping = grouping(&["idle"]);
    grouping.add(deployment("web", &["k", "gone", "hand-made"], &["reg.io/app"]));
    let (key, group) = only(&mut grouping);
    let mut survey = Survey::new(known(Uuid::from_u128(1), Uuid::from_u128(2)), None);
    survey.add(&key, &group, &judged(Verdict::Ok, &[]));
    let found = |state, is_sound| FoundSecret { state, secret_type: None, keys: vec!["reg.io".to_owned()], is_sound };
    let place = |name| (namespace("a"), secret_name(name));
    let secrets = BTreeMap::from([
        (place("k"), found(SecretState::Found, true)),
        (place("gone"), found(SecretState::Missing, false)),
        (place("hand-made"), found(SecretState::Found, true)),
        (place("idle"), found(SecretState::NotRead, false)),
    ]);

    let used = survey.pull_secrets(&secrets, &grouping.attachments());

    let shown: Vec<_> = used
        .iter()
        .map(|one| (one.name.as_str(), one.owner, one.workloads, one.service_accounts, one.adoptable))
        .collect();
    let expected = [
        ("gone", SecretOwner::Foreign, 1, 0, false),
        ("hand-made", SecretOwner::Foreign, 1, 0, true),
        ("idle", SecretOwner::Foreign, 0, 1, false),
        ("k", SecretOwner::PullSecret, 1, 0, false),
    ];
    assert_eq!(shown, expected);
    let counts = survey.summary(&grouping, &used, SurveyFacts::default()).pull_secrets;
    assert_eq!((counts.total, counts.unused, counts.missing, counts.adoptable), (4, 1, 1, 1));
}

fn secret_use(namespace: &str, name: &str, keys: &[&str]) -> PullSecretUse {
    PullSecretUse {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        state: SecretState::Found,
        secret_type: Some("kubernetes.io/dockerconfigjson".to_owned()),
        owner: SecretOwner::Foreign,
        pull_secret: None,
        workloads: 1,
        pods: 1,
        service_accounts: 0,
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        adoptable: true,
        adoption: None,
    }
}

/// Not collision-resistant, but different for the places of these tests.
fn digest(place: &[u8]) -> String {
    format!("{:08x}{:08x}", crc32fast::hash(place), place.len())
}

fn adopted(cluster: &str, namespace: &str, name: &str, keys: &[&str]) -> Option<Adoption> {
    adoption(&Name::parse(cluster).unwrap(), &secret_use(namespace, name, keys), digest)
}

#[test]
fn adoption_names_the_accounts_of_the_import() {
    let keys = ["reg.io:5000", "https://index.docker.io/v1/", "https://reg.io:5000/v2/"];
    let steps = adopted("dev", "team-a", "pull.key", &keys).unwrap();
    let digest = digest(b"dev/team-a/pull.key");
    assert_eq!(steps.pull_secret, format!("dev-team-a-pull-key-{digest}"));
    let accounts = ["reg-io-5000", "docker-io"].map(|registry| format!("dev-team-a-pul-{digest}-{registry}"));
    assert_eq!(steps.accounts, accounts);
    let [Step::Command { command }, Step::Request { method: "PUT", headers, .. }] = &steps.steps[..] else {
        panic!("{steps:?}")
    };
    assert!(command.contains(" -H 'If-None-Match: *' "), "{command}");
    assert_eq!(headers.get("If-None-Match"), Some(&"*"));
    assert!(adopted("dev", "team-a", "k", &[]).is_none());
    let long = adopted("dev", "team-a", &"x".repeat(253), &["reg.io"]).unwrap();
    assert_eq!(long.pull_secret.len(), 63);
}

/// Equal texts without a separator, equal names in two clusters, and equal first characters.
#[rstest]
#[case(("dev", "a-b", "c"), ("dev", "a", "b-c"))]
#[case(("dev", "a", "b.c"), ("dev", "a", "b-c"))]
#[case(("dev", "a", "k"), ("prod", "a", "k"))]
#[case(("dev", "a-namespace-with-a-long-name", "the-first"), ("dev", "a-namespace-with-a-long-name", "the-second"))]
fn adoptions_of_two_secrets_share_no_name(#[case] one: (&str, &str, &str), #[case] other: (&str, &str, &str)) {
    let names = |(cluster, namespace, name): (&str, &str, &str)| {
        let steps = adopted(cluster, namespace, name, &["reg.io"]).unwrap();
        (steps.accounts[0].clone(), steps.pull_secret)
    };
    let (one, other) = (names(one), names(other));
    assert_ne!(one.0, other.0);
    assert_ne!(one.1, other.1);
}
