//! The door for tokens: whom a token of an identity provider stands for.
//!
//! From cheap to dear: form, time, provider, then keys that are kept or a review that is remembered, and at last a call to whoever
//! vouches for it. A call is made for what can be good alone, at most once for the same token or unknown key, and a provider
//! that does not answer holds up nobody but its own.

mod metrics;
mod reviews;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use sqlx::PgPool;
use tokio::sync::Semaphore;

pub use self::metrics::{TokenMetrics, TokenOutcome};
use self::reviews::Reviews;
use crate::{
    clients::oidc::IssuerClient,
    crypto::{api_key::CryptoError, jws},
    domain::{
        caller::{Actor, ActorKind, Identity},
        cluster::CaCertificate,
        identity_provider::{Issuer, Voucher},
        token::{Claims, PresentedToken, TokenTimeError},
    },
    service::{ServiceError, clusters::Clusters, connection},
    storage::{self, identity_providers::StoredProvider},
};

/// When it is worth to ask a cluster again that did not answer.
const RETRY_CLUSTER_AFTER: Duration = Duration::from_secs(5);
/// How many tokens' providers are looked up in Postgres at a time: a flood of tokens that are nobody's leaves the other connections
/// to those who have a good one, or a key.
const PROVIDER_READS: usize = 4;

/// What the door says of a shown token.
#[derive(Debug)]
pub enum TokenVerdict {
    /// It is this caller's.
    Known(Identity),
    /// It is not valid here.
    Refused,
    /// It is valid, and no rule says who its bearer is.
    NoRule,
    /// Whoever vouches for such tokens does not answer.
    Unavailable {
        /// When to try again.
        retry_after: Duration,
    },
}

/// Why a token does not open the door, with the reason for the log.
#[derive(Debug)]
enum No {
    Refused(TokenOutcome),
    Unmatched,
    Unavailable(Duration),
}

/// Says whom a shown token stands for.
#[derive(Clone)]
pub struct TokenAuthenticator {
    pool: PgPool,
    provider_reads: Arc<Semaphore>,
    issuers: Arc<IssuerClient>,
    clusters: Clusters,
    reviews: Arc<Reviews>,
    metrics: Arc<TokenMetrics>,
}

