//! Where a request comes from.

use std::net::IpAddr;

use actix_web::{HttpRequest, http::header::HeaderValue, web::Data};

use crate::domain::proxies::Proxies;

/// The address that a request comes from: what is limited, logged and recorded. That of the connection, unless a proxy that is
/// trusted says another one.
pub fn address(request: &HttpRequest) -> Option<IpAddr> {
    let peer = request.peer_addr()?.ip();
    let Some(proxies) = request.app_data::<Data<Proxies>>() else { return Some(peer) };
    let lines: Vec<&[u8]> = request.headers().get_all(proxies.header.as_str()).map(HeaderValue::as_bytes).collect();
    Some(proxies.client(peer, lines.into_iter()))
}
