//! URLs that somebody else wrote: only those with one plain meaning are taken.

use url::Url;

/// Longer URLs are refused unread.
const URL_MAX: usize = 2048;

/// Which schemes a URL may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schemes {
    /// `https` alone.
    Https,
    /// `http` too.
    HttpAndHttps,
}

/// Reads an absolute URL whose host has one spelling: no user or password, no fragment, no address in decimal, octal,
/// hexadecimal or shortened form, nothing that another program could read otherwise.
///
/// # Errors
///
/// What is wrong with it, never repeating it; the text fits after "the URL".
pub fn parse_url(text: &str, schemes: Schemes) -> Result<Url, &'static str> {
    if text.len() > URL_MAX {
        return Err("is too long");
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\\"<>^`{|}".contains(&byte)) {
        return Err("has characters that do not belong in a URL");
    }
    let Some((scheme, rest)) = text.split_once("://") else { return Err("is not absolute") };
    match scheme.to_ascii_lowercase().as_str() {
        "https" => {}
        "http" if schemes == Schemes::HttpAndHttps => {}
        "http" => return Err("is http://, over which no login is sent unless the account has plainHttp"),
        _ => return Err("has another scheme than https"),
    }
    if text.contains('#') {
        return Err("has a fragment");
    }
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    if authority.contains('@') {
        return Err("has a user or password in it");
    }
    let url = Url::parse(text).map_err(|_| "cannot be read")?;
    let host = match authority.rsplit_once(':') {
        // Inside of brackets a colon is no port's.
        Some((host, port)) if !port.contains(']') => {
            if !port.bytes().all(|b| b.is_ascii_digit()) || port.is_empty() || url.port_or_known_default() == Some(0) {
                return Err("has an odd port");
            }
            host
        }
        _ => authority,
    };
    // The parser turns 2130706433, 0177.1 and 0x7f.1 into 127.0.0.1, as some resolvers do and others do not.
    let is_plain = url.host_str().is_some_and(|parsed| parsed.eq_ignore_ascii_case(host)) && !host.ends_with('.');
    if is_plain { Ok(url) } else { Err("has a host in an odd spelling") }
}
