//! Callers, their roles and permissions. `TABLE` is the only definition of what a role may do.
//!
//! A request is authorized in two steps. The role must include the [`Permission`] of the route, and
//! the [`Grants`] must include the resource.

use std::{
    hash::{Hash, Hasher},
    net::IpAddr,
    ops::Deref,
    str::FromStr,
    sync::Arc,
};

use chrono::{DateTime, TimeDelta, Utc};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::{
    grants::{Grants, GrantsDocument},
    idempotency::IdempotentRequest,
    invalid::{FieldError, FieldErrors, Invalid},
    names::Name,
    network::{Networks, parse_source_network},
};

/// Permission that a route requires.
///
/// Delivering and revealing a credential are separate permissions: placing a Secret in a namespace
/// does not disclose the password to the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permission {
    /// Authenticate. Every valid caller has this permission.
    Authenticated,
    /// Read registry accounts, without their passwords.
    ReadAccounts,
    /// Create, change and delete registry accounts.
    WriteAccounts,
    /// Receive docker configs, which contain passwords.
    RevealCredentials,
    /// Read and check clusters, without their credentials.
    ReadClusters,
    /// Create, change and delete clusters.
    WriteClusters,
    /// Deliver a Secret to a namespace.
    DeliverSecrets,
    /// Diagnose the image pulls of pods, which reads the values of their pull secrets.
    DiagnosePods,
    /// Run the coverage of clusters, which reads the values of all pull secrets in use, and read it.
    DiagnoseClusters,
    /// Read pull secrets and the status of their targets.
    ReadPullSecrets,
    /// Create, change and delete pull secrets.
    WritePullSecrets,
    /// Read API keys, without their text.
    ReadApiKeys,
    /// Create and revoke API keys.
    WriteApiKeys,
    /// Read identity providers.
    ReadIdentityProviders,
    /// Create, change and delete identity providers.
    WriteIdentityProviders,
    /// Read the audit log, which never contains secret values.
    ReadAudit,
}

impl Permission {
    /// Whether the permission also requires grants that include everything.
    ///
    /// - Identity providers and audit events name resources of all callers.
    /// - A cluster decides where the accounts of all callers are sent: a caller that could point it
    ///   at another server would receive passwords that it is not granted.
    /// - The coverage of a cluster names accounts, namespaces and workloads of all callers.
    #[must_use]
    pub fn needs_all_grants(self) -> bool {
        matches!(
            self,
            Permission::WriteClusters
                | Permission::DiagnoseClusters
                | Permission::ReadIdentityProviders
                | Permission::ReadAudit
        )
    }

    /// Returns the name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Authenticated => "authenticated",
            Self::ReadAccounts => "readAccounts",
            Self::WriteAccounts => "writeAccounts",
            Self::RevealCredentials => "revealCredentials",
            Self::ReadClusters => "readClusters",
            Self::WriteClusters => "writeClusters",
            Self::DeliverSecrets => "deliverSecrets",
            Self::DiagnosePods => "diagnosePods",
            Self::DiagnoseClusters => "diagnoseClusters",
            Self::ReadPullSecrets => "readPullSecrets",
            Self::WritePullSecrets => "writePullSecrets",
            Self::ReadApiKeys => "readApiKeys",
            Self::WriteApiKeys => "writeApiKeys",
            Self::ReadIdentityProviders => "readIdentityProviders",
            Self::WriteIdentityProviders => "writeIdentityProviders",
            Self::ReadAudit => "readAudit",
        }
    }
}

/// Role of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ToSchema)]
#[schema(rename_all = "camelCase")]
pub enum Role {
    /// Has every permission on every resource. Grants cannot restrict it.
    Admin,
    /// Manages accounts, clusters and pull secrets. Cannot read passwords.
    Operator,
    /// Delivers granted accounts to granted namespaces. Cannot read passwords.
    Deliverer,
    /// Receives docker configs of granted accounts.
    Renderer,
    /// Reads everything except passwords and API keys. Changes nothing.
    Viewer,
}

