//! Verdict about a group, from the diagnosis of a pod with its images.

use crate::domain::diagnosis::{Attempt, DiagnosedImage, Diagnosis, ManifestState, Verdict};

/// Entry of a pull secret that matches the images of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatchedEntry {
    /// Name of the pull secret.
    pub secret: String,
    /// Key of the entry.
    pub key: String,
    /// Whether the registry delivers an image with it.
    pub works: bool,
}

/// Verdict about a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// The worst verdict of its images.
    pub verdict: Verdict,
    /// That verdict as a sentence.
    pub sentence: String,
    /// Entries that match, in the order in which the kubelet tries them.
    pub entries: Vec<MatchedEntry>,
}

impl Judged {
    /// Judges a group by the diagnosis of its images. The worst verdict counts, and one that is
    /// incomplete is worse than `ok` only.
    #[must_use]
    pub fn of(diagnosis: &Diagnosis) -> Self {
        let worst = diagnosis.images.iter().max_by_key(|image| badness(image.verdict));
        let Some(worst) = worst else {
            return Self { verdict: Verdict::Unknown, sentence: "there is no image".to_owned(), entries: Vec::new() };
        };
        Self { verdict: worst.verdict, sentence: worst.sentence.clone(), entries: entries(&diagnosis.images) }
    }
}

/// How much a verdict counts. [`Verdict`] is ordered from `ok` to `unknown`.
pub(super) const fn badness(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Ok => 0,
        Verdict::Unknown => 1,
        Verdict::RateLimited => 2,
        Verdict::ArchitectureMismatch => 3,
        Verdict::RegistryUnreachable => 4,
        Verdict::TlsError => 5,
        Verdict::ImageNotFound => 6,
        Verdict::NoAccess => 7,
        Verdict::CredentialInvalid => 8,
        Verdict::NoMatchingEntry => 9,
        Verdict::SecretMissing => 10,
        Verdict::NoSecret => 11,
        Verdict::SecretUnreadable => 12,
    }
}

/// Entries match by repository, so all images of a group have the same ones.
fn entries(images: &[DiagnosedImage]) -> Vec<MatchedEntry> {
    let Some(first) = images.first() else { return Vec::new() };
    let works =
        |attempt: &Attempt| attempt.answer.as_ref().is_some_and(|answer| answer.manifest == ManifestState::Found);
    let entry = |(index, attempt): (usize, &Attempt)| MatchedEntry {
        secret: attempt.secret.clone(),
        key: attempt.key.clone(),
        works: images.iter().filter_map(|image| image.attempts.get(index)).any(works),
    };
    first.attempts.iter().enumerate().map(entry).collect()
}