impl TokenAuthenticator {
    /// Puts the service together; the answer of a cluster is remembered for so long.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system gives no random bytes.
    pub fn new(
        pool: PgPool,
        issuers: Arc<IssuerClient>,
        clusters: Clusters,
        review_remembered: Duration,
    ) -> Result<Self, CryptoError> {
        let metrics = Arc::new(TokenMetrics::new(Arc::clone(&issuers)));
        let provider_reads = Arc::new(Semaphore::new(PROVIDER_READS));
        let reviews = Arc::new(Reviews::new(review_remembered)?);
        Ok(Self { pool, provider_reads, issuers, clusters, reviews, metrics })
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> Arc<TokenMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Says whom a token stands for. Providers and rules are read at each request, so that a change counts at once.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`] if Postgres cannot be asked.
    pub async fn identify(&self, text: &str) -> Result<TokenVerdict, ServiceError> {
        let verdict = match self.verify(text, Utc::now()).await? {
            Ok(identity) => {
                self.metrics.count(TokenOutcome::Accepted);
                return Ok(TokenVerdict::Known(identity));
            }
            Err(no) => no,
        };
        let (outcome, verdict) = match verdict {
            No::Refused(outcome) => (outcome, TokenVerdict::Refused),
            No::Unmatched => (TokenOutcome::NoRule, TokenVerdict::NoRule),
            No::Unavailable(retry_after) => (TokenOutcome::Unavailable, TokenVerdict::Unavailable { retry_after }),
        };
        self.metrics.count(outcome);
        tracing::info!(reason = outcome.as_str(), "a token does not open the door");
        Ok(verdict)
    }

    async fn verify(&self, text: &str, now: DateTime<Utc>) -> Result<Result<Identity, No>, ServiceError> {
        let Some(token) = PresentedToken::parse(text) else { return Ok(Err(No::Refused(TokenOutcome::Malformed))) };
        let end = match token.expiry(now) {
            Ok(end) => end,
            Err(error) => return Ok(Err(No::Refused(error.into()))),
        };
        let providers = self.providers(&token).await?;
        let (by_review, with_keys): (Vec<&StoredProvider>, Vec<&StoredProvider>) =
            providers.iter().partition(|provider| provider.cluster.is_some());
        // Keys first: whoever has them need not show the token to anybody. And it is shown to one cluster alone: of one that is
        // for several nobody can say which made it, and the others would be given what is good at that one.
        match (&with_keys[..], &by_review[..]) {
            ([_, ..], _) => Ok(self.verify_with_keys(&token, &with_keys, end).await),
            ([], [provider]) => Ok(self.verify_by_review(&token, provider, end).await),
            ([], _) => Ok(Err(No::Refused(TokenOutcome::UnknownProvider))),
        }
    }

    /// The providers that a token says that it is meant for: one query. A memory of providers would stand here.
    async fn providers(&self, token: &PresentedToken) -> Result<Vec<StoredProvider>, ServiceError> {
        // Postgres takes no NUL in a text, and no provider has one.
        let is_text = |text: &&str| !text.contains('\0');
        let audiences: Vec<String> = token.claims.audiences().into_iter().filter(is_text).map(str::to_owned).collect();
        if audiences.is_empty() {
            return Ok(Vec::new());
        }
        let issuer = token.claims.text("iss").filter(is_text);
        // Waited for no longer than a connection is.
        let patience = self.pool.options().get_acquire_timeout();
        let turn = tokio::time::timeout(patience, self.provider_reads.acquire()).await;
        let _turn = turn.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let mut conn = connection(&self.pool).await?;
        Ok(storage::identity_providers::find_for_token(&mut conn, issuer, &audiences).await?)
    }

    /// By the keys of its issuer. There is more than one provider only for a token with more than one audience.
    async fn verify_with_keys(
        &self,
        token: &PresentedToken,
        providers: &[&StoredProvider],
        end: DateTime<Utc>,
    ) -> Result<Identity, No> {
        let mut no = No::Refused(TokenOutcome::UnknownProvider);
        for provider in providers {
            let Voucher::Oidc { issuer, ca_certificate } = &provider.config.voucher else { continue };
            match self.check_signature(token, issuer, ca_certificate.as_ref()).await {
                Ok(()) => match identity(provider, &token.claims, end) {
                    Some(identity) => return Ok(identity),
                    None => no = No::Unmatched,
                },
                // A token that is valid for one of them is answered so.
                Err(_) if matches!(no, No::Unmatched) => {}
                Err(other) => no = other,
            }
        }
        Err(no)
    }

    async fn check_signature(
        &self,
        token: &PresentedToken,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
    ) -> Result<(), No> {
        let algorithm = token.algorithm.ok_or(No::Refused(TokenOutcome::Algorithm))?;
        let key_id = token.key_id.as_deref();
        let keys = self.issuers.keys(issuer, ca_certificate, key_id).await;
        let keys = keys.map_err(|_| No::Unavailable(self.issuers.refresh_interval()))?;
        let mut candidates = keys.candidates(key_id, algorithm).peekable();
        if candidates.peek().is_none() {
            return Err(No::Refused(TokenOutcome::UnknownKey));
        }
        if candidates.any(|key| jws::verify(key, algorithm, token.signed_part(), &token.signature)) {
            Ok(())
        } else {
            Err(No::Refused(TokenOutcome::Signature))
        }
    }

    /// By asking the cluster. The token has its audience and its time by now, as far as it says so itself.
    async fn verify_by_review(
        &self,
        token: &PresentedToken,
        provider: &StoredProvider,
        end: DateTime<Utc>,
    ) -> Result<Identity, No> {
        let Some(cluster) = provider.cluster else { return Err(No::Refused(TokenOutcome::UnknownProvider)) };
        let audience = provider.config.audience.as_str();
        let ask = async || {
            let client = self.clusters.reviewer(cluster.id).await?;
            Ok::<_, ServiceError>(client.review_token(token.secret(), audience).await?)
        };
        let account = match self.reviews.get(cluster, audience, token, end, ask).await {
            Ok(Some(account)) => account,
            Ok(None) => return Err(No::Refused(TokenOutcome::NotVouchedFor)),
            Err(error) => {
                tracing::warn!(provider = provider.name, %error, "the cluster of an identity provider cannot be asked");
                return Err(No::Unavailable(RETRY_CLUSTER_AFTER));
            }
        };
        let subject = format!("system:serviceaccount:{}:{}", account.namespace, account.name);
        let claims = Claims::from([
            ("sub", Some(subject)),
            ("namespace", Some(account.namespace)),
            ("serviceAccount", Some(account.name)),
            ("serviceAccountUid", account.uid),
            ("podName", account.pod_name),
            ("podUid", account.pod_uid),
            ("nodeName", account.node_name),
        ]);
        identity(provider, &claims, end).ok_or(No::Unmatched)
    }
}

/// Who bears these claims, by the first rule that matches.
fn identity(provider: &StoredProvider, claims: &Claims, end: DateTime<Utc>) -> Option<Identity> {
    let rule = provider.config.rules.iter().find(|rule| rule.matches(claims))?;
    let name = format!("{}/{}", provider.name, claims.display_subject());
    Some(Identity {
        actor: Actor { kind: ActorKind::IdentityProvider, id: None, name },
        role: rule.role,
        grants: rule.grants.clone(),
        expires_at: Some(end),
    })
}

impl From<TokenTimeError> for TokenOutcome {
    fn from(error: TokenTimeError) -> Self {
        match error {
            TokenTimeError::Malformed => Self::Malformed,
            TokenTimeError::Expired => Self::Expired,
            TokenTimeError::NotYetValid => Self::Early,
        }
    }
}
