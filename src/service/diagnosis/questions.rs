//! Questions to registries: each is asked once, within limits.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
};

use futures_util::{StreamExt, stream};
use secrecy::SecretString;
use tokio::time::{Duration, Instant, timeout_at};

use super::{
    memo::Memo,
    remembered::{RememberedAnswers, digest_of},
};
use crate::{
    clients::registry::{PullQuestion, RegistryClient},
    crypto::{
        api_key::CryptoError,
        keyed_digest::{Digest, Digester},
    },
    domain::{
        diagnosis::{Candidate, Examination, ImageAnswers, PullReport, Question},
        matching::ImageReference,
        verification::VerificationResult,
    },
};

/// Maximum number of concurrent questions of one examination.
const CONCURRENCY: usize = 4;

/// Limits of the questions of one diagnosis.
#[derive(Debug, Clone, Copy)]
pub struct QuestionLimits {
    /// Maximum number of questions.
    pub questions: usize,
    /// Time in which registries must answer all of them.
    pub within: Duration,
}

impl Default for QuestionLimits {
    fn default() -> Self {
        Self { questions: 60, within: Duration::from_secs(20) }
    }
}

/// Registries, and what they answered so far. Equal questions are asked once, so it lives for one
/// run only.
///
/// A login that a registry rejected is not sent to it again: many failed logins lock accounts.
#[derive(Debug)]
pub struct RegistryQuestions<'a> {
    registries: &'a RegistryClient,
    /// Answers of earlier runs.
    remembered: Option<&'a RememberedAnswers>,
    /// Questions are remembered as digests, so that a run keeps no login.
    digester: Digester,
    answers: Memo<Digest, Option<PullReport>>,
    /// By registry and login, its rejection; `None` if the first question was not rejected.
    rejections: Memo<Digest, Option<PullReport>>,
    left: AtomicUsize,
    /// Questions beyond the limits.
    left_out: AtomicU32,
    deadline: Instant,
}

impl<'a> RegistryQuestions<'a> {
    /// Begins a run. Its time starts now.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes.
    pub fn new(registries: &'a RegistryClient, limits: QuestionLimits) -> Result<Self, CryptoError> {
        let deadline = Instant::now() + limits.within;
        let left = AtomicUsize::new(limits.questions);
        Ok(Self {
            registries,
            remembered: None,
            digester: Digester::new()?,
            answers: Memo::default(),
            rejections: Memo::default(),
            left,
            left_out: AtomicU32::default(),
            deadline,
        })
    }

    /// Uses answers of earlier runs, and remembers those of this one.
    #[must_use]
    pub fn remembering(self, remembered: &'a RememberedAnswers) -> Self {
        Self { remembered: Some(remembered), ..self }
    }

    /// Asks the registry of each image.
    pub async fn ask(&self, examination: &Examination) -> Vec<ImageAnswers> {
        let wants_platforms = examination.wants_platforms();
        let questions = examination.questions().map(|(index, image, candidates)| {
            let asked = self.ask_for_image(image, candidates, wants_platforms);
            async move { (index, asked.await) }
        });
        let mut answers: Vec<ImageAnswers> = (0..examination.image_count()).map(|_| ImageAnswers::default()).collect();
        // Collected first: the borrow of a closure's argument would otherwise be part of the stream's type.
        let questions: Vec<_> = questions.collect();
        let mut asked = stream::iter(questions).buffer_unordered(CONCURRENCY);
        while let Some((index, found)) = asked.next().await {
            if let Some(answer) = answers.get_mut(index) {
                *answer = found;
            }
        }
        answers
    }

