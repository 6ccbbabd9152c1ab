//! Strict parser for URLs from untrusted sources: accepts only URLs with one unambiguous meaning.

use url::Url;

/// Maximum length of a URL, in bytes.
const URL_MAX: usize = 2048;

/// Schemes that a URL may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schemes {
    /// Only `https`.
    Https,
    /// `https` and `http`.
    HttpAndHttps,
}

/// Parses an absolute URL whose host has one spelling.
///
/// Refuses user information, fragments, addresses in decimal, octal, hexadecimal or shortened form,
/// and everything else that another program could read differently.
///
/// # Errors
///
/// The reason, without the URL itself. The text fits after "the URL".
pub fn parse_url(text: &str, schemes: Schemes) -> Result<Url, &'static str> {
    if text.len() > URL_MAX {
        return Err("is too long");
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\\"<>^`{|}".contains(&byte)) {
        return Err("contains characters that a URL may not contain");
    }
    let Some((scheme, rest)) = text.split_once("://") else { return Err("is not absolute") };
    match scheme.to_ascii_lowercase().as_str() {
        "https" => {}
        "http" if schemes == Schemes::HttpAndHttps => {}
        "http" => return Err("is http://: credentials are sent over http:// only if the account has plainHttp"),
        _ => return Err("has a scheme other than https"),
    }
    if text.contains('#') {
        return Err("has a fragment");
    }
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err("contains a user name or password");
    }
    let url = Url::parse(text).map_err(|_| "cannot be parsed")?;
    let host = match authority.rsplit_once(':') {
        // A colon inside brackets belongs to an IPv6 address.
        Some((host, port)) if !port.contains(']') => {
            if !port.bytes().all(|b| b.is_ascii_digit()) || port.is_empty() || url.port_or_known_default() == Some(0) {
                return Err("has an invalid port");
            }
            host
        }
        _ => authority,
    };
    // The parser turns 2130706433, 0177.1 and 0x7f.1 into 127.0.0.1. Resolvers disagree about these
    // spellings.
    let is_plain = url.host_str().is_some_and(|parsed| parsed.eq_ignore_ascii_case(host)) && !host.ends_with('.');
    if is_plain { Ok(url) } else { Err("has a host in an ambiguous spelling") }
}
