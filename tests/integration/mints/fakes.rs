//! Providers on loopback that refuse what the real ones refuse. In each test regcred and the vendor's
//! own client call the same instance.

pub mod aws;
pub mod azure;
pub mod google;
pub mod jwt;

use std::{collections::HashMap, io::Write, net::SocketAddr, sync::Arc};

use chrono::Utc;
use http::StatusCode;
use serde_json::Value;
use url::form_urlencoded;

use crate::{
    support::listener::{listen, listen_tls, read_request},
    verify::{certificates::ServerCertificate, listening::answer},
};

/// Provider that answers HTTP requests.
pub trait Provider: Send + Sync + 'static {
    fn respond(&self, request: &Request) -> Reply;
}

/// Serves a provider, and returns its URL.
pub fn serve(provider: &Arc<impl Provider>) -> String {
    let provider = Arc::clone(provider);
    let address: SocketAddr = listen(move |mut stream| {
        let reply = provider.respond(&Request::parse(&read_request(&stream)));
        // The client may have closed the connection.
        let _ = stream.write_all(&reply.into_bytes());
    });
    format!("http://{address}")
}

/// Serves a provider over TLS, and returns its address.
pub fn serve_tls(provider: &Arc<impl Provider>, server: &ServerCertificate) -> SocketAddr {
    let provider = Arc::clone(provider);
    listen_tls(&server.certificate, &server.key, move |stream| {
        let reply = provider.respond(&Request::parse(&read_request(&mut *stream)));
        let _ = stream.write_all(&reply.into_bytes());
    })
}

/// Request to a provider.
pub struct Request {
    pub method: String,
    /// Path without the query.
    pub path: String,
    pub query: Form,
    /// Values by lower-case name.
    headers: HashMap<String, String>,
    pub body: String,
}

impl Request {
    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((text, ""));
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (method, target) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let headers = lines.filter_map(|line| line.split_once(':'));
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            query: Form::parse(query),
            headers: headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect(),
            body: body.to_owned(),
        }
    }

    /// Value of a header; empty if it is missing.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// Names of all headers, in lower case.
    pub fn header_names(&self) -> impl Iterator<Item = &str> {
        self.headers.keys().map(String::as_str)
    }

    /// The body as a form.
    pub fn form(&self) -> Form {
        Form::parse(&self.body)
    }
}

/// Parameters of a query or a form.
pub struct Form(Vec<(String, String)>);

impl Form {
    fn parse(text: &str) -> Self {
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    /// First value of a parameter; empty if it is missing.
    pub fn get(&self, name: &str) -> &str {
        self.all(name).next().unwrap_or_default()
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// Response of a provider.
pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Reply {
    pub fn json(status: u16, body: &Value) -> Self {
        Self::text(status, "application/json", &body.to_string())
    }

    pub fn text(status: u16, content_type: &str, body: &str) -> Self {
        let date = Utc::now().format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let headers = vec![("Content-Type", content_type.to_owned()), ("Date", date)];
        Self { status, headers, body: body.to_owned() }
    }

    pub fn not_found() -> Self {
        Self::text(404, "text/plain", "")
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn into_bytes(self) -> Vec<u8> {
        let reason = StatusCode::from_u16(self.status).ok().and_then(|status| status.canonical_reason());
        let headers: Vec<(&str, &str)> = self.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        answer(&format!("{} {}", self.status, reason.unwrap_or_default()), &headers, &self.body)
    }
}
