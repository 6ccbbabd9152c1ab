//! The name of an OIDC issuer, which is a URL and is compared letter by letter.

use std::{fmt, net::IpAddr};

use url::{Host, Url};

use crate::domain::invalid::Invalid;

/// Longer issuers are refused unread.
const ISSUER_MAX: usize = 512;
/// Where an issuer tells of itself (`OpenID` Connect Discovery 1.0, 4).
const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";

/// An issuer, as it stands in `iss` of its tokens and in its own discovery document.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Issuer(String);

impl Issuer {
    /// Reads an issuer: an `https://` URL in its normal form. `http://` is taken for loopback alone, as a sandbox has it.
    ///
    /// # Errors
    ///
    /// Which rule it breaks.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let refused = || Invalid::new("must be a URL such as https://gitlab.example.com, as it stands in `iss`");
        if text.len() > ISSUER_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(refused());
        }
        let url = Url::parse(text).map_err(|_| refused())?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(Invalid::new("must have neither user nor password, no query and no fragment"));
        }
        // Another spelling of the same URL is another issuer, and a host that some read otherwise is none.
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
            "http" => return Err(Invalid::new("must be https://: keys that come over http:// could be anybody's")),
            _ => return Err(refused()),
        }
        Ok(Self(text.to_owned()))
    }

    /// The issuer as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host of the URL; empty for none, which no issuer has.
    #[must_use]
    pub fn host(&self) -> String {
        Url::parse(&self.0).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default()
    }

    /// Whether it is called over TLS.
    #[must_use]
    pub fn is_https(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// The URL of its discovery document.
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
