//! Verdict about one image.

use super::{
    answer::{PullSecretsFrom, SkipReason, Verdict},
    examination::{CANDIDATES_MAX, Examination, ExaminedImage, IMAGES_MAX, ImageAnswers},
    node_logins,
    pod::Subject,
    registry::{ManifestState, Platform, PullReport},
    secret::{ReadSecret, SecretState},
};
use crate::domain::{matching::ImageReference, verification::VerificationResult as Result};

/// A verdict and its sentence.
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    /// Verdict that decides about the fix. That of the image is `unknown` if the registry may deliver it
    /// in spite of this one.
    pub(super) cause: Verdict,
    pub(super) sentence: String,
}

fn verdict(verdict: Verdict, sentence: impl Into<String>) -> Judgement {
    Judgement { verdict, cause: verdict, sentence: sentence.into() }
}

/// Judges an image as the kubelet would fare with it.
pub(super) fn judge(examination: &Examination, index: usize, answers: &ImageAnswers) -> Judgement {
    let Some(image) = examination.images.get(index) else {
        return verdict(Verdict::Unknown, "there is no such image");
    };
    let Some(reference) = &image.reference else {
        let reason = image.invalid.as_deref().unwrap_or("it is invalid");
        return verdict(Verdict::Unknown, format!("the image reference cannot be parsed: {reason}"));
    };
    if let Some(secret) = examination.failing_secret() {
        let problem = secret.failure().map(|problem| problem.detail.as_str()).unwrap_or_default();
        let name = &secret.name;
        return verdict(
            Verdict::SecretUnreadable,
            format!("the kubelet cannot read the pull secret {name}, so every pull of the pod fails: {problem}"),
        );
    }
    if index >= IMAGES_MAX {
        return verdict(Verdict::Unknown, format!("registries are asked about the first {IMAGES_MAX} images only"));
    }
    if answers.is_of_node {
        return judge_unasked(examination, image, reference);
    }
    let pulls = image.candidates.iter().zip(&answers.attempts);
    let pulls = pulls.filter_map(|(candidate, report)| Some((candidate, report.as_ref()?)));
    if let Some((candidate, report)) = pulls.clone().find(|(_, report)| report.pulls()) {
        let is_of_account = examination.from == PullSecretsFrom::ServiceAccount;
        let how = match &candidate.login {
            Some(_) if is_of_account => {
                "the login of a pull secret may pull it; restart pods that are older than the list of the \
                 ServiceAccount: they keep the list that they were created with"
            }
            Some(_) => "the login of a pull secret may pull it",
            None => "it needs no login",
        };
        return delivered(examination, reference, report, how);
    }
    let with_login: Vec<&PullReport> =
        pulls.filter(|(candidate, _)| candidate.login.is_some()).map(|(_, report)| report).collect();
    if image.candidates.iter().any(|candidate| candidate.login.is_some()) {
        return judge_attempts(image, reference, &with_login, answers.anonymous.as_ref());
    }
    // An entry without a login may have been the last question.
    let anonymous = answers.anonymous.as_ref().or_else(|| answers.attempts.iter().flatten().last());
    match anonymous {
        Some(report) if report.pulls() => delivered(examination, reference, report, "it needs no login"),
        Some(report) if report.manifest == ManifestState::Missing => not_found(reference, report),
        Some(report) if report.result == Result::NoAccess => {
            without_login(image, reference, judge_lists(examination, image, reference))
        }
        Some(report) => of_connection(report),
        None => verdict(Verdict::Unknown, "the registry was not asked: a limit of the diagnosis was reached"),
    }
}

/// The registry is at the node's own host, where it cannot be asked. It may deliver the image without a
/// login; if it does not, the pull secrets alone can show the cause.
fn judge_unasked(examination: &Examination, image: &ExaminedImage, reference: &ImageReference) -> Judgement {
    let advice = if examination.has_local_node_option {
        "if this machine is the node, add --local-node"
    } else {
        "it cannot be asked from the host of the service"
    };
    let sentence = format!("the registry of `{reference}` is at the node's own host and was not asked: {advice}");
    if examination.secrets.is_empty() || !image.candidates.is_empty() {
        return verdict(Verdict::Unknown, sentence);
    }
    let Judgement { cause, sentence: reason, .. } = judge_lists(examination, image, reference);
    let reason = reason.strip_prefix(&format!("`{reference}` needs a login, and ")).unwrap_or(&reason);
    let sentence = format!("{sentence}. If it requires a login: {reason}");
    Judgement { verdict: Verdict::Unknown, cause, sentence }
}

