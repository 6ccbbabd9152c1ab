//! API keys: their form, and the road by which a shown key is checked.
//!
//! A key is `rgc_<id>_<secret><checksum>`: the row's UUID, 256 random bits and the CRC-32 of all that stands
//! before it, in hexadecimal digits. The row holds an HMAC under a pepper that is not in the database, and an
//! argon2id hash. A shown key passes, from cheap to dear:
//!
//! 1. the checksum, without any I/O: a mistyped or cut key, and most scanners, end here;
//! 2. the HMAC, compared in constant time, against a dummy where the id is unknown: a forged key ends here and
//!    never reaches argon2, so argon2 is no lever for a denial of service;
//! 3. the memory of rows whose key argon2 has verified: it holds the HMAC and the hash of the row, and no other text than the
//!    one that was verified has this HMAC;
//! 4. argon2id, once for each key however many requests wait for it, on few permits. A run that has begun goes on though nobody
//!    waits for it any more, keeps its permit until it is over, and its verdict is remembered.
//!
//! Whether the key is revoked or expired is the caller's question, at every request.

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
/// How long argon2's verdict is remembered.
const REMEMBERED_FOR: Duration = Duration::from_mins(10);
/// How many verdicts are remembered: 250 bytes each.
const REMEMBERED_MAX: usize = 10_000;

/// The system failed at a cryptographic step that needs no secret to explain.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{0}")]
pub struct CryptoError(&'static str);

impl CryptoError {
    /// The system's generator failed.
    pub(in crate::crypto) const fn no_random_bytes() -> Self {
        Self("the system gave no random bytes")
    }

    const fn pool_closed() -> Self {
        Self("the argon2 pool is closed")
    }

    const fn ended_early() -> Self {
        Self("the argon2 task ended early")
    }
}

/// The secret of the HMAC over API keys; it lives beside the master keys, never in the database.
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
    /// [`Invalid`] says what is wrong, never the value.
    pub fn parse(pepper: &SecretString) -> Result<Self, Invalid> {
        let bytes = Zeroizing::new(
            BASE64_STANDARD
                .decode(pepper.expose_secret().trim())
                .map_err(|_| Invalid::new("must be base64, as `openssl rand -base64 32` prints it"))?,
        );
        if bytes.len() < 32 {
            return Err(Invalid::new("must be 32 bytes or more, as `openssl rand -base64 32` prints"));
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }

    /// A key of its own for hashes of what is written into clusters. Only the pepper gives it, and it does not give the
    /// pepper.
    #[must_use]
    pub fn content_key(&self) -> ContentKey {
        ContentKey(hmac::Key::new(hmac::HMAC_SHA256, self.mac("regcred content key").as_ref()))
    }

    fn mac(&self, key: &str) -> hmac::Tag {
        hmac::sign(&self.0, key.as_bytes())
    }

    /// A secret for another purpose, of which nothing of this one follows. No API key begins as a purpose does.
    pub(super) fn subkey(&self, purpose: &str) -> hmac::Tag {
        hmac::sign(&self.0, purpose.as_bytes())
    }
}

/// The secret of the hashes of what is written into clusters: a hash in the database tells nothing without it.
#[derive(Clone)]
pub struct ContentKey(hmac::Key);

impl std::fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ContentKey([REDACTED])")
    }
}

impl ContentKey {
    /// The keyed hash of some parts, each with its place.
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

/// A key as a caller shows it: well-formed, its checksum right, not yet verified. It is nowhere but in the request.
#[derive(Clone, Copy)]
pub struct ShownKey<'a> {
    /// Id of the key's row.
    pub id: Uuid,
    text: &'a str,
}

impl std::fmt::Debug for ShownKey<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShownKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl<'a> ShownKey<'a> {
    /// Parses a shown key; no I/O, no cryptography.
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
        let is_whole = u32::from_str_radix(checksum, 16).is_ok_and(|checksum| checksum == checksum_of(body));
        is_whole.then_some(Self { id: Uuid::try_parse(id).ok()?, text })
    }
}

fn checksum_of(body: &str) -> u32 {
    crc32fast::hash(body.as_bytes())
}

/// A new key: shown once, its verifier stored.
#[derive(Debug)]
pub struct NewKey {
    /// Id of the key's row.
    pub id: Uuid,
    /// The key itself.
    pub text: SecretString,
    /// What is stored.
    pub verifier: KeyVerifier,
}