const YES: bool = true;
const NO_: bool = false;

/// Permissions of each role: one row per permission, one column per role, in the order of
/// [`Role::ALL`].
///
/// A permission without a row is denied to every role. `docs/ACCESS.md` publishes this table; a
/// test compares the two.
#[rustfmt::skip]
const TABLE: &[(Permission, [bool; Role::ALL.len()])] = &[
    //                                   admin operator deliverer renderer viewer
    (Permission::Authenticated,          [YES, YES,     YES,      YES,     YES]),
    (Permission::ReadAccounts,           [YES, YES,     YES,      YES,     YES]),
    (Permission::WriteAccounts,          [YES, YES,     NO_,      NO_,     NO_]),
    (Permission::RevealCredentials,      [YES, NO_,     NO_,      YES,     NO_]),
    (Permission::ReadClusters,           [YES, YES,     YES,      NO_,     YES]),
    (Permission::WriteClusters,          [YES, YES,     NO_,      NO_,     NO_]),
    (Permission::DeliverSecrets,         [YES, YES,     YES,      NO_,     NO_]),
    (Permission::DiagnosePods,           [YES, YES,     NO_,      NO_,     NO_]),
    (Permission::DiagnoseClusters,       [YES, YES,     NO_,      NO_,     NO_]),
    (Permission::ReadPullSecrets,        [YES, YES,     YES,      NO_,     YES]),
    (Permission::WritePullSecrets,       [YES, YES,     NO_,      NO_,     NO_]),
    (Permission::ReadApiKeys,            [YES, NO_,     NO_,      NO_,     NO_]),
    (Permission::WriteApiKeys,           [YES, NO_,     NO_,      NO_,     NO_]),
    (Permission::ReadIdentityProviders,  [YES, NO_,     NO_,      NO_,     YES]),
    (Permission::WriteIdentityProviders, [YES, NO_,     NO_,      NO_,     NO_]),
    (Permission::ReadAudit,              [YES, NO_,     NO_,      NO_,     YES]),
];

impl Role {
    /// All roles, in the order of the table's columns.
    pub const ALL: [Role; 5] = [Role::Admin, Role::Operator, Role::Deliverer, Role::Renderer, Role::Viewer];

    /// Whether the role includes `permission`.
    #[must_use]
    pub fn allows(self, permission: Permission) -> bool {
        let column = Self::ALL.iter().position(|role| *role == self);
        let row = TABLE.iter().find(|(listed, _)| *listed == permission);
        row.zip(column).is_some_and(|((_, allowed), column)| allowed[column])
    }

    /// Whether a kind of resource that the grants omit is granted completely (`true`) or not at
    /// all.
    #[must_use]
    pub fn grants_all_by_default(self) -> bool {
        match self {
            Role::Admin | Role::Operator | Role::Viewer => true,
            Role::Deliverer | Role::Renderer => false,
        }
    }

    /// Whether grants can restrict the role.
    ///
    /// Roles that write API keys or identity providers take no grants, so that no caller can hand
    /// out more access than it has.
    #[must_use]
    pub fn takes_grants(self) -> bool {
        self != Role::Admin
    }

    /// Returns the name in the API and in the database.
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

/// Kind of an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ToSchema)]
#[schema(rename_all = "camelCase")]
pub enum ActorKind {
    /// Caller with an API key.
    ApiKey,
    /// Caller with a token of an identity provider.
    IdentityProvider,
    /// User of the command line, who has access to the database and the service's secrets.
    CommandLine,
    /// Background work of regcred itself.
    Worker,
    /// Unauthenticated caller.
    Anonymous,
}

impl ActorKind {
    /// Returns the name in the API and in the database.
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

/// Originator of an action, as responses, logs and the audit log name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// Kind of the actor.
    pub kind: ActorKind,
    /// Id of the API key; `None` for other kinds.
    pub id: Option<Uuid>,
    /// Name of the API key, `provider/subject` of a token, or user name at the command line.
    pub name: String,
}

/// Authenticated caller. Every use case that serves a caller takes one and enforces its grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Actor for responses and the audit log.
    pub actor: Actor,
    /// Role of the caller.
    pub role: Role,
    /// Resources that the caller can access.
    pub grants: Grants,
    /// Networks that the key may be used from. Empty for any.
    pub source_networks: Networks,
    /// Expiry of the key or token.
    pub expires_at: Option<DateTime<Utc>>,
}

