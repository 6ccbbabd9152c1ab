//! The keys of one issuer, and when it is time to fetch them.

use std::{sync::Arc, time::Duration};

use futures_util::future::{BoxFuture, Shared};
use tokio::time::Instant;

use super::IssuerError;
use crate::domain::jwk::KeySet;

/// A fetch that is under way, for all who wait for it.
pub(super) type Flight = Shared<BoxFuture<'static, ()>>;

/// See [`IssuerClientConfig`](super::IssuerClientConfig).
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    pub(super) keys_lifetime: Duration,
    pub(super) refresh_interval: Duration,
    pub(super) stale_lifetime: Duration,
}

/// What is known of an issuer.
#[derive(Debug, Default)]
pub(super) struct Kept {
    keys: Option<(Arc<KeySet>, Instant)>,
    /// When the last fetch ended, and what went wrong.
    last: Option<(Instant, Option<IssuerError>)>,
    flight: Option<Flight>,
}

/// What is to be done for somebody who needs a key.
#[derive(Debug)]
pub(super) enum Step {
    Use(Arc<KeySet>),
    Fail(IssuerError),
    Wait(Flight),
    Fetch,
}

impl Kept {
    /// Decides what to do for somebody who needs the key of this id.
    pub(super) fn step(&mut self, key_id: Option<&str>, now: Instant, times: &Times) -> Step {
        if let Some((keys, fetched_at)) = &self.keys
            && now.duration_since(*fetched_at) < times.keys_lifetime
            && keys.knows(key_id)
        {
            return Step::Use(Arc::clone(keys));
        }
        // A fetch that came to its end without landing has crashed.
        if let Some(flight) = self.flight.take_if(|flight| flight.peek().is_none()) {
            self.flight = Some(flight.clone());
            return Step::Wait(flight);
        }
        self.flight = None;
        let rests = |ended: &Instant| now.duration_since(*ended) < times.refresh_interval;
        if self.last.as_ref().is_some_and(|(ended, _)| rests(ended)) {
            return self.settle(key_id, now, times).map_or_else(Step::Fail, Step::Use);
        }
        Step::Fetch
    }

    /// Remembers that a fetch is under way.
    pub(super) fn take_off(&mut self, flight: Flight) {
        self.flight = Some(flight);
    }

    /// Remembers what a fetch came to.
    pub(super) fn land(&mut self, fetched: Result<KeySet, IssuerError>, now: Instant) {
        self.flight = None;
        self.last = Some((now, fetched.as_ref().err().cloned()));
        if let Ok(keys) = fetched {
            self.keys = Some((Arc::new(keys), now));
        }
    }

    /// What there is without another fetch. After one that went well its keys, whether they have this one or not. After one
    /// that failed those from before, if this key is among them and they are not too old; then nobody can say that it is
    /// not the issuer's any more, nor that an unknown one is not.
    pub(super) fn settle(
        &mut self,
        key_id: Option<&str>,
        now: Instant,
        times: &Times,
    ) -> Result<Arc<KeySet>, IssuerError> {
        let error = match &self.last {
            Some((_, error)) => error.clone(),
            None => Some(IssuerError::Unreachable("the fetch of the keys did not come to its end".to_owned())),
        };
        let lifetime = if error.is_none() { Duration::MAX } else { times.stale_lifetime };
        match (&self.keys, error) {
            (Some((keys, _)), None) => Ok(Arc::clone(keys)),
            (Some((keys, fetched_at)), Some(_)) if now.duration_since(*fetched_at) < lifetime && keys.knows(key_id) => {
                Ok(Arc::clone(keys))
            }
            (_, Some(error)) => Err(error),
            (None, None) => Err(IssuerError::Unreachable("the issuer has no keys".to_owned())),
        }
    }

