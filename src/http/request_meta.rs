//! Metadata of a request: its ids and source address.

use std::{fmt, net::IpAddr};

use actix_web::{
    HttpMessage, HttpRequest,
    http::header::{self, HeaderName, HeaderValue},
};
use uuid::{Uuid, fmt::Hyphenated};

use crate::domain::proxies::{ForwardingHeader, Proxies};

/// Header with the id of a request. In a request it holds the client's own id.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Header of a response with the client's own id.
pub const X_CLIENT_REQUEST_ID: HeaderName = HeaderName::from_static("x-client-request-id");

/// Id of a request. That of regcred is in logs, problems and the `X-Request-Id` of the response; a
/// client cannot choose it, so that no two requests share one.
#[derive(Debug, Clone, Copy)]
pub struct RequestId(Uuid);

impl RequestId {
    /// The UUID.
    pub fn uuid(self) -> Uuid {
        self.0
    }

    /// Calls a function with the id as text, without an allocation.
    pub fn with_text<T>(self, use_text: impl FnOnce(&str) -> T) -> T {
        use_text(self.0.hyphenated().encode_lower(&mut [0; Hyphenated::LENGTH]))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_text(|text| f.write_str(text))
    }
}

/// Metadata that is known before routing.
#[derive(Debug, Clone, Copy)]
pub struct RequestMeta {
    /// Request id.
    pub id: RequestId,
    /// Id that the client gave the request, if it is a UUID: other values could be secrets, or
    /// inject text into logs.
    pub client_id: Option<RequestId>,
    /// Source address for rate limits, logs and audit events: the peer, or the client address that
    /// a trusted proxy reports.
    pub source: Option<IpAddr>,
    /// Whether no reverse proxy is known or likely: none is configured, no header reports one, and the
    /// peer is in this host or a private network, from which Docker forwards published ports.
    pub is_direct: bool,
}

impl RequestMeta {
    /// Reads the metadata of a request.
    pub fn new(request: &HttpRequest, proxies: &Proxies) -> Self {
        let headers = request.headers();
        let forwarded = match proxies.header {
            ForwardingHeader::XForwardedFor => header::X_FORWARDED_FOR,
            ForwardingHeader::Forwarded => header::FORWARDED,
        };
        let lines = headers.get_all(forwarded).map(HeaderValue::as_bytes);
        let source = request.peer_addr().map(|peer| proxies.client(peer.ip(), lines));
        let client_id = headers.get(X_REQUEST_ID).and_then(|id| Uuid::try_parse_ascii(id.as_bytes()).ok());
        let added_by_proxies = [header::X_FORWARDED_FOR, header::FORWARDED, header::VIA];
        let is_forwarded = added_by_proxies.iter().any(|name| headers.contains_key(name));
        let is_near = request.peer_addr().is_some_and(|peer| is_near(peer.ip()));
        let is_direct = proxies.trusted.is_empty() && !is_forwarded && is_near;
        Self { id: RequestId(Uuid::now_v7()), client_id: client_id.map(RequestId), source, is_direct }
    }

    /// The metadata that [`edge`](super::edge) stored; `None` if the request did not pass it.
    pub fn of(request: &HttpRequest) -> Option<Self> {
        request.extensions().get::<Self>().copied()
    }
}

fn is_near(peer: IpAddr) -> bool {
    match peer.to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_private(),
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unique_local(),
    }
}
