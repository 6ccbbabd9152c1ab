//! Web origins: which pages of browsers may call.

use std::str::FromStr;

use url::Url;

use crate::domain::invalid::Invalid;

/// An origin, spelled as browsers do: scheme, host, and the port where it is not the scheme's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// The spelling.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Origin {
    type Err = Invalid;

    /// Takes only what a browser would send, so that a listed origin never matches something else or nothing.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let url = Url::parse(text).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && !text.contains('*'));
        match url.map(|url| url.origin().ascii_serialization()) {
            Some(origin) if origin == text => Ok(Self(origin)),
            Some(origin) => Err(Invalid::new(format!("`{text}` must be spelled `{origin}`"))),
            None => Err(Invalid::new(format!("`{text}` is no origin such as https://console.example"))),
        }
    }
}

/// A list of origins, separated by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(Vec<Origin>);

impl Origins {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the header `Origin` of a request names one of them.
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
    fn what_no_browser_sends_is_refused(#[case] origin: &str) {
        assert!(origin.parse::<Origins>().is_err(), "{origin}");
    }

    #[test]
    fn only_the_whole_spelling_matches() {
        let origins: Origins = "https://console.example, http://localhost:3000".parse().unwrap();
        assert!(origins.contain(b"https://console.example") && origins.contain(b"http://localhost:3000"));
        for other in ["https://console.example.evil", "http://console.example", "http://localhost", "null", ""] {
            assert!(!origins.contain(other.as_bytes()), "{other}");
        }
    }
}
