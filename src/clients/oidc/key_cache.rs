//! Cached publication of one issuer: its keys, and where people sign in. Decides without I/O when to
//! fetch it.

use std::{sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, Shared};
use tokio::time::Instant;

use super::{IssuerError, Publication};

/// Fetch in progress, shared by its callers.
pub(super) type Fetch = Shared<BoxFuture<'static, ()>>;

/// Lifetimes of [`IssuerClientConfig`](super::IssuerClientConfig).
#[derive(Debug, Clone, Copy)]
pub(super) struct Lifetimes {
    pub(super) keys_lifetime: Duration,
    pub(super) refresh_interval: Duration,
    pub(super) stale_lifetime: Duration,
}

/// State of one issuer.
#[derive(Debug, Default)]
pub(super) struct KeyCache {
    /// Publication, and when it was fetched.
    found: Option<(Arc<Publication>, Instant)>,
    /// End of the last fetch, and its error.
    last: Option<(Instant, Option<IssuerError>)>,
    fetch: Option<Fetch>,
}

/// Result of [`KeyCache::look_up`].
#[derive(Debug)]
pub(super) enum Lookup {
    Found(Arc<Publication>),
    Failed(IssuerError),
    /// Wait for the fetch in progress.
    Wait(Fetch),
    /// Start a fetch.
    Fetch,
}

impl KeyCache {
    /// Looks up the keys for a caller that needs `key_id`.
    pub(super) fn look_up(&mut self, key_id: Option<&str>, now: Instant, lifetimes: &Lifetimes) -> Lookup {
        if let Some((found, fetched_at)) = &self.found
            && now.duration_since(*fetched_at) < lifetimes.keys_lifetime
            && found.keys.contains(key_id)
        {
            return Lookup::Found(Arc::clone(found));
        }
        // A fetch that completed without `finish_fetch` panicked.
        if let Some(fetch) = self.fetch.take_if(|fetch| fetch.peek().is_none()) {
            self.fetch = Some(fetch.clone());
            return Lookup::Wait(fetch);
        }
        self.fetch = None;
        let is_recent = |ended: &Instant| now.duration_since(*ended) < lifetimes.refresh_interval;
        if self.last.as_ref().is_some_and(|(ended, _)| is_recent(ended)) {
            return self.current(key_id, now, lifetimes).map_or_else(Lookup::Failed, Lookup::Found);
        }
        Lookup::Fetch
    }

    /// Records the start of a fetch.
    pub(super) fn start_fetch(&mut self, fetch: Fetch) {
        self.fetch = Some(fetch);
    }

    /// Records the result of a fetch.
    pub(super) fn finish_fetch(&mut self, fetched: Result<Publication, IssuerError>, now: Instant) {
        self.fetch = None;
        self.last = Some((now, fetched.as_ref().err().cloned()));
        if let Ok(found) = fetched {
            self.found = Some((Arc::new(found), now));
        }
    }

    /// Returns the publication without another fetch.
    ///
    /// After a successful fetch: its keys, with or without `key_id`. After a failed fetch: the
    /// previous keys, if they contain `key_id` and are not too old. An unknown `key_id` is then an
    /// error, since it could be a new key.
    pub(super) fn current(
        &mut self,
        key_id: Option<&str>,
        now: Instant,
        lifetimes: &Lifetimes,
    ) -> Result<Arc<Publication>, IssuerError> {
        let error = match &self.last {
            Some((_, error)) => error.clone(),
            None => Some(IssuerError::Unreachable("the fetch of the keys did not complete".to_owned())),
        };
        let lifetime = if error.is_none() { Duration::MAX } else { lifetimes.stale_lifetime };
        match (&self.found, error) {
            (Some((found, _)), None) => Ok(Arc::clone(found)),
            (Some((found, fetched_at)), Some(_))
                if now.duration_since(*fetched_at) < lifetime && found.keys.contains(key_id) =>
            {
                Ok(Arc::clone(found))
            }
            (_, Some(error)) => Err(error),
            (None, None) => Err(IssuerError::Unreachable("the issuer provided no keys".to_owned())),
        }
    }

