//! `regcred api-key`: creates, lists and revokes API keys directly in the database.

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use clap::{Args, Subcommand};
use secrecy::ExposeSecret;

use super::{CliError, argument, audit, database, print_line, print_table};
use crate::{
    app, clock,
    config::{Reader, variable},
    crypto::pepper::Peppers,
    domain::{
        caller::{ApiKeyFields, NewApiKey},
        grants::{AccountGrant, Grants, GrantsDocument, LabelGrant},
        invalid::FieldError,
        listing::{ApiKeySort, ListRequest, Next, Sort},
        names::Name,
    },
    service::api_keys,
    storage::{
        PgPool,
        api_keys::{ApiKey, ApiKeyFilter},
    },
};

#[derive(Debug, Subcommand)]
pub(super) enum ApiKeyCommand {
    /// Create a key and print it. It cannot be displayed again.
    Create(CreateApiKey),
    /// List all keys.
    List,
    /// Revoke a key with immediate effect.
    Revoke {
        /// Name of the key.
        #[arg(long)]
        name: String,
        /// Revoke the key even if no other key can create keys through the API. This command still
        /// can.
        #[arg(long)]
        even_last_admin: bool,
    },
}

#[derive(Debug, Args)]
pub(super) struct CreateApiKey {
    /// Name of the key: a DNS-1123 label.
    #[arg(long)]
    name: String,
    /// Role: admin, operator, deliverer, renderer or viewer.
    #[arg(long)]
    role: String,
    /// Granted registry accounts: comma-separated names or prefixes such as team-a-*.
    ///
    /// Without any grants, an operator or viewer is granted everything, a deliverer or renderer
    /// nothing. With some, an operator or viewer must be given accounts, clusters and namespaces; '*'
    /// grants all.
    #[arg(long, value_delimiter = ',')]
    accounts: Option<Vec<String>>,
    /// Granted registry accounts by label, such as team=a,tier=prod for accounts with both labels.
    /// Can be repeated.
    #[arg(long)]
    account_labels: Vec<String>,
    /// Granted clusters: comma-separated names or prefixes.
    #[arg(long, value_delimiter = ',')]
    clusters: Option<Vec<String>>,
    /// Granted namespaces, in each of the clusters: comma-separated names or prefixes.
    #[arg(long, value_delimiter = ',')]
    namespaces: Option<Vec<String>>,
    /// Networks that the key may be used from: comma-separated, such as 10.0.0.0/8 [default: any].
    #[arg(long, value_delimiter = ',')]
    source_cidr: Option<Vec<String>>,
    /// Expiry, such as 2027-01-31T00:00:00Z [default: never]. Required with
    /// `REGCRED_API_KEY_MAX_LIFETIME_DAYS`.
    #[arg(long)]
    expires_at: Option<DateTime<Utc>>,
}

impl ApiKeyCommand {
    pub(super) async fn run(self) -> Result<(), CliError> {
        match self {
            Self::Create(create) => create.run().await,
            Self::List => list().await,
            Self::Revoke { name, even_last_admin } => revoke(&name, even_last_admin).await,
        }
    }
}

impl CreateApiKey {
    async fn run(self) -> Result<(), CliError> {
        let grants = GrantsDocument {
            accounts: account_grants(self.accounts, &self.account_labels)?,
            clusters: self.clusters,
            namespaces: self.namespaces,
        };
        let fields = ApiKeyFields {
            name: &self.name,
            role: &self.role,
            grants: Some(grants),
            source_cidrs: self.source_cidr,
            expires_at: self.expires_at,
        };
        let new = NewApiKey::parse(fields, clock::now(), lifetime_max()?);
        let new = new.map_err(|errors| CliError::Usage(argument_errors(&errors)))?;
        let (pool, peppers) = open().await?;
        let (audit, actor) = (audit::audit(&pool, &peppers), audit::actor());
        let created = api_keys::create(&pool, &audit, &actor, peppers.current().first(), &new).await;
        audit::close(&audit).await;
        let (stored, key) = created?;
        note!(
            "Created the API key `{}`, {}. Store it now, it cannot be displayed again:",
            stored.name,
            rights(&stored)
        );
        print_line(key.text.expose_secret())
    }
}

