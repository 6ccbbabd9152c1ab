//! A client of regcred's API that shows a whole answer where a test finds another one than it expects.

use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::Value;

use super::PATIENCE;

const PROBLEM_BASE: &str = "https://regcred.dev/problems/";

/// Somebody who calls the API, with a key or without.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Client {
    pub fn new(base: impl Into<String>, key: Option<&str>) -> Self {
        // A connection that was kept while a test ran a program may have been closed meanwhile.
        let builder = reqwest::Client::builder().pool_max_idle_per_host(0);
        let http = builder.timeout(PATIENCE).no_proxy().build().expect("a client");
        Self { http, base: base.into(), key: key.map(str::to_owned) }
    }

    /// The same client with another key.
    pub fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    /// The key that it uses.
    pub fn key(&self) -> &str {
        self.key.as_deref().expect("a key")
    }

    /// A request that a test adds to and then hands to [`send`](Self::send).
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

    /// The answer, or that none came.
    pub async fn try_send(&self, request: RequestBuilder) -> reqwest::Result<Answer> {
        let mut response = request.send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        // Of what goes on for long, what comes at once.
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

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    /// A header, empty where it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("a header in ASCII"))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("this is not JSON: {self:?}"))
    }

    /// The body of an answer with this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        self.json()
    }

    /// The slug of a problem, all parts of which are there and fit the answer; empty for an answer that is none.
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
        problem_type.strip_prefix(PROBLEM_BASE).unwrap_or_else(|| panic!("a foreign type: {self:?}")).to_owned()
    }

    /// Asserts that this is a problem of this status and slug; the problem.
    #[track_caller]
    pub fn problem(&self, status: u16, slug: &str) -> Value {
        assert_eq!((self.status, self.slug().as_str()), (status, slug), "{self:?}");
        self.json()
    }

    /// The fields that a problem names.
    pub fn fields(&self) -> Vec<String> {
        let problem = self.json();
        let errors = problem["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().map(|error| error["field"].as_str().expect("a field").to_owned()).collect()
    }
}

/// Asserts that an object has these members with these values. It may have more: the API may grow.
#[track_caller]
pub fn assert_holds(object: &Value, members: &Value) {
    for (name, value) in members.as_object().expect("an object") {
        assert_eq!(object.get(name), Some(value), "{name} of {object}");
    }
}
