//! Trusted reverse proxies, and the client address that they report.

use std::{
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use crate::domain::{invalid::Invalid, network::Networks};

/// Header in which the proxies report the client address.
///
/// Only the configured header is read: a client could send the other one, which its proxy forwards
/// unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ForwardingHeader {
    /// `X-Forwarded-For`: comma-separated addresses.
    #[default]
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

impl ForwardingHeader {
    /// Name of the header, in lower case.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::XForwardedFor => "x-forwarded-for",
            Self::Forwarded => "forwarded",
        }
    }

    /// Address in one element of the list.
    fn address(self, element: &str) -> Option<IpAddr> {
        match self {
            Self::XForwardedFor => node(element.trim()),
            Self::Forwarded => forwarded_for(element),
        }
    }
}

impl FromStr for ForwardingHeader {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let mut known = [Self::XForwardedFor, Self::Forwarded].into_iter();
        let named = known.find(|header| header.as_str().eq_ignore_ascii_case(text));
        named.ok_or_else(|| Invalid::new("must be X-Forwarded-For or Forwarded"))
    }
}

/// Trusted proxies, and the header that they set. By default none is trusted.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    /// Networks of the proxies.
    pub trusted: Networks,
    /// Header that they set.
    pub header: ForwardingHeader,
}

impl Proxies {
    /// Client address of a request that arrived from `peer`.
    ///
    /// If `peer` is trusted, this is the rightmost address of the header that is not a trusted
    /// proxy. Addresses left of it are under the client's control. It is `peer` if that is not
    /// trusted, or if the header is missing or malformed.
    ///
    /// `lines` are the values of [`Self::header`], in order.
    pub fn client<'a>(&self, peer: IpAddr, lines: impl DoubleEndedIterator<Item = &'a [u8]>) -> IpAddr {
        if self.trusted.is_empty() || !self.trusted.contain(peer) {
            return peer;
        }
        let mut client = peer;
        for line in lines.rev() {
            let Ok(line) = str::from_utf8(line) else { return peer };
            for element in line.rsplit(',') {
                let Some(address) = self.header.address(element) else { return peer };
                client = address.to_canonical();
                if !self.trusted.contain(client) {
                    return client;
                }
            }
        }
        client
    }
}

/// Parameter `for` of an element of `Forwarded`.
///
/// A quoted comma or semicolon splits the value, and the parts are not addresses.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut found = None;
    for parameter in element.split(';') {
        let (name, value) = parameter.trim().split_once('=')?;
        if !name.eq_ignore_ascii_case("for") {
            continue;
        }
        if found.is_some() {
            return None;
        }
        let quoted = value.strip_prefix('"').map(|rest| rest.strip_suffix('"'));
        found = Some(match quoted {
            Some(inner) => node(inner?)?,
            None => node(value)?,
        });
    }
    found
}