/// No pull secret has a login, but nodes may have one.
fn without_login(image: &ExaminedImage, reference: &ImageReference, judgement: Judgement) -> Judgement {
    if image.has_started() {
        let sentence = format!(
            "{}; a container has run with it, so the image was on the node, or the node has a login of its own",
            judgement.sentence
        );
        return Judgement { sentence, ..judgement };
    }
    if node_logins::may_log_in(reference.name.registry()) && !image.has_failed() {
        let sentence = format!(
            "{}; but nodes in the cloud of this registry usually log in by a credential provider of the kubelet, which \
             a diagnosis does not see",
            judgement.sentence
        );
        return verdict(Verdict::Unknown, sentence);
    }
    judgement
}

/// The registry delivers the image.
fn delivered(examination: &Examination, image: &ImageReference, report: &PullReport, how: &str) -> Judgement {
    let is_list = !report.platforms.is_empty();
    let lacking: Vec<&Platform> =
        examination.platforms.iter().filter(|platform| is_list && !report.platforms.contains(platform)).collect();
    if let Some(unknown) = reservation(examination) {
        return verdict(Verdict::Unknown, format!("`{image}` can be pulled: {how}; but {unknown}"));
    }
    if lacking.is_empty() {
        return verdict(Verdict::Ok, format!("`{image}` can be pulled: {how}"));
    }
    let (nodes, found) = (shown(lacking.iter().copied()), shown(&report.platforms));
    if lacking.len() < examination.platforms.len() {
        let sentence = format!("`{image}` can be pulled: {how}; but not by nodes with {nodes}, because it has {found}");
        return verdict(Verdict::Ok, sentence);
    }
    let sentence = format!("`{image}` has no manifest for {nodes}, which the pod or its nodes require, only {found}");
    verdict(Verdict::ArchitectureMismatch, sentence)
}

/// What the diagnosis does not know, and what could make every pull fail.
fn reservation(examination: &Examination) -> Option<String> {
    if let Some(secret) = examination.secrets.iter().find(|secret| secret.is_unknown()) {
        return Some(unread(secret));
    }
    let account = &examination.pod.service_account;
    examination
        .is_list_unknown()
        .then(|| format!("regcred could not read the ServiceAccount {account}, whose pull secrets the pod would get"))
}

fn unread(secret: &ReadSecret) -> String {
    let name = &secret.name;
    if secret.is_uncertain {
        format!("the pull secret {name} is too large to be examined completely")
    } else {
        format!("regcred could not read the pull secret {name}")
    }
}

