//! Signing in to the web console through an identity provider: authorization code with PKCE
//! (`OpenID` Connect Core 1.0, section 3.1; RFC 7636; RFC 9700).
//!
//! An attempt is a cookie of the browser ([`LoginAttempts`]); nothing is stored before a person has
//! signed in. Only a genuine cookie causes a call to a provider. The claims of the ID token are
//! verified here, and mapped to a role and grants by the provider's rules, at each request of the
//! session ([`Sessions`]).

mod permits;

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::Semaphore;
use url::Url;
use uuid::Uuid;

use self::permits::CallPermits;
use crate::{
    clients::oidc::{CodeExchange, ExchangeError, IssuerClient, LoginEndpoints},
    crypto::{
        login::{Attempt, LoginAttempts},
        sealer::Sealer,
        session::NewSession,
    },
    domain::{
        caller::{Call, Identity},
        cluster::CaCertificate,
        identity_provider::{AuthMethod, ClientId, Issuer},
        names::Name,
        session::Person,
        token::{Claims, PresentedToken},
    },
    service::{
        ServiceError, connection,
        sessions::{ListedSession, Sessions},
        tokens::{self, IdTokenError, TokenAuthenticator},
    },
    storage::{
        self, PgPool, StorageError,
        identity_providers::{StoredProvider, login_slot},
    },
};

/// Scopes that an ID token with the usual claims requires.
const SCOPE: &str = "openid profile email";
/// Providers that a sign-in page offers.
const OFFERED_MAX: i64 = 20;
/// Maximum number of concurrent look-ups for callers without a credential.
const LOOKUPS: usize = 4;
/// Maximum length of a subject (`OpenID` Connect Core 1.0, section 2).
const SUBJECT_MAX: usize = 255;
/// `Retry-After` if a provider does not answer.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Why a person is not signed in.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The attempt, the code or the ID token is not accepted.
    #[error("{0}")]
    Refused(&'static str),
    /// The person is known, but no rule matches.
    #[error("no rule matches")]
    NoMatchingRule,
    /// The provider does not answer.
    #[error("the provider does not answer")]
    Unavailable {
        /// Time after which to retry.
        retry_after: Duration,
    },
    /// Error of a service.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl From<StorageError> for LoginError {
    fn from(error: StorageError) -> Self {
        Self::Service(error.into())
    }
}

const NO_ATTEMPT: LoginError =
    LoginError::Refused("this attempt to sign in has ended, or belongs to another browser; start again");
const NOT_OFFERED: LoginError = LoginError::Refused("people do not sign in through this identity provider");

/// Started attempt.
#[derive(Debug)]
pub struct StartedLogin {
    /// Page of the provider, with the request.
    pub authorization_url: String,
    /// Cookie of the attempt.
    pub cookie: SecretString,
}

/// What a browser brings back from a provider.
#[derive(Debug)]
pub struct ReturnedLogin<'a> {
    /// Cookie of the attempt.
    pub cookie: &'a str,
    /// Name of the provider that the page belongs to.
    pub provider: &'a str,
    /// `state`
    pub state: &'a str,
    /// `code`
    pub code: &'a SecretString,
    /// `iss` (RFC 9207)
    pub issuer: Option<&'a str>,
    /// Address that the browser was sent back to.
    pub redirect_uri: &'a str,
}

/// Provider through which people sign in.
struct LoginProvider {
    stored: StoredProvider,
    issuer: Issuer,
    ca_certificate: Option<CaCertificate>,
    client_id: ClientId,
}

impl LoginProvider {
    fn of(stored: StoredProvider) -> Option<Self> {
        let AuthMethod::Oidc { issuer, ca_certificate } = &stored.config.auth_method else { return None };
        let (issuer, ca_certificate) = (issuer.clone(), ca_certificate.clone());
        let client_id = stored.config.login.clone()?;
        Some(Self { stored, issuer, ca_certificate, client_id })
    }
}

/// Service that signs people in.
#[derive(Clone)]
pub struct Logins {
    pool: PgPool,
    sealer: Arc<Sealer>,
    attempts: LoginAttempts,
    tokens: TokenAuthenticator,
    sessions: Sessions,
    calls: Arc<CallPermits>,
    lookups: Arc<Semaphore>,
}

