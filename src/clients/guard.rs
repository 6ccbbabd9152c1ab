//! The guard before every call to an address that a user, or a server that a user named, has chosen.
//!
//! A host is resolved once. If any of its addresses is not public, none is called, unless the configuration allows it; else the caller
//! gets the addresses to connect to, so that a name cannot mean something else a moment later. Refusals name the kind of
//! an address, never the address or what was resolved.

mod address;
mod allow;
mod url;

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

pub use self::{
    allow::AllowList,
    url::{Schemes, parse_url},
};

/// How long a look-up may take.
const RESOLVE_WITHIN: Duration = Duration::from_secs(5);
/// The most addresses of a name that are tried.
const ADDRESSES_MAX: usize = 8;

/// Ports above 1023 on which something listens that is no web server, and that a request might confuse.
const OTHER_SERVICES: [u16; 24] = [
    1433, 1521, 1719, 1720, 1723, 2049, 2375, 2379, 2380, 3306, 3389, 4045, 5060, 5061, 5432, 5672, 6379, 6667, 9042,
    9092, 10250, 10255, 11211, 27017,
];

/// What turns names into addresses.
pub trait Resolve: Send + Sync {
    /// Looks a name up, once.
    fn resolve<'a>(&'a self, host: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>>;
}

/// The operating system's resolver.
#[derive(Debug)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str) -> Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send + 'a>> {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, 0)).await?.map(|address| address.ip()).collect()) })
    }
}

/// Why a host is not called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The guard forbids it; the text fits after "the host".
    #[error("{0}")]
    Refused(&'static str),
    /// The name has no address.
    #[error("cannot be resolved: there is no such name, or the resolver does not answer")]
    Unresolved,
}

/// Decides which addresses are called.
#[derive(Clone)]
pub struct Guard {
    allowed: AllowList,
    resolver: Arc<dyn Resolve>,
}

impl Guard {
    /// A guard that asks the operating system for addresses.
    #[must_use]
    pub fn new(allowed: AllowList) -> Self {
        Self::with_resolver(allowed, Arc::new(SystemResolver))
    }

    /// A guard with another resolver, as tests need that see what a hostile name server can do.
    #[must_use]
    pub fn with_resolver(allowed: AllowList, resolver: Arc<dyn Resolve>) -> Self {
        Self { allowed, resolver }
    }

    /// Says which addresses may be called for `host`: all that it has, or none. An IPv6 address stands in brackets.
    ///
    /// # Errors
    ///
    /// [`NotAdmitted`] if the host has no address, one that is not public, or the port is another service's.
    pub async fn admit(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, NotAdmitted> {
        let mut addresses = self.addresses(host).await?;
        addresses.truncate(ADDRESSES_MAX);
        let names_host = self.allowed.names(host);
        let mut is_allowed = true;
        for address in &addresses {
            if address::is_metadata(*address) && !self.allowed.singles_out(*address) {
                return Err(NotAdmitted::Refused("is a cloud's metadata service"));
            }
            if names_host || self.allowed.contains(*address) {
                continue;
            }
            is_allowed = false;
            if let Some(kind) = address::not_public(*address) {
                return Err(NotAdmitted::Refused(kind));
            }
        }
        if !is_allowed && !is_web_port(port) {
            return Err(NotAdmitted::Refused("is named with a port that other services than registries have"));
        }
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }

    async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, NotAdmitted> {
        let literal = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = literal.parse() {
            return Ok(vec![address]);
        }
        match tokio::time::timeout(RESOLVE_WITHIN, self.resolver.resolve(host)).await {
            Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
            _ => Err(NotAdmitted::Unresolved),
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

fn is_web_port(port: u16) -> bool {
    matches!(port, 80 | 443) || (port >= 1024 && !OTHER_SERVICES.contains(&port))
}

#[cfg(test)]
mod tests;
