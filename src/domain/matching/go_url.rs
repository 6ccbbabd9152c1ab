//! URL parsing as in Go's `net/url`, as far as key lookup depends on it.
//!
//! Go accepts URLs that other parsers reject, such as `*` in a host, and vice versa. The kubelet
//! skips a key that Go rejects.

use std::net::Ipv6Addr;

/// Host with port, and path, of an `http` or `https` URL.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GoUrl {
    /// As written, with case and brackets.
    pub(super) host: String,
    /// Percent-decoded; empty or with a leading slash.
    pub(super) path: String,
}

impl GoUrl {
    /// Parses `https://` followed by `schemeless`, like `url.Parse`.
    ///
    /// Also `None` if the path is not UTF-8, which no image's is.
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

    /// Splits host and port like `net.SplitHostPort`; without a port, returns the complete host
    /// (`pkg/credentialprovider/keyring.go`, `splitURL`).
    ///
    /// Brackets of an IPv6 address are removed only if there is a port.
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

/// `parseHost`. Rejects brackets around anything but an IPv6 address, as Go does since 1.25.2
/// (CVE-2025-47912).
fn is_host(host: &str) -> bool {
    if let Some(bracketed) = host.strip_prefix('[') {
        return bracketed
            .split_once(']')
            .is_some_and(|(address, port)| address.parse::<Ipv6Addr>().is_ok() && is_optional_port(port));
    }
    let port = host.rfind(':').map_or("", |colon| &host[colon..]);
    is_optional_port(port) && host.bytes().all(|byte| !byte.is_ascii() || is_in_host(byte))
}

/// Empty, or a colon with optional digits.
fn is_optional_port(port: &str) -> bool {
    port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Characters that `shouldEscape` allows in a host. Go allows a percent sign only in hosts that no
/// image can name.
fn is_in_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:<>\"".contains(&byte)
}

/// Characters that `validUserinfo` allows.
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

    /// Expected values are output of `net/url`.
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
    fn url_splits_into_host_and_path(#[case] url: &str, #[case] host: &str, #[case] path: &str) {
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
    fn urls_rejected_by_go_are_rejected(#[case] url: &str) {
        assert_eq!(GoUrl::parse(url), None);
    }

    #[rstest]
    #[case("reg.io:5000", "reg.io", "5000")]
    #[case("reg.io", "reg.io", "")]
    #[case("reg.io:", "reg.io", "")]
    #[case("[::1]:5000", "::1", "5000")]
    #[case("[::1]", "[::1]", "")]
    fn port_is_split_off(#[case] url: &str, #[case] host: &str, #[case] port: &str) {
        assert_eq!(GoUrl::parse(url).unwrap().host_and_port(), (host, port));
    }
}