    /// Time of the last successful fetch.
    pub(super) fn fetched_at(&self) -> Option<Instant> {
        self.found.as_ref().map(|(_, fetched_at)| *fetched_at)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::jwk::KeySet;

    const LIFETIMES: Lifetimes = Lifetimes {
        keys_lifetime: Duration::from_mins(10),
        refresh_interval: Duration::from_secs(10),
        stale_lifetime: Duration::from_hours(1),
    };

    fn keys(ids: &[&str]) -> Publication {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let keys: Vec<_> = ids.iter().map(|id| json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": x})).collect();
        let keys = KeySet::parse(json!({"keys": keys}).to_string().as_bytes()).unwrap();
        Publication { keys, login: None }
    }

    fn down() -> IssuerError {
        IssuerError::Unreachable("down".to_owned())
    }

    /// Cache with a clock that the test sets.
    struct Clock {
        cache: KeyCache,
        start: Instant,
    }

    impl Clock {
        fn new() -> Self {
            Self { cache: KeyCache::default(), start: Instant::now() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// Names the result of a lookup; `present` or `absent` for cached keys.
        fn look_up(&mut self, seconds: u64, id: &str) -> &'static str {
            match self.cache.look_up(Some(id), self.at(seconds), &LIFETIMES) {
                Lookup::Fetch => "fetch",
                Lookup::Failed(_) => "fail",
                Lookup::Wait(_) => "wait",
                Lookup::Found(found) if found.keys.contains(Some(id)) => "present",
                Lookup::Found(_) => "absent",
            }
        }

        fn finish(&mut self, seconds: u64, fetched: Result<Publication, IssuerError>) {
            self.cache.finish_fetch(fetched, self.at(seconds));
        }
    }

    #[test]
    fn keys_are_cached_for_their_lifetime() {
        let mut clock = Clock::new();
        assert_eq!(clock.look_up(0, "a"), "fetch");
        clock.finish(0, Ok(keys(&["a"])));
        assert_eq!(
            (clock.look_up(0, "a"), clock.look_up(599, "a"), clock.look_up(600, "a")),
            ("present", "present", "fetch")
        );
        clock.finish(600, Ok(keys(&["b"])));
        assert_eq!((clock.look_up(600, "a"), clock.look_up(600, "b")), ("absent", "present"));
    }

    #[test]
    fn unknown_key_is_fetched_at_most_once_per_interval() {
        let mut clock = Clock::new();
        clock.finish(0, Ok(keys(&["a"])));
        assert_eq!(
            (clock.look_up(1, "b"), clock.look_up(9, "c"), clock.look_up(10, "b")),
            ("absent", "absent", "fetch")
        );
        clock.finish(11, Ok(keys(&["a", "b"])));
        assert_eq!(
            (clock.look_up(11, "b"), clock.look_up(20, "c"), clock.look_up(21, "c")),
            ("present", "absent", "fetch")
        );
    }

    #[test]
    fn stale_keys_of_an_unavailable_issuer_are_used() {
        let mut clock = Clock::new();
        clock.finish(0, Ok(keys(&["a"])));
        assert_eq!(clock.look_up(600, "a"), "fetch");
        clock.finish(605, Err(down()));
        // An unknown key could be a new one.
        assert_eq!(
            (clock.look_up(606, "a"), clock.look_up(606, "b"), clock.look_up(615, "a")),
            ("present", "fail", "fetch")
        );
        clock.finish(3595, Err(down()));
        assert_eq!(
            (clock.look_up(3599, "a"), clock.look_up(3600, "a"), clock.look_up(3605, "a")),
            ("present", "fail", "fetch")
        );
        clock.finish(3606, Ok(keys(&["b"])));
        assert_eq!((clock.look_up(3607, "b"), clock.look_up(3607, "a")), ("present", "absent"));
    }

    #[test]
    fn failed_fetch_is_not_repeated_within_the_interval() {
        let mut clock = Clock::new();
        clock.finish(0, Err(down()));
        assert_eq!((clock.look_up(1, "a"), clock.look_up(9, "a"), clock.look_up(10, "a")), ("fail", "fail", "fetch"));
    }

    #[tokio::test]
    async fn caller_waits_for_the_fetch_in_progress_only_if_needed() {
        use futures_util::FutureExt;
        let mut clock = Clock::new();
        clock.finish(0, Ok(keys(&["a"])));
        clock.cache.start_fetch(futures_util::future::pending().boxed().shared());
        assert_eq!(
            (clock.look_up(20, "b"), clock.look_up(20, "a"), clock.look_up(700, "a")),
            ("wait", "present", "wait")
        );
        // A fetch that panicked blocks no caller.
        let crashed = async {}.boxed().shared();
        crashed.clone().await;
        clock.cache.start_fetch(crashed);
        assert_eq!(clock.look_up(20, "b"), "fetch");
    }
}
