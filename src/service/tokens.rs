//! Authentication by tokens of identity providers.
//!
//! Checks run in order of cost: form, validity period, provider, cached keys or reviews, and
//! finally a call to the issuer or cluster. Only tokens that can still be valid cause a call, at
//! most one at a time per token or unknown key. A provider that does not respond delays its own
//! tokens only.

mod metrics;
mod reviews;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use tokio::sync::Semaphore;

pub use self::metrics::{TokenMetrics, TokenOutcome};
use self::reviews::ReviewCache;
use crate::{
    clients::oidc::IssuerClient,
    crypto::{api_key::CryptoError, jws},
    domain::{
        caller::{Actor, ActorKind, Identity},
        cluster::CaCertificate,
        identity_provider::{AuthMethod, FormError, Issuer},
        network::Networks,
        token::{Claims, PresentedToken, TokenTimeError},
    },
    service::{ServiceError, clusters::Clusters, connection},
    storage::{self, PgPool, identity_providers::StoredProvider},
};

/// `Retry-After` for the tokens of a cluster that does not respond.
const CLUSTER_RETRY_AFTER: Duration = Duration::from_secs(5);
/// Maximum number of concurrent provider lookups. A flood of invalid tokens leaves the other
/// connections of the pool to other requests.
const PROVIDER_LOOKUPS: usize = 4;

/// Result of the authentication of a token.
#[derive(Debug)]
pub enum TokenAuthentication {
    /// The token is valid and a rule matches.
    Authenticated(Identity),
    /// The token is not valid.
    Rejected,
    /// The token is valid, but no rule matches.
    NoMatchingRule,
    /// The issuer or cluster that could verify the token does not respond.
    Unavailable {
        /// Delay before the next attempt.
        retry_after: Duration,
    },
}

/// Reason why a token does not authenticate a caller.
#[derive(Debug)]
enum Failure {
    Rejected(TokenOutcome),
    NoMatchingRule,
    Unavailable(Duration),
}

/// Reason why an ID token is not accepted.
#[derive(Debug)]
pub(super) enum IdTokenError {
    /// It is not valid.
    Rejected(&'static str),
    /// The issuer does not respond.
    Unavailable(Duration),
}

/// Authenticates callers by token.
#[derive(Clone)]
pub struct TokenAuthenticator {
    pool: PgPool,
    provider_lookups: Arc<Semaphore>,
    issuers: Arc<IssuerClient>,
    clusters: Clusters,
    reviews: Arc<ReviewCache>,
    metrics: Arc<TokenMetrics>,
}

impl TokenAuthenticator {
    /// Creates the authenticator. `review_ttl` is the lifetime of a cached `TokenReview`.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system provides no random bytes.
    pub fn new(
        pool: PgPool,
        issuers: Arc<IssuerClient>,
        clusters: Clusters,
        review_ttl: Duration,
    ) -> Result<Self, CryptoError> {
        let metrics = Arc::new(TokenMetrics::new(Arc::clone(&issuers)));
        let provider_lookups = Arc::new(Semaphore::new(PROVIDER_LOOKUPS));
        let reviews = Arc::new(ReviewCache::new(review_ttl)?);
        Ok(Self { pool, provider_lookups, issuers, clusters, reviews, metrics })
    }

    /// Returns the client for issuers.
    pub(super) const fn issuers(&self) -> &Arc<IssuerClient> {
        &self.issuers
    }

    /// Returns the metrics.
    #[must_use]
    pub fn metrics(&self) -> Arc<TokenMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Authenticates a token. Providers and rules are read at every call, so a change applies
    /// immediately.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn authenticate(&self, text: &str) -> Result<TokenAuthentication, ServiceError> {
        let failure = match self.verify(text, crate::clock::now()).await? {
            Ok(identity) => {
                self.metrics.count(TokenOutcome::Accepted);
                return Ok(TokenAuthentication::Authenticated(identity));
            }
            Err(failure) => failure,
        };
        let (outcome, authentication) = match failure {
            Failure::Rejected(outcome) => (outcome, TokenAuthentication::Rejected),
            Failure::NoMatchingRule => (TokenOutcome::NoRule, TokenAuthentication::NoMatchingRule),
            Failure::Unavailable(retry_after) => {
                (TokenOutcome::Unavailable, TokenAuthentication::Unavailable { retry_after })
            }
        };
        self.metrics.count(outcome);
        tracing::info!(reason = outcome.as_str(), "token rejected");
        Ok(authentication)
    }

