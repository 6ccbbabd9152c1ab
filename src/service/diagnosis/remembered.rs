//! Answers of registries that are remembered for minutes, for all runs of a process.

use std::{collections::HashMap, fmt, time::Duration};

use parking_lot::Mutex;
use secrecy::ExposeSecret;
use tokio::time::Instant;

use crate::{
    clients::registry::PullQuestion,
    crypto::{
        api_key::CryptoError,
        keyed_digest::{Digest, Digester},
    },
    domain::{diagnosis::PullReport, verification::VerificationResult},
};

/// Time for which an answer is remembered.
const TTL: Duration = Duration::from_mins(5);
/// Maximum number of remembered answers.
const ANSWERS_MAX: usize = 20_000;

/// Remembered answers. Questions are remembered as digests under a key of the process, so no login
/// outlives its run.
pub struct RememberedAnswers {
    digester: Digester,
    answers: Mutex<HashMap<Digest, (PullReport, Instant)>>,
}

impl fmt::Debug for RememberedAnswers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RememberedAnswers").field("answers", &self.answers.lock().len()).finish_non_exhaustive()
    }
}

impl RememberedAnswers {
    /// Remembers nothing yet.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn new() -> Result<Self, CryptoError> {
        Ok(Self { digester: Digester::new()?, answers: Mutex::default() })
    }

    pub(super) fn digest(&self, question: &PullQuestion<'_>) -> Digest {
        digest_of(&self.digester, &question.image.to_string(), question)
    }

    pub(super) fn get(&self, digest: &Digest) -> Option<PullReport> {
        self.get_at(digest, Instant::now())
    }

    fn get_at(&self, digest: &Digest, now: Instant) -> Option<PullReport> {
        let answers = self.answers.lock();
        answers.get(digest).filter(|(_, at)| now.duration_since(*at) < TTL).map(|(report, _)| report.clone())
    }

    /// Remembers an answer about an image or a login. One about the connection may be another one
    /// soon.
    pub(super) fn remember(&self, digest: Digest, report: &PullReport) {
        use VerificationResult as R;
        if matches!(report.result, R::Unreachable | R::TlsError | R::NotARegistry | R::RateLimited | R::Refused) {
            return;
        }
        let mut answers = self.answers.lock();
        if answers.len() >= ANSWERS_MAX {
            answers.retain(|_, (_, at)| at.elapsed() < TTL);
        }
        if answers.len() < ANSWERS_MAX {
            answers.insert(digest, (report.clone(), Instant::now()));
        }
    }
}

/// Digest of a question about an image, or about a registry.
pub(super) fn digest_of(digester: &Digester, place: &str, question: &PullQuestion<'_>) -> Digest {
    let (has_login, username, password) = match question.login {
        Some((username, password)) => (b"login".as_slice(), username, password.expose_secret()),
        None => (b"none".as_slice(), "", ""),
    };
    let platforms: &[u8] = if question.wants_platforms { b"platforms" } else { b"" };
    digester.digest(&[place.as_bytes(), has_login, username.as_bytes(), password.as_bytes(), platforms])
}

#[cfg(test)]
mod tests {
    use secrecy::SecretString;

    use super::*;
    use crate::domain::{diagnosis::ManifestState, matching::ImageReference};

    #[test]
    fn answer_is_remembered_for_its_question_and_some_minutes() {
        let remembered = RememberedAnswers::new().unwrap();
        let image = ImageReference::parse("reg.io/app:1").unwrap();
        let (password, other) = (SecretString::from("one"), SecretString::from("two"));
        let with = |password| PullQuestion { image: &image, login: Some(("dev", password)), wants_platforms: false };
        let digest = remembered.digest(&with(&password));
        let found = PullReport::new(VerificationResult::Valid, "found", ManifestState::Found);

        remembered.remember(digest, &found);

        assert_eq!(remembered.get(&digest), Some(found));
        assert_eq!(remembered.get(&remembered.digest(&with(&other))), None);
        let anonymous = PullQuestion { image: &image, login: None, wants_platforms: false };
        assert_eq!(remembered.get(&remembered.digest(&anonymous)), None);
        assert_eq!(remembered.get_at(&digest, Instant::now() + TTL), None);
        let unreachable = PullReport::new(VerificationResult::Unreachable, "away", ManifestState::Unknown);
        let other = remembered.digest(&with(&other));
        remembered.remember(other, &unreachable);
        assert_eq!(remembered.get(&other), None);
    }
}
