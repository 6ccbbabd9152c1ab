//! Callers that rotate and read passwords without a pause, spread over replicas as a load balancer
//! does.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use futures_util::future::{join, try_join_all};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    load::{self, Connection, on_this_thread},
    process::Server,
};

/// Callers that rotate, each an account of its own.
pub const ROTATING: usize = 6;
/// Callers that read, each one of these accounts.
pub const READING: usize = 6;
/// Longest time for one request.
pub const REQUEST_MAX: Duration = Duration::from_mins(1);
/// Registry of the accounts.
const REGISTRY: &str = "registry.example.com:5000";

/// Replicas that get requests, in turn.
pub struct Balancer(Mutex<Vec<SocketAddr>>);

impl Balancer {
    /// Creates one with replicas.
    pub fn of(replicas: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self(Mutex::new(replicas.into_iter().collect()))
    }

    /// Adds a replica.
    pub fn add(&self, replica: SocketAddr) {
        self.0.lock().push(replica);
    }

    /// Removes a replica, which gets no new request from then on.
    pub fn remove(&self, replica: SocketAddr) {
        self.0.lock().retain(|other| *other != replica);
    }

    fn pick(&self, turn: usize) -> Option<SocketAddr> {
        let replicas = self.0.lock();
        replicas.get(turn.checked_rem(replicas.len())?).copied()
    }
}

/// Response to one request.
#[derive(Clone, Copy)]
pub struct Answer {
    /// When the request was sent.
    pub asked: Instant,
    /// When the response was complete.
    pub answered: Instant,
    /// Status. 0 is a connection that broke, or a response that did not come.
    pub status: u16,
    /// Password that was stored or read, if the request succeeded.
    password: Option<usize>,
}

/// Responses of one caller.
#[derive(Default)]
pub struct Caller {
    /// In their order.
    pub answers: Vec<Answer>,
    /// Last password that was sent.
    pub sent: usize,
    /// Last password that was acknowledged.
    pub acknowledged: usize,
    connections: HashMap<SocketAddr, Connection>,
}

impl Caller {
    /// Sends one request to the next replica. Notes the response, with the password that
    /// `password_of` finds in the body of a success.
    async fn ask(&mut self, balancer: &Balancer, request: &[u8], password_of: impl Fn(&[u8]) -> Option<usize>) -> u16 {
        let asked = Instant::now();
        let exchange = async {
            let replica = balancer.pick(self.answers.len()).ok_or_else(|| anyhow!("no replica"))?;
            let open = self.connections.remove(&replica);
            let mut open = match open {
                Some(open) => open,
                None => Connection::open(replica).await?,
            };
            let status = open.exchange(request).await?;
            let password = if status == 200 { password_of(open.body()) } else { None };
            // Responses with an error may close the connection.
            if status < 500 {
                self.connections.insert(replica, open);
            }
            anyhow::Ok((status, password))
        };
        let (status, password) = match tokio::time::timeout(REQUEST_MAX, exchange).await {
            Ok(Ok(answered)) => answered,
            Ok(Err(_)) | Err(_) => (0, None),
        };
        self.answers.push(Answer { asked, answered: Instant::now(), status, password });
        status
    }
}

/// Name of the account with this number.
pub fn name(number: usize) -> String {
    format!("rotating-{number}")
}