    /// Tries the entries in the order of the kubelet until one works, and then without a login.
    async fn ask_for_image(
        &self,
        image: &ImageReference,
        candidates: &[Candidate],
        wants_platforms: bool,
    ) -> ImageAnswers {
        if self.registries.is_of_node(image) {
            return ImageAnswers { is_of_node: true, ..ImageAnswers::default() };
        }
        let mut answers = ImageAnswers::default();
        let anonymously = PullQuestion { image, login: None, wants_platforms };
        for candidate in candidates {
            let report = match candidate.question() {
                Some(Question::Login(user, password)) => {
                    self.with_login(PullQuestion { image, login: Some((user, password)), wants_platforms }).await
                }
                Some(Question::Anonymous) => self.pull(&anonymously).await,
                None => None,
            };
            let is_last = report.as_ref().is_some_and(|report| report.pulls() || is_about_connection(report));
            answers.attempts.push(report);
            if is_last {
                return answers;
            }
        }
        answers.anonymous = self.pull(&anonymously).await;
        answers
    }

    /// Asks the registry of an image with a login of regcred; none if it was not asked.
    ///
    /// The account of the login must be for the registry of the image.
    pub async fn ask_with(&self, image: &ImageReference, login: (&str, &SecretString)) -> Option<PullReport> {
        if self.registries.is_of_node(image) {
            return None;
        }
        self.with_login(PullQuestion { image, login: Some(login), wants_platforms: false }).await
    }

    /// Asks with a login, unless the registry has rejected it. Other questions with this login wait for
    /// the answer to the first one.
    async fn with_login(&self, question: PullQuestion<'_>) -> Option<PullReport> {
        let of_registry = PullQuestion { image: question.image, login: question.login, wants_platforms: false };
        let login = digest_of(&self.digester, question.image.name.registry(), &of_registry);
        let mut first = None;
        let rejection = async {
            let answer = self.pull(&question).await;
            let rejection = answer.clone().filter(|report| report.result == VerificationResult::Invalid);
            first = Some(answer);
            Ok::<_, Infallible>(rejection)
        };
        let Ok(rejection) = Box::pin(self.rejections.get(login, rejection)).await;
        match (first, rejection) {
            (Some(answer), _) => answer,
            (None, Some(rejection)) => Some(rejection),
            (None, None) => self.pull(&question).await,
        }
    }

    /// Returns the answer to a question; none if a limit was reached.
    async fn pull(&self, question: &PullQuestion<'_>) -> Option<PullReport> {
        let key = digest_of(&self.digester, &question.image.to_string(), question);
        // Nothing is kept of questions beyond the limit.
        if self.left.load(Ordering::Relaxed) == 0 {
            let known = self.answers.known(&key);
            if known.is_none() {
                self.leave_out();
            }
            return known.flatten();
        }
        let asked = async { Ok::<_, Infallible>(self.send(question).await) };
        let Ok(answer) = Box::pin(self.answers.get(key, asked)).await;
        answer
    }

    fn leave_out(&self) {
        self.left_out.fetch_add(1, Ordering::Relaxed);
    }

    /// Number of questions that limits left without an answer.
    #[must_use]
    pub fn left_out(&self) -> u32 {
        self.left_out.load(Ordering::Relaxed)
    }

    async fn send(&self, question: &PullQuestion<'_>) -> Option<PullReport> {
        let earlier = self.remembered.map(|remembered| (remembered, remembered.digest(question)));
        if let Some(report) = earlier.and_then(|(remembered, digest)| remembered.get(&digest)) {
            return Some(report);
        }
        let take = |left: usize| left.checked_sub(1);
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            self.leave_out();
            return None;
        }
        let Ok(report) = timeout_at(self.deadline, self.registries.pull(question)).await else {
            self.leave_out();
            return None;
        };
        let report = report?;
        if let Some((remembered, digest)) = earlier {
            remembered.remember(digest, &report);
        }
        Some(report)
    }
}

/// Whether another login would get the same answer. A limit may be that of the login.
fn is_about_connection(report: &PullReport) -> bool {
    use VerificationResult as R;
    matches!(report.result, R::Unreachable | R::TlsError | R::NotARegistry | R::Refused)
}
