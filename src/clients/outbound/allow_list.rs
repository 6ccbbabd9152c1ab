//! Networks and hosts that the configuration allows beyond public addresses.

use std::{net::IpAddr, str::FromStr};

use ipnet::IpNet;

use crate::domain::{invalid::Invalid, network::parse_network};

/// Networks, such as `10.0.0.0/8`, and host names that may be called although their addresses are
/// not public.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowList {
    networks: Vec<IpNet>,
    hosts: Vec<String>,
}

impl AllowList {
    /// Whether a host is allowed by its name, whatever its addresses.
    pub(super) fn names(&self, host: &str) -> bool {
        self.hosts.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    /// Whether an address is in an allowed network.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address))
    }

    /// Whether an entry is exactly this address. Only such an entry allows a metadata service.
    pub(super) fn contains_exactly(&self, address: IpAddr) -> bool {
        self.networks.contains(&IpNet::from(address))
    }

    /// Adds a host name.
    pub fn allow_host(&mut self, host: &str) {
        self.hosts.push(host.to_ascii_lowercase());
    }
}

impl FromStr for AllowList {
    type Err = Invalid;

    /// Parses a comma-separated list of networks, addresses and host names.
    fn from_str(list: &str) -> Result<Self, Invalid> {
        let mut allowed = Self::default();
        for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if let Ok(network) = parse_network(entry) {
                allowed.networks.push(network);
            } else if is_host(entry) {
                allowed.allow_host(entry);
            } else {
                return Err(refused(entry));
            }
        }
        Ok(allowed)
    }
}

fn is_host(entry: &str) -> bool {
    let last = entry.rsplit('.').next().unwrap_or_default();
    entry.split('.').all(|label| {
        !label.is_empty() && label.len() < 64 && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    }) && !last.bytes().all(|b| b.is_ascii_digit())
}

fn refused(entry: &str) -> Invalid {
    Invalid::new(format!("`{entry}` is not a network such as 10.0.0.0/8, an address or a host name"))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("fd00::/8, 10.0.0.0/8", "10.9.9.9", true)]
    #[case("10.0.0.7", "10.0.0.7", true)]
    #[case("10.0.0.7", "10.0.0.8", false)]
    fn list_contains_the_addresses_of_its_networks(
        #[case] list: &str,
        #[case] address: IpAddr,
        #[case] contains: bool,
    ) {
        assert_eq!(list.parse::<AllowList>().unwrap().contains(address), contains);
    }

    #[rstest]
    #[case("10.0.0.0/33")]
    #[case("10.0.0/8")]
    #[case("10.0.0.256")]
    #[case("http://reg.io")]
    #[case("*.reg.io")]
    #[case("reg.io:5000")]
    #[case("::1/129")]
    fn entry_that_is_neither_network_nor_host_is_refused(#[case] list: &str) {
        assert!(list.parse::<AllowList>().is_err());
    }

    #[test]
    fn hosts_are_matched_by_their_full_name() {
        let allowed: AllowList = "Registry.Corp.Example, localhost".parse().unwrap();
        assert!(allowed.names("registry.corp.example") && allowed.names("LOCALHOST"));
        assert!(!allowed.names("corp.example") && !allowed.names("a.registry.corp.example"));
    }
}