    async fn verify(&self, text: &str, now: DateTime<Utc>) -> Result<Result<Identity, Failure>, ServiceError> {
        let Some(token) = PresentedToken::parse(text) else {
            return Ok(Err(Failure::Rejected(TokenOutcome::Malformed)));
        };
        let expires_at = match token.expiry(now) {
            Ok(expires_at) => expires_at,
            Err(not_now) => return Ok(Err(Failure::Rejected(not_now.into()))),
        };
        let providers = self.find_providers(&token).await?;
        let (by_review, by_keys): (Vec<&StoredProvider>, Vec<&StoredProvider>) =
            providers.iter().partition(|provider| provider.cluster.is_some());
        // Keys first: a check with keys discloses the token to no other system. A review discloses
        // it to a cluster, so a token with audiences of several clusters is rejected: the cluster
        // that issued it is unknown.
        match (&by_keys[..], &by_review[..]) {
            ([_, ..], _) => Ok(self.verify_with_keys(&token, &by_keys, expires_at).await),
            ([], [provider]) => Ok(match check_form(provider, &token) {
                Ok(()) => self.verify_by_review(&token, provider, expires_at).await,
                Err(failure) => Err(failure),
            }),
            ([], _) => Ok(Err(Failure::Rejected(TokenOutcome::UnknownProvider))),
        }
    }

    /// Finds the providers for the issuer and audiences that the token claims.
    async fn find_providers(&self, token: &PresentedToken) -> Result<Vec<StoredProvider>, ServiceError> {
        // Postgres text cannot contain NUL, so no provider matches such a value.
        let is_text = |text: &&str| !text.contains('\0');
        let audiences: Vec<String> = token.claims.audiences().into_iter().filter(is_text).map(str::to_owned).collect();
        if audiences.is_empty() {
            return Ok(Vec::new());
        }
        let issuer = token.claims.text("iss").filter(is_text);
        let acquire_timeout = self.pool.acquire_timeout();
        let permit = tokio::time::timeout(acquire_timeout, self.provider_lookups.acquire()).await;
        let _permit = permit.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let mut conn = connection(&self.pool).await?;
        Ok(storage::identity_providers::find_for_token(&mut conn, issuer, &audiences).await?)
    }

    /// Verifies a token with the keys of its issuer. Several providers are possible only for a
    /// token with several audiences.
    async fn verify_with_keys(
        &self,
        token: &PresentedToken,
        providers: &[&StoredProvider],
        expires_at: DateTime<Utc>,
    ) -> Result<Identity, Failure> {
        let mut failure = Failure::Rejected(TokenOutcome::UnknownProvider);
        for provider in providers {
            let AuthMethod::Oidc { issuer, ca_certificate } = &provider.config.auth_method else { continue };
            let verified = match check_form(provider, token) {
                Ok(()) => self.check_signature(token, issuer, ca_certificate.as_ref()).await,
                Err(failure) => Err(failure),
            };
            match verified {
                Ok(()) => match identity(provider, &token.claims, expires_at) {
                    Some(identity) => return Ok(identity),
                    None => failure = Failure::NoMatchingRule,
                },
                // The token is valid for another provider, which takes precedence in the response.
                Err(_) if matches!(failure, Failure::NoMatchingRule) => {}
                Err(other) => failure = other,
            }
        }
        Err(failure)
    }

    async fn check_signature(
        &self,
        token: &PresentedToken,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
    ) -> Result<(), Failure> {
        let algorithm = token.algorithm.ok_or(Failure::Rejected(TokenOutcome::Algorithm))?;
        let key_id = token.key_id.as_deref();
        let found = self.issuers.publication(issuer, ca_certificate, key_id).await;
        let found = found.map_err(|_| Failure::Unavailable(self.issuers.refresh_interval()))?;
        let mut candidates = found.keys.candidates(key_id, algorithm).peekable();
        if candidates.peek().is_none() {
            return Err(Failure::Rejected(TokenOutcome::UnknownKey));
        }
        if candidates.any(|key| jws::verify(key, algorithm, token.signed_part(), &token.signature)) {
            Ok(())
        } else {
            Err(Failure::Rejected(TokenOutcome::Signature))
        }
    }

