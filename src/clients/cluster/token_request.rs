//! Token requests: new tokens of a `ServiceAccount`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::{Resource, api::PostParams};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;

use super::{ClusterClient, ClusterError, unbuildable};
use crate::domain::cluster::{ServiceAccountRef, check_token};

/// Token that an API server issued.
#[derive(Debug)]
pub struct IssuedToken {
    /// The token.
    pub token: SecretString,
    /// Its end. API servers may choose another lifetime than requested.
    pub expires_at: DateTime<Utc>,
}

#[derive(Deserialize)]
struct TokenRequest {
    status: Status,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    token: SecretString,
    expiration_timestamp: DateTime<Utc>,
}

impl ClusterClient {
    /// Requests a token of a `ServiceAccount` for an audience; for the API server itself if there is
    /// none.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Refused`] if the `ServiceAccount` does not exist; see [`ClusterError`].
    #[tracing::instrument(name = "cluster.request_token", skip_all, fields(server = %self.server(), %account))]
    pub async fn request_token(
        &self,
        account: &ServiceAccountRef,
        audience: Option<&str>,
        lifetime: Duration,
    ) -> Result<IssuedToken, ClusterError> {
        let audiences: Vec<&str> = audience.into_iter().collect();
        let body = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {"audiences": audiences, "expirationSeconds": lifetime.as_secs()},
        });
        let body = serde_json::to_vec(&body).map_err(unbuildable)?;
        let requests = kube::core::Request::new(ServiceAccount::url_path(&(), Some(account.namespace.as_str())));
        let request = requests
            .create_subresource("token", account.name.as_str(), &PostParams::default(), body)
            .map_err(unbuildable)?;
        let response = self.call(request, self.deadline()).await?;
        match response.status {
            _ if response.is_success() => {}
            403 => {
                let detail = format!(
                    "the credential for the cluster may not create serviceaccounts/token of {account} (403): apply \
                     the output of `regcred cluster rbac`"
                );
                return Err(ClusterError::Forbidden { detail });
            }
            404 => {
                let detail = format!("the ServiceAccount {account} does not exist (404)");
                return Err(ClusterError::Refused { detail });
            }
            _ => return Err(response.error(self.server(), &format!("create serviceaccounts/token of {account}"))),
        }
        let TokenRequest { status: Status { token, expiration_timestamp } } = response.read(self.server())?;
        if check_token(token.expose_secret()).is_err() {
            let detail = format!("{} issued a token that cannot be sent in a header", self.server());
            return Err(ClusterError::Refused { detail });
        }
        Ok(IssuedToken { token, expires_at: expiration_timestamp })
    }
}
