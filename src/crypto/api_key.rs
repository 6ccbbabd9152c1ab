//! API keys: their format and their verification.
//!
//! A key is `rgc_<id>_<secret><checksum>`: the row's UUID, 256 random bits and the CRC-32 of the
//! preceding text, in hexadecimal digits. The row holds an HMAC under a pepper, which is not in the
//! database, and an argon2id hash. Verification has four steps, cheapest first:
//!
//! 1. Checksum, without I/O. Rejects mistyped and truncated keys and most scanners.
//! 2. HMAC, compared in constant time, against a dummy if the id is unknown. Rejects forged keys
//!    before argon2, so that argon2 cannot be used for denial of service.
//! 3. Cache of rows whose key argon2 has verified. It is keyed by HMAC and hash of the row; only
//!    the verified text has this HMAC.
//! 4. argon2id, once per key however many requests wait for it, with a limited number of permits.
//!    A run that has started finishes even if all requests are gone, and its result is cached.
//!
//! The caller checks at every request whether the key is revoked or expired.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use argon2::{
    Algorithm, Argon2, Block, Params, PasswordHasher, Version,
    password_hash::phc::{Output, PasswordHash},
};
use aws_lc_rs::{hmac, rand};
use base64::{Engine, prelude::BASE64_STANDARD};
use parking_lot::{Mutex, MutexGuard};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::domain::{caller::KeyVerifier, invalid::Invalid};

const PREFIX: &str = "rgc_";
const SECRET_BYTES: usize = 32;
/// `rgc_` + 32 digits of the id + `_` + 64 digits of the secret + 8 digits of the checksum.
const KEY_CHARS: usize = 4 + 32 + 1 + 64 + 8;
/// Time for which the result of argon2 is cached.
const CACHED_FOR: Duration = Duration::from_mins(10);
/// Maximum number of cached results, of 250 bytes each.
const CACHED_MAX: usize = 10_000;

/// Failure of the system during a cryptographic operation. Holds no secret.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{0}")]
pub struct CryptoError(&'static str);

impl CryptoError {
    pub(in crate::crypto) const fn no_random_bytes() -> Self {
        Self("the system returned no random bytes")
    }

    const fn pool_closed() -> Self {
        Self("the argon2 pool is closed")
    }

    const fn ended_early() -> Self {
        Self("the argon2 task ended early")
    }
}

/// Key of the HMAC over API keys. Stored with the master keys, never in the database.
#[derive(Clone)]
pub struct Pepper(hmac::Key);

impl std::fmt::Debug for Pepper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pepper([REDACTED])")
    }
}

impl Pepper {
    /// Parses the pepper: base64 of 32 bytes or more.
    ///
    /// # Errors
    ///
    /// [`Invalid`] describes the problem without the value.
    pub fn parse(pepper: &SecretString) -> Result<Self, Invalid> {
        let bytes = Zeroizing::new(
            BASE64_STANDARD
                .decode(pepper.expose_secret().trim())
                .map_err(|_| Invalid::new("must be base64: generate it with `openssl rand -base64 32`"))?,
        );
        if bytes.len() < 32 {
            return Err(Invalid::new("must be 32 bytes or more: generate it with `openssl rand -base64 32`"));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// Derives the key for hashes of the content of Secrets. It does not reveal the pepper.
    #[must_use]
    pub fn content_key(&self) -> ContentKey {
        ContentKey(hmac::Key::new(hmac::HMAC_SHA256, self.mac("regcred content key").as_ref()))
    }

    fn mac(&self, key: &str) -> hmac::Tag {
        hmac::sign(&self.0, key.as_bytes())
    }

    /// Derives a key for another purpose. It does not reveal the pepper, and no API key starts like
    /// a purpose.
    pub(super) fn subkey(&self, purpose: &str) -> hmac::Tag {
        hmac::sign(&self.0, purpose.as_bytes())
    }
}

/// Key of the hashes of Secret contents. Without it a stored hash reveals nothing.
#[derive(Clone)]
pub struct ContentKey(hmac::Key);

impl std::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ContentKey([REDACTED])")
    }
}