impl Identity {
    /// Whether the caller may call from this address. An unknown address is in no network.
    #[must_use]
    pub fn may_call_from(&self, source: Option<IpAddr>) -> bool {
        self.source_networks.is_empty() || source.is_some_and(|source| self.source_networks.contain(source))
    }

    /// Whether the role includes `permission` and the grants are sufficient for it.
    #[must_use]
    pub fn may(&self, permission: Permission) -> bool {
        self.role.allows(permission) && (!permission.needs_all_grants() || self.grants.include_everything())
    }

    /// Returns the permissions of the caller, in the order of the table.
    pub fn permissions(&self) -> impl Iterator<Item = Permission> {
        TABLE.iter().map(|(permission, _)| *permission).filter(|permission| self.may(*permission))
    }
}

/// Authenticated request of a caller, with the metadata that audit events record.
#[derive(Debug, Clone)]
pub struct Call {
    /// The caller.
    pub identity: Arc<Identity>,
    /// Request id.
    pub request_id: Uuid,
    /// Id that the client gave the request.
    pub client_request_id: Option<Uuid>,
    /// Address of the client.
    pub source: Option<IpAddr>,
    /// Idempotency key of the request. A change claims it in its transaction.
    pub idempotency: Option<IdempotentRequest>,
    /// Whether the request checks a change without making it. Its transaction is rolled back, and
    /// nothing else is changed.
    pub dry_run: bool,
}

impl Deref for Call {
    type Target = Identity;

    fn deref(&self) -> &Identity {
        &self.identity
    }
}

/// Maximum number of networks of an API key.
const SOURCE_NETWORKS_MAX: usize = 100;

/// Fields of a new API key, before validation.
#[derive(Debug, Default)]
pub struct ApiKeyFields<'a> {
    /// Name.
    pub name: &'a str,
    /// Role.
    pub role: &'a str,
    /// Grants.
    pub grants: Option<GrantsDocument>,
    /// Networks that the key may be used from. Absent or empty for any.
    pub source_cidrs: Option<Vec<String>>,
    /// Expiry.
    pub expires_at: Option<DateTime<Utc>>,
}

/// Validated input for the creation of an API key.
#[derive(Debug)]
pub struct NewApiKey {
    /// Name, unique among the keys that are not revoked.
    pub name: Name,
    /// Role of the key.
    pub role: Role,
    /// Resources that the key can access.
    pub grants: Grants,
    /// Networks that the key may be used from. Empty for any.
    pub source_networks: Networks,
    /// Expiry; `None` for a key that never expires.
    pub expires_at: Option<DateTime<Utc>>,
}

impl NewApiKey {
    /// Validates the fields of a new key. With `lifetime_max`, it must expire within that time.
    ///
    /// # Errors
    ///
    /// Every invalid field.
    pub fn parse(
        fields: ApiKeyFields<'_>,
        now: DateTime<Utc>,
        lifetime_max: Option<TimeDelta>,
    ) -> Result<Self, Vec<FieldError>> {
        let ApiKeyFields { name, role, grants, source_cidrs, expires_at } = fields;
        let mut errors = FieldErrors::default();
        let name = errors.take("name", Name::parse(name));
        let role = errors.take("role", role.parse::<Role>());
        let grants = grants.unwrap_or_default();
        if role.is_some_and(|role| !role.takes_grants()) && grants != GrantsDocument::default() {
            errors.refuse("grants", "must be omitted: grants cannot restrict an admin");
        }
        let grants = errors.take_all(Grants::parse_new(role.unwrap_or(Role::Viewer), grants));
        let source_networks = source_networks(&mut errors, &source_cidrs.unwrap_or_default());
        errors.take("expiresAt", check_expiry(expires_at, now, lifetime_max));
        errors.finish(|| {
            Some(Self { name: name?, role: role?, grants: grants?, source_networks: source_networks?, expires_at })
        })
    }
}

