//! Networks: a base address and how many of its bits count.

use std::{net::IpAddr, str::FromStr};

use crate::domain::invalid::Invalid;

/// A network such as `10.0.0.0/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    base: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether an address is in it. An IPv4 address in IPv6 spelling is not in an IPv4 network.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
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

    /// Whether it is this address and no other.
    #[must_use]
    pub fn is_only(self, address: IpAddr) -> bool {
        self.base == address && self.bits == width(address)
    }
}

const fn width(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

impl FromStr for Network {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let refused = || Invalid::new(format!("`{text}` is no network such as 10.0.0.0/8 and no address"));
        let Some((base, bits)) = text.split_once('/') else {
            let base = text.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| refused())?;
            return Ok(Self { base, bits: width(base) });
        };
        let base: IpAddr = base.parse().map_err(|_| refused())?;
        let bits = bits.parse().ok().filter(|bits| *bits <= width(base)).ok_or_else(refused)?;
        Ok(Self { base, bits })
    }
}

/// A list of networks, separated by commas.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

impl Networks {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an address is in one of them; an IPv4 address in IPv6 spelling counts as what it is.
    #[must_use]
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(address))
    }
}

impl FromStr for Networks {
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
    #[case("127.0.0.0/8", "127.1.2.3", true)]
    #[case("127.0.0.0/8", "128.0.0.1", false)]
    #[case("127.0.0.0/8", "::1", false)]
    #[case("127.0.0.0/8", "::ffff:127.0.0.1", false)]
    #[case("0.0.0.0/0", "10.0.0.1", true)]
    #[case("0.0.0.0/0", "fd00::1", false)]
    #[case("::/0", "fd00::1", true)]
    #[case("10.0.0.7", "10.0.0.7", true)]
    #[case("10.0.0.7", "10.0.0.8", false)]
    #[case("[::1]", "::1", true)]
    #[case("10.0.0.0/31", "10.0.0.1", true)]
    #[case("10.0.0.0/31", "10.0.0.2", false)]
    fn a_network_contains_its_addresses(#[case] network: &str, #[case] address: IpAddr, #[case] contains: bool) {
        assert_eq!(network.parse::<Network>().unwrap().contains(address), contains);
    }

    #[rstest]
    #[case("10.0.0.0/33")]
    #[case("10.0.0/8")]
    #[case("10.0.0.256")]
    #[case("proxy.example")]
    #[case("::1/129")]
    #[case("*")]
    fn what_is_no_network_is_refused(#[case] text: &str) {
        assert!(text.parse::<Networks>().is_err());
    }

    #[test]
    fn a_list_contains_what_one_of_its_networks_does() {
        let networks: Networks = "10.0.0.0/8, fd00::/8,".parse().unwrap();
        for (address, contained) in
            [("10.9.9.9", true), ("::ffff:10.9.9.9", true), ("fd00::1", true), ("11.0.0.1", false), ("::1", false)]
        {
            assert_eq!(networks.contain(address.parse().unwrap()), contained, "{address}");
        }
        assert!("".parse::<Networks>().unwrap().is_empty());
    }
}
