//! What clusters said of tokens, remembered for a moment, and how often they are asked.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use parking_lot::{Mutex, MutexGuard};
use secrecy::ExposeSecret;
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout},
};
use uuid::Uuid;

use crate::{
    clients::cluster::{ClusterError, ReviewedServiceAccount},
    crypto::{
        api_key::CryptoError,
        keyed_digest::{Digest, Digester},
    },
    domain::token::PresentedToken,
    service::ServiceError,
    storage::identity_providers::ReviewingCluster,
};

/// How many answers are remembered.
const ANSWERS_MAX: usize = 10_000;
/// How many tokens one cluster is asked about at a time.
const PER_CLUSTER: usize = 8;
/// How many more may wait for that: whoever comes then is told to come again.
const WAITING_MAX: usize = 64;
/// How long they may wait.
const WAIT_MAX: Duration = Duration::from_secs(5);

type Answer = Option<ReviewedServiceAccount>;
/// What one call came to, for all who wait for it: after a failure nobody of them asks once more.
type Asked = Result<Answer, Arc<ServiceError>>;

/// Somebody who waits for an answer. When the last one goes, whether he got it or hung up, nothing is left of it.
struct Flight<'a> {
    reviews: &'a Reviews,
    digest: Digest,
    cell: Arc<OnceCell<Asked>>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut in_flight = lock(&self.reviews.in_flight);
        // The map's and this one.
        if Arc::strong_count(&self.cell) <= 2 {
            in_flight.remove(&self.digest);
        }
    }
}

/// Answers of clusters, and the calls that are under way.
#[derive(Debug)]
pub(super) struct Reviews {
    remembered_for: Duration,
    digester: Digester,
    answers: Mutex<HashMap<Digest, (Answer, Instant)>>,
    in_flight: Mutex<HashMap<Digest, Arc<OnceCell<Asked>>>>,
    places: Mutex<HashMap<Uuid, Arc<Places>>>,
}

#[derive(Debug)]
struct Places {
    calls: Semaphore,
    /// Of those who call and those who wait.
    all: Semaphore,
}

impl Reviews {
    pub(super) fn new(remembered_for: Duration) -> Result<Self, CryptoError> {
        Ok(Self {
            remembered_for,
            digester: Digester::new()?,
            answers: Mutex::default(),
            in_flight: Mutex::default(),
            places: Mutex::default(),
        })
    }

    /// What a cluster says of a token, now or a moment ago, but never beyond the token's end. All who show the same token at the
    /// same time wait for one call.
    pub(super) async fn get(
        &self,
        cluster: ReviewingCluster,
        audience: &str,
        token: &PresentedToken,
        end: DateTime<Utc>,
        ask: impl AsyncFnOnce() -> Result<Answer, ServiceError>,
    ) -> Asked {
        // Of a cluster that was changed since, another one may have said it.
        let about = [
            cluster.id.as_bytes(),
            &cluster.version.to_be_bytes()[..],
            audience.as_bytes(),
            token.secret().expose_secret().as_bytes(),
        ];
        let digest = self.digester.digest(&about);
        if let Some(answer) = self.remembered(&digest) {
            return Ok(answer);
        }
        let cell = Arc::clone(lock(&self.in_flight).entry(digest).or_default());
        let flight = Flight { reviews: self, digest, cell };
        let asked = flight.cell.get_or_init(async || self.call(cluster.id, digest, end, ask).await.map_err(Arc::new));
        asked.await.clone()
    }

    async fn call(
        &self,
        cluster: Uuid,
        digest: Digest,
        end: DateTime<Utc>,
        ask: impl AsyncFnOnce() -> Result<Answer, ServiceError>,
    ) -> Result<Answer, ServiceError> {
        let crowded = || ClusterError::Overloaded { retry_after: None };
        let places = self.places(cluster);
        let _place = places.all.try_acquire().map_err(|_| crowded())?;
        let call = timeout(WAIT_MAX, places.calls.acquire()).await;
        let _call = call.map_err(|_| crowded())?.map_err(|_| crowded())?;
        let answer = ask().await?;
        self.remember(digest, answer.clone(), end);
        Ok(answer)
    }

    fn remembered(&self, digest: &Digest) -> Option<Answer> {
        let answers = lock(&self.answers);
        answers.get(digest).filter(|(_, until)| Instant::now() < *until).map(|(answer, _)| answer.clone())
    }

    fn remember(&self, digest: Digest, answer: Answer, end: DateTime<Utc>) {
        let now = Instant::now();
        let left = (end - Utc::now()).to_std().unwrap_or_default().min(self.remembered_for);
        let mut answers = lock(&self.answers);
        if answers.len() >= ANSWERS_MAX {
            answers.retain(|_, (_, until)| now < *until);
        }
        if answers.len() >= ANSWERS_MAX
            && let Some(any) = answers.keys().next().copied()
        {
            answers.remove(&any);
        }
        answers.insert(digest, (answer, now + left));
    }