fn source_networks(errors: &mut FieldErrors, source_cidrs: &[String]) -> Option<Networks> {
    if source_cidrs.len() > SOURCE_NETWORKS_MAX {
        errors.refuse("sourceCidrs", "must be at most 100 networks");
        return None;
    }
    let parsed = source_cidrs.iter().enumerate();
    // Parse every network before returning, to report all errors.
    let parsed: Vec<Option<_>> =
        parsed.map(|(index, text)| errors.take(&format!("sourceCidrs[{index}]"), parse_source_network(text))).collect();
    parsed.into_iter().collect()
}

fn check_expiry(
    expires_at: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
    lifetime_max: Option<TimeDelta>,
) -> Result<(), Invalid> {
    if expires_at.is_some_and(|at| at <= now) {
        return Err(Invalid::new("must be in the future, such as 2027-01-31T00:00:00Z"));
    }
    let Some(lifetime_max) = lifetime_max else { return Ok(()) };
    // A limit beyond the last representable time is none.
    let latest = now.checked_add_signed(lifetime_max).unwrap_or(DateTime::<Utc>::MAX_UTC);
    match expires_at {
        Some(at) if at <= latest => Ok(()),
        Some(_) => Err(Invalid::new(format!("must be within {} days: keys live no longer", lifetime_max.num_days()))),
        None => Err(Invalid::new(format!("is required: keys live for at most {} days", lifetime_max.num_days()))),
    }
}

/// Stored verifiers of a key's secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyVerifier {
    /// HMAC-SHA-256 of the whole key under a pepper.
    pub mac: Vec<u8>,
    /// Id of the pepper; `None` for a pepper without one.
    pub pepper_id: Option<String>,
    /// Argon2id hash, as a PHC string.
    pub hash: String,
}

/// Hashes the HMAC only: it is unique per key.
impl Hash for KeyVerifier {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.mac.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn documentation_shows_the_same_role_table() {
        let document = include_str!("../../docs/ACCESS.md");
        let cells = |line: &str| -> Vec<String> {
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
        };
        let mut rows = document.lines().skip_while(|line| !line.starts_with("| Permission "));
        let header = cells(rows.next().expect("the table of roles"));
        assert_eq!(header[3..], Role::ALL.map(|role| role.as_str().to_owned()));
        let shown: Vec<Vec<String>> = rows.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
        assert_eq!(shown.len(), TABLE.len());
        for (row, (permission, columns)) in shown.iter().zip(TABLE) {
            assert_eq!(row[0], format!("{permission:?}"));
            let yes = |has: bool| if has { "yes" } else { "" }.to_owned();
            assert_eq!(row[2], yes(permission.needs_all_grants()), "{permission:?}");
            assert_eq!(row[3..], columns.map(yes), "{permission:?}");
        }
    }

    #[test]
    fn roles_that_grant_access_cannot_be_restricted() {
        for role in Role::ALL {
            for permission in [Permission::WriteApiKeys, Permission::WriteIdentityProviders] {
                assert!(!role.allows(permission) || !role.takes_grants(), "{role:?}");
            }
        }
    }

