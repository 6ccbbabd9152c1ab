//! Who calls and what he may do: the one table of permissions.

use std::{
    hash::{Hash, Hasher},
    net::IpAddr,
    ops::Deref,
    str::FromStr,
    sync::Arc,
};

use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::domain::{
    grants::{Grants, GrantsDocument},
    invalid::{FieldError, FieldErrors, Invalid},
    names::Name,
};

/// A right that a route asks for. *Deliver* and *reveal* are separate on purpose: to place a credential in a
/// namespace is not to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// Be known: what every valid caller may do.
    Authenticated,
    /// See registry accounts, never their passwords.
    ReadAccounts,
    /// Create, change and delete registry accounts.
    WriteAccounts,
    /// Receive a docker config, which holds passwords.
    RevealCredentials,
    /// See and check clusters, never their credentials.
    ReadClusters,
    /// Create, change and delete clusters.
    WriteClusters,
    /// Have a Secret placed in a namespace.
    DeliverSecrets,
    /// See pull secrets and how their targets are doing.
    ReadPullSecrets,
    /// Declare, change and remove pull secrets.
    WritePullSecrets,
    /// See API keys, never their text.
    ReadApiKeys,
    /// Make and revoke API keys.
    WriteApiKeys,
    /// See identity providers.
    ReadIdentityProviders,
    /// Create, change and delete identity providers.
    WriteIdentityProviders,
    /// Read the audit record: who did what, never a value.
    ReadAudit,
}

impl Permission {
    /// Whether it shows what belongs to everybody, so that whoever reaches a part alone does not have it.
    #[must_use]
    pub fn needs_all_grants(self) -> bool {
        matches!(self, Permission::ReadIdentityProviders | Permission::ReadAudit)
    }
}

/// What an API key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Everything.
    Admin,
    /// Accounts and clusters, and where they go; no stored password.
    Operator,
    /// Places granted accounts into granted namespaces; no password.
    Deliverer,
    /// Obtains docker configs of granted accounts.
    Renderer,
    /// Sees everything but passwords and keys, and changes nothing.
    Viewer,
}

const YES: bool = true;
const NO_: bool = false;

/// Which role has which permission. A permission that has no row is nobody's. `docs/ACCESS.md` shows this table, and
/// a test compares the two.
#[rustfmt::skip]
const TABLE: &[(Permission, [bool; Role::ALL.len()])] = &[
    //                              admin operator deliverer renderer viewer
    (Permission::Authenticated,     [YES,  YES,     YES,      YES,     YES]),
    (Permission::ReadAccounts,      [YES,  YES,     YES,      YES,     YES]),
    (Permission::WriteAccounts,     [YES,  YES,     NO_,      NO_,     NO_]),
    (Permission::RevealCredentials, [YES,  NO_,     NO_,      YES,     NO_]),
    (Permission::ReadClusters,      [YES,  YES,     YES,      NO_,     YES]),
    (Permission::WriteClusters,     [YES,  YES,     NO_,      NO_,     NO_]),
    (Permission::DeliverSecrets,    [YES,  YES,     YES,      NO_,     NO_]),
    (Permission::ReadPullSecrets,   [YES,  YES,     YES,      NO_,     YES]),
    (Permission::WritePullSecrets,  [YES,  YES,     NO_,      NO_,     NO_]),
    (Permission::ReadApiKeys,       [YES,  NO_,     NO_,      NO_,     NO_]),
    (Permission::WriteApiKeys,      [YES,  NO_,     NO_,      NO_,     NO_]),
    (Permission::ReadIdentityProviders,  [YES, NO_, NO_,      NO_,     YES]),
    (Permission::WriteIdentityProviders, [YES, NO_, NO_,      NO_,     NO_]),
    (Permission::ReadAudit,         [YES,  NO_,     NO_,      NO_,     YES]),
];

impl Role {
    /// All roles, in the order of the table's columns.
    pub const ALL: [Role; 5] = [Role::Admin, Role::Operator, Role::Deliverer, Role::Renderer, Role::Viewer];

    /// Whether this role includes `permission`.
    #[must_use]
    pub fn allows(self, permission: Permission) -> bool {
        let has = |(_, columns): &(_, [bool; Role::ALL.len()])| {
            Self::ALL.iter().zip(columns).any(|(role, has)| *role == self && *has)
        };
        TABLE.iter().filter(|(of, _)| *of == permission).any(has)
    }

    /// Whether this role reaches everything of a kind that its grants do not mention; else it reaches nothing of it.
    #[must_use]
    pub fn reaches_all_by_default(self) -> bool {
        match self {
            Role::Admin | Role::Operator | Role::Viewer => true,
            Role::Deliverer | Role::Renderer => false,
        }
    }

    /// Whether grants can narrow this role. Who makes keys has everything, so nobody grants more than he has.
    #[must_use]
    pub fn takes_grants(self) -> bool {
        self != Role::Admin
    }

    /// The name in the API and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Operator => "operator",
            Role::Deliverer => "deliverer",
            Role::Renderer => "renderer",
            Role::Viewer => "viewer",
        }
    }
}

