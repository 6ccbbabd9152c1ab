//! Performs a change at most once per idempotency key of its caller.
//!
//! The row of a key is inserted in the transaction of the change ([`begin`]): both commit, or
//! neither. A process that dies in between leaves nothing, so the retry performs the change. A
//! failed request rolls back, so its key stays free. An advisory lock of the same transaction tells
//! a second request at once that the first is in progress.

use std::{sync::Arc, time::Duration};

use tokio::time::MissedTickBehavior;

use crate::{
    crypto::{keyed_digest::Digester, pepper::Peppers},
    domain::{
        caller::{Actor, Call},
        idempotency::{IdempotencyKey, IdempotentRequest},
    },
    service::{ServiceError, connection},
    storage::{self, PgPool, Transaction},
};

/// Interval at which expired keys are deleted.
const PRUNE_INTERVAL: Duration = Duration::from_mins(10);
/// Pause between two batches of expired keys.
const PRUNE_PAUSE: Duration = Duration::from_millis(100);
/// First pause while a failed attempt rolls back. Doubles.
const RELEASE_PAUSE: Duration = Duration::from_millis(1);
/// Expired keys per batch, which locks them for a few milliseconds.
const PRUNE_BATCH: u32 = 500;

/// Reason why a request with an idempotency key was not performed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdempotencyError {
    /// A request with the key is in progress.
    #[error("a request with this `Idempotency-Key` is in progress: retry later")]
    InUse,
    /// The key was used for another request.
    #[error("this `Idempotency-Key` was used for another request: use a new one for each request")]
    Reused,
    /// The same request was performed before. Only a caller whose response cannot be repeated sees
    /// this error.
    #[error(
        "a request with this `Idempotency-Key` was performed before, and its response with the secret of the new API key \
         is not repeated: revoke that key and create another one with a new `Idempotency-Key`"
    )]
    Performed,
}

/// Parts of a request that a repetition must have in common.
#[derive(Debug, Clone, Copy)]
pub struct RequestParts<'a> {
    /// Method.
    pub method: &'a str,
    /// Path, as sent.
    pub path: &'a str,
    /// Query string, as sent.
    pub query: &'a str,
    /// Body.
    pub body: &'a [u8],
}

/// Idempotency keys of the last 24 hours.
#[derive(Debug, Clone)]
pub struct IdempotencyKeys {
    pool: PgPool,
    peppers: Arc<Peppers>,
}

impl IdempotencyKeys {
    /// Creates the service. Processes with a common pepper recognise each other's requests.
    #[must_use]
    pub const fn new(pool: PgPool, peppers: Arc<Peppers>) -> Self {
        Self { pool, peppers }
    }

    /// Returns the call with its idempotency key.
    #[must_use]
    pub fn with_key(&self, caller: &Call, key: IdempotencyKey, parts: RequestParts<'_>) -> Call {
        let RequestParts { method, path, query, body } = parts;
        let principal = principal(&caller.actor);
        // Caller and key are part of both: equal requests under two keys have two digests.
        let digest = |digester: &Digester, purpose: &[u8], parts: &[&[u8]]| {
            let named = [purpose, principal.as_bytes(), key.as_str().as_bytes()];
            digester.digest(&[&named[..], parts].concat())
        };
        let digesters: Vec<Digester> = self.peppers.current().digesters("regcred idempotency 1").collect();
        // Under the oldest pepper, so that replicas agree while a new one is put first.
        let lock = digesters.last().map(|oldest| digest(oldest, b"lock", &[]));
        let lock = lock.as_ref().and_then(|lock| lock.first_chunk()).map_or(0, |first| i64::from_be_bytes(*first));
        let parts = [method.as_bytes(), path.as_bytes(), query.as_bytes(), body];
        let mut digests = digesters.iter().map(|digester| digest(digester, b"request", &parts));
        let (digest, older_digests) = (digests.next().unwrap_or_default(), digests.collect());
        Call { idempotency: Some(IdempotentRequest { key, digest, older_digests, lock }), ..caller.clone() }
    }