    /// Verifies the signature and the time of an ID token. Its claims are left to the caller.
    ///
    /// # Errors
    ///
    /// The reason, for the log, or the time after which to retry.
    pub(super) async fn verify_id_token(
        &self,
        text: &str,
        issuer: &Issuer,
        ca_certificate: Option<&CaCertificate>,
        now: DateTime<Utc>,
    ) -> Result<PresentedToken, IdTokenError> {
        let token = PresentedToken::parse(text).ok_or(IdTokenError::Rejected(TokenOutcome::Malformed.as_str()))?;
        let time: Result<DateTime<Utc>, TokenOutcome> = token.expiry(now).map_err(TokenOutcome::from);
        time.map_err(|outcome| IdTokenError::Rejected(outcome.as_str()))?;
        match self.check_signature(&token, issuer, ca_certificate).await {
            Ok(()) => Ok(token),
            Err(Failure::Unavailable(retry_after)) => Err(IdTokenError::Unavailable(retry_after)),
            Err(Failure::Rejected(outcome)) => Err(IdTokenError::Rejected(outcome.as_str())),
            Err(Failure::NoMatchingRule) => Err(IdTokenError::Rejected(TokenOutcome::NoRule.as_str())),
        }
    }

    /// Verifies a token by a `TokenReview`. Its claimed audience and validity period have already
    /// been checked.
    async fn verify_by_review(
        &self,
        token: &PresentedToken,
        provider: &StoredProvider,
        expires_at: DateTime<Utc>,
    ) -> Result<Identity, Failure> {
        let Some(cluster) = provider.cluster else { return Err(Failure::Rejected(TokenOutcome::UnknownProvider)) };
        if provider.config.accepts_every_pod() {
            return Err(Failure::Rejected(TokenOutcome::ApiServerAudience));
        }
        let audience = provider.config.audience.as_str();
        let review = async || {
            let client = self.clusters.token_review_client(cluster.id).await?;
            let account = client.review_token(token.secret(), audience).await?;
            if account.is_some() && client.is_own_token(token.secret()).await? {
                // Every pod has such a token, so the audience does not say that it is for regcred.
                tracing::warn!(provider = provider.name, "audience belongs to the API server");
                return Ok(None);
            }
            Ok::<_, ServiceError>(account)
        };
        let account = match self.reviews.get(cluster, audience, token, expires_at, review).await {
            Ok(Some(account)) => account,
            Ok(None) => return Err(Failure::Rejected(TokenOutcome::NotVouchedFor)),
            Err(error) => {
                tracing::warn!(provider = provider.name, %error, "token review failed");
                return Err(Failure::Unavailable(CLUSTER_RETRY_AFTER));
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
        identity(provider, &claims, expires_at).ok_or(Failure::NoMatchingRule)
    }
}

fn check_form(provider: &StoredProvider, token: &PresentedToken) -> Result<(), Failure> {
    provider.config.check_form(token).map_err(|error| {
        Failure::Rejected(match error {
            FormError::Audiences => TokenOutcome::Audiences,
            FormError::TokenType => TokenOutcome::TokenType,
        })
    })
}

/// Maps claims to an identity by the first matching rule.
pub(super) fn identity(provider: &StoredProvider, claims: &Claims, expires_at: DateTime<Utc>) -> Option<Identity> {
    let rule = provider.config.matching_rule(claims)?;
    Some(Identity {
        actor: actor(&provider.name, claims),
        role: rule.role,
        grants: rule.grants.clone(),
        source_networks: Networks::default(),
        expires_at: Some(expires_at),
    })
}

/// Names the bearer of a token by its provider and subject.
pub(super) fn actor(provider: &str, claims: &Claims) -> Actor {
    let name = format!("{provider}/{}", claims.display_subject());
    Actor { kind: ActorKind::IdentityProvider, id: None, name }
}

impl From<TokenTimeError> for TokenOutcome {
    fn from(not_now: TokenTimeError) -> Self {
        match not_now {
            TokenTimeError::Malformed => Self::Malformed,
            TokenTimeError::Expired => Self::Expired,
            TokenTimeError::NotYetValid => Self::Early,
        }
    }
}
