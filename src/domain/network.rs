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

/// Comma-separated list of networks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

impl Networks {
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
