//! What the configuration allows beyond public addresses.

use std::{net::IpAddr, str::FromStr};

use crate::domain::invalid::Invalid;

/// Networks, such as `10.0.0.0/8`, and host names that may be called though their addresses are not public.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowList {
    networks: Vec<Network>,
    hosts: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    base: IpAddr,
    bits: u8,
}

impl AllowList {
    /// Whether a host is allowed by its name, wherever that leads.
    pub(super) fn names(&self, host: &str) -> bool {
        self.hosts.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    /// Whether an address is in an allowed network.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }

    /// Whether an address is allowed by itself: a whole network never opens a metadata service.
    pub(super) fn singles_out(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.base == address && network.bits == width(address))
    }

    /// Allows one more host by its name.
    pub fn allow_host(&mut self, host: &str) {
        self.hosts.push(host.to_ascii_lowercase());
    }
}

impl Network {
    fn contains(self, address: IpAddr) -> bool {
        let shift = u32::from(width(address) - self.bits.min(width(address)));
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                (base.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                (base.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

const fn width(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl FromStr for AllowList {
    type Err = Invalid;

    /// Reads a list of networks, addresses and host names, separated by commas.
    fn from_str(list: &str) -> Result<Self, Invalid> {
        let mut allowed = Self::default();
        for entry in list.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if let Some((base, bits)) = entry.split_once('/') {
                let network = network(base, bits).ok_or_else(|| refused(entry))?;
                allowed.networks.push(network);
            } else if let Ok(base) = entry.trim_start_matches('[').trim_end_matches(']').parse() {
                allowed.networks.push(Network { base, bits: width(base) });
            } else if is_host(entry) {
                allowed.allow_host(entry);
            } else {
                return Err(refused(entry));
            }
        }
        Ok(allowed)
    }
}

fn network(base: &str, bits: &str) -> Option<Network> {
    let base: IpAddr = base.parse().ok()?;
    let bits: u8 = bits.parse().ok().filter(|bits| *bits <= width(base))?;
    Some(Network { base, bits })
}

fn is_host(entry: &str) -> bool {
    let last = entry.rsplit('.').next().unwrap_or_default();
    entry.split('.').all(|label| {
        !label.is_empty() && label.len() < 64 && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    }) && !last.bytes().all(|b| b.is_ascii_digit())
}

fn refused(entry: &str) -> Invalid {
    Invalid::new(format!("`{entry}` is no network such as 10.0.0.0/8, no address and no host name"))
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
    #[case("0.0.0.0/0", "10.0.0.1", true)]
    #[case("0.0.0.0/0", "fd00::1", false)]
    #[case("::/0", "fd00::1", true)]
    #[case("fd00::/8, 10.0.0.0/8", "10.9.9.9", true)]
    #[case("10.0.0.7", "10.0.0.7", true)]
    #[case("10.0.0.7", "10.0.0.8", false)]
    #[case("[::1]", "::1", true)]
    #[case("10.0.0.0/31", "10.0.0.1", true)]
    #[case("10.0.0.0/31", "10.0.0.2", false)]
    fn a_network_contains_its_addresses(#[case] list: &str, #[case] address: IpAddr, #[case] contains: bool) {
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
    fn what_is_neither_network_nor_host_is_refused(#[case] list: &str) {
        assert!(list.parse::<AllowList>().is_err());
    }

    #[test]
    fn hosts_are_matched_whole() {
        let allowed: AllowList = "Registry.Corp.Example, localhost".parse().unwrap();
        assert!(allowed.names("registry.corp.example") && allowed.names("LOCALHOST"));
        assert!(!allowed.names("corp.example") && !allowed.names("a.registry.corp.example"));
    }
}
