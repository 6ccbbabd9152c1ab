//! Classification of IP addresses by IANA's special-purpose registries (RFC 6890 and its
//! successors).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Metadata services, which hand out a cloud's credentials. Some of these addresses look public.
const METADATA: [IpAddr; 11] = [
    // AWS, Google, Azure, Oracle, OpenStack and others; the containers of ECS; the pods of EKS.
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),
    // Alibaba; Azure's wire server; Oracle (legacy).
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    // In IPv6: Google, Oracle, Scaleway, Akamai, Alibaba.
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200)),
];

/// `fd00:ec2::/32`: the services of an instance on AWS, of which the metadata service is `::254` and
/// that of pods on EKS `::23`.
const AWS_SERVICES: [u16; 2] = [0xfd00, 0xec2];

/// Whether the address is a metadata service, also as an IPv4 address embedded in IPv6.
pub(super) fn is_metadata(address: IpAddr) -> bool {
    METADATA.contains(&address)
        || matches!(address, IpAddr::V6(v6) if v6.segments().starts_with(&AWS_SERVICES)
            || embedded(v6).is_some_and(|v4| METADATA.contains(&IpAddr::V4(v4))))
}

/// Kind of an address that is not public. The text fits after the host's name.
pub(super) fn not_public(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => not_public_v4(address),
        IpAddr::V6(address) => not_public_v6(address),
    }
}

fn not_public_v4(address: Ipv4Addr) -> Option<&'static str> {
    Some(match address.octets() {
        [127, ..] => "is at a loopback address",
        [169, 254, ..] => "is at a link-local address",
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => "is at a private address",
        [100, 64..=127, ..] => "is at a carrier-grade NAT address (100.64.0.0/10)",
        [0, ..] => "is at an unspecified address",
        [224..=239, ..] => "is at a multicast address",
        // Protocol assignments, documentation, 6to4 relays, benchmarks, future use.
        [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18 | 19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _]
        | [240..=255, ..] => "is at a reserved address",
        _ => return None,
    })
}

fn not_public_v6(address: Ipv6Addr) -> Option<&'static str> {
    if embedded(address).is_some() {
        return Some("is at an IPv6 address with an embedded IPv4 address");
    }
    Some(match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => "is at an unspecified address",
        [0, 0, 0, 0, 0, 0, 0, 1] => "is at a loopback address",
        [0xfe80..=0xfebf, ..] => "is at a link-local address",
        [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => "is at a private address",
        [0xff00..=0xffff, ..] => "is at a multicast address",
        // Protocol assignments with Teredo and ORCHID, documentation.
        [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => "is at a reserved address",
        [0x2000..=0x3fff, ..] => return None,
        _ => "is at a reserved address",
    })
}

/// IPv4 address inside a mapped, compatible, translated (NAT64, SIIT) or 6to4 address.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let v4 = |high: u16, low: u16| Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low)));
    match address.segments() {
        // `::` and `::1` embed nothing.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x64, 0xff9b, 1, _, _, _, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        _ => None,
    }
}
