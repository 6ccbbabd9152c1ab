//! What is known of a request before anybody looks at what it wants: which one it is, and where it comes from.

use std::{fmt, net::IpAddr};

use actix_web::{
    HttpMessage, HttpRequest,
    http::header::{self, HeaderMap, HeaderName, HeaderValue},
};
use uuid::{Uuid, fmt::Hyphenated};

use crate::domain::proxies::{ForwardingHeader, Proxies};

/// The header with the id of a request.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The id of a request: in the log, in problems, and in `X-Request-Id` of every response.
#[derive(Debug, Clone, Copy)]
pub struct RequestId(Uuid);

impl RequestId {
    /// The caller's own is kept if it is a UUID; any other is replaced, so that nobody writes into our log what he likes.
    fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(&X_REQUEST_ID).and_then(|id| Uuid::try_parse_ascii(id.as_bytes()).ok());
        Self(given.unwrap_or_else(Uuid::now_v7))
    }

    /// The id itself.
    pub fn uuid(self) -> Uuid {
        self.0
    }

    /// Its text, as it stands everywhere.
    pub fn with_text<T>(self, use_text: impl FnOnce(&str) -> T) -> T {
        use_text(self.0.hyphenated().encode_lower(&mut [0; Hyphenated::LENGTH]))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.with_text(|text| f.write_str(text))
    }
}

/// What is known of a request from its arrival on.
#[derive(Debug, Clone, Copy)]
pub struct RequestMeta {
    /// Which one it is.
    pub id: RequestId,
    /// The address that it comes from: what is limited, logged and recorded. That of the connection, unless a proxy that is
    /// trusted says another one.
    pub source: Option<IpAddr>,
}

impl RequestMeta {
    /// Looks at a request that arrives.
    pub fn new(request: &HttpRequest, proxies: &Proxies) -> Self {
        let headers = request.headers();
        let forwarded = match proxies.header {
            ForwardingHeader::XForwardedFor => header::X_FORWARDED_FOR,
            ForwardingHeader::Forwarded => header::FORWARDED,
        };
        let lines = headers.get_all(forwarded).map(HeaderValue::as_bytes);
        let source = request.peer_addr().map(|peer| proxies.client(peer.ip(), lines));
        Self { id: RequestId::of(headers), source }
    }

    /// What was found out when this request arrived; nothing where it did not come by way of the edge.
    pub fn of(request: &HttpRequest) -> Option<Self> {
        request.extensions().get::<Self>().copied()
    }
}
