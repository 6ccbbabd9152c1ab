//! Pull secrets of regcred that Secrets belong to.

use super::Diagnoses;
use crate::{
    domain::{
        caller::Call,
        diagnosis::{Examination, ManagedAccount, ManagedBy},
        docker_config::{Profile, key_for},
        names::{Name, NamespaceName, SecretName},
    },
    service::{ServiceError, connection, pull_secrets},
    storage::{
        self, PageRequest, PgConnection,
        pull_secrets::StoredPullSecret,
        targets::listing::{ShownTarget, TargetFilter},
    },
};

impl Diagnoses {
    /// Returns the pull secrets that Secrets belong to, as far as the caller may see them: those that
    /// the label of a Secret names, and those that place a Secret which does not exist.
    pub(super) async fn managed(
        &self,
        caller: &Call,
        (cluster, namespace): (&Name, &NamespaceName),
        examination: &Examination,
    ) -> Result<Vec<(SecretName, ManagedBy)>, ServiceError> {
        let labelled: Vec<_> = examination.managed().collect();
        let missing: Vec<&str> = examination.missing().map(SecretName::as_str).collect();
        if labelled.is_empty() && missing.is_empty() {
            return Ok(Vec::new());
        }
        let cluster = self.clusters.find(caller, cluster).await?.id;
        let filter = TargetFilter { cluster: Some(cluster), namespace: Some(namespace.clone()), states: Vec::new() };
        let mut conn = connection(&self.pool).await?;
        let mut found = Vec::new();
        for (name, id) in labelled {
            // The label is that of an editor of the namespace, who may write anything.
            let stored = storage::pull_secrets::find_many(&mut conn, &[id]).await?;
            found.extend(stored.into_iter().filter(|stored| stored.declaration.secret_name == *name));
        }
        if !missing.is_empty() {
            let placing = storage::pull_secrets::ids_placing(&mut conn, cluster, namespace, &missing).await?;
            found.extend(storage::pull_secrets::find_many(&mut conn, &placing).await?);
        }
        let mut managed = Vec::new();
        for stored in found {
            let name = stored.declaration.secret_name.clone();
            // Without a target here, the label was copied from another namespace.
            let page = PageRequest { after: None, limit: 1 };
            let targets = storage::targets::listing::list_of(&mut conn, stored.id, &filter, &page).await?;
            if let Some(target) = targets.into_iter().next() {
                let by = self.describe(&mut conn, caller, stored, target, examination.version_of(&name)).await?;
                managed.push((name, by));
            }
        }
        Ok(managed)
    }

    async fn describe(
        &self,
        conn: &mut PgConnection,
        caller: &Call,
        stored: StoredPullSecret,
        target: ShownTarget,
        version: Option<&str>,
    ) -> Result<ManagedBy, ServiceError> {
        let mut by = ManagedBy {
            pull_secret: None,
            state: None,
            last_error: None,
            is_as_written: version.is_some() && version == target.resource_version.as_deref(),
            accounts: Vec::new(),
        };
        let Some(stored) = pull_secrets::visible(conn, caller, vec![stored]).await?.pop() else { return Ok(by) };
        by.pull_secret = Some(stored.name.to_string());
        by.state = Some(target.state);
        by.last_error = target.last_error_type;
        // Without its accounts, the fix of a wrong password does not name one.
        let accounts = self.docker_configs.chosen(caller, &stored.declaration.accounts).await.unwrap_or_default();
        let accounts = accounts.iter().filter_map(|account| {
            Some(ManagedAccount {
                name: Name::parse(&account.name).ok()?,
                key: key_for(Profile::Kubernetes, &account.registry).to_owned(),
                is_minted: account.valid_until.is_some(),
            })
        });
        by.accounts = accounts.collect();
        Ok(by)
    }
}
