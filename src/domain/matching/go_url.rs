//! URLs as Go's `net/url` takes them apart, so far as it decides whether a key is found.
//!
//! Go accepts what other parsers refuse (a `*` in a host) and refuses what they accept, and the kubelet passes over a
//! key that is refused.

use std::net::Ipv6Addr;

/// Host with port, and path, of an `http` or `https` URL.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GoUrl {
    /// As written: case and brackets are kept.
    pub(super) host: String,
    /// Percent-decoded, empty or with its leading slash.
    pub(super) path: String,
}

impl GoUrl {
    /// `url.Parse` of `https://` and this; `None` where it fails, and where the path is not UTF-8, which no image's is.
    pub(super) fn parse(schemeless: &str) -> Option<Self> {
        if schemeless.bytes().any(|byte| byte < 0x20 || byte == 0x7f) {
            return None;
        }
        let (url, fragment) = schemeless.split_once('#').unwrap_or((schemeless, ""));
        percent_decoded(fragment)?;
        let url = url.split('?').next().unwrap_or_default();
        let (authority, path) = url.split_at(url.find('/').unwrap_or(url.len()));
        let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
        percent_decoded(user)?;
        (is_host(host) && user.bytes().all(is_in_userinfo)).then_some(())?;
        Some(Self { host: host.to_owned(), path: percent_decoded(path)? })
    }

    /// `net.SplitHostPort`, or else the whole host and no port (`pkg/credentialprovider/keyring.go`, `splitURL`). The
    /// brackets of an IPv6 address are taken off only where there is a port.
    pub(super) fn host_and_port(&self) -> (&str, &str) {
        let host = self.host.as_str();
        match host.rsplit_once(':') {
            Some((address, port)) if host.starts_with('[') => match address.strip_suffix(']') {
                Some(address) => (&address[1..], port),
                None => (host, ""),
            },
            Some((name, port)) if !name.contains(':') => (name, port),
            _ => (host, ""),
        }
    }
}

/// `parseHost`. Brackets around anything but an IPv6 address are refused since Go 1.25.2 (CVE-2025-47912).
fn is_host(host: &str) -> bool {
    if let Some(bracketed) = host.strip_prefix('[') {
        return bracketed
            .split_once(']')
            .is_some_and(|(address, port)| address.parse::<Ipv6Addr>().is_ok() && is_optional_port(port));
    }
    let port = host.rfind(':').map_or("", |colon| &host[colon..]);
    is_optional_port(port) && host.bytes().all(|byte| !byte.is_ascii() || is_in_host(byte))
}

/// Empty, or a colon and digits or nothing.
fn is_optional_port(port: &str) -> bool {
    port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What `shouldEscape` lets stand in a host. A percent sign is let stand in very few cases, none of them a host that an
/// image can name.
fn is_in_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:<>\"".contains(&byte)
}

/// `validUserinfo`.
fn is_in_userinfo(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._:~!$&'()*+,;=%".contains(&byte)
}

fn percent_decoded(text: &str) -> Option<String> {
    if !text.contains('%') {
        return Some(text.to_owned());
    }
    let mut parts = text.split('%');
    let mut decoded = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(2)?;
        digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then_some(())?;
        decoded.push(u8::from_str_radix(digits, 16).ok()?);
        decoded.extend_from_slice(rest.as_bytes());
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    /// Compared with the output of `net/url`.
    #[rstest]
    #[case("reg.io", "reg.io", "")]
    #[case("reg.io/", "reg.io", "/")]
    #[case("reg.io:5000/a/b", "reg.io:5000", "/a/b")]
    #[case("reg.io:/a", "reg.io:", "/a")]
    #[case("*.reg.io", "*.reg.io", "")]
    #[case("Reg.io", "Reg.io", "")]
    #[case("reg.io?x=/a", "reg.io", "")]
    #[case("reg.io/a?x#y", "reg.io", "/a")]
    #[case("reg.io#/a", "reg.io", "")]
    #[case("me:pw@reg.io/a", "reg.io", "/a")]
    #[case("reg.io/a%20b", "reg.io", "/a b")]
    #[case("reg.io/a b", "reg.io", "/a b")]
    #[case("[::1]:5000", "[::1]:5000", "")]
    #[case("HTTPS://reg.io", "HTTPS:", "//reg.io")]
    #[case("", "", "")]
    fn a_url_has_host_and_path(#[case] url: &str, #[case] host: &str, #[case] path: &str) {
        let (host, path) = (host.to_owned(), path.to_owned());
        assert_eq!(GoUrl::parse(url), Some(GoUrl { host, path }));
    }

    #[rstest]
    #[case("reg.io\n")]
    #[case("re g.io")]
    #[case("reg.io:http")]
    #[case("reg[12].io")]
    #[case("[::1")]
    #[case("[reg.io]")]
    #[case("[::1]x")]
    #[case("reg.io/%zz")]
    #[case("reg.io/%2")]
    #[case("reg.io/%+1")]
    #[case("reg.io/%€")]
    #[case("reg%41.io")]
    #[case("reg.io#%")]
    #[case("m\\e@reg.io")]
    fn what_go_refuses_is_no_url(#[case] url: &str) {
        assert_eq!(GoUrl::parse(url), None);
    }

    #[rstest]
    #[case("reg.io:5000", "reg.io", "5000")]
    #[case("reg.io", "reg.io", "")]
    #[case("reg.io:", "reg.io", "")]
    #[case("[::1]:5000", "::1", "5000")]
    #[case("[::1]", "[::1]", "")]
    fn the_port_is_split_off(#[case] url: &str, #[case] host: &str, #[case] port: &str) {
        assert_eq!(GoUrl::parse(url).unwrap().host_and_port(), (host, port));
    }
}
