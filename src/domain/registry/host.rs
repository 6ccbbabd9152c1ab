//! `host[:port]`, the part of a scope before the first slash.
//!
//! Uses the grammar of image references (`distribution/reference`, `regexp.go`, `domain`): no image
//! could match a scope with another host.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::domain::invalid::Invalid;

/// Splits off the port and checks both parts. Returns the canonical host.
pub(super) fn parse(authority: &str) -> Result<(String, Option<u16>), Invalid> {
    if authority.contains('@') {
        return Err(Invalid::new(
            "a user or password (`@`) does not belong in a registry: use the fields `username` and `password`",
        ));
    }
    let (host, port) = split(authority)?;
    let host = if let Some(address) = host.strip_prefix('[') { ipv6(address)? } else { name(host)? };
    Ok((host, port.map(parse_port).transpose()?))
}

fn split(authority: &str) -> Result<(&str, Option<&str>), Invalid> {
    if authority.starts_with('[') {
        let end = authority.find(']').map_or(authority.len(), |at| at + 1);
        let (host, rest) = authority.split_at(end);
        return match (rest.strip_prefix(':'), rest.is_empty()) {
            (Some(port), _) => Ok((host, Some(port))),
            (None, true) => Ok((host, None)),
            (None, false) => Err(not_ipv6()),
        };
    }
    match authority.split_once(':') {
        Some((_, port)) if port.contains(':') => {
            Err(Invalid::new("an IPv6 address must be in brackets, for example [2001:db8::1]:5000"))
        }
        Some((host, port)) => Ok((host, Some(port))),
        None => Ok((authority, None)),
    }
}

fn parse_port(port: &str) -> Result<u16, Invalid> {
    let refused = || Invalid::new("a port must be a number between 1 and 65535");
    if !port.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refused());
    }
    match port.parse() {
        Ok(0) | Err(_) => Err(refused()),
        Ok(port) => Ok(port),
    }
}

fn ipv6(address: &str) -> Result<String, Invalid> {
    let address: Ipv6Addr = address.strip_suffix(']').and_then(|address| address.parse().ok()).ok_or_else(not_ipv6)?;
    Ok(format!("[{address}]"))
}

fn not_ipv6() -> Invalid {
    Invalid::new("the brackets of a host must contain an IPv6 address, for example [2001:db8::1]:5000")
}

fn name(host: &str) -> Result<String, Invalid> {
    if host.is_empty() {
        return Err(Invalid::new(
            "the host is missing: write host[:port][/path], for example registry.example.com:5000",
        ));
    }
    if !host.is_ascii() {
        return Err(Invalid::new("a host must be ASCII: use the xn--… form of an international name"));
    }
    if host.len() > 253 {
        return Err(Invalid::new("a host has at most 253 characters"));
    }
    for label in host.split('.') {
        check_label(label)?;
    }
    let last = host.rsplit('.').next().unwrap_or_default();
    if last.bytes().all(|b| b.is_ascii_digit()) && host.parse::<Ipv4Addr>().is_err() {
        return Err(Invalid::new(
            "a host that ends in a number must be an IPv4 address of four numbers from 0 to 255, for example 10.0.0.1",
        ));
    }
    Ok(host.to_ascii_lowercase())
}

fn check_label(label: &str) -> Result<(), Invalid> {
    let refused = if label.is_empty() {
        "a host must not have an empty part: look for a leading, a trailing or a double dot"
    } else if label.len() > 63 {
        "a part of a host (between two dots) has at most 63 characters"
    } else if label.starts_with('-') || label.ends_with('-') {
        "a part of a host (between two dots) must not start or end with a hyphen"
    } else if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        "a host consists of letters, digits and hyphens, in parts separated by dots"
    } else {
        return Ok(());
    };
    Err(Invalid::new(refused))
}
