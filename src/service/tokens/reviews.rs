//! Cache of `TokenReview` results, with a limit of concurrent calls per cluster.
//!
//! Concurrent requests with the same token share one call.

use std::{collections::HashMap, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
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

/// Maximum number of cached reviews.
const REVIEWS_MAX: usize = 10_000;
/// Maximum number of concurrent calls per cluster.
const CALLS_PER_CLUSTER: usize = 8;
/// Maximum number of further tokens that wait for a call to the same cluster. Others are rejected
/// with a retry delay.
const WAITING_MAX: usize = 64;
/// Maximum time that a token waits for a call.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Account of a valid token, or `None` for a token that the cluster rejects.
type Review = Option<ReviewedServiceAccount>;
/// Result of one call, shared by all requests that wait for it. A failure is not retried by them.
type SharedReview = Result<Review, Arc<ServiceError>>;

/// Call in progress, held by every request that waits for it. The last one to finish or to be
/// dropped removes the entry.
struct InFlight<'a> {
    cache: &'a ReviewCache,
    digest: Digest,
    call: Arc<OnceCell<SharedReview>>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        let mut in_flight = self.cache.in_flight.lock();
        // Two references: the map's and this one.
        if Arc::strong_count(&self.call) <= 2 {
            in_flight.remove(&self.digest);
        }
    }
}

/// Cached reviews and calls in progress.
#[derive(Debug)]
pub(super) struct ReviewCache {
    ttl: Duration,
    digester: Digester,
    reviews: Mutex<HashMap<Digest, (Review, Instant)>>,
    in_flight: Mutex<HashMap<Digest, Arc<OnceCell<SharedReview>>>>,
    limits: Mutex<HashMap<Uuid, Arc<ClusterLimits>>>,
}

/// Limits of the calls to one cluster.
#[derive(Debug)]
struct ClusterLimits {
    calls: Semaphore,
    /// Calls and the tokens that wait for one.
    admitted: Semaphore,
}

impl ReviewCache {
    pub(super) fn new(ttl: Duration) -> Result<Self, CryptoError> {
        Ok(Self {
            ttl,
            digester: Digester::new()?,
            reviews: Mutex::default(),
            in_flight: Mutex::default(),
            limits: Mutex::default(),
        })
    }

    /// Returns the cached review of a token, or calls the cluster with `review`. A review is never
    /// cached beyond the token's expiry.
    pub(super) async fn get(
        &self,
        cluster: ReviewingCluster,
        audience: &str,
        token: &PresentedToken,
        expires_at: DateTime<Utc>,
        review: impl AsyncFnOnce() -> Result<Review, ServiceError>,
    ) -> SharedReview {
        // The version is part of the key because a changed cluster may be another server.
        let key = [
            cluster.id.as_bytes(),
            &cluster.version.to_be_bytes()[..],
            audience.as_bytes(),
            token.secret().expose_secret().as_bytes(),
        ];
        let digest = self.digester.digest(&key);
        if let Some(review) = self.cached(&digest) {
            return Ok(review);
        }
        let call = Arc::clone(self.in_flight.lock().entry(digest).or_default());
        let in_flight = InFlight { cache: self, digest, call };
        let result = in_flight
            .call
            .get_or_init(async || self.call(cluster.id, digest, expires_at, review).await.map_err(Arc::new));
        result.await.clone()
    }

    async fn call(
        &self,
        cluster: Uuid,
        digest: Digest,
        expires_at: DateTime<Utc>,
        review: impl AsyncFnOnce() -> Result<Review, ServiceError>,
    ) -> Result<Review, ServiceError> {
        let overloaded = || ClusterError::Overloaded { retry_after: None };
        let limits = self.limits(cluster);
        let _admitted = limits.admitted.try_acquire().map_err(|_| overloaded())?;
        let permit = timeout(WAIT_MAX, limits.calls.acquire()).await;
        let _permit = permit.map_err(|_| overloaded())?.map_err(|_| overloaded())?;
        let review = review().await?;
        self.insert(digest, review.clone(), expires_at);
        Ok(review)
    }

    fn cached(&self, digest: &Digest) -> Option<Review> {
        let reviews = self.reviews.lock();
        reviews.get(digest).filter(|(_, until)| Instant::now() < *until).map(|(review, _)| review.clone())
    }