impl ContentKey {
    /// Hashes parts, each prefixed with its length.
    #[must_use]
    pub fn mac(&self, parts: &[&[u8]]) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.0);
        for part in parts {
            context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(part);
        }
        context.sign().as_ref().to_vec()
    }
}

/// Key from a request: well-formed with a correct checksum, but not verified.
#[derive(Clone, Copy)]
pub struct PresentedKey<'a> {
    /// Id of the key's row.
    pub id: Uuid,
    text: &'a str,
}

impl std::fmt::Debug for PresentedKey<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PresentedKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<'a> PresentedKey<'a> {
    /// Parses a key, without I/O or cryptography. Returns `None` for a wrong format or checksum.
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        if text.len() != KEY_CHARS || !text.is_ascii() {
            return None;
        }
        let (body, checksum) = text.split_at(KEY_CHARS - 8);
        let (id, secret) = body.strip_prefix(PREFIX)?.split_once('_')?;
        let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if id.len() != 32 || !digits(id) || !digits(secret) || !digits(checksum) {
            return None;
        }
        let is_intact = u32::from_str_radix(checksum, 16).is_ok_and(|checksum| checksum == checksum_of(body));
        is_intact.then_some(Self { id: Uuid::try_parse(id).ok()?, text })
    }
}

fn checksum_of(body: &str) -> u32 {
    crc32fast::hash(body.as_bytes())
}

/// New key. The text is returned once; only the verifier is stored.
#[derive(Debug)]
pub struct NewKey {
    /// Id of the key's row.
    pub id: Uuid,
    /// Text of the key.
    pub text: SecretString,
    /// Stored verifier.
    pub verifier: KeyVerifier,
}

/// Returns argon2id with 7 MiB, five passes and one lane: of the equivalent parameter sets that
/// OWASP recommends, the one with the least memory, which each permit holds. An existing key is
/// verified with the parameters in its hash.
/// See <https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html#argon2id>.
fn argon2id() -> Result<Argon2<'static>, CryptoError> {
    let params = Params::new(7 * 1024, 5, 1, None).map_err(|_| CryptoError("argon2 refused its parameters"))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// Generates a key. argon2 takes tens of milliseconds of CPU time.
///
/// # Errors
///
/// [`CryptoError`] if the system returns no random bytes.
pub fn generate(pepper: &Pepper) -> Result<NewKey, CryptoError> {
    let id = Uuid::now_v7();
    let mut secret = Zeroizing::new([0_u8; SECRET_BYTES]);
    rand::fill(secret.as_mut()).map_err(|_| CryptoError::no_random_bytes())?;
    let mut body = Zeroizing::new(String::with_capacity(KEY_CHARS));
    body.push_str(PREFIX);
    body.push_str(&id.simple().to_string());
    body.push('_');
    for byte in secret.iter() {
        for digit in [byte >> 4, byte & 15] {
            body.push(char::from_digit(u32::from(digit), 16).unwrap_or_default());
        }
    }
    let checksum = format!("{:08x}", checksum_of(&body));
    body.push_str(&checksum);
    let hash = argon2id()?.hash_password(body.as_bytes()).map_err(|_| CryptoError("argon2 failed"))?.to_string();
    let verifier = KeyVerifier { mac: pepper.mac(&body).as_ref().to_vec(), hash };
    Ok(NewKey { id, text: SecretString::from(body.as_str()), verifier })
}

type CheckResult = Result<bool, CryptoError>;

/// Verifies presented keys against their rows. The module documentation lists the steps.
#[derive(Debug)]
pub struct KeyChecker {
    pepper: Pepper,
    /// Shared with the runs, which outlive the requests that started them.
    runs: Arc<Runs>,
}