    fn places(&self, cluster: Uuid) -> Arc<Places> {
        let mut places = lock(&self.places);
        // Of clusters that nobody asks now there is nothing to know.
        places.retain(|id, places| *id == cluster || Arc::strong_count(places) > 1);
        let fresh = || Places { calls: Semaphore::new(PER_CLUSTER), all: Semaphore::new(PER_CLUSTER + WAITING_MAX) };
        Arc::clone(places.entry(cluster).or_insert_with(|| Arc::new(fresh())))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in there can panic halfway through a change.
    mutex.lock()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use chrono::TimeDelta;
    use futures_util::future::join_all;

    use super::*;

    const CLUSTER: ReviewingCluster = ReviewingCluster { id: Uuid::nil(), version: 1 };

    fn token(number: usize) -> PresentedToken {
        // {"alg":"RS256"} . {} . a signature that differs
        PresentedToken::parse(&format!("eyJhbGciOiJSUzI1NiJ9.e30.{number:08}")).unwrap()
    }

    fn account() -> ReviewedServiceAccount {
        ReviewedServiceAccount {
            namespace: "a".to_owned(),
            name: "ci".to_owned(),
            uid: None,
            pod_name: None,
            pod_uid: None,
            node_name: None,
        }
    }

    /// Counts how often a cluster was asked.
    struct Asked {
        reviews: Reviews,
        count: AtomicUsize,
    }

    impl Asked {
        fn new(seconds: u64) -> Self {
            Self { reviews: Reviews::new(Duration::from_secs(seconds)).unwrap(), count: AtomicUsize::new(0) }
        }

        async fn ask(&self, cluster: ReviewingCluster, number: usize, end: DateTime<Utc>) -> usize {
            let token = token(number);
            let answer = self.reviews.get(cluster, "regcred", &token, end, async || {
                tokio::task::yield_now().await;
                self.count.fetch_add(1, Ordering::SeqCst);
                Ok(Some(account()))
            });
            assert_eq!(answer.await.unwrap(), Some(account()));
            self.count.load(Ordering::SeqCst)
        }
    }

    fn later() -> DateTime<Utc> {
        Utc::now() + TimeDelta::hours(1)
    }

    #[tokio::test]
    async fn a_cluster_is_asked_once_for_one_token() {
        let asked = Asked::new(30);
        join_all((0..50).map(|_| asked.ask(CLUSTER, 1, later()))).await;
        assert_eq!(asked.ask(CLUSTER, 1, later()).await, 1);
        assert_eq!(asked.ask(CLUSTER, 2, later()).await, 2);
        assert_eq!(asked.ask(ReviewingCluster { version: 2, ..CLUSTER }, 1, later()).await, 3);
        assert!(lock(&asked.reviews.in_flight).is_empty());
    }

    #[tokio::test]
    async fn an_answer_does_not_outlive_its_token_nor_its_time() {
        let asked = Asked::new(30);
        assert_eq!((asked.ask(CLUSTER, 1, Utc::now()).await, asked.ask(CLUSTER, 1, Utc::now()).await), (1, 2));
        let at_once = Asked::new(0);
        assert_eq!((at_once.ask(CLUSTER, 1, later()).await, at_once.ask(CLUSTER, 1, later()).await), (1, 2));
    }

    #[tokio::test]
    async fn all_who_wait_for_a_call_that_fails_are_told_so_by_that_one() {
        let (reviews, count) = (Reviews::new(Duration::from_secs(30)).unwrap(), AtomicUsize::new(0));
        let shown: Vec<PresentedToken> = (0..50).map(|_| token(1)).collect();
        let answers = join_all(shown.iter().map(|token| {
            reviews.get(CLUSTER, "regcred", token, later(), async || {
                tokio::task::yield_now().await;
                count.fetch_add(1, Ordering::SeqCst);
                Err(ClusterError::Unauthorized.into())
            })
        }))
        .await;
        assert!(answers.iter().all(Result::is_err));
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert!(lock(&reviews.in_flight).is_empty());
    }

    #[tokio::test]
    async fn who_hangs_up_leaves_nothing_behind() {
        let reviews = Reviews::new(Duration::from_secs(30)).unwrap();
        let shown = token(1);
        let hung_up = reviews.get(CLUSTER, "regcred", &shown, later(), async || std::future::pending().await);
        assert!(timeout(Duration::from_millis(1), hung_up).await.is_err());
        assert!(lock(&reviews.in_flight).is_empty());
    }

    #[tokio::test]
    async fn what_went_wrong_is_not_remembered() {
        let reviews = Reviews::new(Duration::from_secs(30)).unwrap();
        let down = async || Err(ClusterError::Unauthorized.into());
        assert!(reviews.get(CLUSTER, "regcred", &token(1), later(), down).await.is_err());
        let up = async || Ok(None);
        assert_eq!(reviews.get(CLUSTER, "regcred", &token(1), later(), up).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_flood_of_tokens_does_not_reach_the_cluster() {
        let reviews = Reviews::new(Duration::from_secs(30)).unwrap();
        let (calling, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let shown: Vec<PresentedToken> = (0..200).map(token).collect();
        let answers = join_all(shown.iter().map(|token| {
            reviews.get(CLUSTER, "regcred", token, later(), async || {
                most.fetch_max(calling.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::task::yield_now().await;
                calling.fetch_sub(1, Ordering::SeqCst);
                Ok(None)
            })
        }))
        .await;
        assert_eq!(most.load(Ordering::SeqCst), PER_CLUSTER);
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), PER_CLUSTER + WAITING_MAX);
    }
}
