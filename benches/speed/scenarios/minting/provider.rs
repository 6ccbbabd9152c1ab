//! A provider of logins: an OAuth 2.0 token service, and an API like ECR's that checks the time of
//! each request.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use parking_lot::Mutex;
use serde_json::{Value, json};

/// Difference of clocks that the API accepts, as AWS does.
const SKEW_MAX: TimeDelta = TimeDelta::minutes(5);
/// Longest wait for the rest of a request.
const READ_MAX: Duration = Duration::from_secs(10);

/// A login that was issued.
#[derive(Clone)]
pub struct Issued {
    /// Client or access key that it was issued to: the account.
    pub client: String,
    /// The login's password: the account, and how many it had before.
    pub password: String,
    /// Arrival of the request.
    pub requested: Instant,
    /// End of the login.
    pub expires_at: DateTime<Utc>,
}

#[derive(Default)]
struct State {
    is_down: bool,
    latency: Duration,
    lifetime: TimeDelta,
    /// Arrivals of all requests.
    requests: Vec<Instant>,
    /// Requests that were refused because of their time.
    skewed: usize,
    issued: Vec<Issued>,
    /// Number of logins by client.
    counts: HashMap<String, usize>,
}

/// The provider. It serves until the process ends.
pub struct Provider {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Provider {
    /// Starts a provider whose logins have this lifetime.
    pub fn start(lifetime: TimeDelta, latency: Duration) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State { latency, lifetime, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A peer that was killed breaks its connection.
                std::thread::spawn(move || drop(serve(&stream, &state)));
            }
        });
        Ok(Self { address, state })
    }

    /// Source of a client of the token service.
    pub fn oauth2(&self, client: &str) -> Value {
        json!({
            "type": "oauth2", "tokenUrl": format!("http://{}/token", self.address), "username": "robot",
            "authentication": "body",
            "identity": {"type": "clientSecret", "clientId": client, "clientSecret": "secret"},
        })
    }

    /// Source of an access key of the API.
    pub fn ecr(&self, key: &str) -> Value {
        json!({
            "type": "ecr", "region": "eu-central-1", "endpoint": format!("http://{}", self.address),
            "identity": {"type": "accessKey", "accessKeyId": key, "secretAccessKey": "secret"},
        })
    }

    /// Closes connections without an answer, or answers again.
    pub fn set_down(&self, is_down: bool) {
        self.state.lock().is_down = is_down;
    }

    /// Number of requests that were refused because of their time.
    pub fn skewed(&self) -> usize {
        self.state.lock().skewed
    }

    /// Number of requests.
    pub fn requests(&self) -> usize {
        self.state.lock().requests.len()
    }

    /// Logins that were issued after the first `from`.
    pub fn issued_since(&self, from: usize) -> Vec<Issued> {
        self.state.lock().issued.get(from..).unwrap_or_default().to_vec()
    }

    /// Number of logins.
    pub fn issued(&self) -> usize {
        self.state.lock().issued.len()
    }

    /// The last login of each client.
    pub fn last(&self) -> HashMap<String, Issued> {
        self.state.lock().issued.iter().map(|issued| (issued.client.clone(), issued.clone())).collect()
    }
}

fn serve(mut stream: &TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    stream.set_read_timeout(Some(READ_MAX))?;
    let request = read(stream)?;
    let requested = Instant::now();
    let latency = {
        let mut state = state.lock();
        state.requests.push(requested);
        if state.is_down {
            return Ok(());
        }
        state.latency
    };
    std::thread::sleep(latency);
    let now = Utc::now();
    let (status, body) = match client(&request) {
        Some(_) if is_skewed(&request, now) => {
            state.lock().skewed += 1;
            ("400 Bad Request", json!({"__type": "InvalidSignatureException"}))
        }
        Some(client) => ("200 OK", issue(&request, client, requested, now, &mut state.lock())),
        None => ("400 Bad Request", json!({"error": "invalid_request"})),
    };
    let (date, body) = (now.format("%a, %d %b %Y %H:%M:%S GMT"), body.to_string());
    let head = format!("HTTP/1.1 {status}\r\nDate: {date}\r\nConnection: close\r\nContent-Length: {}", body.len());
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())
}

/// Reads a request with a body of `Content-Length` bytes.
fn read(mut stream: &TcpStream) -> std::io::Result<String> {
    let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&request);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = header(head, "content-length").and_then(|length| length.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(text.into_owned());
            }
        }
        match stream.read(&mut chunk)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => request.extend_from_slice(&chunk[..count]),
        }
    }
}

fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let lines = request.lines().take_while(|line| !line.is_empty());
    let mut fields = lines.filter_map(|line| line.split_once(':'));
    fields.find(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

fn is_ecr(request: &str) -> bool {
    request.starts_with("POST / ")
}

/// Client of a request, or access key.
fn client(request: &str) -> Option<String> {
    if is_ecr(request) {
        let (_, credential) = header(request, "authorization")?.split_once("Credential=")?;
        return Some(credential.split_once('/')?.0.to_owned());
    }
    let (_, body) = request.split_once("\r\n\r\n")?;
    let mut fields = url::form_urlencoded::parse(body.as_bytes());
    fields.find(|(name, _)| name == "client_id").map(|(_, client)| client.into_owned())
}

/// Whether a signed request states another time.
fn is_skewed(request: &str, now: DateTime<Utc>) -> bool {
    let stated =
        header(request, "x-amz-date").and_then(|date| NaiveDateTime::parse_from_str(date, "%Y%m%dT%H%M%SZ").ok());
    stated.is_some_and(|stated| (stated.and_utc() - now).abs() > SKEW_MAX)
}

/// Issues a login.
fn issue(request: &str, client: String, requested: Instant, now: DateTime<Utc>, state: &mut State) -> Value {
    let count = state.counts.entry(client.clone()).or_default();
    *count += 1;
    let password = format!("{client}-{count}");
    let expires_at = now + state.lifetime;
    let body = if is_ecr(request) {
        let token = BASE64_STANDARD.encode(format!("AWS:{password}"));
        json!({"authorizationData": [{"authorizationToken": token, "expiresAt": expires_at.timestamp()}]})
    } else {
        json!({"access_token": password, "expires_in": state.lifetime.num_seconds()})
    };
    state.issued.push(Issued { client, password, requested, expires_at });
    body
}
