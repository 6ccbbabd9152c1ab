//! Web origins whose pages may call the API from a browser.

use std::str::FromStr;

use url::Url;

use crate::domain::invalid::Invalid;

/// An origin as browsers serialize it: scheme, host, and the port unless it is the scheme's
/// default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// The serialized origin.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Origin {
    type Err = Invalid;

    /// Accepts only the serialization that a browser sends: any other spelling would never match.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let url = Url::parse(text).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && !text.contains('*'));
        match url.map(|url| url.origin().ascii_serialization()) {
            Some(origin) if origin == text => Ok(Self(origin)),
            Some(origin) => Err(Invalid::new(format!("`{text}` must be written as `{origin}`"))),
            None => Err(Invalid::new(format!("`{text}` is not an origin; write one such as https://console.example"))),
        }
    }
}

/// A comma-separated list of origins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(Vec<Origin>);

impl Origins {
    /// Whether the list is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the list contains the value of an `Origin` header.
    #[must_use]
    pub fn contain(&self, origin: &[u8]) -> bool {
        self.0.iter().any(|listed| listed.as_str().as_bytes() == origin)
    }
}

impl FromStr for Origins {
    type Err = Invalid;

    fn from_str(list: &str) -> Result<Self, Invalid> {
        let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        entries.map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("*")]
    #[case("https://*.example")]
    #[case("console.example")]
    #[case("https://console.example/")]
    #[case("https://console.example:443")]
    #[case("https://Console.example")]
    #[case("https://user@console.example")]
    #[case("ftp://console.example")]
    #[case("file:///")]
    #[case("null")]
    fn an_origin_that_no_browser_sends_is_refused(#[case] origin: &str) {
        assert!(origin.parse::<Origins>().is_err(), "{origin}");
    }

    #[test]
    fn only_the_exact_origin_matches() {
        let origins: Origins = "https://console.example, http://localhost:3000".parse().unwrap();
        assert!(origins.contain(b"https://console.example") && origins.contain(b"http://localhost:3000"));
        for other in ["https://console.example.evil", "http://console.example", "http://localhost", "null", ""] {
            assert!(!origins.contain(other.as_bytes()), "{other}");
        }
    }
}