/// Parses an address with an optional port. IPv6 with a port needs brackets. Names and obfuscated
/// identifiers are refused.
fn node(text: &str) -> Option<IpAddr> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(address);
    }
    if let Some(inner) = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
        return inner.parse().ok().map(IpAddr::V6);
    }
    text.parse::<SocketAddr>().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn client(header: ForwardingHeader, peer: &str, lines: &[&str]) -> String {
        let proxies = Proxies { trusted: "10.0.0.0/8, fd00::/8, 127.0.0.1".parse().unwrap(), header };
        proxies.client(peer.parse().unwrap(), lines.iter().map(|line| line.as_bytes())).to_string()
    }

    #[rstest]
    #[case("10.0.0.1", &["203.0.113.7"], "203.0.113.7")]
    #[case("::ffff:10.0.0.1", &["203.0.113.7"], "203.0.113.7")]
    #[case("10.0.0.1", &["203.0.113.7:4711"], "203.0.113.7")]
    #[case("10.0.0.1", &["2001:db8::1"], "2001:db8::1")]
    #[case("10.0.0.1", &["[2001:db8::1]:4711"], "2001:db8::1")]
    #[case("10.0.0.1", &["[2001:db8::1]"], "2001:db8::1")]
    #[case("10.0.0.1", &["::ffff:203.0.113.7"], "203.0.113.7")]
    // The rightmost address that is not a proxy; the client sent the rest.
    #[case("10.0.0.1", &["198.51.100.9, 203.0.113.7, 10.2.3.4"], "203.0.113.7")]
    #[case("10.0.0.1", &["198.51.100.9", "203.0.113.7"], "203.0.113.7")]
    #[case("10.0.0.1", &["garbage, 203.0.113.7"], "203.0.113.7")]
    // Only proxies: the leftmost one.
    #[case("10.0.0.1", &["10.9.9.9, 10.2.3.4"], "10.9.9.9")]
    // The peer is not trusted.
    #[case("198.51.100.1", &["203.0.113.7"], "198.51.100.1")]
    // Malformed headers are ignored.
    #[case("10.0.0.1", &[], "10.0.0.1")]
    #[case("10.0.0.1", &["203.0.113.7, "], "10.0.0.1")]
    #[case("10.0.0.1", &["garbage"], "10.0.0.1")]
    #[case("10.0.0.1", &["203.0.113.7, unknown, 10.1.1.1"], "10.0.0.1")]
    #[case("10.0.0.1", &["203.0.113.7:port"], "10.0.0.1")]
    #[case("10.0.0.1", &["[203.0.113.7]"], "10.0.0.1")]
    fn x_forwarded_for_is_read_from_the_right(#[case] peer: &str, #[case] lines: &[&str], #[case] expected: &str) {
        assert_eq!(client(ForwardingHeader::XForwardedFor, peer, lines), expected);
    }

    #[rstest]
    #[case(&["for=203.0.113.7"], "203.0.113.7")]
    #[case(&["For=\"[2001:db8::1]:4711\";proto=https;by=10.0.0.1"], "2001:db8::1")]
    #[case(&["proto=https; for=203.0.113.7"], "203.0.113.7")]
    #[case(&["for=198.51.100.9, for=203.0.113.7;by=10.0.0.9, for=10.0.0.9"], "203.0.113.7")]
    #[case(&["for=198.51.100.9", "for=203.0.113.7"], "203.0.113.7")]
    #[case(&["for=\"203.0.113.7:80\""], "203.0.113.7")]
    #[case(&["for=unknown"], "10.0.0.1")]
    #[case(&["for=_hidden"], "10.0.0.1")]
    #[case(&["proto=https"], "10.0.0.1")]
    #[case(&["203.0.113.7"], "10.0.0.1")]
    #[case(&["for=\"203.0.113.7"], "10.0.0.1")]
    #[case(&["for=203.0.113.7;for=198.51.100.9"], "10.0.0.1")]
    #[case(&["for=198.51.100.9;x=\"a,for=203.0.113.7;y=b\""], "203.0.113.7")]
    fn forwarded_is_read_from_the_right(#[case] lines: &[&str], #[case] expected: &str) {
        assert_eq!(client(ForwardingHeader::Forwarded, "10.0.0.1", lines), expected);
    }

    #[test]
    fn without_trusted_proxies_the_peer_is_the_client() {
        let proxies = Proxies { trusted: Networks::default(), header: ForwardingHeader::XForwardedFor };
        let peer = "127.0.0.1".parse().unwrap();
        assert_eq!(proxies.client(peer, [&b"203.0.113.7"[..]].into_iter()), peer);
    }

    #[test]
    fn header_names_are_parsed_case_insensitively() {
        assert_eq!("x-forwarded-for".parse(), Ok(ForwardingHeader::XForwardedFor));
        assert_eq!("Forwarded".parse(), Ok(ForwardingHeader::Forwarded));
        assert!("X-Real-IP".parse::<ForwardingHeader>().is_err());
    }
}
