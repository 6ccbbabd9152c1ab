//! Identifier of an OIDC issuer: a URL that is compared byte by byte.

use std::{fmt, net::IpAddr};

use url::{Host, Url};

use crate::domain::invalid::Invalid;

/// Maximum length of an issuer, in bytes.
const ISSUER_MAX: usize = 512;
/// Path of the discovery document (`OpenID` Connect Discovery 1.0, section 4).
const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";

/// Issuer, exactly as in `iss` of its tokens and in its discovery document.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Issuer(String);

impl Issuer {
    /// Parses an issuer: an `https://` URL in normal form. `http://` is accepted for loopback only,
    /// for sandboxes.
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the violated rule.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let refused =
            || Invalid::new("must be a URL such as https://gitlab.example.com, exactly as in the token's `iss`");
        if text.len() > ISSUER_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused());
        }
        let url = Url::parse(text).map_err(|_| refused())?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(Invalid::new("must not contain a user, password, query or fragment"));
        }
        // `iss` is compared byte by byte, so only one spelling can match. This also rejects
        // ambiguous hosts.
        if url.as_str() != text && url.as_str().strip_suffix('/') != Some(text) || url.port() == Some(0) {
            return Err(Invalid::new("must be written in its normal form: lower case, no default port, no `..`"));
        }
        let is_loopback = match url.host().ok_or_else(refused)? {
            Host::Domain(name) => name == "localhost",
            Host::Ipv4(address) => IpAddr::from(address).is_loopback(),
            Host::Ipv6(address) => IpAddr::from(address).is_loopback(),
        };
        match url.scheme() {
            "https" => {}
            "http" if is_loopback => {}
            "http" => return Err(Invalid::new("must use https://: keys fetched over http:// are not authenticated")),
            _ => return Err(refused()),
        }
        Ok(Self(text.to_owned()))
    }

    /// Returns the issuer as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the host of the URL.
    #[must_use]
    pub fn host(&self) -> String {
        Url::parse(&self.0).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default()
    }

    /// Whether the issuer is called over TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// Returns the URL of the discovery document.
    #[must_use]
    pub fn discovery_url(&self) -> String {
        format!("{}{DISCOVERY_PATH}", self.0.trim_end_matches('/'))
    }
}

impl fmt::Display for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