impl Logins {
    /// Creates the service.
    #[must_use]
    pub fn new(
        pool: PgPool,
        sealer: Arc<Sealer>,
        attempts: LoginAttempts,
        tokens: TokenAuthenticator,
        sessions: Sessions,
    ) -> Self {
        let (calls, lookups) = (Arc::default(), Arc::new(Semaphore::new(LOOKUPS)));
        Self { pool, sealer, attempts, tokens, sessions, calls, lookups }
    }

    /// Lists the names of the providers through which people sign in.
    ///
    /// # Errors
    ///
    /// [`ServiceError::Storage`].
    pub async fn offered(&self) -> Result<Vec<String>, ServiceError> {
        let _permit = self.lookup().await?;
        let mut conn = connection(&self.pool).await?;
        Ok(storage::identity_providers::names_for_login(&mut conn, OFFERED_MAX).await?)
    }

    /// A flood of callers without a credential leaves the other connections of the pool to others.
    async fn lookup(&self) -> Result<tokio::sync::SemaphorePermit<'_>, ServiceError> {
        let permit = tokio::time::timeout(self.pool.acquire_timeout(), self.lookups.acquire()).await;
        let unavailable = || StorageError::from(sqlx::Error::PoolTimedOut);
        permit.ok().and_then(Result::ok).ok_or_else(|| unavailable().into())
    }

    /// Starts an attempt to sign in. The provider sends the browser to `redirect_uri` afterwards.
    ///
    /// # Errors
    ///
    /// [`LoginError::Refused`] if people do not sign in through the provider.
    pub async fn start(&self, name: &Name, redirect_uri: &str) -> Result<StartedLogin, LoginError> {
        let stored = {
            let _permit = self.lookup().await?;
            let mut conn = connection(&self.pool).await?;
            storage::identity_providers::find(&mut conn, name).await?
        };
        let provider = stored.and_then(LoginProvider::of).ok_or(NOT_OFFERED)?;
        let endpoints = self.endpoints(&provider).await?;
        let attempt = self.attempts.start(provider.stored.id, crate::clock::now()).map_err(ServiceError::from)?;
        let mut url: Url = endpoints.authorization;
        url.query_pairs_mut()
            .append_pair("response_type", "code")
            .append_pair("client_id", provider.client_id.as_str())
            .append_pair("redirect_uri", redirect_uri)
            .append_pair("scope", SCOPE)
            .append_pair("state", &attempt.state)
            .append_pair("nonce", &attempt.nonce)
            .append_pair("code_challenge", &attempt.challenge)
            .append_pair("code_challenge_method", "S256");
        Ok(StartedLogin { authorization_url: url.into(), cookie: attempt.cookie })
    }

    async fn endpoints(&self, provider: &LoginProvider) -> Result<LoginEndpoints, LoginError> {
        let issuers = self.tokens.issuers();
        let found = issuers.publication(&provider.issuer, provider.ca_certificate.as_ref(), None).await;
        let found = found.map_err(|_| LoginError::Unavailable { retry_after: issuers.refresh_interval() })?;
        let missing = || {
            tracing::warn!(
                provider = provider.stored.name,
                "discovery document without usable addresses for signing in"
            );
            LoginError::Refused("the identity provider does not say where people sign in; the log of regcred has more")
        };
        found.login.clone().ok_or_else(missing)
    }

    /// Completes an attempt: exchanges the code, verifies the ID token and creates a session.
    /// `call_for` adds the metadata of the request to the person's identity.
    ///
    /// # Errors
    ///
    /// [`LoginError`]
    pub async fn complete(
        &self,
        returned: &ReturnedLogin<'_>,
        call_for: impl FnOnce(Identity) -> Call,
    ) -> Result<(ListedSession, NewSession), LoginError> {
        let now = crate::clock::now();
        let attempt = self.attempts.open(returned.cookie, returned.state, now).ok_or(NO_ATTEMPT)?;
        let (provider, secret) = self.provider(attempt.provider_id).await?;
        // Does not depend on what the provider of the attempt publishes, which may be hostile: it could
        // have sent the browser on to another one, for the code of that (RFC 9700, section 4.4).
        if provider.stored.name != returned.provider {
            return Err(NO_ATTEMPT);
        }
        let endpoints = self.endpoints(&provider).await?;
        check_issuer(&endpoints, &provider.issuer, returned.issuer)?;
        let exchange = CodeExchange {
            client_id: provider.client_id.as_str(),
            client_secret: &secret,
            code: returned.code,
            verifier: &attempt.verifier,
            redirect_uri: returned.redirect_uri,
        };
        let id_token = self.exchange(&provider, &endpoints, &exchange).await?;
        let (identity, person) = self.verify(&provider, &attempt, &id_token, now).await?;
        let call = call_for(identity);
        let (session, new) =
            self.sessions.create_for(&call, person, &provider.stored.config).await?.ok_or(NOT_OFFERED)?;
        Ok((ListedSession { session, owner: call.actor.clone() }, new))
    }

    /// Finds the provider of an attempt, and opens the secret of its client.
    async fn provider(&self, id: Uuid) -> Result<(LoginProvider, SecretString), LoginError> {
        let _permit = self.lookup().await?;
        let mut conn = connection(&self.pool).await?;
        let stored = storage::identity_providers::find_by_id(&mut conn, id).await?;
        let provider = stored.and_then(LoginProvider::of).ok_or(NOT_OFFERED)?;
        let sealed = storage::identity_providers::find_login_secret(&mut conn, id).await?;
        let slot = login_slot(id, &provider.stored.config);
        let (sealed, slot) = sealed.zip(slot).ok_or(NOT_OFFERED)?;
        let secret = self.sealer.open(&slot, &sealed).map_err(ServiceError::from)?;
        Ok((provider, secret))
    }

    async fn exchange(
        &self,
        provider: &LoginProvider,
        endpoints: &LoginEndpoints,
        exchange: &CodeExchange<'_>,
    ) -> Result<SecretString, LoginError> {
        let unavailable = || LoginError::Unavailable { retry_after: RETRY_AFTER };
        let permits = tokio::time::timeout(RETRY_AFTER, self.calls.acquire(provider.stored.id)).await;
        let Ok(Some(_permits)) = permits else { return Err(unavailable()) };
        let issuers: &Arc<IssuerClient> = self.tokens.issuers();
        let exchanged = issuers.exchange(endpoints, provider.ca_certificate.as_ref(), exchange).await;
        exchanged.map_err(|error| {
            tracing::warn!(provider = provider.stored.name, %error, "code not exchanged");
            match error {
                ExchangeError::Refused("invalid_client" | "unauthorized_client") => LoginError::Refused(
                    "the identity provider does not accept regcred as its client; an administrator must set `login` again",
                ),
                ExchangeError::Refused(_) => {
                    LoginError::Refused("the identity provider did not accept the code; start again")
                }
                ExchangeError::Unavailable(_) => unavailable(),
            }
        })
    }

    /// Verifies an ID token and maps its claims.
    async fn verify(
        &self,
        provider: &LoginProvider,
        attempt: &Attempt,
        id_token: &SecretString,
        now: DateTime<Utc>,
    ) -> Result<(Identity, Person), LoginError> {
        let rejected = |reason: &str| {
            tracing::warn!(provider = provider.stored.name, reason, "id token rejected");
            LoginError::Refused("the ID token of the identity provider is not accepted; the log of regcred has more")
        };
        let ca_certificate = provider.ca_certificate.as_ref();
        let verified = self.tokens.verify_id_token(id_token.expose_secret(), &provider.issuer, ca_certificate, now);
        let token = verified.await.map_err(|error| match error {
            IdTokenError::Rejected(reason) => rejected(reason),
            IdTokenError::Unavailable(retry_after) => LoginError::Unavailable { retry_after },
        })?;
        let subject = check_claims(&token, &provider.issuer, &provider.client_id, attempt).map_err(rejected)?;
        let claims = token.claims.identifying();
        // The same claims as at each request of the session.
        let kept = Claims::parse(&claims).unwrap_or_default();
        let identity = tokens::identity(&provider.stored, &kept, now).ok_or(LoginError::NoMatchingRule)?;
        Ok((identity, Person { provider_id: provider.stored.id, subject, claims }))
    }
}

