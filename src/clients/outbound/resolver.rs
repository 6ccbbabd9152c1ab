//! Look-ups of host names: bounded in number, shared and cached for seconds.
//!
//! `getaddrinfo` blocks its thread and cannot be cancelled. A name whose server does not answer
//! occupies a thread for half a minute, long after the caller has given up. So each look-up has a
//! thread of its own, which holds its permit until `getaddrinfo` returns. tokio's blocking threads
//! stay free for other work.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io,
    net::{IpAddr, ToSocketAddrs},
    pin::Pin,
    sync::Arc,
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::Instant,
};

/// Maximum number of concurrent look-ups of one resolver.
const LOOK_UPS_MAX: usize = 16;
/// Time for which addresses are cached.
const ADDRESSES_TTL: Duration = Duration::from_secs(10);
/// Time for which a failure is cached.
const FAILURE_TTL: Duration = Duration::from_secs(2);
/// Maximum number of cached names.
const CACHED_MAX: usize = 1_000;

/// Resolves host names.
pub trait Resolve: Send + Sync {
    /// Looks up the addresses of a name.
    fn resolve<'a>(&'a self, host: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;
}

/// Blocking look-up, such as `getaddrinfo`.
type LookUp = dyn Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync;

/// Addresses of a name, or the kind of failure.
type Answer = Result<Vec<IpAddr>, io::ErrorKind>;

/// The operating system's resolver.
///
/// Each has its own threads and cache. A guard creates one, so a flood of slow names for one
/// purpose, such as registries, does not delay the names of others.
pub struct SystemResolver(Arc<Shared>);

/// State that the threads share with the resolver. They outlive the callers.
struct Shared {
    look_up: Box<LookUp>,
    addresses_ttl: Duration,
    failure_ttl: Duration,
    permits: Arc<Semaphore>,
    names: Mutex<HashMap<String, Name>>,
}

/// State of a name.
enum Name {
    /// A thread looks the name up.
    Pending(watch::Receiver<Option<Answer>>),
    /// The answer is valid until this time.
    Known(Answer, Instant),
}

impl Default for SystemResolver {
    fn default() -> Self {
        Self::with_look_up(|host| Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect()))
    }
}

impl SystemResolver {
    /// Creates a resolver with another blocking look-up, so that tests can act as a slow name
    /// server.
    pub fn with_look_up(look_up: impl Fn(&str) -> io::Result<Vec<IpAddr>> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Shared {
            look_up: Box::new(look_up),
            addresses_ttl: ADDRESSES_TTL,
            failure_ttl: FAILURE_TTL,
            permits: Arc::new(Semaphore::new(LOOK_UPS_MAX)),
            names: Mutex::default(),
        }))
    }

    async fn addresses(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        let host = host.to_ascii_lowercase();
        let name = if let Some(name) = self.0.find(&host) {
            name
        } else {
            // A caller that gives up leaves the queue, so no look-up starts without a caller.
            let permit = Arc::clone(&self.0.permits).acquire_owned().await.map_err(io::Error::other)?;
            self.0.start(&host, permit)?
        };
        let answer = match name {
            Name::Known(answer, _) => answer,
            Name::Pending(mut answer) => {
                let answer = answer.wait_for(Option::is_some).await.map_err(io::Error::other)?;
                answer.clone().unwrap_or(Err(io::ErrorKind::Other))
            }
        };
        Ok(answer?)
    }
}

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>> {
        Box::pin(self.addresses(host))
    }
}

impl fmt::Debug for SystemResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SystemResolver").field("names", &self.0.names.lock().len()).finish_non_exhaustive()
    }
}

impl Shared {
    /// Returns the state of a name, or none if it needs to be looked up.
    fn find(&self, host: &str) -> Option<Name> {
        find(&self.names.lock(), host)
    }

    /// Starts the look-up of a name, unless another caller has started or finished one meanwhile.
    /// The permit is released when the thread ends.
    fn start(self: &Arc<Self>, host: &str, permit: OwnedSemaphorePermit) -> io::Result<Name> {
        let mut names = self.names.lock();
        if let Some(name) = find(&names, host) {
            return Ok(name);
        }
        let (sender, answer) = watch::channel(None);
        let (shared, looked_up) = (Arc::clone(self), host.to_owned());
        thread::Builder::new().name("resolver".to_owned()).spawn(move || {
            let answer = (shared.look_up)(&looked_up).map_err(|error| error.kind());
            shared.insert(looked_up, answer.clone());
            sender.send_replace(Some(answer));
            drop(permit);
        })?;
        names.insert(host.to_owned(), Name::Pending(answer.clone()));
        Ok(Name::Pending(answer))
    }

    fn insert(&self, host: String, answer: Answer) {
        let now = Instant::now();
        let mut names = self.names.lock();
        // The map contains this name as pending.
        if names.len() > CACHED_MAX {
            names.retain(|_, name| match name {
                Name::Pending(_) => true,
                Name::Known(_, until) => now < *until,
            });
        }
        if names.len() > CACHED_MAX
            && let Some(any) =
                names.iter().find(|(_, name)| matches!(name, Name::Known(..))).map(|(host, _)| host.clone())
        {
            names.remove(&any);
        }
        let ttl = if answer.is_ok() { self.addresses_ttl } else { self.failure_ttl };
        names.insert(host, Name::Known(answer, now + ttl));
    }
}