async fn revoke(name: &str, even_last_admin: bool) -> Result<(), CliError> {
    let name = argument("--name", Name::parse(name))?;
    let lifetime_max = lifetime_max()?;
    let (pool, peppers) = open().await?;
    let (audit, actor) = (audit::audit(&pool, &peppers), audit::actor());
    let revoked = if even_last_admin {
        api_keys::revoke_even_last_admin(&pool, &audit, &actor, &name).await
    } else {
        api_keys::revoke(&pool, &audit, &actor, &name, lifetime_max).await
    };
    audit::close(&audit).await;
    revoked?;
    note!("Revoked the API key `{name}`.");
    Ok(())
}

/// Reads the maximum lifetime of a new key.
fn lifetime_max() -> Result<Option<TimeDelta>, CliError> {
    let mut reader = Reader::new(&variable);
    let lifetime_max = reader.api_key_lifetime_max();
    Ok(reader.finish(|| lifetime_max)?)
}

async fn open() -> Result<(PgPool, Arc<Peppers>), CliError> {
    let mut reader = Reader::new(&variable);
    let (database, peppers) = (reader.database(), reader.peppers());
    let (database, peppers) = reader.finish(|| database.zip(peppers))?;
    Ok((app::connect(&database).await?, Arc::new(peppers)))
}

async fn list() -> Result<(), CliError> {
    const PAGE: usize = 500;
    let pool = database().await?;
    let (order, filter) = (ApiKeySort::default().order(), ApiKeyFilter::default());
    let mut request = ListRequest { order, after: None, limit: PAGE };
    let mut rows = Vec::new();
    loop {
        let page = api_keys::list(&pool, &request, &filter).await?;
        rows.extend(page.items.iter().map(row));
        let Some(Next::Item(position) | Next::Row(position)) = page.next else { break };
        request.after = Some(position);
    }
    print_table(["ID", "NAME", "STATE", "EXPIRES", "RIGHTS"], &rows)
}

fn row(key: &ApiKey) -> [String; 5] {
    let is_expired = key.expires_at.is_some_and(|at| at <= clock::now());
    let state = match (key.revoked_at, is_expired) {
        (Some(_), _) => "revoked",
        (None, true) => "expired",
        (None, false) => "active",
    };
    let expires = key.expires_at.map_or_else(|| "never".to_owned(), |at| at.to_rfc3339());
    [key.id.to_string(), key.name.clone(), state.to_owned(), expires, rights(key)]
}

/// Formats role, grants and networks on one line.
fn rights(key: &ApiKey) -> String {
    let networks = key.source_networks.to_texts();
    let from = if networks.is_empty() { String::new() } else { format!(", from {}", networks.join(",")) };
    let role = key.role.as_str();
    if !key.role.takes_grants() {
        return format!("{role}{from}");
    }
    let Grants { accounts, clusters, namespaces } = &key.grants;
    let listed = |rules: Vec<String>| if rules.is_empty() { "none".to_owned() } else { rules.join(",") };
    format!(
        "{role} (accounts {}; clusters {}; namespaces {}){from}",
        listed(accounts.iter().map(ToString::to_string).collect()),
        listed(clusters.iter().map(ToString::to_string).collect()),
        listed(namespaces.iter().map(ToString::to_string).collect()),
    )
}

/// Combines grants by name and by label; `None` if neither is given.
fn account_grants(names: Option<Vec<String>>, labels: &[String]) -> Result<Option<Vec<AccountGrant>>, CliError> {
    if names.is_none() && labels.is_empty() {
        return Ok(None);
    }
    let mut rules: Vec<AccountGrant> = names.unwrap_or_default().into_iter().map(AccountGrant::Names).collect();
    for rule in labels {
        let pairs = rule.split(',').map(|pair| {
            let (key, value) = pair.split_once('=')?;
            Some((key.to_owned(), value.to_owned()))
        });
        let match_labels = pairs.collect::<Option<_>>();
        let match_labels =
            match_labels.ok_or_else(|| CliError::Usage("--account-labels must be key=value,key=value".to_owned()))?;
        rules.push(AccountGrant::Labels(LabelGrant { match_labels }));
    }
    Ok(Some(rules))
}

/// Formats refused fields by the names of the command's arguments.
fn argument_errors(errors: &[FieldError]) -> String {
    let all = errors.iter().map(|FieldError { field, detail }| match field.as_str() {
        "expiresAt" => format!("--expires-at {detail}"),
        field if field.starts_with("sourceCidrs") => format!("--source-cidr {detail}"),
        "grants" => format!("--accounts, --account-labels, --clusters and --namespaces {detail}"),
        other => format!("--{} {detail}", other.trim_start_matches("grants.")),
    });
    all.collect::<Vec<_>>().join("; ")
}
