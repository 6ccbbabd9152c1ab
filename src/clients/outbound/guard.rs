//! Guard against server-side request forgery: decides which hosts may be called.
//!
//! A host is resolved once. If any of its addresses is not public, the host is refused, unless the
//! configuration allows the address. Otherwise the caller gets the addresses to connect to, so that
//! the name cannot change its meaning later.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::{
    address,
    allow_list::AllowList,
    resolver::{Resolve, SystemResolver},
};

/// Time limit for resolving a name, including the wait for a thread.
const RESOLVE_WITHIN: Duration = Duration::from_secs(5);
/// Maximum number of addresses that a connection tries.
const ADDRESSES_MAX: usize = 8;

/// Ports above 1023 of well-known services other than HTTP, which a request could confuse.
const OTHER_SERVICES: [u16; 24] = [
    1433, 1521, 1719, 1720, 1723, 2049, 2375, 2379, 2380, 3306, 3389, 4045, 5060, 5061, 5432, 5672, 6379, 6667, 9042,
    9092, 10250, 10255, 11211, 27017,
];

/// Reason why a host may not be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardError {
    /// The address or port is forbidden; the text fits after the host's name.
    Forbidden(&'static str),
    /// The name has no address.
    NotResolved,
}

impl GuardError {
    /// Describes the refusal without the address, since a caller could probe a network with it.
    ///
    /// `allow_variable` names the variable that could allow the host.
    #[must_use]
    pub fn describe(&self, label: &str, allow_variable: &str) -> String {
        match self {
            Self::Forbidden(kind) => format!("{label} {kind}: to call it, add it to {allow_variable}"),
            Self::NotResolved => format!("{label} cannot be reached: its host name cannot be resolved"),
        }
    }
}

/// Decides which addresses may be called.
#[derive(Clone)]
pub struct Guard {
    allowed: AllowList,
    resolver: Arc<dyn Resolve>,
}

impl Guard {
    /// Creates a guard with a resolver of its own. A process has one guard for each purpose.
    #[must_use]
    pub fn new(allowed: AllowList) -> Self {
        Self::with_resolver(allowed, Arc::new(SystemResolver::default()))
    }

    /// Creates a guard with another resolver, so that tests can act as a hostile name server.
    #[must_use]
    pub fn with_resolver(allowed: AllowList, resolver: Arc<dyn Resolve>) -> Self {
        Self { allowed, resolver }
    }

    /// Resolves `host` and returns its addresses, or an error if any of them is forbidden.
    ///
    /// An IPv6 address is written in brackets.
    ///
    /// # Errors
    ///
    /// [`GuardError::Forbidden`] if an address is not public and not allowed, or if the port
    /// belongs to another service. [`GuardError::NotResolved`] if the name has no address.
    pub async fn admit(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, GuardError> {
        let mut addresses = self.addresses(host).await?;
        addresses.truncate(ADDRESSES_MAX);
        let names_host = self.allowed.names(host);
        let mut is_allowed = true;
        for address in &addresses {
            if address::is_metadata(*address) && !self.allowed.contains_exactly(*address) {
                return Err(GuardError::Forbidden("is a cloud's metadata service"));
            }
            if names_host || self.allowed.contains(*address) {
                continue;
            }
            is_allowed = false;
            if let Some(kind) = address::not_public(*address) {
                return Err(GuardError::Forbidden(kind));
            }
        }
        if !is_allowed && !is_web_port(port) {
            return Err(GuardError::Forbidden("has a port of a service other than HTTP"));
        }
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }

    /// Resolves `host` and returns its addresses, also if they are not public, unless one is that of a
    /// cloud's metadata service. For hosts that the person names who runs the process.
    ///
    /// # Errors
    ///
    /// [`GuardError::Forbidden`] for a metadata service, [`GuardError::NotResolved`] if the name has no
    /// address.
    pub async fn admit_anywhere(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, GuardError> {
        let mut addresses = self.addresses(host).await?;
        addresses.truncate(ADDRESSES_MAX);
        let is_forbidden =
            |address: &IpAddr| address::is_metadata(*address) && !self.allowed.contains_exactly(*address);
        if addresses.iter().any(is_forbidden) {
            return Err(GuardError::Forbidden("is a cloud's metadata service"));
        }
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect())
    }

    /// Whether the configuration allows `localhost` or a loopback address, by its name or its address.
    #[must_use]
    pub fn allows_loopback(&self, host: &str) -> bool {
        let literal = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        let address = literal.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        self.allowed.names(host) || self.allowed.contains(address)
    }

    /// Resolves a host that no user named, and admits every address of it.
    ///
    /// # Errors
    ///
    /// [`GuardError::NotResolved`].
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, GuardError> {
        let literal = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
        if let Ok(address) = literal.parse() {
            return Ok(vec![address]);
        }
        match tokio::time::timeout(RESOLVE_WITHIN, self.resolver.resolve(host)).await {
            Ok(Ok(addresses)) if !addresses.is_empty() => Ok(addresses),
            _ => Err(GuardError::NotResolved),
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
