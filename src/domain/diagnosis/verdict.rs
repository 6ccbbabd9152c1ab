//! Verdict about one image.

use super::{
    answer::{SkipReason, Verdict},
    examination::{Examination, ExaminedImage, IMAGES_MAX, ImageAnswers},
    pod::Subject,
    registry::{ManifestState, Platform, PullReport},
    secret::SecretState,
};
use crate::domain::{matching::ImageReference, verification::VerificationResult as Result};

/// A verdict and its sentence.
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    pub(super) sentence: String,
}

fn verdict(verdict: Verdict, sentence: impl Into<String>) -> Judgement {
    Judgement { verdict, sentence: sentence.into() }
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
        let problem = secret.problems.iter().map(|problem| problem.detail.as_str()).next().unwrap_or_default();
        let name = &secret.name;
        return verdict(
            Verdict::SecretUnreadable,
            format!("the kubelet cannot read the pull secret {name}, so every pull of the pod fails: {problem}"),
        );
    }
    if index >= IMAGES_MAX {
        return verdict(Verdict::Unknown, format!("registries are asked about the first {IMAGES_MAX} images only"));
    }
    if let Some(report) = answers.attempts.iter().flatten().find(|report| report.pulls()) {
        return delivered(examination, reference, report, "the login of a pull secret may pull it");
    }
    if image.candidates.iter().any(|candidate| candidate.login.is_some()) {
        return judge_attempts(image, reference, answers);
    }
    match &answers.anonymous {
        Some(report) if report.pulls() => delivered(examination, reference, report, "it needs no login"),
        Some(report) if report.manifest == ManifestState::Missing => not_found(reference, report),
        Some(report) if report.result == Result::NoAccess => judge_lists(examination, image, reference),
        Some(report) => of_connection(report),
        None => verdict(Verdict::Unknown, "the registry was not asked: a limit of the diagnosis was reached"),
    }
}

/// The registry delivers the image.
fn delivered(examination: &Examination, image: &ImageReference, report: &PullReport, how: &str) -> Judgement {
    let is_list = !report.platforms.is_empty();
    let lacking: Vec<&Platform> =
        examination.platforms.iter().filter(|platform| is_list && !report.platforms.contains(platform)).collect();
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

fn shown<'a>(platforms: impl IntoIterator<Item = &'a Platform>) -> String {
    platforms.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// No entry that matches works. The kubelet does not try without a login then.
fn judge_attempts(image: &ExaminedImage, reference: &ImageReference, answers: &ImageAnswers) -> Judgement {
    let reports = answers.attempts.iter().flatten();
    let Some(report) = reports.max_by_key(|report| significance(report)) else {
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
    let is_public = answers.anonymous.as_ref().is_some_and(PullReport::pulls);
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
    if let Some(near) = image.nearest.first() {
        return verdict(
            Verdict::NoMatchingEntry,
            format!(
                "no entry is for `{reference}`; the nearest is `{}` in the pull secret {}: {}",
                near.key, near.secret, near.detail
            ),
        );
    }
    if let Some(secret) = secrets.iter().find(|secret| secret.is_uncertain) {
        return verdict(
            Verdict::Unknown,
            format!("the pull secret {} has a key twice, of which the kubelet uses the last: delete one", secret.name),
        );
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
    verdict(Verdict::NoMatchingEntry, format!("no entry of the pull secrets is for `{reference}`"))
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