impl KeyChecker {
    /// Creates a checker with at most `permits` concurrent argon2 runs, of 7 MiB each.
    #[must_use]
    pub fn new(pepper: Pepper, permits: usize) -> Self {
        Self { pepper, runs: Arc::new(Runs::new(permits)) }
    }

    /// Returns the number of argon2 runs.
    #[must_use]
    pub fn argon2_runs(&self) -> u64 {
        self.runs.count.load(Ordering::Relaxed)
    }

    /// Generates a key. Takes a permit, because it costs as much as a verification.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system returns no random bytes or the task ends early.
    pub async fn generate(&self) -> Result<NewKey, CryptoError> {
        let permit = self.runs.permit().await?;
        let pepper = self.pepper.clone();
        let made = tokio::task::spawn_blocking(move || {
            let made = generate(&pepper);
            drop(permit);
            made
        });
        made.await.map_err(|_| CryptoError::ended_early())?
    }

    /// Checks the HMAC of a key, but not its argon2id hash. Takes the same time for an unknown key
    /// (`None`) as for a wrong secret.
    #[must_use]
    pub fn has_valid_mac(&self, key: PresentedKey<'_>, verifier: Option<&KeyVerifier>) -> bool {
        let dummy = [0_u8; 32];
        let mac = verifier.map_or(&dummy[..], |v| &v.mac);
        let is_valid = hmac::verify(&self.pepper.0, key.text.as_bytes(), mac).is_ok();
        is_valid && verifier.is_some()
    }

    /// Checks HMAC and argon2id hash of a key. Takes the same time for an unknown key (`None`) as
    /// for a wrong secret.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the stored hash is malformed or the task ends early.
    pub async fn check(&self, key: PresentedKey<'_>, verifier: Option<&KeyVerifier>) -> Result<bool, CryptoError> {
        let is_valid = self.has_valid_mac(key, verifier);
        let Some(verifier) = verifier.filter(|_| is_valid) else { return Ok(false) };
        if self.has_verified(verifier) {
            return Ok(true);
        }
        self.runs.verify_once(key.text, verifier).await
    }

    /// Whether argon2 has verified the key of this row recently. A key with a valid HMAC needs no
    /// further check then.
    #[must_use]
    pub fn has_verified(&self, verifier: &KeyVerifier) -> bool {
        self.runs.has_verified(verifier)
    }
}

/// argon2 runs and their results.
#[derive(Debug)]
struct Runs {
    /// Verified rows with the time of verification. A changed row is verified again.
    verified: Mutex<HashMap<KeyVerifier, Instant>>,
    /// Runs that have not finished, by row.
    in_flight: Mutex<HashMap<KeyVerifier, watch::Receiver<Option<CheckResult>>>>,
    /// Held by the thread that runs argon2, not by the requests that wait for it.
    permits: Arc<Semaphore>,
    /// Memory of finished runs, for reuse: at most one block list per permit. Allocating it on the
    /// blocking threads would leave a copy in the allocator arena of every thread.
    spare_blocks: Mutex<Vec<Vec<Block>>>,
    count: AtomicU64,
}

