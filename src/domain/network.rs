//! Lists of IP networks, as in the configuration.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;

use crate::domain::invalid::Invalid;

/// Parses a network such as `10.0.0.0/8`, or an address as a network of its own. An IPv6 address
/// may have brackets.
///
/// # Errors
///
/// The text is neither.
pub fn parse_network(text: &str) -> Result<IpNet, Invalid> {
    let parsed = if text.contains('/') {
        text.parse().ok()
    } else {
        text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok().map(IpNet::from)
    };
    parsed.ok_or_else(|| Invalid::new(format!("`{text}` is not a network such as 10.0.0.0/8 or an address")))
}

/// Parses a network as [`parse_network`] does and clears its host bits. The error does not repeat
/// the text.
///
/// # Errors
///
/// The text is no network, or an IPv4 network in the form of IPv6, which contains no address:
/// [`Networks::contain`] compares IPv4 addresses.
pub fn parse_source_network(text: &str) -> Result<IpNet, Invalid> {
    let network =
        parse_network(text).map_err(|_| Invalid::new("must be a network such as 10.0.0.0/8, or an address"))?;
    match network {
        IpNet::V6(mapped) if mapped.prefix_len() >= 96 && mapped.addr().to_ipv4_mapped().is_some() => {
            Err(Invalid::new("must be written as an IPv4 network"))
        }
        network => Ok(network.trunc()),
    }
}

/// List of networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

impl FromIterator<IpNet> for Networks {
    fn from_iter<I: IntoIterator<Item = IpNet>>(networks: I) -> Self {
        Self(networks.into_iter().collect())
    }
}

impl Networks {
    /// Returns the networks as text, such as `10.0.0.0/8`.
    #[must_use]
    pub fn to_texts(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }

    /// Whether the list is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a network contains the address. An IPv4-mapped IPv6 address counts as its IPv4
    /// address.
    #[must_use]
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Parses a comma-separated list.
impl FromStr for Networks {
    type Err = Invalid;

    fn from_str(list: &str) -> Result<Self, Invalid> {
        let entries = list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        entries.map(parse_network).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("127.0.0.0/8", "127.1.2.3", true)]
    #[case("127.0.0.0/8", "128.0.0.1", false)]
    #[case("127.0.0.0/8", "::1", false)]
    #[case("127.0.0.0/8", "::ffff:127.0.0.1", false)]
    #[case("10.1.2.3/8", "10.9.9.9", true)]
    #[case("0.0.0.0/0", "10.0.0.1", true)]
    #[case("0.0.0.0/0", "fd00::1", false)]
    #[case("::/0", "fd00::1", true)]
    #[case("10.0.0.7", "10.0.0.7", true)]
    #[case("10.0.0.7", "10.0.0.8", false)]
    #[case("[::1]", "::1", true)]
    #[case("10.0.0.0/31", "10.0.0.1", true)]
    #[case("10.0.0.0/31", "10.0.0.2", false)]
    fn network_contains_its_addresses(#[case] network: &str, #[case] address: IpAddr, #[case] contains: bool) {
        assert_eq!(parse_network(network).unwrap().contains(&address), contains);
    }

    #[rstest]
    #[case("10.0.0.0/33")]
    #[case("10.0.0/8")]
    #[case("10.0.0.256")]
    #[case("proxy.example")]
    #[case("::1/129")]
    #[case("*")]
    fn invalid_network_is_refused(#[case] text: &str) {
        assert!(text.parse::<Networks>().is_err());
    }

    #[rstest]
    #[case("10.1.2.3/8", Some("10.0.0.0/8"))]
    #[case("10.1.2.3", Some("10.1.2.3/32"))]
    #[case("[fd00::1]", Some("fd00::1/128"))]
    #[case("0.0.0.0/0", Some("0.0.0.0/0"))]
    #[case("::/0", Some("::/0"))]
    #[case("::ffff:10.0.0.0/104", None)]
    #[case("::ffff:10.0.0.1", None)]
    #[case("canary", None)]
    fn source_network_is_normalised(#[case] text: &str, #[case] expected: Option<&str>) {
        let parsed = parse_source_network(text);
        if let Err(invalid) = &parsed {
            assert!(!invalid.to_string().contains(text), "{invalid}");
        }
        assert_eq!(parsed.ok().map(|network| network.to_string()).as_deref(), expected);
    }

    #[test]
    fn list_contains_the_addresses_of_every_network() {
        let networks: Networks = "10.0.0.0/8, fd00::/8,".parse().unwrap();
        for (address, contained) in
            [("10.9.9.9", true), ("::ffff:10.9.9.9", true), ("fd00::1", true), ("11.0.0.1", false), ("::1", false)]
        {
            assert_eq!(networks.contain(address.parse().unwrap()), contained, "{address}");
        }
        assert!("".parse::<Networks>().unwrap().is_empty());
    }
}
