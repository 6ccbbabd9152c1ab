//! Lists the Secrets of direct delivery in a namespace.

use std::collections::HashMap;

use chrono::{DateTime, Utc};

use super::Secrets;
use crate::{
    clients::cluster::{ClusterError, ListedSecret},
    domain::{
        caller::Identity,
        names::{Name, NamespaceName, SecretName},
    },
    service::{ServiceError, connection},
    storage::{self, direct_secrets::Included},
};

/// Secret of direct delivery, as its cluster and its record show it.
#[derive(Debug)]
pub struct ListedDelivery {
    /// The Secret in the cluster.
    pub secret: ListedSecret,
    /// Record of its delivery; `None` if there is none.
    pub record: Option<DeliveryRecord>,
}

/// Record of a delivery.
#[derive(Debug)]
pub struct DeliveryRecord {
    /// Time of the delivery.
    pub delivered_at: DateTime<Utc>,
    /// Names of its accounts that are granted to the caller.
    pub accounts: Vec<String>,
    /// Whether the login of one of its accounts has changed since.
    pub is_outdated: bool,
}

impl Secrets {
    /// Lists the Secrets of direct delivery in a namespace by name: at most `limit` after `after`.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::NotFound`] for the cluster. A namespace that is not granted is reported as
    ///   absent, without a call to the cluster.
    /// - [`ServiceError::Cluster`] if the API server refuses, such as for a missing right.
    pub async fn list(
        &self,
        caller: &Identity,
        (cluster, namespace): (&Name, &NamespaceName),
        after: Option<&SecretName>,
        limit: usize,
    ) -> Result<Vec<ListedDelivery>, ServiceError> {
        let client = self.clusters.client(caller, cluster).await?;
        if !caller.grants.include_namespace(namespace.as_str()) {
            return Err(ClusterError::NamespaceNotFound.into());
        }
        let mut listed = client.list_direct_secrets(namespace).await?;
        listed.retain(|secret| after.is_none_or(|after| secret.name.as_str() > after.as_str()));
        listed.sort_unstable_by(|one, other| one.name.as_str().cmp(other.name.as_str()));
        listed.truncate(limit);
        let names: Vec<&str> = listed.iter().map(|secret| secret.name.as_str()).collect();
        let mut conn = connection(&self.pool).await?;
        let included = storage::direct_secrets::list_included(&mut conn, cluster, namespace, &names).await?;
        let mut records = records(caller, included);
        let listed = listed.into_iter().map(|secret| {
            let record = records.remove(secret.name.as_str());
            ListedDelivery { secret, record }
        });
        Ok(listed.collect())
    }
}

/// Records by the name of their Secret.
fn records(caller: &Identity, included: Vec<Included>) -> HashMap<String, DeliveryRecord> {
    let mut records: HashMap<String, DeliveryRecord> = HashMap::new();
    for one in included {
        let is_granted = caller.grants.include_account(&one.account, &one.labels);
        let record = records.entry(one.secret).or_insert_with(|| DeliveryRecord {
            delivered_at: one.delivered_at,
            accounts: Vec::new(),
            is_outdated: false,
        });
        if is_granted {
            record.accounts.push(one.account);
            record.is_outdated |= one.is_outdated;
        }
    }
    records
}