    /// When its keys were fetched, if ever.
    pub(super) fn fetched_at(&self) -> Option<Instant> {
        self.keys.as_ref().map(|(_, fetched_at)| *fetched_at)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TIMES: Times = Times {
        keys_lifetime: Duration::from_mins(10),
        refresh_interval: Duration::from_secs(10),
        stale_lifetime: Duration::from_hours(1),
    };

    fn keys(ids: &[&str]) -> KeySet {
        let x = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
        let keys: Vec<_> = ids.iter().map(|id| json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": x})).collect();
        KeySet::parse(json!({"keys": keys}).to_string().as_bytes()).unwrap()
    }

    fn down() -> IssuerError {
        IssuerError::Unreachable("down".to_owned())
    }

    /// An issuer whose clock a test sets.
    struct Clock {
        kept: Kept,
        start: Instant,
    }

    impl Clock {
        fn new() -> Self {
            Self { kept: Kept::default(), start: Instant::now() }
        }

        fn at(&self, seconds: u64) -> Instant {
            self.start + Duration::from_secs(seconds)
        }

        /// `fetch`, `fail`, or whether the key is there.
        fn ask(&mut self, seconds: u64, id: &str) -> &'static str {
            match self.kept.step(Some(id), self.at(seconds), &TIMES) {
                Step::Fetch => "fetch",
                Step::Fail(_) => "fail",
                Step::Wait(_) => "wait",
                Step::Use(keys) if keys.knows(Some(id)) => "there",
                Step::Use(_) => "unknown",
            }
        }

        fn land(&mut self, seconds: u64, fetched: Result<KeySet, IssuerError>) {
            self.kept.land(fetched, self.at(seconds));
        }
    }

    #[test]
    fn keys_are_kept_for_their_lifetime() {
        let mut clock = Clock::new();
        assert_eq!(clock.ask(0, "a"), "fetch");
        clock.land(0, Ok(keys(&["a"])));
        assert_eq!((clock.ask(0, "a"), clock.ask(599, "a"), clock.ask(600, "a")), ("there", "there", "fetch"));
        clock.land(600, Ok(keys(&["b"])));
        assert_eq!((clock.ask(600, "a"), clock.ask(600, "b")), ("unknown", "there"));
    }

    #[test]
    fn an_unknown_key_leads_to_a_fetch_at_intervals() {
        let mut clock = Clock::new();
        clock.land(0, Ok(keys(&["a"])));
        assert_eq!((clock.ask(1, "b"), clock.ask(9, "c"), clock.ask(10, "b")), ("unknown", "unknown", "fetch"));
        clock.land(11, Ok(keys(&["a", "b"])));
        assert_eq!((clock.ask(11, "b"), clock.ask(20, "c"), clock.ask(21, "c")), ("there", "unknown", "fetch"));
    }

    #[test]
    fn keys_of_an_issuer_that_is_down_are_used_for_a_while() {
        let mut clock = Clock::new();
        clock.land(0, Ok(keys(&["a"])));
        assert_eq!(clock.ask(600, "a"), "fetch");
        clock.land(605, Err(down()));
        // Nobody can say whether a key that is not among the old ones is a new one.
        assert_eq!((clock.ask(606, "a"), clock.ask(606, "b"), clock.ask(615, "a")), ("there", "fail", "fetch"));
        clock.land(3595, Err(down()));
        assert_eq!((clock.ask(3599, "a"), clock.ask(3600, "a"), clock.ask(3605, "a")), ("there", "fail", "fetch"));
        clock.land(3606, Ok(keys(&["b"])));
        assert_eq!((clock.ask(3607, "b"), clock.ask(3607, "a")), ("there", "unknown"));
    }

    #[test]
    fn an_issuer_that_never_answered_is_left_alone_for_a_while() {
        let mut clock = Clock::new();
        clock.land(0, Err(down()));
        assert_eq!((clock.ask(1, "a"), clock.ask(9, "a"), clock.ask(10, "a")), ("fail", "fail", "fetch"));
    }

    #[tokio::test]
    async fn whoever_comes_while_a_fetch_is_under_way_waits_for_it_unless_he_needs_it_not() {
        use futures_util::FutureExt;
        let mut clock = Clock::new();
        clock.land(0, Ok(keys(&["a"])));
        clock.kept.take_off(futures_util::future::pending().boxed().shared());
        assert_eq!((clock.ask(20, "b"), clock.ask(20, "a"), clock.ask(700, "a")), ("wait", "there", "wait"));
        // One that crashed holds up nobody.
        let crashed = async {}.boxed().shared();
        crashed.clone().await;
        clock.kept.take_off(crashed);
        assert_eq!(clock.ask(20, "b"), "fetch");
    }
}