impl Runs {
    fn new(permits: usize) -> Self {
        Self {
            verified: Mutex::default(),
            in_flight: Mutex::default(),
            permits: Arc::new(Semaphore::new(permits.max(1))),
            spare_blocks: Mutex::default(),
            count: AtomicU64::new(0),
        }
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, CryptoError> {
        Arc::clone(&self.permits).acquire_owned().await.map_err(|_| CryptoError::pool_closed())
    }

    fn has_verified(&self, verifier: &KeyVerifier) -> bool {
        self.verified.lock().get(verifier).is_some_and(|at| at.elapsed() < CACHED_FOR)
    }

    fn cache(&self, verifier: &KeyVerifier) {
        let mut cached = self.verified.lock();
        if cached.len() >= CACHED_MAX {
            cached.retain(|_, at| at.elapsed() < CACHED_FOR);
        }
        if cached.len() >= CACHED_MAX
            && let Some(any) = cached.keys().next().cloned()
        {
            cached.remove(&any);
        }
        cached.insert(verifier.clone(), Instant::now());
    }

    /// Runs argon2 once for all concurrent requests with the same key.
    async fn verify_once(self: &Arc<Self>, text: &str, verifier: &KeyVerifier) -> CheckResult {
        let Some(mut result) = self.join_run(text, verifier) else { return Ok(true) };
        let result = result.wait_for(Option::is_some).await.map(|result| *result);
        result.ok().flatten().unwrap_or(Err(CryptoError::ended_early()))
    }

    /// Returns the channel of the run for this key, and starts one if necessary. Returns `None` if
    /// a run has verified the key meanwhile.
    fn join_run(self: &Arc<Self>, text: &str, verifier: &KeyVerifier) -> Option<watch::Receiver<Option<CheckResult>>> {
        let mut in_flight = self.in_flight();
        if let Some(result) = in_flight.get(verifier) {
            return Some(result.clone());
        }
        if self.has_verified(verifier) {
            return None;
        }
        let (sender, result) = watch::channel(None);
        in_flight.insert(verifier.clone(), result.clone());
        // A separate task, because the run must finish even if the request is cancelled.
        tokio::spawn(Arc::clone(self).run(Zeroizing::new(text.to_owned()), verifier.clone(), sender));
        Some(result)
    }

    async fn run(
        self: Arc<Self>,
        text: Zeroizing<String>,
        verifier: KeyVerifier,
        sender: watch::Sender<Option<CheckResult>>,
    ) {
        let result = Arc::clone(&self).verify(text, verifier.hash.clone()).await;
        if let Ok(true) = result {
            self.cache(&verifier);
        }
        // After the result was cached: a request always finds one or the other.
        self.in_flight().remove(&verifier);
        sender.send_replace(Some(result));
    }

    async fn verify(self: Arc<Self>, text: Zeroizing<String>, hash: String) -> CheckResult {
        let permit = self.permit().await?;
        self.count.fetch_add(1, Ordering::Relaxed);
        let run = tokio::task::spawn_blocking(move || {
            let mut blocks = self.spare_blocks().pop().unwrap_or_default();
            let result = is_key_of(text.as_bytes(), &hash, &mut blocks);
            self.spare_blocks().push(blocks);
            // Last: the next run must find the memory.
            drop(permit);
            result
        });
        run.await.map_err(|_| CryptoError::ended_early())?
    }

    fn in_flight(&self) -> MutexGuard<'_, HashMap<KeyVerifier, watch::Receiver<Option<CheckResult>>>> {
        self.in_flight.lock()
    }

    fn spare_blocks(&self) -> MutexGuard<'_, Vec<Vec<Block>>> {
        self.spare_blocks.lock()
    }
}