    #[test]
    fn narrowed_callers_cannot_write_clusters() {
        for role in Role::ALL.into_iter().filter(|role| role.takes_grants()) {
            let narrowed = GrantsDocument { accounts: Some(Vec::new()), ..GrantsDocument::default() };
            let identity = Identity {
                actor: Actor { kind: ActorKind::ApiKey, id: None, name: "narrowed".to_owned() },
                role,
                grants: Grants::parse(role, narrowed).unwrap(),
                source_networks: Networks::default(),
                expires_at: None,
            };
            assert!(!identity.may(Permission::WriteClusters), "{role:?}");
            assert!(identity.permissions().all(|permission| permission != Permission::WriteClusters), "{role:?}");
        }
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    fn refused_fields(fields: ApiKeyFields<'_>, lifetime_max: Option<TimeDelta>) -> Vec<String> {
        let parsed = NewApiKey::parse(fields, at("2027-01-01T00:00:00Z"), lifetime_max);
        parsed.err().into_iter().flatten().map(|error| error.field).collect()
    }

    #[rstest]
    #[case(None, None, true)]
    #[case(Some("2027-01-01T00:00:00Z"), None, false)]
    #[case(Some("9999-01-01T00:00:00Z"), None, true)]
    #[case(None, Some(30), false)]
    #[case(Some("2027-01-31T00:00:00Z"), Some(30), true)]
    #[case(Some("2027-01-31T00:00:01Z"), Some(30), false)]
    #[case(Some("9999-01-01T00:00:00Z"), Some(36_500), false)]
    fn key_expires_within_the_maximum_lifetime(
        #[case] expires_at: Option<&str>,
        #[case] days_max: Option<i64>,
        #[case] accepted: bool,
    ) {
        let fields =
            ApiKeyFields { name: "ci", role: "viewer", expires_at: expires_at.map(at), ..ApiKeyFields::default() };
        let refused = refused_fields(fields, days_max.map(TimeDelta::days));
        assert_eq!(refused, if accepted { vec![] } else { vec!["expiresAt".to_owned()] });
    }

    #[test]
    fn every_invalid_source_network_is_reported() {
        let with = |cidrs: &[&str]| ApiKeyFields {
            name: "ci",
            role: "viewer",
            source_cidrs: Some(cidrs.iter().map(|cidr| (*cidr).to_owned()).collect()),
            ..ApiKeyFields::default()
        };
        let refused = refused_fields(with(&["10.0.0.0/8", "10.0.0.0/33", "::/0", "host", ""]), None);
        assert_eq!(refused, ["sourceCidrs[1]", "sourceCidrs[3]", "sourceCidrs[4]"]);
        assert_eq!(refused_fields(with(&["10.0.0.0/8"; 101]), None), ["sourceCidrs"]);
        assert!(refused_fields(with(&[]), None).is_empty());
    }

    #[rstest]
    #[case(&[], None, true)]
    #[case(&[], Some("203.0.113.7"), true)]
    #[case(&["10.0.0.0/8", "fd00::/8"], Some("10.1.2.3"), true)]
    #[case(&["10.0.0.0/8", "fd00::/8"], Some("::ffff:10.1.2.3"), true)]
    #[case(&["10.0.0.0/8", "fd00::/8"], Some("fd00::1"), true)]
    #[case(&["10.0.0.0/8", "fd00::/8"], Some("11.0.0.1"), false)]
    #[case(&["10.0.0.0/8", "fd00::/8"], Some("::1"), false)]
    #[case(&["10.0.0.0/8", "fd00::/8"], None, false)]
    fn caller_may_call_from_its_networks_only(
        #[case] networks: &[&str],
        #[case] source: Option<&str>,
        #[case] expected: bool,
    ) {
        let identity = Identity {
            actor: Actor { kind: ActorKind::ApiKey, id: None, name: "ci".to_owned() },
            role: Role::Viewer,
            grants: Grants::everything(),
            source_networks: networks.iter().map(|network| parse_source_network(network).unwrap()).collect(),
            expires_at: None,
        };
        assert_eq!(identity.may_call_from(source.map(|source| source.parse().unwrap())), expected);
    }

    #[test]
    fn deliverer_cannot_reveal_credentials() {
        assert!(Role::Deliverer.allows(Permission::DeliverSecrets));
        assert!(!Role::Deliverer.allows(Permission::RevealCredentials));
    }

    #[test]
    fn role_names_round_trip() {
        for role in Role::ALL {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("Admin".parse::<Role>().is_err());
    }
}
