//! API keys: their format and their verification.
//!
//! A key is `rgc_<id>_<secret><checksum>`: the row's UUID, 256 random bits and the CRC-32 of the
//! preceding text, in hexadecimal digits. The row holds an HMAC under a pepper, which is not in the
//! database, with the pepper's id, and an argon2id hash. Verification has four steps, cheapest first:
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
    thread,
    time::{Duration, Instant},
};

use argon2::{
    Algorithm, Argon2, Block, Params, PasswordHasher, Version,
    password_hash::phc::{Output, PasswordHash},
};
use aws_lc_rs::rand;
use parking_lot::{Mutex, MutexGuard};
use secrecy::SecretString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    crypto::pepper::{Pepper, Peppers},
    domain::caller::KeyVerifier,
};

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

    pub(in crate::crypto) const fn cipher_failed() -> Self {
        Self("the cipher failed")
    }

    const fn pool_closed() -> Self {
        Self("the argon2 pool is closed")
    }

    const fn ended_early() -> Self {
        Self("the argon2 thread ended early")
    }

    const fn no_thread() -> Self {
        Self("the system started no thread for argon2")
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
    let verifier = KeyVerifier { mac: pepper.mac(&body), pepper_id: pepper.id().map(str::to_owned), hash };
    Ok(NewKey { id, text: SecretString::from(body.as_str()), verifier })
}

type CheckResult = Result<bool, CryptoError>;

/// Verifies presented keys against their rows. The module documentation lists the steps.
#[derive(Debug)]
pub struct KeyChecker {
    peppers: Arc<Peppers>,
    /// Shared with the runs, which outlive the requests that started them.
    runs: Arc<Runs>,
}

impl KeyChecker {
    /// Creates a checker with at most `permits` concurrent argon2 runs, of 7 MiB each.
    #[must_use]
    pub fn new(peppers: Arc<Peppers>, permits: usize) -> Self {
        Self { peppers, runs: Arc::new(Runs::new(permits)) }
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
    /// [`CryptoError`] if the system returns no random bytes or starts no thread.
    pub async fn generate(&self) -> Result<NewKey, CryptoError> {
        let permit = self.runs.permit().await?;
        let peppers = self.peppers.current();
        on_own_thread(move || {
            let made = generate(peppers.first());
            drop(permit);
            made
        })
        .await
    }

    /// Checks the HMAC of a key, but not its argon2id hash. Takes the same time for an unknown key
    /// (`None`) as for a wrong secret.
    #[must_use]
    pub fn has_valid_mac(&self, key: PresentedKey<'_>, verifier: Option<&KeyVerifier>) -> bool {
        let dummy = [0_u8; 32];
        let mac = verifier.map_or(&dummy[..], |v| &v.mac);
        let is_valid = self.peppers.current().verify(key.text, mac);
        is_valid && verifier.is_some()
    }

    /// Returns a verifier under the first pepper for a verified key, if the stored one is of
    /// another pepper.
    #[must_use]
    pub fn renew(&self, key: PresentedKey<'_>, verifier: &KeyVerifier) -> Option<KeyVerifier> {
        let peppers = self.peppers.current();
        let (first, pepper_id) = (peppers.first(), verifier.pepper_id.as_deref());
        (first.id() != pepper_id).then(|| KeyVerifier {
            mac: first.mac(key.text),
            pepper_id: first.id().map(str::to_owned),
            hash: verifier.hash.clone(),
        })
    }

    /// Notes that the key of a renewed verifier has been verified.
    pub fn note_renewed(&self, renewed: &KeyVerifier) {
        self.runs.cache(renewed);
    }

    /// Reloads the peppers if the verifier's one is unknown, because another replica may already
    /// use a newer ring.
    pub fn reload_for(&self, verifier: &KeyVerifier) {
        let id = verifier.pepper_id.as_deref();
        if id.is_none() || self.peppers.current().ids().any(|known| known == id) {
            return;
        }
        if let Err(error) = self.peppers.reload_on_demand() {
            tracing::error!(%error, "pepper ring not reloaded");
        }
    }

    /// Checks HMAC and argon2id hash of a key. Takes the same time for an unknown key (`None`) as
    /// for a wrong secret.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the stored hash is malformed or the system starts no thread.
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
    /// Memory of finished runs, for reuse: at most one block list per permit. Allocating it in each
    /// run would leave a copy in the allocator arena of every thread.
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
        on_own_thread(move || {
            let mut blocks = self.spare_blocks().pop().unwrap_or_default();
            let result = is_key_of(text.as_bytes(), &hash, &mut blocks);
            self.spare_blocks().push(blocks);
            // Last: the next run must find the memory.
            drop(permit);
            result
        })
        .await
    }