    /// Reads the peppers again after a request was found to differ from the one before: another
    /// replica may have stored its digest under a new pepper.
    pub fn reload_peppers(&self) {
        if let Err(error) = self.peppers.reload_on_demand() {
            tracing::warn!(%error, "pepper ring not reloaded");
        }
    }

    /// Checks that the call was not performed before, without a claim. It saves work that precedes
    /// [`begin`], such as the verification of a login.
    ///
    /// # Errors
    ///
    /// [`IdempotencyError::Performed`] or [`IdempotencyError::Reused`].
    pub async fn require_new(&self, caller: &Call) -> Result<(), ServiceError> {
        let Some(request) = &caller.idempotency else { return Ok(()) };
        let mut conn = connection(&self.pool).await?;
        let found = storage::idempotency_keys::find(&mut conn, &principal(&caller.actor), request).await?;
        found.map_or(Ok(()), |digest| Err(refusal(request, &digest).into()))
    }

    /// Waits until a failed attempt has released its key, so that a retry is not told that it is in
    /// progress: the connection rolls back after the error was returned. Gives up after half a
    /// second, because another attempt may hold the key.
    pub async fn wait_until_released(&self, caller: &Call) {
        let Some(request) = &caller.idempotency else { return };
        for exponent in 0..9 {
            match self.is_released(request).await {
                Ok(false) => tokio::time::sleep(RELEASE_PAUSE * 2_u32.pow(exponent)).await,
                // Without Postgres the key cannot be used either.
                Ok(true) | Err(_) => return,
            }
        }
    }

    async fn is_released(&self, request: &IdempotentRequest) -> Result<bool, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        Ok(storage::idempotency_keys::is_released(&mut conn, request).await?)
    }

    /// Deletes expired keys at intervals. Runs until it is dropped.
    pub async fn prune(&self) {
        let mut ticks = tokio::time::interval(PRUNE_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if let Err(error) = self.delete_expired().await {
                tracing::warn!(%error, "expired idempotency keys not deleted");
            }
        }
    }

    async fn delete_expired(&self) -> Result<(), ServiceError> {
        loop {
            // A connection per batch: none is held during the pause.
            let mut conn = connection(&self.pool).await?;
            let deleted = storage::idempotency_keys::delete_expired(&mut conn, PRUNE_BATCH.into()).await?;
            drop(conn);
            if deleted < PRUNE_BATCH.into() {
                return Ok(());
            }
            tokio::time::sleep(PRUNE_PAUSE).await;
        }
    }
}

/// Begins the transaction of a change and claims the call's idempotency key in it, if it has one.
///
/// The transaction of a dry run ends with a rollback, also when it is committed.
///
/// # Errors
///
/// [`ServiceError::Idempotency`] if the change must not be performed.
pub(super) async fn begin(pool: &PgPool, caller: &Call) -> Result<Transaction, ServiceError> {
    let mut tx = pool.begin().await?;
    if caller.dry_run {
        return Ok(tx.dry());
    }
    let Some(request) = &caller.idempotency else { return Ok(tx) };
    let principal = principal(&caller.actor);
    if storage::idempotency_keys::claim(&mut tx, &principal, request).await? {
        return Ok(tx);
    }
    let found = storage::idempotency_keys::find(&mut tx, &principal, request).await?;
    Err(found.map_or(IdempotencyError::InUse, |digest| refusal(request, &digest)).into())
}

fn refusal(request: &IdempotentRequest, performed: &[u8]) -> IdempotencyError {
    if request.is_of(performed) { IdempotencyError::Performed } else { IdempotencyError::Reused }
}

/// Names a caller: the same key of two callers are two keys.
fn principal(actor: &Actor) -> String {
    let kind = actor.kind.as_str();
    actor.id.map_or_else(|| format!("{kind} {}", actor.name), |id| format!("{kind} {id}"))
}

#[cfg(test)]
mod tests {
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::SecretString;
    use uuid::Uuid;

    use super::*;
    use crate::{
        crypto::{pepper::PepperRing, ring::Ring as _},
        domain::{
            caller::{ActorKind, Identity, Role},
            grants::Grants,
            network::Networks,
        },
    };

    const PARTS: RequestParts<'_> = RequestParts { method: "PATCH", path: "/a", query: "q", body: b"{}" };