/// A provider that names itself must be the one of the attempt: another one could have sent its own
/// code (RFC 9207, section 2.4).
fn check_issuer(endpoints: &LoginEndpoints, issuer: &Issuer, named: Option<&str>) -> Result<(), LoginError> {
    match named {
        Some(named) if named == issuer.as_str() => Ok(()),
        None if !endpoints.names_issuer => Ok(()),
        _ => Err(LoginError::Refused("the answer comes from another identity provider; start again")),
    }
}

/// Checks the claims of an ID token (`OpenID` Connect Core 1.0, section 3.1.3.7) and returns its
/// subject.
fn check_claims(
    token: &PresentedToken,
    issuer: &Issuer,
    client_id: &ClientId,
    attempt: &Attempt,
) -> Result<String, &'static str> {
    let claims = &token.claims;
    if claims.text("iss") != Some(issuer.as_str()) {
        return Err("issuer");
    }
    let audiences = claims.audiences();
    let authorized = claims.text("azp");
    if !audiences.contains(&client_id.as_str())
        || authorized.is_some_and(|party| party != client_id.as_str())
        || audiences.len() > 1 && authorized.is_none()
    {
        return Err("audience");
    }
    if token.special_type().is_some() {
        return Err("token_type");
    }
    if !claims.text("nonce").is_some_and(|nonce| attempt.is_nonce(nonce)) {
        return Err("nonce");
    }
    let is_subject =
        |subject: &&str| !subject.is_empty() && subject.len() <= SUBJECT_MAX && !subject.chars().any(char::is_control);
    claims.text("sub").filter(is_subject).map(str::to_owned).ok_or("subject")
}

