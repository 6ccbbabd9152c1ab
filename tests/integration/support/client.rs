//! Client of regcred's API. Failed expectations print the complete response.

use std::sync::LazyLock;

use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::Value;

use super::PATIENCE;

const PROBLEM_BASE: &str = "https://regcred.dev/problems/";

/// HTTP client of all tests: to build one takes long enough that a server on a busy machine ends the
/// connections of those built before.
static HTTP: LazyLock<reqwest::Client> = LazyLock::new(|| {
    // No idle connections: the server may close one while a test runs a program, and a connection
    // belongs to the runtime of its test.
    let builder = reqwest::Client::builder().pool_max_idle_per_host(0);
    builder.timeout(PATIENCE).no_proxy().build().expect("a client")
});

/// API client, with or without a key.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Client {
    pub fn new(base: impl Into<String>, key: Option<&str>) -> Self {
        Self { http: HTTP.clone(), base: base.into(), key: key.map(str::to_owned) }
    }

    /// Returns the same client with another key.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    /// Returns the key.
    pub fn key(&self) -> &str {
        self.key.as_deref().expect("a key")
    }

    /// Builds a request, for [`send`](Self::send).
    pub fn request(&self, method: &str, path: &str) -> RequestBuilder {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    pub async fn send(&self, request: RequestBuilder) -> Answer {
        self.try_send(request).await.expect("an answer")
    }

    /// Like [`send`](Self::send), but returns connection errors.
    pub async fn try_send(&self, request: RequestBuilder) -> reqwest::Result<Answer> {
        let mut response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        // An event stream does not end: read its first chunk.
        let is_stream = headers.get("content-type").is_some_and(|value| value == "text/event-stream");
        let body = if is_stream {
            let first = response.chunk().await?.unwrap_or_default();
            String::from_utf8(first.to_vec()).expect("UTF-8")
        } else {
            response.text().await?
        };
        Ok(Answer { status, headers, body })
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request("GET", path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request("POST", path).json(body)).await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request("PATCH", path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request("DELETE", path)).await
    }
}

/// Complete response.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    /// Returns a header, or an empty string if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("a header in ASCII"))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    /// Asserts the status and returns the body.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        self.json()
    }

    /// Returns the slug of a problem after checking all its members; empty if this is no problem.
    #[track_caller]
    pub fn slug(&self) -> String {
        if self.header("content-type") != "application/problem+json" {
            return String::new();
        }
        let problem = self.json();
        assert_eq!(problem["status"], self.status, "{self:?}");
        for member in ["title", "detail", "instance", "requestId"] {
            assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "no {member}: {self:?}");
        }
        assert_eq!(problem["requestId"], self.header("x-request-id"), "{self:?}");
        let problem_type = problem["type"].as_str().expect("a type");
        problem_type.strip_prefix(PROBLEM_BASE).unwrap_or_else(|| panic!("unknown problem type: {self:?}")).to_owned()
    }

    /// Asserts status and slug, and returns the problem.
    #[track_caller]
    pub fn problem(&self, status: u16, slug: &str) -> Value {
        assert_eq!((self.status, self.slug().as_str()), (status, slug), "{self:?}");
        self.json()
    }

    /// Names of the fields that a problem lists.
    pub fn fields(&self) -> Vec<String> {
        let problem = self.json();
        let errors = problem["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().map(|error| error["field"].as_str().expect("a field").to_owned()).collect()
    }
}

/// Asserts that an object has these members. Additional members are allowed: the API may grow.
#[track_caller]
pub fn assert_holds(object: &Value, members: &Value) {
    for (name, value) in members.as_object().expect("an object") {
        assert_eq!(object.get(name), Some(value), "{name} of {object}");
    }
}