    fn keys(peppers: &[u8]) -> IdempotencyKeys {
        let line = |pepper: &u8| format!("p-{pepper}:{}\n", BASE64_STANDARD.encode([*pepper; 32]));
        let ring = PepperRing::parse(&SecretString::from(peppers.iter().map(line).collect::<String>())).unwrap();
        let peppers = Arc::new(Peppers::new(ring, None));
        IdempotencyKeys::new(sqlx::PgPool::connect_lazy("postgres://unused").unwrap().into(), peppers)
    }

    fn call(id: Option<Uuid>, name: &str) -> Call {
        let kind = if id.is_some() { ActorKind::ApiKey } else { ActorKind::IdentityProvider };
        let identity = Identity {
            actor: Actor { kind, id, name: name.to_owned() },
            role: Role::Admin,
            grants: Grants::everything(),
            source_networks: Networks::default(),
            expires_at: None,
        };
        Call {
            identity: Arc::new(identity),
            request_id: Uuid::nil(),
            client_request_id: None,
            source: None,
            idempotency: None,
            dry_run: false,
        }
    }

    fn request(pepper: u8, caller: &Call, parts: RequestParts<'_>) -> IdempotentRequest {
        request_in_ring(&[pepper], caller, parts)
    }

    fn request_in_ring(peppers: &[u8], caller: &Call, parts: RequestParts<'_>) -> IdempotentRequest {
        let key = IdempotencyKey::parse(b"k").unwrap();
        keys(peppers).with_key(caller, key, parts).idempotency.unwrap()
    }

    #[tokio::test]
    async fn request_is_recognised_under_every_pepper_of_the_ring() {
        let caller = call(Some(Uuid::nil()), "ci");
        let stored = request(1, &caller, PARTS);
        let retried = request_in_ring(&[3, 2, 1], &caller, PARTS);
        assert_eq!(refusal(&retried, &stored.digest), IdempotencyError::Performed);
        assert_eq!(retried.digest, request(3, &caller, PARTS).digest, "the first pepper makes new digests");
        assert_eq!(retried.lock, stored.lock, "two replicas lock each other out during a rotation");
        let other = request_in_ring(&[3, 2, 1], &caller, RequestParts { body: b"{ }", ..PARTS });
        assert_eq!(refusal(&other, &stored.digest), IdempotencyError::Reused);
        assert_eq!(refusal(&request_in_ring(&[3, 2], &caller, PARTS), &stored.digest), IdempotencyError::Reused);
    }

    #[tokio::test]
    async fn every_part_of_a_request_and_the_pepper_change_its_digest() {
        let caller = call(Some(Uuid::nil()), "ci");
        let first = request(1, &caller, PARTS);
        assert_eq!(first.digest, request(1, &caller, PARTS).digest);
        let others = [
            RequestParts { method: "POST", ..PARTS },
            RequestParts { path: "/b", ..PARTS },
            RequestParts { query: "", ..PARTS },
            RequestParts { body: b"{ }", ..PARTS },
            // The same bytes in other parts.
            RequestParts { path: "/aq", query: "", ..PARTS },
        ];
        for other in others {
            let second = request(1, &caller, other);
            assert_ne!(first.digest, second.digest, "{other:?}");
            assert_eq!(first.lock, second.lock);
        }
        assert_ne!(first.digest, request(2, &caller, PARTS).digest);
    }

    #[tokio::test]
    async fn keys_of_two_callers_are_independent() {
        let [first, second] = [Uuid::nil(), Uuid::max()].map(|id| call(Some(id), "ci"));
        let [third, fourth] = ["gitlab/ci", "github/ci"].map(|name| call(None, name));
        let callers = [first, second, third, fourth];
        let digests: std::collections::BTreeSet<[u8; 32]> =
            callers.iter().map(|caller| request(1, caller, PARTS).digest).collect();
        assert_eq!(digests.len(), 4);
        let principals: std::collections::BTreeSet<String> =
            callers.iter().map(|caller| principal(&caller.actor)).collect();
        let locks: std::collections::BTreeSet<i64> =
            callers.iter().map(|caller| request(1, caller, PARTS).lock).collect();
        assert_eq!((principals.len(), locks.len()), (4, 4));
    }
}