    fn in_flight(&self) -> MutexGuard<'_, HashMap<KeyVerifier, watch::Receiver<Option<CheckResult>>>> {
        self.in_flight.lock()
    }

    fn spare_blocks(&self) -> MutexGuard<'_, Vec<Vec<Block>>> {
        self.spare_blocks.lock()
    }
}

/// Runs argon2 on a thread of its own, of which there are as many as permits. tokio's blocking
/// threads are not used: other work could occupy all of them, and no key would be verified.
async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CryptoError> + Send + 'static,
) -> Result<T, CryptoError> {
    let (sender, result) = oneshot::channel();
    let thread = thread::Builder::new().name("argon2".to_owned()).spawn(move || drop(sender.send(work())));
    thread.map_err(|_| CryptoError::no_thread())?;
    result.await.map_err(|_| CryptoError::ended_early())?
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
    use base64::{Engine, prelude::BASE64_STANDARD};
    use secrecy::ExposeSecret;

    use super::*;
    use crate::crypto::{pepper::PepperRing, ring::Ring};

    fn pepper(byte: u8) -> Pepper {
        Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap()
    }

    fn checker_of(ring: PepperRing, permits: usize) -> KeyChecker {
        KeyChecker::new(Arc::new(Peppers::new(ring, None)), permits)
    }

    fn checker(permits: usize) -> KeyChecker {
        checker_of(pepper(1).into(), permits)
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
        let checker = checker(1);
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
        let checker = checker(2);
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
        let checker = checker(1);
        let key = generate(&pepper(1)).unwrap();
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(1), checker.generate()).await;
        if given_up.is_err() {
            assert_eq!(checker.runs.permits.available_permits(), 0, "the permit was released with the request");
        }
        assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());
    }

    #[test]
    fn occupied_blocking_threads_do_not_delay_argon2() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().max_blocking_threads(1).build().unwrap();
        let (release, wait) = std::sync::mpsc::channel::<()>();
        runtime.spawn_blocking(move || wait.recv());
        let check = async {
            let checker = checker(1);
            let key = checker.generate().await.unwrap();
            checker.check(PresentedKey::parse(key.text.expose_secret()).unwrap(), Some(&key.verifier)).await.unwrap()
        };
        let checked = runtime.block_on(async { tokio::time::timeout(Duration::from_mins(1), check).await });
        assert_eq!(checked, Ok(true));
        drop(release);
    }

    #[tokio::test]
    async fn mac_check_does_not_run_argon2() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = checker(1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        assert!(checker.has_valid_mac(presented, Some(&key.verifier)));
        assert!(!checker.has_valid_mac(presented, Some(&other.verifier)));
        assert!(!checker.has_valid_mac(presented, None));
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn key_made_with_another_pepper_is_rejected() {
        let key = generate(&pepper(2)).unwrap();
        let checker = checker(1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        assert!(!checker.check(presented, Some(&key.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn key_of_an_older_pepper_is_renewed_and_stays_verified() {
        let line = |byte| BASE64_STANDARD.encode([byte; 32]);
        let ring = |text: String| PepperRing::parse(&SecretString::from(text)).unwrap();
        let key = generate(&pepper(2)).unwrap();
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        let checker = checker_of(ring(format!("new:{}\n{}", line(1), line(2))), 1);
        assert!(checker.check(presented, Some(&key.verifier)).await.unwrap());

        let renewed = checker.renew(presented, &key.verifier).unwrap();
        checker.note_renewed(&renewed);

        assert_eq!((renewed.pepper_id.as_deref(), &renewed.hash), (Some("new"), &key.verifier.hash));
        assert!(checker.check(presented, Some(&renewed)).await.unwrap());
        assert_eq!((checker.argon2_runs(), checker.renew(presented, &renewed)), (1, None));
        // Without the old pepper.
        let new = checker_of(ring(format!("new:{}", line(1))), 1);
        assert!(!new.has_valid_mac(presented, Some(&key.verifier)));
        assert!(new.has_valid_mac(presented, Some(&renewed)));
    }

    #[tokio::test]
    async fn key_is_verified_with_the_parameters_in_its_hash() {
        let checker = checker(1);
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
        let checker = checker(1);
        let presented = PresentedKey::parse(key.text.expose_secret()).unwrap();
        let mixed = KeyVerifier { hash: other.verifier.hash, ..key.verifier };
        assert!(!checker.check(presented, Some(&mixed)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 1);
    }
}
