//! Where a request comes from.

use std::net::IpAddr;

use actix_web::HttpRequest;

/// The address that a request comes from: what is limited, logged and recorded.
pub fn address(request: &HttpRequest) -> Option<IpAddr> {
    request.peer_addr().map(|peer| peer.ip())
}
