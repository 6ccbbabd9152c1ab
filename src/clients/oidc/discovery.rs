//! Fetch of an issuer's keys: the discovery document, then the key document that it names.

use http::header;
use serde::Deserialize;
use tokio::time::Instant;
use url::Url;

use super::IssuerError;
use crate::{
    clients::outbound::{OutboundClient, OutboundError, OutboundErrorKind, Schemes, parse_url},
    domain::{cluster::CaCertificate, identity_provider::Issuer, jwk::KeySet},
};

/// Maximum length of a discovery document, in bytes. Those of large issuers have 2 to 3 KiB.
const DISCOVERY_MAX: usize = 64 * 1024;
/// Maximum length of a key document, in bytes. A key with its certificates has 2 to 4 KiB.
const KEYS_MAX: usize = 256 * 1024;

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Fetches the keys of an issuer. The discovery document must name exactly this issuer.
pub(super) async fn fetch(
    outbound: &OutboundClient,
    issuer: &Issuer,
    ca_certificate: Option<&CaCertificate>,
    deadline: Instant,
) -> Result<KeySet, IssuerError> {
    let invalid = |detail: &str| IssuerError::Invalid(detail.to_owned());
    let schemes = if issuer.is_https() { Schemes::Https } else { Schemes::HttpAndHttps };
    let url = parse_url(&issuer.discovery_url(), schemes).map_err(|_| invalid("the issuer's URL cannot be used"))?;
    let document = get(outbound, &url, "discovery document", ca_certificate, DISCOVERY_MAX, deadline).await?;
    let discovery: Discovery = serde_json::from_slice(&document)
        .map_err(|_| invalid("the discovery document is invalid: it lacks issuer or jwks_uri"))?;
    if discovery.issuer != issuer.as_str() {
        return Err(invalid("the discovery document belongs to another issuer"));
    }
    let keys_url = parse_url(&discovery.jwks_uri, schemes)
        .map_err(|reason| IssuerError::Invalid(format!("the jwks_uri of the discovery document {reason}")))?;
    // An issuer over http:// (for development) may only serve its keys itself.
    if keys_url.scheme() != "https" && keys_url.origin() != url.origin() {
        return Err(invalid("the jwks_uri of the discovery document is http://"));
    }
    let keys = get(outbound, &keys_url, "key document", ca_certificate, KEYS_MAX, deadline).await?;
    KeySet::parse(&keys).map_err(|refused| IssuerError::Invalid(refused.to_string()))
}

async fn get(
    outbound: &OutboundClient,
    url: &Url,
    document: &'static str,
    ca_certificate: Option<&CaCertificate>,
    limit: usize,
    deadline: Instant,
) -> Result<Vec<u8>, IssuerError> {
    let endpoint = outbound.endpoint(url, format!("the host of the {document}"), ca_certificate, deadline).await?;
    let request = endpoint.http().get(url.clone()).header(header::ACCEPT, "application/json");
    let response = endpoint.send(request).await?;
    let label = endpoint.label();
    match response.status().as_u16() {
        200 => Ok(endpoint.read_body(response, limit).await?),
        status @ 300..=399 => Err(IssuerError::Invalid(format!("{label} redirects ({status}), which is not followed"))),
        status @ (429 | 500..=599) => Err(IssuerError::Unreachable(format!("{label} answered {status}"))),
        status => Err(IssuerError::Invalid(format!("{label} answered {status}"))),
    }
}

impl From<OutboundError> for IssuerError {
    fn from(error: OutboundError) -> Self {
        match error.kind {
            OutboundErrorKind::Refused => Self::Refused(error.detail),
            OutboundErrorKind::Unreachable | OutboundErrorKind::Tls => Self::Unreachable(error.detail),
            OutboundErrorKind::TooLarge => Self::Invalid(error.detail),
        }
    }
}
