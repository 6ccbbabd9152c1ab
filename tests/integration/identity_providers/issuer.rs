//! OIDC issuer for tests, with configurable failures.

use std::{
    collections::HashMap,
    io::Write,
    net::SocketAddr,
    sync::{Arc, Condvar, Mutex},
};

use chrono::Utc;
use serde_json::{Value, json};

use super::keys::TestKey;
use crate::{
    support::listener::{listen, listen_tls, read_request},
    verify::{certificates::ServerCertificate, listening::answer},
};

pub const DISCOVERY: &str = "/.well-known/openid-configuration";
pub const KEYS: &str = "/keys";

/// Issuer of one test.
pub struct TestIssuer {
    pub address: SocketAddr,
    scheme: &'static str,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    inner: Mutex<Inner>,
    released: Condvar,
}

#[derive(Default)]
struct Inner {
    keys: Vec<Value>,
    /// Overridden responses by path.
    answers: HashMap<&'static str, Vec<u8>>,
    /// Closes connections without a response.
    is_down: bool,
    /// Delays responses until it is reset.
    holds: bool,
    requests: HashMap<String, usize>,
    /// The last request of each path.
    last: HashMap<String, String>,
}

impl TestIssuer {
    /// Starts an issuer with these keys over plain HTTP on loopback.
    pub fn start(keys: &[&TestKey]) -> Self {
        let issuer = Self::with_state("http", keys, |state| {
            listen(move |mut stream| {
                let request = read_request(&stream);
                let base = format!("http://{}", stream.local_addr().expect("an address"));
                // Some tests close the connection early.
                let _ = stream.write_all(&state.respond(&request, &base));
            })
        });
        assert!(issuer.url().starts_with("http://127.0.0.1:"));
        issuer
    }

    /// Starts an issuer over TLS.
    pub fn start_tls(keys: &[&TestKey], server: &ServerCertificate) -> Self {
        Self::with_state("https", keys, |state| {
            listen_tls(&server.certificate, &server.key, move |stream| {
                let base = format!("https://{}", stream.sock.local_addr().expect("an address"));
                let request = read_request(&mut *stream);
                let _ = stream.write_all(&state.respond(&request, &base));
            })
        })
    }

    fn with_state(scheme: &'static str, keys: &[&TestKey], start: impl FnOnce(Arc<State>) -> SocketAddr) -> Self {
        let state = Arc::new(State::default());
        state.inner.lock().expect("the state").keys = keys.iter().map(|key| key.jwk()).collect();
        Self { address: start(Arc::clone(&state)), scheme, state }
    }

    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.state.inner.lock().expect("the state"));
        self.state.released.notify_all();
    }

    /// Replaces the published keys.
    pub fn publish(&self, keys: Vec<Value>) {
        self.change(|inner| inner.keys = keys);
    }

    /// Overrides the response of a path.
    pub fn answer(&self, path: &'static str, answer: Vec<u8>) {
        self.change(|inner| drop(inner.answers.insert(path, answer)));
    }

    pub fn set_down(&self, is_down: bool) {
        self.change(|inner| inner.is_down = is_down);
    }

    pub fn hold(&self, holds: bool) {
        self.change(|inner| inner.holds = holds);
    }

    /// Returns the number of requests for a path.
    pub fn requests(&self, path: &str) -> usize {
        self.state.inner.lock().expect("the state").requests.get(path).copied().unwrap_or_default()
    }

    /// Returns the last request for a path.
    pub fn last_request(&self, path: &str) -> String {
        self.state.inner.lock().expect("the state").last.get(path).cloned().expect("a request")
    }

    /// Returns claims that are valid for five minutes, overridden by `more`. `null` removes a
    /// claim.
    pub fn claims(&self, more: Value) -> Value {
        let now = Utc::now().timestamp();
        let mut claims = json!({
            "iss": self.url(), "aud": "regcred", "sub": "ci", "iat": now, "nbf": now - 5, "exp": now + 300,
            "jti": uuid::Uuid::now_v7().to_string(),
        });
        let Value::Object(more) = more else { panic!("an object: {more}") };
        let object = claims.as_object_mut().expect("an object");
        object.extend(more);
        object.retain(|_, value| !value.is_null());
        claims
    }

    /// Returns a token signed with `key`, with the claims of [`Self::claims`].
    pub fn token(&self, key: &TestKey, more: Value) -> String {
        key.sign(&json!({"alg": key.algorithm(), "typ": "JWT", "kid": key.id}), &self.claims(more))
    }
}

impl State {
    fn respond(&self, request: &str, base: &str) -> Vec<u8> {
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut inner = self.inner.lock().expect("the state");
        *inner.requests.entry(path.clone()).or_default() += 1;
        inner.last.insert(path.clone(), request.to_owned());
        let inner = self.released.wait_while(inner, |inner| inner.holds).expect("the state");
        if inner.is_down {
            return Vec::new();
        }
        if let Some(answer) = inner.answers.get(path.as_str()) {
            return answer.clone();
        }
        let json_header = [("Content-Type", "application/json")];
        match path.as_str() {
            DISCOVERY => {
                let document = json!({
                    "issuer": base, "jwks_uri": format!("{base}{KEYS}"), "response_types_supported": ["id_token"],
                    "authorization_endpoint": format!("{base}/authorize"), "token_endpoint": format!("{base}/token"),
                });
                answer("200 OK", &json_header, &document.to_string())
            }
            KEYS => answer("200 OK", &json_header, &json!({"keys": inner.keys}).to_string()),
            _ => answer("404 Not Found", &[], ""),
        }
    }
}
