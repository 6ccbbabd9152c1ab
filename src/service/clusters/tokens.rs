//! Tokens of `ServiceAccount`s for providers of logins.
//!
//! The receiver of such a token can present it elsewhere. So it must be of no use where regcred, or
//! the cluster itself, authenticates callers.

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;

use super::{Clusters, KIND, is_encrypted};
use crate::{
    domain::{
        caller::Call,
        cluster::{ServiceAccountRef, audiences_of_token, service_account_of_token},
        identity_provider::Audience,
        invalid::{FieldError, FieldErrors},
        mint::WebIdentity,
    },
    service::{ServiceError, connection, no_such},
    storage::{self, clusters::StoredCluster},
};

/// Requested lifetime of a token. Most providers see it for seconds; Google's logins end with it.
const LIFETIME: Duration = Duration::from_hours(1);
/// Shortest lifetime that API servers issue.
const LIFETIME_MIN: Duration = Duration::from_mins(10);
const CLUSTER: &str = "source.identity.cluster";
const NAMESPACE: &str = "source.identity.namespace";
const SERVICE_ACCOUNT: &str = "source.identity.serviceAccount";
const AUDIENCE: &str = "source.identity.audience";

impl Clusters {
    /// Checks that a caller may have logins minted with the tokens of a `ServiceAccount`, and returns
    /// its cluster. Except for a dry run, the cluster is asked for the audiences of its API server.
    ///
    /// # Errors
    ///
    /// - [`ServiceError::UnknownAccounts`] if cluster or namespace are missing or not granted.
    /// - [`ServiceError::Invalid`] if a token would be of use elsewhere than at the provider.
    /// - [`ServiceError::Cluster`] if the cluster issues no token.
    pub(in crate::service) async fn admit_web_identity(
        &self,
        caller: &Call,
        identity: &WebIdentity,
    ) -> Result<Uuid, ServiceError> {
        let grants = &caller.grants;
        let cluster = identity.cluster.as_str();
        let no_cluster = || unknown(CLUSTER, no_such(grants, KIND, cluster));
        if !grants.include_cluster(cluster) {
            return Err(no_cluster());
        }
        if !grants.include_namespace(identity.namespace.as_str()) {
            return Err(unknown(NAMESPACE, no_such(grants, "namespace", identity.namespace.as_str())));
        }
        let mut conn = connection(&self.pool).await?;
        let found = storage::clusters::find(&mut conn, &identity.cluster).await?;
        drop(conn);
        let stored = found.ok_or_else(no_cluster)?;
        self.refuse_web_identity(&stored, identity).await?;
        if !caller.dry_run {
            let client = self.client_for(&stored).await?;
            let default = client.request_token(&identity.account(), None, LIFETIME_MIN).await?;
            if audiences_of_token(default.token.expose_secret()).contains(&identity.audience) {
                return Err(ServiceError::field(AUDIENCE, WebIdentity::reserved()));
            }
        }
        Ok(stored.id)
    }

    /// Requests a token of the `ServiceAccount` of a source. Grants were checked when the source was
    /// set.
    ///
    /// # Errors
    ///
    /// [`ServiceError::NotFound`] if there is no such cluster, [`ServiceError::Invalid`] if the token
    /// would be of use elsewhere than at the provider, [`ServiceError::Cluster`].
    pub(in crate::service) async fn issue_token(
        &self,
        cluster: Uuid,
        identity: &WebIdentity,
    ) -> Result<SecretString, ServiceError> {
        let stored = self.find_by_id(cluster).await?;
        self.refuse_web_identity(&stored, identity).await?;
        let client = self.client_for(&stored).await?;
        Ok(client.request_token(&identity.account(), Some(&identity.audience), LIFETIME).await?.token)
    }

    /// Refuses tokens that would be of use elsewhere than at the provider, as far as that is known
    /// without a call to the cluster. The text does not tell why: callers need all grants to read the
    /// audiences of identity providers.
    async fn refuse_web_identity(&self, stored: &StoredCluster, identity: &WebIdentity) -> Result<(), ServiceError> {
        let mut errors = FieldErrors::default();
        if !is_encrypted(stored) {
            errors.refuse(CLUSTER, "is called over http://, where its tokens could be read: use an https:// URL");
        }
        if self.is_own(stored, &identity.account())? {
            errors.refuse(SERVICE_ACCOUNT, WebIdentity::reserved());
        }
        let audience = Audience::parse(&identity.audience);
        let is_server =
            audience.is_ok_and(|audience| stored.server.as_deref().is_some_and(|url| audience.is_server(url)));
        let mut conn = connection(&self.pool).await?;
        let is_of_provider = storage::identity_providers::have_audience(&mut conn, &identity.audience).await?;
        if is_server || is_of_provider {
            errors.refuse(AUDIENCE, WebIdentity::reserved());
        }
        errors.finish(|| Some(())).map_err(ServiceError::from)
    }

    /// Whether a `ServiceAccount` is regcred's own: that of its credential for the cluster, or that of
    /// its pod. The pod's is refused in every cluster: which one it runs in is not known.
    fn is_own(&self, stored: &StoredCluster, account: &ServiceAccountRef) -> Result<bool, ServiceError> {
        let renewed = stored.renewal.as_ref().map(|renewal| renewal.account.clone());
        let tokens = self.bearer(stored)?.into_iter().chain(self.config.own_token());
        let mut own =
            renewed.into_iter().chain(tokens.filter_map(|token| service_account_of_token(token.expose_secret())));
        Ok(own.any(|own| own == *account))
    }
}

fn unknown(field: &str, detail: String) -> ServiceError {
    ServiceError::UnknownAccounts { errors: vec![FieldError::new(field, detail)], names: Vec::new() }
}