    fn insert(&self, digest: Digest, review: Review, expires_at: DateTime<Utc>) {
        let now = Instant::now();
        let lifetime = (expires_at - crate::clock::now()).to_std().unwrap_or_default().min(self.ttl);
        let mut reviews = self.reviews.lock();
        if reviews.len() >= REVIEWS_MAX {
            reviews.retain(|_, (_, until)| now < *until);
        }
        if reviews.len() >= REVIEWS_MAX
            && let Some(any) = reviews.keys().next().copied()
        {
            reviews.remove(&any);
        }
        reviews.insert(digest, (review, now + lifetime));
    }

    fn limits(&self, cluster: Uuid) -> Arc<ClusterLimits> {
        let mut limits = self.limits.lock();
        // Drop the limits of clusters without calls.
        limits.retain(|id, limits| *id == cluster || Arc::strong_count(limits) > 1);
        let new = || ClusterLimits {
            calls: Semaphore::new(CALLS_PER_CLUSTER),
            admitted: Semaphore::new(CALLS_PER_CLUSTER + WAITING_MAX),
        };
        Arc::clone(limits.entry(cluster).or_insert_with(|| Arc::new(new())))
    }
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

    /// Counts the calls to a cluster.
    struct Counted {
        reviews: ReviewCache,
        count: AtomicUsize,
    }

    impl Counted {
        fn new(seconds: u64) -> Self {
            Self { reviews: ReviewCache::new(Duration::from_secs(seconds)).unwrap(), count: AtomicUsize::new(0) }
        }

        async fn review(&self, cluster: ReviewingCluster, number: usize, end: DateTime<Utc>) -> usize {
            let token = token(number);
            let review = self.reviews.get(cluster, "regcred", &token, end, async || {
                tokio::task::yield_now().await;
                self.count.fetch_add(1, Ordering::SeqCst);
                Ok(Some(account()))
            });
            assert_eq!(review.await.unwrap(), Some(account()));
            self.count.load(Ordering::SeqCst)
        }
    }

    fn later() -> DateTime<Utc> {
        crate::clock::now() + TimeDelta::hours(1)
    }

    #[tokio::test]
    async fn one_token_causes_one_call() {
        let counted = Counted::new(30);
        join_all((0..50).map(|_| counted.review(CLUSTER, 1, later()))).await;
        assert_eq!(counted.review(CLUSTER, 1, later()).await, 1);
        assert_eq!(counted.review(CLUSTER, 2, later()).await, 2);
        assert_eq!(counted.review(ReviewingCluster { version: 2, ..CLUSTER }, 1, later()).await, 3);
        assert!(counted.reviews.in_flight.lock().is_empty());
    }

    #[tokio::test]
    async fn review_expires_with_its_token_or_its_ttl() {
        let counted = Counted::new(30);
        assert_eq!(
            (
                counted.review(CLUSTER, 1, crate::clock::now()).await,
                counted.review(CLUSTER, 1, crate::clock::now()).await
            ),
            (1, 2)
        );
        let uncached = Counted::new(0);
        assert_eq!((uncached.review(CLUSTER, 1, later()).await, uncached.review(CLUSTER, 1, later()).await), (1, 2));
    }

    #[tokio::test]
    async fn waiting_requests_share_a_failed_call() {
        let (reviews, count) = (ReviewCache::new(Duration::from_secs(30)).unwrap(), AtomicUsize::new(0));
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
        assert!(reviews.in_flight.lock().is_empty());
    }

    #[tokio::test]
    async fn dropped_request_removes_the_call_in_progress() {
        let reviews = ReviewCache::new(Duration::from_secs(30)).unwrap();
        let shown = token(1);
        let dropped = reviews.get(CLUSTER, "regcred", &shown, later(), async || std::future::pending().await);
        assert!(timeout(Duration::from_millis(1), dropped).await.is_err());
        assert!(reviews.in_flight.lock().is_empty());
    }

    #[tokio::test]
    async fn failed_review_is_not_cached() {
        let reviews = ReviewCache::new(Duration::from_secs(30)).unwrap();
        let down = async || Err(ClusterError::Unauthorized.into());
        assert!(reviews.get(CLUSTER, "regcred", &token(1), later(), down).await.is_err());
        let up = async || Ok(None);
        assert_eq!(reviews.get(CLUSTER, "regcred", &token(1), later(), up).await.unwrap(), None);
    }

    #[tokio::test]
    async fn flood_of_tokens_is_limited_per_cluster() {
        let reviews = ReviewCache::new(Duration::from_secs(30)).unwrap();
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
        assert_eq!(most.load(Ordering::SeqCst), CALLS_PER_CLUSTER);
        assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), CALLS_PER_CLUSTER + WAITING_MAX);
    }
}