/// Registers the accounts.
pub fn register(server: &Server, key: &str) -> anyhow::Result<()> {
    for number in 0..ROTATING {
        let account =
            format!(r#"{{"name":"{}","registry":"{REGISTRY}","username":"martin","password":"0"}}"#, name(number));
        let request = load::request("POST", "/v1/registry-accounts", Some(key), &account);
        let (status, body) = load::once(server.address, &request)?;
        ensure!(status == 201, "the account was not registered: {status} {body}");
    }
    Ok(())
}

/// Request that reads the password of an account.
pub fn reading(number: usize, key: &str) -> Vec<u8> {
    load::request("POST", "/v1/docker-configs", Some(key), &format!(r#"{{"accounts":["{}"]}}"#, name(number)))
}

/// Password in the response to [`reading`].
pub fn password_in(body: &[u8]) -> Option<usize> {
    let document: Value = serde_json::from_slice(body).ok()?;
    document["config"]["auths"][REGISTRY]["password"].as_str()?.parse().ok()
}

/// Runs the load while `event` runs. Returns the callers, those that rotate first, and the result of
/// the event.
pub fn under_load<T>(
    balancer: &Balancer,
    key: &str,
    event: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<(Vec<Caller>, T)> {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            on_this_thread(async {
                let rotating = (0..ROTATING).map(|number| rotate(balancer, key, number, &is_over));
                let reading = (0..READING).map(|number| read(balancer, key, number % ROTATING, &is_over));
                let (rotating, reading) = join(try_join_all(rotating), try_join_all(reading)).await;
                Ok(rotating?.into_iter().chain(reading?).collect())
            })
        });
        let done = event();
        is_over.store(true, Ordering::Release);
        let callers = load.join().map_err(|_| anyhow!("a thread panicked"))??;
        Ok((callers, done?))
    })
}

async fn rotate(balancer: &Balancer, key: &str, number: usize, is_over: &AtomicBool) -> anyhow::Result<Caller> {
    let mut caller = Caller::default();
    let path = format!("/v1/registry-accounts/{}", name(number));
    while !is_over.load(Ordering::Acquire) {
        let password = caller.sent + 1;
        let request = load::request("PATCH", &path, Some(key), &format!(r#"{{"password":"{password}"}}"#));
        caller.sent = password;
        match caller.ask(balancer, &request, |_| Some(password)).await {
            200 => caller.acknowledged = password,
            _ => pause().await,
        }
    }
    Ok(caller)
}

async fn read(balancer: &Balancer, key: &str, number: usize, is_over: &AtomicBool) -> anyhow::Result<Caller> {
    let mut caller = Caller::default();
    let request = reading(number, key);
    while !is_over.load(Ordering::Acquire) {
        if caller.ask(balancer, &request, password_in).await != 200 {
            pause().await;
        }
    }
    Ok(caller)
}

/// Pause after an error, as a caller makes.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

/// Answers that a condition on their time selects.
pub fn answers(callers: &[Caller], is_meant: impl Fn(&Answer) -> bool) -> Vec<Answer> {
    callers.iter().flat_map(|caller| &caller.answers).copied().filter(|answer| is_meant(answer)).collect()
}

/// Number of answers without success.
pub fn failed(answers: &[Answer]) -> usize {
    answers.iter().filter(|answer| !(200..300).contains(&answer.status)).count()
}

/// Duration of the slowest request, in seconds.
pub fn slowest(answers: &[Answer]) -> f64 {
    answers.iter().map(|answer| (answer.answered - answer.asked).as_secs_f64()).fold(0.0, f64::max)
}

/// Counts of statuses.
pub fn statuses(answers: &[Answer]) -> BTreeMap<u16, usize> {
    let mut counts = BTreeMap::new();
    for answer in answers {
        *counts.entry(answer.status).or_default() += 1;
    }
    counts
}

/// Longest time after an acknowledged rotation at which a read was sent that returned an older
/// password, in seconds.
pub fn staleness(callers: &[Caller]) -> f64 {
    let (rotating, reading) = callers.split_at(ROTATING);
    let acknowledged = |caller: &Caller| -> BTreeMap<usize, Instant> {
        caller.answers.iter().filter_map(|answer| Some((answer.password?, answer.answered))).collect()
    };
    let acknowledged: Vec<BTreeMap<usize, Instant>> = rotating.iter().map(acknowledged).collect();
    let reads = reading.iter().enumerate().flat_map(|(number, caller)| {
        caller.answers.iter().filter_map(move |answer| Some((number % ROTATING, answer.asked, answer.password?)))
    });
    let stale = reads.filter_map(|(number, asked, password)| {
        let (_, newer) = acknowledged[number].range(password + 1..).next()?;
        Some(asked.checked_duration_since(*newer)?.as_secs_f64())
    });
    stale.fold(0.0, f64::max)
}