/// argon2id with the one of OWASP's sets of parameters that needs the least memory: 7 MiB, five passes, one lane. They defend
/// equally well and take about as long; but this memory is held by each permit of a service that needs hardly any beside it.
/// A key that was made with others is checked with those, which its hash states.
/// See <https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html#argon2id>.
fn argon2id() -> Result<Argon2<'static>, CryptoError> {
    let params = Params::new(7 * 1024, 5, 1, None).map_err(|_| CryptoError("argon2 refused its parameters"))?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// Makes a key. Takes tens of milliseconds of CPU for argon2.
///
/// # Errors
///
/// [`CryptoError`] if the system gives no random bytes.
pub fn generate(pepper: &Pepper) -> Result<NewKey, CryptoError> {
    let id = Uuid::now_v7();
    let mut secret = Zeroizing::new([0_u8; SECRET_BYTES]);
    rand::fill(secret.as_mut()).map_err(|_| CryptoError("the system gave no random bytes"))?;
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

/// What argon2 says of a key.
type CheckResult = Result<bool, CryptoError>;

/// Checks shown keys against their rows; see the module's text for the road.
#[derive(Debug)]
pub struct KeyChecker {
    pepper: Pepper,
    /// Shared with the runs, which outlive whoever began them.
    runs: Arc<Runs>,
}

impl KeyChecker {
    /// Makes a checker with `permits` argon2 runs at a time, each with the memory that its key asks for: 7 MiB.
    #[must_use]
    pub fn new(pepper: Pepper, permits: usize) -> Self {
        Self { pepper, runs: Arc::new(Runs::new(permits)) }
    }

    /// How often argon2 has run.
    #[must_use]
    pub fn argon2_runs(&self) -> u64 {
        self.runs.count.load(Ordering::Relaxed)
    }

    /// Makes a key, on one of the permits: it costs as much as a verification.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the system gives no random bytes or the task could not be run.
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

    /// Whether `shown` has the HMAC of the row that `verifier` was read from; `None` stands for no such row, and takes as long
    /// as a wrong secret. Only who has the key can show what has it, but the row's hash was not looked at.
    #[must_use]
    pub fn has_right_mac(&self, shown: ShownKey<'_>, verifier: Option<&KeyVerifier>) -> bool {
        let dummy = [0_u8; 32];
        let mac = verifier.map_or(&dummy[..], |v| &v.mac);
        let is_right = hmac::verify(&self.pepper.0, shown.text.as_bytes(), mac).is_ok();
        is_right && verifier.is_some()
    }

    /// Whether `shown` is the key of the row that `verifier` was read from; `None` stands for no such row, and
    /// takes as long as a wrong secret.
    ///
    /// # Errors
    ///
    /// [`CryptoError`] if the stored hash cannot be read or the check could not be run.
    pub async fn check(&self, shown: ShownKey<'_>, verifier: Option<&KeyVerifier>) -> Result<bool, CryptoError> {
        let is_right = self.has_right_mac(shown, verifier);
        let Some(verifier) = verifier.filter(|_| is_right) else { return Ok(false) };
        if self.remembers(verifier) {
            return Ok(true);
        }
        self.runs.verify_once(shown.text, verifier).await
    }

    /// Whether argon2 has verified the key of this row, not long ago: no other text has its HMAC.
    #[must_use]
    pub fn remembers(&self, verifier: &KeyVerifier) -> bool {
        self.runs.remembers(verifier)
    }
}

/// The runs of argon2, and what came of them.
#[derive(Debug)]
struct Runs {
    /// Bound to the whole row's part, so that a changed row is verified anew.
    remembered: Mutex<HashMap<KeyVerifier, Instant>>,
    /// Where the verdicts of runs will be that are not over.
    in_flight: Mutex<HashMap<KeyVerifier, watch::Receiver<Option<CheckResult>>>>,
    /// Each is kept by the thread that runs argon2, not by whoever waits for it.
    permits: Arc<Semaphore>,
    /// The memory of runs that are over, for the next ones: no more pieces than permits. Allocated anew in each run, on
    /// whichever thread that is, it would stay with the allocator once for each of these threads.
    spare_blocks: Mutex<Vec<Vec<Block>>>,
    count: AtomicU64,
}

impl Runs {
    fn new(permits: usize) -> Self {
        Self {
            remembered: Mutex::default(),
            in_flight: Mutex::default(),
            permits: Arc::new(Semaphore::new(permits.max(1))),
            spare_blocks: Mutex::default(),
            count: AtomicU64::new(0),
        }
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, CryptoError> {
        Arc::clone(&self.permits).acquire_owned().await.map_err(|_| CryptoError::pool_closed())
    }

    fn remembers(&self, verifier: &KeyVerifier) -> bool {
        let remembered = self.remembered.lock();
        remembered.get(verifier).is_some_and(|at| at.elapsed() < REMEMBERED_FOR)
    }

    fn remember(&self, verifier: &KeyVerifier) {
        let mut remembered = self.remembered.lock();
        if remembered.len() >= REMEMBERED_MAX {
            remembered.retain(|_, at| at.elapsed() < REMEMBERED_FOR);
        }
        if remembered.len() >= REMEMBERED_MAX
            && let Some(any) = remembered.keys().next().cloned()
        {
            remembered.remove(&any);
        }
        remembered.insert(verifier.clone(), Instant::now());
    }

    /// Runs argon2 once for all requests that show the same key at the same time.
    async fn verify_once(self: &Arc<Self>, text: &str, verifier: &KeyVerifier) -> CheckResult {
        let Some(mut verdict) = self.run_of(text, verifier) else { return Ok(true) };
        let found = verdict.wait_for(Option::is_some).await.map(|found| *found);
        found.ok().flatten().unwrap_or(Err(CryptoError::ended_early()))
    }

    /// Where the verdict of the run for this key will be, which is begun if there is none; nothing if it has become known to
    /// be right meanwhile.
    fn run_of(self: &Arc<Self>, text: &str, verifier: &KeyVerifier) -> Option<watch::Receiver<Option<CheckResult>>> {
        let mut in_flight = self.in_flight();
        if let Some(verdict) = in_flight.get(verifier) {
            return Some(verdict.clone());
        }
        if self.remembers(verifier) {
            return None;
        }
        let (tell, verdict) = watch::channel(None);
        in_flight.insert(verifier.clone(), verdict.clone());
        // In a task of its own: whoever waits may go away, and the next one who shows the key must find what came of it.
        tokio::spawn(Arc::clone(self).run(Zeroizing::new(text.to_owned()), verifier.clone(), tell));
        Some(verdict)
    }

    async fn run(
        self: Arc<Self>,
        text: Zeroizing<String>,
        verifier: KeyVerifier,
        tell: watch::Sender<Option<CheckResult>>,
    ) {
        let verdict = Arc::clone(&self).verify(text, verifier.hash.clone()).await;
        if let Ok(true) = verdict {
            self.remember(&verifier);
        }
        // After it is remembered, so that nobody finds neither.
        self.in_flight().remove(&verifier);
        tell.send_replace(Some(verdict));
    }

    async fn verify(self: Arc<Self>, text: Zeroizing<String>, hash: String) -> CheckResult {
        let permit = self.permit().await?;
        self.count.fetch_add(1, Ordering::Relaxed);
        let run = tokio::task::spawn_blocking(move || {
            let mut blocks = self.spare_blocks().pop().unwrap_or_default();
            let verdict = is_key_of(text.as_bytes(), &hash, &mut blocks);
            self.spare_blocks().push(blocks);
            // Not before: who has the permit next finds the memory.
            drop(permit);
            verdict
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

/// Whether argon2 makes the stored hash of this text.
fn is_key_of(text: &[u8], hash: &str, blocks: &mut Vec<Block>) -> Result<bool, CryptoError> {
    let unreadable = CryptoError("a stored hash of an API key cannot be read");
    let Ok(stored) = PasswordHash::new(hash) else { return Err(unreadable) };
    let (Ok(params), Some(salt), Some(expected)) = (Params::try_from(&stored), &stored.salt, &stored.hash) else {
        return Err(unreadable);
    };
    blocks.resize(params.block_count(), Block::default());
    // A key that was made with parameters that take more leaves nothing behind.
    blocks.shrink_to_fit();
    let mut output = [0; Output::MAX_LENGTH];
    let Some(output) = output.get_mut(..expected.len()) else { return Err(unreadable) };
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(text, salt, output, blocks.as_mut_slice())
        .map_err(|_| CryptoError("argon2 failed"))?;
    // In constant time: that is how two outputs are compared.
    Ok(Output::new(output).is_ok_and(|output| output == *expected))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pepper(byte: u8) -> Pepper {
        Pepper::parse(&SecretString::from(BASE64_STANDARD.encode([byte; 32]))).unwrap()
    }

    #[test]
    fn a_key_parses_and_any_changed_character_does_not() {
        let key = generate(&pepper(1)).unwrap();
        let text = key.text.expose_secret();
        assert_eq!(ShownKey::parse(text).unwrap().id, key.id);
        for at in 0..text.len() {
            let mut changed = text.to_owned().into_bytes();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            assert!(ShownKey::parse(std::str::from_utf8(&changed).unwrap()).is_none(), "at {at}");
        }
        for bad in ["", "rgc_", "Bearer", &text[1..], &format!("{text}0"), &text.to_uppercase()] {
            assert!(ShownKey::parse(bad).is_none(), "{bad}");
        }
    }

    #[tokio::test]
    async fn argon2_runs_once_for_a_good_key_and_never_for_a_forged_one() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let shown = ShownKey::parse(key.text.expose_secret()).unwrap();

        assert!(!checker.check(shown, None).await.unwrap());
        assert!(!checker.check(shown, Some(&other.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 0);

        let checks = (0..32).map(|_| checker.check(shown, Some(&key.verifier)));
        for verdict in futures_util::future::join_all(checks).await {
            assert!(verdict.unwrap());
        }
        assert!(checker.check(shown, Some(&key.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 1);
    }

    /// Waits until no run is under way or waits for a permit.
    async fn until_quiet(checker: &KeyChecker) {
        while !checker.runs.in_flight().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn who_hangs_up_makes_no_more_runs_than_there_are_permits_and_the_verdict_is_kept() {
        let checker = KeyChecker::new(pepper(1), 2);
        let keys: Vec<NewKey> = (0..6).map(|_| generate(&pepper(1)).unwrap()).collect();
        for _ in 0..10 {
            for key in &keys {
                let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
                // Long enough to begin, and too short to end.
                let check = checker.check(shown, Some(&key.verifier));
                let _ = tokio::time::timeout(Duration::from_millis(1), check).await;
            }
        }

        until_quiet(&checker).await;

        assert_eq!(checker.argon2_runs(), keys.len() as u64);
        // Each run takes a piece of memory, and a new one only where all others are in use.
        assert!(checker.runs.spare_blocks().len() <= 2);
        for key in &keys {
            assert!(checker.runs.remembers(&key.verifier));
            let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
            assert!(checker.check(shown, Some(&key.verifier)).await.unwrap());
        }
        assert_eq!(checker.argon2_runs(), keys.len() as u64);
    }

    #[tokio::test]
    async fn a_key_that_nobody_waits_for_any_more_is_made_on_its_permit() {
        let checker = KeyChecker::new(pepper(1), 1);
        let key = generate(&pepper(1)).unwrap();
        let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
        let given_up = tokio::time::timeout(Duration::from_millis(1), checker.generate()).await;
        if given_up.is_err() {
            assert_eq!(checker.runs.permits.available_permits(), 0, "the permit ended with whoever waited");
        }
        assert!(checker.check(shown, Some(&key.verifier)).await.unwrap());
    }

    #[tokio::test]
    async fn a_right_mac_is_told_without_argon2() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
        assert!(checker.has_right_mac(shown, Some(&key.verifier)));
        assert!(!checker.has_right_mac(shown, Some(&other.verifier)));
        assert!(!checker.has_right_mac(shown, None));
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn a_stolen_database_does_not_make_keys_without_the_pepper() {
        let key = generate(&pepper(2)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
        assert!(!checker.check(shown, Some(&key.verifier)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 0);
    }

    #[tokio::test]
    async fn a_key_is_checked_with_the_parameters_that_it_was_made_with() {
        let checker = KeyChecker::new(pepper(1), 1);
        let mut keys = [(); 3].map(|()| generate(&pepper(1)).unwrap());
        for key in [0, 2] {
            // As the first keys were made.
            let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::new(19 * 1024, 2, 1, None).unwrap());
            let hash = argon2.hash_password(keys[key].text.expose_secret().as_bytes()).unwrap();
            keys[key].verifier.hash = hash.to_string();
        }
        for (key, kibibytes) in keys.iter().zip([19 * 1024, 7 * 1024, 19 * 1024]) {
            let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
            assert!(checker.check(shown, Some(&key.verifier)).await.unwrap());
            until_quiet(&checker).await;
            assert_eq!(checker.runs.spare_blocks()[0].capacity(), kibibytes);
        }
    }

    #[tokio::test]
    async fn a_right_mac_with_a_wrong_hash_is_refused_by_argon2() {
        let key = generate(&pepper(1)).unwrap();
        let other = generate(&pepper(1)).unwrap();
        let checker = KeyChecker::new(pepper(1), 1);
        let shown = ShownKey::parse(key.text.expose_secret()).unwrap();
        let mixed = KeyVerifier { hash: other.verifier.hash, ..key.verifier };
        assert!(!checker.check(shown, Some(&mixed)).await.unwrap());
        assert_eq!(checker.argon2_runs(), 1);
    }
}