fn find(names: &HashMap<String, Name>, host: &str) -> Option<Name> {
    match names.get(host)? {
        Name::Known(answer, until) if Instant::now() < *until => Some(Name::Known(answer.clone(), *until)),
        // The sender is gone without an answer if the thread panicked.
        Name::Pending(answer) if answer.borrow().is_some() || answer.has_changed().is_ok() => {
            Some(Name::Pending(answer.clone()))
        }
        Name::Known(..) | Name::Pending(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    use futures_util::future::join_all;
    use tokio::time::timeout;

    use super::*;

    /// Resolver whose look-ups of `slow…` return when a permission is sent, and its counters.
    struct Slow {
        resolver: SystemResolver,
        running: Arc<AtomicUsize>,
        started: Arc<AtomicUsize>,
        permissions: mpsc::Sender<()>,
    }

    impl Slow {
        fn new() -> Self {
            let (running, started) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let (permissions, wait) = mpsc::channel();
            let (counted, wait) = ((Arc::clone(&running), Arc::clone(&started)), Mutex::new(wait));
            let resolver = SystemResolver::with_look_up(move |host| {
                counted.1.fetch_add(1, Ordering::SeqCst);
                counted.0.fetch_add(1, Ordering::SeqCst);
                if host.starts_with("slow") {
                    let _ = wait.lock().recv();
                }
                counted.0.fetch_sub(1, Ordering::SeqCst);
                if host.starts_with("none") {
                    Err(io::ErrorKind::NotFound.into())
                } else {
                    Ok(vec![IpAddr::from([8, 8, 8, 8])])
                }
            });
            Self { resolver, running, started, permissions }
        }

        fn running(&self) -> usize {
            self.running.load(Ordering::SeqCst)
        }

        fn started(&self) -> usize {
            self.started.load(Ordering::SeqCst)
        }

        async fn until_running(&self, count: usize) {
            while self.running() != count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    }

    #[tokio::test]
    async fn callers_that_give_up_free_no_thread_and_start_none() {
        let slow = Slow::new();
        let names: Vec<String> = (0..100).map(|number| format!("slow-{number}")).collect();

        let given_up =
            join_all(names.iter().map(|name| timeout(Duration::from_millis(50), slow.resolver.resolve(name))));
        assert!(given_up.await.iter().all(Result::is_err));

        slow.until_running(LOOK_UPS_MAX).await;
        assert!(timeout(Duration::from_millis(50), slow.resolver.resolve("name.example")).await.is_err());
        assert_eq!((slow.running(), slow.started()), (LOOK_UPS_MAX, LOOK_UPS_MAX));

        // One slow look-up returns: its thread serves the name that waits.
        slow.permissions.send(()).unwrap();
        assert_eq!(slow.resolver.resolve("name.example").await.unwrap(), [IpAddr::from([8, 8, 8, 8])]);
        assert_eq!(slow.started(), LOOK_UPS_MAX + 1);
    }

    #[tokio::test]
    async fn callers_of_one_name_share_a_look_up_and_its_answer() {
        let slow = Slow::new();
        let callers = join_all((0..50).map(|_| slow.resolver.resolve("slow.example")));
        let answers = async {
            slow.until_running(1).await;
            slow.permissions.send(()).unwrap();
        };
        let (answers, ()) = tokio::join!(callers, answers);
        assert!(answers.iter().all(Result::is_ok));
        assert!(slow.resolver.resolve("SLOW.example").await.is_ok());
        assert_eq!(slow.started(), 1);
    }

    #[tokio::test]
    async fn answer_of_an_abandoned_look_up_is_cached() {
        let slow = Slow::new();
        assert!(timeout(Duration::from_millis(50), slow.resolver.resolve("slow.example")).await.is_err());
        slow.permissions.send(()).unwrap();
        assert!(slow.resolver.resolve("slow.example").await.is_ok());
        assert_eq!(slow.started(), 1);
    }

    #[tokio::test]
    async fn addresses_and_failures_expire() {
        for expires in ["name.example", "none.example"] {
            let mut slow = Slow::new();
            let shared = Arc::get_mut(&mut slow.resolver.0).unwrap();
            let ttl = if expires == "name.example" { &mut shared.addresses_ttl } else { &mut shared.failure_ttl };
            *ttl = Duration::ZERO;
            for name in ["name.example", "none.example"] {
                let before = slow.started();
                for _ in 0..3 {
                    assert_eq!(slow.resolver.resolve(name).await.is_ok(), name == "name.example");
                }
                assert_eq!(slow.started() - before, if name == expires { 3 } else { 1 }, "{name}");
            }
        }
    }

    #[tokio::test]
    async fn cache_is_bounded() {
        let slow = Slow::new();
        for number in 0..=CACHED_MAX {
            slow.resolver.resolve(&format!("name-{number}")).await.unwrap();
        }
        assert_eq!(slow.resolver.0.names.lock().len(), CACHED_MAX);
    }

    #[tokio::test]
    async fn panicked_look_up_is_started_again() {
        let calls = AtomicUsize::new(0);
        let resolver = SystemResolver::with_look_up(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 => panic!("a defect"),
            _ => Ok(Vec::new()),
        });
        assert!(resolver.resolve("name.example").await.is_err());
        assert!(resolver.resolve("name.example").await.is_ok());
    }
}
