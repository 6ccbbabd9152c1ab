//! Who calls and what he may do.

use std::str::FromStr;

use uuid::Uuid;

use crate::domain::invalid::Invalid;

/// A right that a route asks for. *Deliver* and *reveal* are separate on purpose: to place a credential in a
/// namespace is not to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// See registry accounts, never their passwords.
    ReadAccounts,
    /// Create, change and delete registry accounts.
    WriteAccounts,
    /// See clusters, never their credentials.
    ReadClusters,
    /// Create, change and delete clusters.
    WriteClusters,
    /// Receive a docker config, which holds passwords.
    RevealCredentials,
    /// Have a Secret placed in a namespace.
    DeliverSecrets,
    /// Be known: what every valid caller may do.
    Authenticated,
}

/// What an API key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Admin,
}

impl Role {
    /// Whether this role includes `permission`.
    #[must_use]
    pub fn allows(self, permission: Permission) -> bool {
        match (self, permission) {
            (Role::Admin, _) => true,
        }
    }

    /// The name in the API and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Admin => "admin",
        }
    }
}

impl FromStr for Role {
    type Err = Invalid;

    fn from_str(role: &str) -> Result<Self, Invalid> {
        match role {
            "admin" => Ok(Role::Admin),
            _ => Err(Invalid::new("must be `admin`, the only role there is so far")),
        }
    }
}

/// A caller whose key was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Id of the API key.
    pub key_id: Uuid,
    /// Name of the API key.
    pub name: String,
    /// What the key is for.
    pub role: Role,
}

/// What the row of a key holds of its secret.
#[derive(Debug, Clone)]
pub struct KeyVerifier {
    /// HMAC-SHA-256 of the whole key under the pepper.
    pub mac: Vec<u8>,
    /// PHC string of argon2id.
    pub hash: String,
}
