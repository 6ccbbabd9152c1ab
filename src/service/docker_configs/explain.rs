//! Explanations: which entry each reader uses for an image. Passwords stay sealed.

use std::{collections::HashSet, sync::Arc};

use secrecy::{ExposeSecret, SecretString};

use super::{DockerConfigs, ReadMode, scoped};
use crate::{
    domain::{
        caller::{Identity, Permission},
        cluster::ServiceAccountRef,
        docker_config::{Profile, ScopedAccount, Warning, key_for, parse::Config, split_collisions},
        invalid::{FieldError, Invalid},
        matching::{Explanation, ImageName, explain_config, explain_secrets, lint::lint_config},
        names::Name,
        selector::AccountSelection,
    },
    service::{ServiceError, connection, pull_secrets, spawn_blocking},
    storage::{self, accounts::SealedCredential, pull_secrets::StoredPullSecret},
};

/// Maximum number of pull secrets of one `ServiceAccount`.
const ATTACHED_MAX: usize = 100;

/// Subject of an explanation.
#[derive(Debug)]
pub enum Subject {
    /// Stored accounts.
    Accounts(AccountSelection),
    /// Docker config from the request, in any supported form.
    Config(SecretString),
    /// Accounts of a pull secret.
    PullSecret(Name),
    /// Accounts of the pull secrets that are declared to be attached to a `ServiceAccount`.
    ServiceAccount {
        /// The cluster.
        cluster: Name,
        /// The `ServiceAccount`.
        account: ServiceAccountRef,
    },
}

impl Subject {
    /// Permissions that the explanation needs, beside that to read accounts.
    #[must_use]
    pub const fn permissions(&self) -> &'static [Permission] {
        match self {
            Self::Accounts(_) | Self::Config(_) => &[],
            Self::PullSecret(_) => &[Permission::ReadPullSecrets],
            Self::ServiceAccount { .. } => &[Permission::ReadPullSecrets, Permission::ReadClusters],
        }
    }
}

/// Accounts of a Secret.
type Secret = Vec<Arc<SealedCredential>>;

impl DockerConfigs {
    /// Explains which entry each container runtime would use for an image. Passwords stay sealed.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::UnknownAccounts`] lists what does not exist or is not granted.
    /// - [`ServiceError::Invalid`] if an account is listed twice, or the config does not parse.
    pub async fn explain(
        &self,
        caller: &Identity,
        subject: Subject,
        image: ImageName,
    ) -> Result<Explanation, ServiceError> {
        let pull_secrets = match subject {
            Subject::Config(text) => return spawn_blocking(move || explain_text(&text, &image)).await,
            Subject::Accounts(choice) => {
                let accounts = self.choose(&caller.grants, &choice, ReadMode::Cached).await?;
                return Ok(explain_stored(&[accounts], &image));
            }
            Subject::PullSecret(name) => vec![self.find_pull_secret(caller, &name).await?],
            Subject::ServiceAccount { cluster, account } => self.find_attached(caller, &cluster, &account).await?,
        };
        let mut seen = HashSet::new();
        let mut secrets = Vec::with_capacity(pull_secrets.len());
        for pull_secret in &pull_secrets {
            let mut accounts = self.delivered(caller, pull_secret).await?;
            // One account in two Secrets is one login.
            accounts.retain(|account| seen.insert(account.id));
            secrets.push(accounts);
        }
        let pull_secrets = pull_secrets.iter().map(|one| one.name.to_string()).collect();
        Ok(Explanation { pull_secrets, ..explain_stored(&secrets, &image) })
    }

    async fn find_pull_secret(&self, caller: &Identity, name: &Name) -> Result<StoredPullSecret, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        pull_secrets::granted(&mut conn, caller, name).await.map_err(|error| match error {
            ServiceError::NotFound { .. } | ServiceError::Hidden { .. } => {
                unknown("pullSecret", format!("there is no pull secret named `{name}`"))
            }
            other => other,
        })
    }

    /// Finds the pull secrets that the caller may see and that are declared to be attached to a
    /// `ServiceAccount`, by name. The cluster is not asked.
    async fn find_attached(
        &self,
        caller: &Identity,
        cluster: &Name,
        ServiceAccountRef { namespace, name }: &ServiceAccountRef,
    ) -> Result<Vec<StoredPullSecret>, ServiceError> {
        let mut conn = connection(&self.pool).await?;
        let found = storage::clusters::find(&mut conn, cluster).await?;
        let found = found.filter(|_| caller.grants.include_cluster(cluster.as_str()));
        let Some(found) = found else {
            return Err(unknown("serviceAccount.cluster", format!("there is no cluster named `{cluster}`")));
        };
        if !caller.grants.include_namespace(namespace.as_str()) {
            let detail = format!("your grants do not include the namespace `{namespace}`");
            return Err(unknown("serviceAccount.namespace", detail));
        }
        let limit = i64::try_from(ATTACHED_MAX).unwrap_or(i64::MAX) + 1;
        let attached = storage::pull_secrets::attached_to(&mut conn, found.id, namespace, name, limit).await?;
        if attached.len() > ATTACHED_MAX {
            let detail = "has more than 100 pull secrets: explain one of them by `pullSecret`";
            return Err(ServiceError::field("serviceAccount", Invalid::new(detail)));
        }
        pull_secrets::visible(&mut conn, caller, attached).await
    }

    /// Finds the accounts in the Secret of a pull secret. The caller is granted all of them.
    async fn delivered(&self, caller: &Identity, pull_secret: &StoredPullSecret) -> Result<Secret, ServiceError> {
        let declaration = &pull_secret.declaration;
        match &declaration.accounts {
            AccountSelection::Names(_) => self.choose(&caller.grants, &declaration.accounts, ReadMode::Cached).await,
            AccountSelection::Selector(selector) => {
                let mut selected = self.select(&caller.grants, selector).await?;
                selected.sort_unstable_by_key(|account| account.id);
                let profile = declaration.secret_type.profile();
                Ok(split_collisions(profile, selected, |account| &account.registry).0)
            }
        }
    }
}

/// Error for a name in a request that does not exist or is not granted.
fn unknown(field: &str, detail: String) -> ServiceError {
    ServiceError::UnknownAccounts { errors: vec![FieldError::new(field, detail)], names: Vec::new() }
}

fn explain_stored(secrets: &[Secret], image: &ImageName) -> Explanation {
    let accounts: Vec<Vec<ScopedAccount<'_>>> =
        secrets.iter().map(|accounts| accounts.iter().map(scoped).collect()).collect();
    let mut explanation = explain_secrets(&accounts, image);
    let padded = secrets.iter().flatten().filter(|account| account.password_ends_with_whitespace);
    let warn = |account: &Arc<SealedCredential>| {
        let key = key_for(Profile::Kubernetes, &account.registry);
        Warning::of_whitespace(Some(&account.name), key)
    };
    explanation.warnings.extend(padded.map(warn));
    explanation
}

fn explain_text(text: &SecretString, image: &ImageName) -> Result<Explanation, ServiceError> {
    let config = Config::parse(text.expose_secret().as_bytes())
        .map_err(|error| ServiceError::field("config", Invalid::new(error.to_string())))?;
    Ok(explain_and_lint(&config, image))
}

/// Explains a config from the request. Its warnings include those that do not concern the image.
fn explain_and_lint(config: &Config, image: &ImageName) -> Explanation {
    let mut explanation = explain_config(config, image);
    for warning in lint_config(config) {
        if !explanation.warnings.contains(&warning) {
            explanation.warnings.push(warning);
        }
    }
    explanation
}
