//! URLs, addresses and allow lists of outbound calls: a URL has one host, and a guard without a list
//! admits public addresses only.

#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::FutureExt;
use libfuzzer_sys::fuzz_target;
use regcred::clients::outbound::{AllowList, Guard, Schemes, parse_url};
use regcred_fuzz::limited;

fuzz_target!(|input: &[u8]| limited(|| {
    if let Some(octets) = input.first_chunk::<4>() {
        check_address(IpAddr::V4(Ipv4Addr::from(*octets)));
    }
    if let Some(octets) = input.first_chunk::<16>() {
        check_address(IpAddr::V6(Ipv6Addr::from(*octets)));
    }
    let Ok(text) = str::from_utf8(input) else { return };
    let _ = text.parse::<AllowList>();
    for schemes in [Schemes::Https, Schemes::HttpAndHttps] {
        let Ok(url) = parse_url(text, schemes) else { continue };
        let host = url.host_str().expect("a host").to_owned();
        assert!(url.scheme() == "https" || schemes == Schemes::HttpAndHttps && url.scheme() == "http");
        assert!(url.username().is_empty() && url.password().is_none() && url.fragment().is_none());
        // The host is between the scheme and the first separator, in the text as well.
        let (_, rest) = text.split_once("://").expect("absolute");
        assert!(rest.to_ascii_lowercase().starts_with(&host), "{host}");
        let literal = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = literal.parse() {
            check_address(address);
        }
    }
}));

/// Compares with the standard library, which knows fewer ranges.
fn check_address(address: IpAddr) {
    let guard = Guard::new(AllowList::default());
    let admitted = guard.admit(&address.to_string(), 443).now_or_never().expect("no look-up");
    if admitted.is_ok() {
        assert!(is_public(address), "{address}");
    }
}

fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_multicast()
                || v4.is_broadcast()
                || v4.is_documentation())
        }
        IpAddr::V6(v6) => {
            !(v6.is_loopback()
                || v6.is_unspecified()
                || v6.is_multicast()
                || v6.is_unique_local()
                || v6.is_unicast_link_local())
                && v6.to_ipv4().is_none_or(|v4| is_public(IpAddr::V4(v4)))
        }
    }
}