impl FromStr for Role {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let known = Self::ALL.into_iter().find(|role| role.as_str() == text);
        known.ok_or_else(|| Invalid::new("must be admin, operator, deliverer, renderer or viewer"))
    }
}

/// What kind of caller does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActorKind {
    /// Somebody with an API key.
    ApiKey,
    /// Somebody with a token of an identity provider.
    IdentityProvider,
    /// Somebody at the command line, who has the database and the service's secrets.
    CommandLine,
    /// regcred itself, which does what was declared.
    Worker,
    /// Somebody who was not let in.
    Anonymous,
}

impl ActorKind {
    /// The name in the API and in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ApiKey => "apiKey",
            Self::IdentityProvider => "identityProvider",
            Self::CommandLine => "commandLine",
            Self::Worker => "worker",
            Self::Anonymous => "anonymous",
        }
    }
}

/// Who does something, as answers, the log and the record name him.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// What he is.
    pub kind: ActorKind,
    /// Id of the API key, where it is one.
    pub id: Option<Uuid>,
    /// Name of the API key, or of the user at the command line; of somebody with a token, name of the provider and subject.
    pub name: String,
}

/// A caller whose key or token was verified. Every use case that serves a caller takes one, and keeps to its grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who he is.
    pub actor: Actor,
    /// What he may do.
    pub role: Role,
    /// What it reaches.
    pub grants: Grants,
    /// When it ends, if ever.
    pub expires_at: Option<DateTime<Utc>>,
}

impl Identity {
    /// Whether his role includes `permission`, and his grants are wide enough for it.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        self.role.allows(permission) && (!permission.needs_all_grants() || self.grants.include_everything())
    }
}

/// A caller in one of his requests: what is recorded of who did something.
#[derive(Debug, Clone)]
pub struct Call {
    /// Who calls.
    pub identity: Arc<Identity>,
    /// Id of the request.
    pub request_id: Uuid,
    /// The address that it comes from.
    pub source: Option<IpAddr>,
}

impl Deref for Call {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.identity
    }
}

/// An API key to be made.
#[derive(Debug)]
pub struct NewApiKey {
    /// Unique among the keys that are not revoked.
    pub name: Name,
    /// What it is for.
    pub role: Role,
    /// What it reaches.
    pub grants: Grants,
    /// When it ends, if ever.
    pub expires_at: Option<DateTime<Utc>>,
}

impl NewApiKey {
    /// Parses what somebody wants of a key.
    ///
    /// # Errors
    ///
    /// Every field that is refused.
    pub fn parse(
        name: &str,
        role: &str,
        grants: Option<GrantsDocument>,
        expires_at: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> Result<Self, Vec<FieldError>> {
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(name));
        let role = errors.take("role", role.parse::<Role>());
        let grants = grants.unwrap_or_default();
        if role.is_some_and(|role| !role.takes_grants()) && grants != GrantsDocument::default() {
            errors.refuse("grants", "must be left out: an admin reaches everything");
        }
        let grants = errors.take_all(Grants::parse(role.unwrap_or(Role::Viewer), grants));
        if expires_at.is_some_and(|at| at <= now) {
            errors.refuse("expiresAt", "must be in the future");
        }
        errors.finish(|| Some(Self { name: name?, role: role?, grants: grants?, expires_at }))
    }
}

/// What the row of a key holds of its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyVerifier {
    /// HMAC-SHA-256 of the whole key under the pepper.
    pub mac: Vec<u8>,
    /// PHC string of argon2id.
    pub hash: String,
}

/// By the HMAC alone, which tells all keys apart.
impl Hash for KeyVerifier {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.mac.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_shows_the_same_table() {
        let document = include_str!("../../docs/ACCESS.md");
        let cells = |line: &str| -> Vec<String> {
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let mut rows = document.lines().skip_while(|line| !line.starts_with("| Permission "));
        let header = cells(rows.next().expect("the table"));
        assert_eq!(header[2..], Role::ALL.map(|role| role.as_str().to_owned()));
        let shown: Vec<Vec<String>> = rows.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
        assert_eq!(shown.len(), TABLE.len());
        for (row, (permission, columns)) in shown.iter().zip(TABLE) {
            assert_eq!(row[0], format!("{permission:?}"));
            assert_eq!(row[2..], columns.map(|has| if has { "yes" } else { "" }.to_owned()), "{permission:?}");
        }
    }

    #[test]
    fn nobody_grants_more_than_he_has() {
        for role in Role::ALL {
            for permission in [Permission::WriteApiKeys, Permission::WriteIdentityProviders] {
                assert!(!role.allows(permission) || !role.takes_grants(), "{role:?}");
            }
        }
    }

    #[test]
    fn who_delivers_does_not_reveal() {
        assert!(Role::Deliverer.allows(Permission::DeliverSecrets));
        assert!(!Role::Deliverer.allows(Permission::RevealCredentials));
    }

    #[test]
    fn roles_are_read_as_they_are_written() {
        for role in Role::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("Admin".parse::<Role>().is_err());
    }
}