/// Whether the text has the stored argon2id hash.
fn is_key_of(text: &[u8], hash: &str, blocks: &mut Vec<Block>) -> Result<bool, CryptoError> {
    let unreadable = CryptoError("the stored hash of an API key is malformed");
    let Ok(stored) = PasswordHash::new(hash) else { return Err(unreadable) };
    let (Ok(params), Some(salt), Some(expected)) = (Params::try_from(&stored), &stored.salt, &stored.hash) else {
        return Err(unreadable);
    };
    blocks.resize(params.block_count(), Block::default());
    // Releases the memory of a run with larger parameters.
    blocks.shrink_to_fit();
    let mut output = [0; Output::MAX_LENGTH];
    let Some(output) = output.get_mut(..expected.len()) else { return Err(unreadable) };
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(text, salt, output, blocks.as_mut_slice())
        .map_err(|_| CryptoError("argon2 failed"))?;
    // `Output` compares in constant time.
    Ok(Output::new(output).is_ok_and(|output| output == *expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pepper(byte: u8) -> Pepper {
        Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap()
    }

    #[test]
    fn any_changed_character_is_rejected() {
        let key = generate(&pepper(1)).unwrap();
        let text = key.text.expose_secret();
        assert_eq!(PresentedKey::parse(text).unwrap().id, key.id);
        for at in 0..text.len() {
            let mut changed = text.to_owned().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(PresentedKey::parse(std::str::from_utf8(&changed).unwrap()).is_none(), "at {at}");
        }
        for bad in ["", "rgc_", "Bearer", &text[1..], &format!("{text}0"), &text.to_uppercase()] {
            assert!(PresentedKey::parse(bad).is_none(), "{bad}");
        }
    }

    #[tokio::test]
    async fn argon2_runs_once_for_a_valid_key_and_never_for_a_forged_one() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();

        assert!(!checker.check(presented, None).await.unwrap());
        assert!(!checker.check(presented, Some(&other.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 0);

        let checks = (0..32).map(|_| checker.check(presented, Some(&key.verifier)));
        for result in futures_util::future::join_all(checks).await {
            assert!(result.unwrap());
        }
        assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 1);
    }

    async fn until_idle(checker: &KeyChecker) {
        while !checker.runs.in_flight().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn cancelled_requests_start_one_run_per_key_and_its_result_is_cached() {
        let checker = KeyChecker::new(pepper(1), 2);
        let keys: Vec<NewKey> = (0..6).map(|_| generate(&pepper(1)).unwrap()).collect();
        for _ in 0..10 {
            for key in &keys {
                let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
                // Long enough to start, too short to finish.
                let check = checker.check(presented, Some(&key.verifier));
                let _ = tokio::time::timeout(Duration::from_millis(1), check).await;
            }
        }

        until_idle(&checker).await;

        assert_eq!(checker.argon2_runs(), keys.len() as u64);
        assert!(checker.runs.spare_blocks().len() <= 2);
        for key in &keys {
            assert!(checker.runs.has_verified(&key.verifier));
            let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
            assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());
        }
        assert_eq!(checker.argon2_runs(), keys.len() as u64);
    }

    #[tokio::test]
    async fn cancelled_generation_keeps_its_permit_until_it_finishes() {
        let checker = KeyChecker::new(pepper(1), 1);
        let key = generate(&pepper(1)).unwrap();
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(1), checker.generate()).await;
        if given_up.is_err() {
            assert_eq!(checker.runs.permits.available_permits(), 0, "the permit was released with the request");
        }
        assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());
    }

    #[tokio::test]
    async fn mac_check_does_not_run_argon2() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        assert!(checker.has_valid_mac(presented, Some(&key.verifier)));
        assert!(!checker.has_valid_mac(presented, Some(&other.verifier)));
        assert!(!checker.has_valid_mac(presented, None));
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn key_made_with_another_pepper_is_rejected() {
        let key = generate(&pepper(2)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        assert!(!checker.check(presented, Some(&key.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn key_is_verified_with_the_parameters_in_its_hash() {
        let checker = KeyChecker::new(pepper(1), 1);
        let mut keys = [(); 3].map(|()| generate(&pepper(1)).unwrap());
        for key in [0, 2] {
            // Parameters of earlier versions.
            let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::new(19 * 1024, 2, 1, None).unwrap());
            let hash = argon2.hash_password(keys[key].text.expose_secret().as_bytes()).unwrap();
            keys[key].verifier.hash = hash.to_string();
        }
        for (key, kibibytes) in keys.iter().zip([19 * 1024, 7 * 1024, 19 * 1024]) {
            let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
            assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());
            until_idle(&checker).await;
            assert_eq!(checker.runs.spare_blocks()[0].capacity(), kibibytes);
        }
    }

    #[tokio::test]
    async fn valid_mac_with_wrong_hash_is_rejected_by_argon2() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        let mixed = KeyVerifier { hash: other.verifier.hash, ..key.verifier };
        assert!(!checker.check(presented, Some(&mixed)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 1);
    }
}