fn shown<'a>(platforms: impl IntoIterator<Item = &'a Platform>) -> String {
    platforms.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// No entry that matches works. The kubelet then tries without a login only for an entry without one.
fn judge_attempts(
    image: &ExaminedImage,
    reference: &ImageReference,
    reports: &[&PullReport],
    anonymous: Option<&PullReport>,
) -> Judgement {
    if image.has_more_candidates {
        let sentence = format!("`{reference}` has more than {CANDIDATES_MAX} entries, of which the first do not work");
        return verdict(Verdict::Unknown, sentence);
    }
    let Some(report) = reports.iter().max_by_key(|report| significance(report)) else {
        let is_skipped = |reason| image.candidates.iter().any(|one| one.skipped == Some(reason));
        let why = if is_skipped(SkipReason::Wildcard) {
            "its entry has a wildcard, and a login is sent only to a registry that an object of the cluster or its \
             entry names: diagnose the pod or the workload"
        } else if is_skipped(SkipReason::OtherRegistry) {
            "the kubelet sends it a login for Docker Hub, because the host has no dot: name the host with its port"
        } else {
            "the registry was not asked: a limit of the diagnosis was reached"
        };
        return verdict(Verdict::Unknown, format!("`{reference}` has a login, but {why}"));
    };
    let is_public = anonymous.is_some_and(PullReport::pulls);
    let public = if is_public {
        "; the image needs no login, but the kubelet uses each entry that matches it, and nothing else"
    } else {
        ""
    };
    match report.result {
        Result::Invalid => verdict(Verdict::CredentialInvalid, format!("{}{public}", report.detail)),
        Result::NoAccess => verdict(Verdict::NoAccess, format!("{}{public}", report.detail)),
        Result::Valid | Result::Anonymous if report.manifest == ManifestState::Missing => not_found(reference, report),
        _ => of_connection(report),
    }
}

/// How much an answer says about why no entry works.
fn significance(report: &PullReport) -> u8 {
    match report.result {
        Result::Valid | Result::Anonymous => 5,
        Result::NoAccess => 4,
        Result::Invalid => 3,
        Result::RateLimited => 2,
        Result::TlsError | Result::Unreachable | Result::NotARegistry | Result::Refused => 1,
    }
}

fn not_found(reference: &ImageReference, report: &PullReport) -> Judgement {
    verdict(Verdict::ImageNotFound, format!("`{reference}` was not found: {}", report.detail))
}

/// The answer is not about the login.
fn of_connection(report: &PullReport) -> Judgement {
    let found = match report.result {
        Result::RateLimited => Verdict::RateLimited,
        Result::TlsError => Verdict::TlsError,
        Result::Unreachable | Result::NotARegistry | Result::Refused => Verdict::RegistryUnreachable,
        Result::Valid | Result::Invalid | Result::Anonymous | Result::NoAccess => Verdict::Unknown,
    };
    verdict(found, report.detail.clone())
}

/// The image needs a login, and no entry matches.
fn judge_lists(examination: &Examination, image: &ExaminedImage, reference: &ImageReference) -> Judgement {
    let secrets = &examination.secrets;
    let name_of =
        |state: SecretState| secrets.iter().find(|secret| secret.state == state).map(|secret| secret.name.as_str());
    if secrets.is_empty() {
        return no_secret(examination, reference);
    }
    if secrets.iter().all(|secret| secret.is_good()) {
        return no_match(image, reference);
    }
    if let Some(secret) = secrets.iter().find(|secret| secret.is_uncertain) {
        return verdict(Verdict::Unknown, format!("`{reference}` needs a login, and {}", unread(secret)));
    }
    if let Some(secret) = secrets.iter().find(|secret| secret.is_unreadable()) {
        let problems: Vec<&str> = secret.problems.iter().map(|problem| problem.detail.as_str()).collect();
        return verdict(
            Verdict::SecretUnreadable,
            format!("the kubelet finds no login in the pull secret {}: {}", secret.name, problems.join("; ")),
        );
    }
    if let Some(name) = name_of(SecretState::Missing) {
        return verdict(
            Verdict::SecretMissing,
            format!("`{reference}` needs a login, and the pull secret {name} does not exist in the namespace"),
        );
    }
    if let Some(name) = name_of(SecretState::Forbidden).or(name_of(SecretState::NotRead)) {
        return verdict(
            Verdict::Unknown,
            format!("`{reference}` needs a login, and regcred could not read the pull secret {name}"),
        );
    }
    no_match(image, reference)
}

/// Every pull secret is good, but none is for the image.
fn no_match(image: &ExaminedImage, reference: &ImageReference) -> Judgement {
    let near = image
        .nearest
        .first()
        .map(|near| format!("; the nearest is `{}` in the pull secret {}: {}", near.key, near.secret, near.detail));
    let near = near.unwrap_or_default();
    verdict(Verdict::NoMatchingEntry, format!("no entry of the pull secrets is for `{reference}`{near}"))
}

fn no_secret(examination: &Examination, reference: &ImageReference) -> Judgement {
    let is_pod = matches!(examination.pod.subject, Subject::Pod { .. });
    let account = &examination.pod.service_account;
    if !is_pod && examination.of_service_account.is_none() && !examination.is_service_account_missing {
        return verdict(
            Verdict::Unknown,
            format!("`{reference}` needs a login, and regcred may not read the ServiceAccount {account}"),
        );
    }
    let sentence = match &examination.of_service_account {
        _ if examination.pod.has_invalid_reference => format!(
            "`{reference}` needs a login, and no entry of imagePullSecrets has a valid name; with such a list, a pod does \
             not get that of its ServiceAccount {account}"
        ),
        Some(names) if is_pod && !names.is_empty() => format!(
            "`{reference}` needs a login, and the pod has no pull secrets: it was created before the ServiceAccount \
             {account} had any"
        ),
        _ => format!(
            "`{reference}` needs a login, and neither the pod nor its ServiceAccount {account} has pull secrets; a \
             `docker login` on a node is of no use, because the kubelet does not read that file"
        ),
    };
    verdict(Verdict::NoSecret, sentence)
}