#[cfg(test)]
mod tests {
    use base64::{
        Engine,
        prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
    };
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;
    use crate::crypto::{
        pepper::{PepperRing, Peppers},
        ring::Ring as _,
    };

    const ISSUER: &str = "https://issuer.example";

    fn attempt() -> (Attempt, String) {
        let line = format!("p-1:{}", BASE64_STANDARD.encode([1; 32]));
        let ring = PepperRing::parse(&SecretString::from(line)).unwrap();
        let attempts = LoginAttempts::new(Arc::new(Peppers::new(ring, None)));
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let made = attempts.start(Uuid::now_v7(), now).unwrap();
        (attempts.open(made.cookie.expose_secret(), &made.state, now).unwrap(), made.nonce)
    }

    fn token(header: &Value, claims: &Value) -> PresentedToken {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        PresentedToken::parse(&format!("{}.{}.{}", part(header), part(claims), part(&json!("x")))).unwrap()
    }

    #[rstest]
    #[case::good(json!({}), Ok("lena"))]
    #[case::further_audience(json!({"aud": ["regcred", "other"], "azp": "regcred"}), Ok("lena"))]
    #[case::further_audience_without_party(json!({"aud": ["regcred", "other"]}), Err("audience"))]
    #[case::of_another_client(json!({"aud": "other"}), Err("audience"))]
    #[case::for_another_party(json!({"azp": "other"}), Err("audience"))]
    #[case::no_audience(json!({"aud": null}), Err("audience"))]
    #[case::of_another_issuer(json!({"iss": "https://issuer.example/"}), Err("issuer"))]
    #[case::other_nonce(json!({"nonce": "other"}), Err("nonce"))]
    #[case::no_nonce(json!({"nonce": null}), Err("nonce"))]
    #[case::logout_token(json!({"events": {}}), Err("token_type"))]
    #[case::no_subject(json!({"sub": ""}), Err("subject"))]
    #[case::subject_with_nul(json!({"sub": "a\u{0}"}), Err("subject"))]
    #[case::long_subject(json!({"sub": "a".repeat(256)}), Err("subject"))]
    fn id_token_is_for_this_client_and_attempt(#[case] more: Value, #[case] expected: Result<&str, &'static str>) {
        let (attempt, nonce) = attempt();
        let mut claims = json!({"iss": ISSUER, "aud": "regcred", "sub": "lena", "nonce": nonce});
        claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let client = ClientId::parse("regcred").unwrap();
        let checked =
            check_claims(&token(&json!({"alg": "RS256"}), &claims), &Issuer::parse(ISSUER).unwrap(), &client, &attempt);
        assert_eq!(checked, expected.map(str::to_owned));
    }

    #[rstest]
    #[case(false, None, true)]
    #[case(false, Some(ISSUER), true)]
    #[case(false, Some("https://other.example"), false)]
    #[case(true, None, false)]
    #[case(true, Some(ISSUER), true)]
    fn answer_comes_from_the_provider_of_the_attempt(
        #[case] names_issuer: bool,
        #[case] named: Option<&str>,
        #[case] accepted: bool,
    ) {
        let url: Url = "https://issuer.example/x".parse().unwrap();
        let endpoints = LoginEndpoints { authorization: url.clone(), token: url, posts_secret: false, names_issuer };
        assert_eq!(check_issuer(&endpoints, &Issuer::parse(ISSUER).unwrap(), named).is_ok(), accepted);
    }
}
