//! Content of the Secrets that regcred wrote, without a call to the cluster.

use std::{collections::HashMap, pin::pin, sync::Arc};

use futures_util::{StreamExt, stream};
use secrecy::{ExposeSecret, SecretSlice};
use uuid::Uuid;

use super::Coverages;
use crate::{
    domain::{
        coverage::{KnownAccount, KnownSecret},
        diagnosis::{Lookup, ReadSecret, SecretValue},
        docker_config::key_for,
        names::{NamespaceName, SecretName},
        secret::SecretType,
    },
    service::{ServiceError, connection},
    storage::{
        self, PgConnection,
        coverage::sources::{DeclaredSecret, DirectAccount},
        pull_secrets::StoredPullSecret,
    },
};

/// Pull secrets that are rendered at the same time.
const CONCURRENCY: usize = 4;

/// Bytes of documents that a run keeps. What further Secrets contain is read from the cluster.
const DOCUMENTS_MAX: usize = 8 * 1024 * 1024;

/// Place of a Secret in the cluster.
pub(super) type SecretPlace = (NamespaceName, SecretName);

/// Secrets that regcred wrote.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Accounts of each.
    pub(super) known: HashMap<SecretPlace, Arc<KnownSecret>>,
    /// Values of those that are in sync with their accounts, within [`DOCUMENTS_MAX`].
    pub(super) values: HashMap<SecretPlace, Arc<ReadSecret>>,
}

/// Value of the Secrets of a pull secret.
struct Rendered {
    name: SecretName,
    /// None beyond [`DOCUMENTS_MAX`].
    secret: Option<Arc<ReadSecret>>,
    /// Length of the document.
    length: usize,
    known: Arc<KnownSecret>,
}

impl Coverages {
    /// Finds the Secrets that regcred writes to a cluster: those of synced targets with their values.
    /// Values of direct deliveries may be older than their accounts.
    pub(super) async fn contents(&self, cluster: Uuid) -> Result<Contents, ServiceError> {
        let (targets, direct, stored) = {
            let mut conn = connection(&self.pool).await?;
            let targets = storage::coverage::sources::declared_secrets(&mut conn, cluster).await?;
            let direct = storage::coverage::sources::direct_accounts(&mut conn, cluster).await?;
            let stored = pull_secrets(&mut conn, &targets).await?;
            (targets, direct, stored)
        };
        let mut contents = Contents::default();
        for one in direct {
            contents.add_direct(one);
        }
        let rendered = stream::iter(stored).map(|one| async move {
            let id = one.id;
            match self.render(&one).await {
                Ok(rendered) => Some((id, rendered)),
                Err(error) => {
                    tracing::debug!(pull_secret = %one.name, %error, "pull secret not rendered");
                    None
                }
            }
        });
        let mut rendered = pin!(rendered.buffered(CONCURRENCY));
        let mut kept: HashMap<Uuid, Rendered> = HashMap::new();
        let mut left = DOCUMENTS_MAX;
        while let Some(one) = rendered.next().await {
            let Some((id, mut one)) = one else { continue };
            match left.checked_sub(one.length) {
                Some(rest) => left = rest,
                None => one.secret = None,
            }
            kept.insert(id, one);
        }
        for target in targets {
            if let Some(Rendered { name, secret, known, .. }) = kept.get(&target.pull_secret_id) {
                let place = (target.namespace, name.clone());
                if let Some(secret) = secret.as_ref().filter(|_| target.is_synced) {
                    contents.values.insert(place.clone(), Arc::clone(secret));
                }
                contents.known.insert(place, Arc::clone(known));
            }
        }
        Ok(contents)
    }

    async fn render(&self, stored: &StoredPullSecret) -> Result<Rendered, ServiceError> {
        let declaration = &stored.declaration;
        let secret_type = declaration.secret_type;
        let (rendered, accounts) =
            self.docker_configs.assemble_with_accounts(secret_type.profile(), &declaration.accounts).await?;
        let document = rendered.document.expose_secret().as_bytes();
        let length = document.len();
        let document = Some(SecretSlice::from(document.to_vec()));
        let (dockerconfigjson, dockercfg) = match secret_type {
            SecretType::DockerConfigJson => (document, None),
            SecretType::Dockercfg => (None, document),
        };
        let value = SecretValue {
            secret_type: secret_type.as_str().to_owned(),
            dockerconfigjson,
            dockercfg,
            has_other_data: false,
            has_owner: false,
            resource_version: None,
            pull_secret_id: Some(stored.id),
        };
        let accounts = accounts.into_iter();
        let accounts = accounts.map(|(key, one)| (key, KnownAccount { id: one.id, name: one.name.clone() })).collect();
        Ok(Rendered {
            name: declaration.secret_name.clone(),
            secret: Some(Arc::new(ReadSecret::of(declaration.secret_name.clone(), Lookup::Found(value)))),
            length,
            known: Arc::new(KnownSecret { pull_secret: Some((stored.id, stored.name.to_string())), accounts }),
        })
    }
}

impl Contents {
    fn add_direct(&mut self, one: DirectAccount) {
        let place = (one.namespace, one.secret);
        let empty = || Arc::new(KnownSecret { pull_secret: None, accounts: HashMap::new() });
        let known = Arc::make_mut(self.known.entry(place).or_insert_with(empty));
        // Both types have the same keys.
        let key = key_for(SecretType::default().profile(), &one.registry).to_owned();
        known.accounts.insert(key, KnownAccount { id: one.account_id, name: one.account });
    }
}

/// Reads the pull secrets of targets, without those that are being deleted.
async fn pull_secrets(
    conn: &mut PgConnection,
    targets: &[DeclaredSecret],
) -> Result<Vec<StoredPullSecret>, ServiceError> {
    let mut ids: Vec<Uuid> = targets.iter().map(|target| target.pull_secret_id).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut stored = storage::pull_secrets::find_many(conn, &ids).await?;
    stored.retain(|one| one.deleted_at.is_none());
    Ok(stored)
}
