//! Fetch of what an issuer publishes: the discovery document, then the key document that it names.

use http::header;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::Instant;
use url::Url;

use super::{IssuerError, LoginEndpoints, Publication};
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
    // Issuers of tokens for programs lack these, or fill them otherwise.
    #[serde(default)]
    authorization_endpoint: Value,
    #[serde(default)]
    token_endpoint: Value,
    #[serde(default)]
    token_endpoint_auth_methods_supported: Value,
    #[serde(default)]
    authorization_response_iss_parameter_supported: Value,
}

impl Discovery {
    /// Finds the addresses for signing in. Those of an issuer over `http://` (for development) may
    /// only be its own.
    fn login(&self, issuer: &Url, schemes: Schemes) -> Option<LoginEndpoints> {
        let address = |value: &Value| {
            let url = parse_url(value.as_str()?, schemes).ok()?;
            (url.scheme() == "https" || url.origin() == issuer.origin()).then_some(url)
        };
        let methods = self.token_endpoint_auth_methods_supported.as_array();
        let supports = |method: &str| methods.is_some_and(|methods| methods.iter().any(|one| one == method));
        Some(LoginEndpoints {
            authorization: address(&self.authorization_endpoint)?,
            token: address(&self.token_endpoint)?,
            // Without a list, a header (OpenID Connect Discovery 1.0, section 3).
            posts_secret: supports("client_secret_post") && !supports("client_secret_basic"),
            names_issuer: self.authorization_response_iss_parameter_supported == true,
        })
    }
}

/// Fetches what an issuer publishes. The discovery document must name exactly this issuer.
pub(super) async fn fetch(
    outbound: &OutboundClient,
    issuer: &Issuer,
    ca_certificate: Option<&CaCertificate>,
    deadline: Instant,
) -> Result<Publication, IssuerError> {
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
    let keys = KeySet::parse(&keys).map_err(|refused| IssuerError::Invalid(refused.to_string()))?;
    Ok(Publication { keys, login: discovery.login(&url, schemes) })
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

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::json;

    use super::*;

    fn login(issuer: &str, more: &Value) -> Option<LoginEndpoints> {
        let mut document = json!({"issuer": issuer, "jwks_uri": format!("{issuer}/keys")});
        document.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let discovery: Discovery = serde_json::from_value(document).unwrap();
        let url = Url::parse(issuer).unwrap();
        discovery.login(&url, if url.scheme() == "https" { Schemes::Https } else { Schemes::HttpAndHttps })
    }

    fn endpoints(base: &str) -> Value {
        json!({"authorization_endpoint": format!("{base}/auth?x=1"), "token_endpoint": format!("{base}/token")})
    }

    #[rstest]
    #[case("https://issuer.example", "https://issuer.example", true)]
    #[case("https://issuer.example", "https://login.example", true)]
    #[case("https://issuer.example", "http://issuer.example", false)]
    #[case("http://127.0.0.1:1", "http://127.0.0.1:1", true)]
    #[case("http://127.0.0.1:1", "http://127.0.0.1:2", false)]
    #[case("http://127.0.0.1:1", "https://login.example", true)]
    #[case("https://issuer.example", "javascript:alert(1);//", false)]
    fn addresses_are_https_or_of_the_issuer_itself(#[case] issuer: &str, #[case] base: &str, #[case] usable: bool) {
        assert_eq!(login(issuer, &endpoints(base)).is_some(), usable);
    }

    #[rstest]
    #[case(json!(null), false)]
    #[case(json!(["client_secret_basic", "client_secret_post"]), false)]
    #[case(json!(["private_key_jwt", "client_secret_post"]), true)]
    #[case(json!("client_secret_post"), false)]
    fn secret_is_posted_if_headers_are_not_supported(#[case] methods: Value, #[case] expected: bool) {
        let mut more = endpoints("https://issuer.example");
        more["token_endpoint_auth_methods_supported"] = methods;
        assert_eq!(login("https://issuer.example", &more).unwrap().posts_secret, expected);
    }

    #[test]
    fn issuer_without_addresses_serves_keys_only() {
        assert_eq!(login("https://issuer.example", &json!({})), None);
        assert_eq!(login("https://issuer.example", &json!({"authorization_endpoint": 7, "token_endpoint": []})), None);
    }
}
