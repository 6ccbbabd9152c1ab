//! Parsers of this module, for the fuzz targets in `fuzz/`. Compiled with `--cfg fuzzing` only, which
//! cargo-fuzz sets.

use std::{fmt::Display, str::FromStr};

use actix_web::http::header::{AUTHORIZATION, HeaderMap, HeaderValue};

pub use crate::http::paging::TargetKey;
use crate::http::{auth, framing::Scanner, paging::PageQuery, query};

/// Scans the bytes of a connection, which arrive in pieces of this size. Returns them as the parser
/// receives them, and where requests end; `None` for an invalid chunked body.
#[must_use]
pub fn scan_requests(sent: &[u8], piece: usize) -> Option<(Vec<u8>, Vec<usize>)> {
    let (mut scanner, mut bytes, mut ends) = (Scanner::default(), sent.to_vec(), Vec::new());
    let count = bytes.len();
    let mut at = 0;
    while at < count {
        let end = count.min(at + piece);
        at = match scanner.scan(&mut bytes[at..end]).ok()? {
            Some(length) => {
                ends.push(at + length);
                at + length
            }
            None => end,
        };
    }
    Some((bytes, ends))
}

/// Returns the credential in an `Authorization` header.
#[must_use]
pub fn bearer(authorization: &[u8]) -> Option<String> {
    let mut headers = HeaderMap::new();
    headers.insert(AUTHORIZATION, HeaderValue::from_bytes(authorization).ok()?);
    auth::bearer(&headers).map(str::to_owned)
}

/// Returns the key that a query string of a list starts after.
#[must_use]
pub fn page_after<K: FromStr + Display>(query: &str) -> Option<String> {
    query::parse::<PageQuery<K>>(query).ok()?.request().after
}
