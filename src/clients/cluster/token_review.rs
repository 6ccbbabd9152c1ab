//! Token reviews: the `ServiceAccount` that a token belongs to.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::{Resource, api::PostParams};
use secrecy::{ExposeSecret, SecretString};

use super::{ClusterClient, ClusterError, unbuildable};

/// Maximum time for which a review may be cached, in seconds. A deleted `ServiceAccount` stays
/// valid that long.
pub const REVIEW_REMEMBERED_MAX: u64 = 60;

const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// `ServiceAccount` that a token belongs to, as reviewed by its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReviewedServiceAccount {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: Option<String>,
    /// Name of the pod that the token is bound to, if any.
    pub pod_name: Option<String>,
    /// UID of that pod.
    pub pod_uid: Option<String>,
    /// Name of the pod's node, if the cluster reports it (since 1.30).
    pub node_name: Option<String>,
}

impl ClusterClient {
    /// Reviews a token. None if the cluster does not authenticate it, if it has another audience,
    /// or if it does not belong to a `ServiceAccount`.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.review_token", skip_all, fields(server = %self.server()))]
    pub async fn review_token(
        &self,
        token: &SecretString,
        audience: &str,
    ) -> Result<Option<ReviewedServiceAccount>, ClusterError> {
        Ok(authenticated(self.review(token, Some(audience)).await?, audience))
    }

    /// Whether the API server accepts a token for itself, as it does the default token of a pod.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.is_own_token", skip_all, fields(server = %self.server()))]
    pub async fn is_own_token(&self, token: &SecretString) -> Result<bool, ClusterError> {
        Ok(self.review(token, None).await?.authenticated == Some(true))
    }

    /// Returns the API server's own audiences that a token has.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`].
    #[tracing::instrument(name = "cluster.own_audiences", skip_all, fields(server = %self.server()))]
    pub async fn own_audiences(&self, token: &SecretString) -> Result<Vec<String>, ClusterError> {
        let status = self.review(token, None).await?;
        Ok(status.audiences.filter(|_| status.authenticated == Some(true)).unwrap_or_default())
    }

    /// Reviews a token for one audience, or for the API server's own.
    async fn review(&self, token: &SecretString, audience: Option<&str>) -> Result<TokenReviewStatus, ClusterError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: audience.map(|audience| vec![audience.to_owned()]),
                token: token.expose_secret().to_owned(),
            },
            ..TokenReview::default()
        };
        let body = serde_json::to_vec(&review).map_err(unbuildable)?;
        let requests = kube::core::Request::new(TokenReview::url_path(&(), None));
        let request = requests.create(&PostParams::default(), body).map_err(unbuildable)?;
        let response = self.call(request, self.deadline()).await?;
        match response.status {
            _ if response.is_success() => {}
            403 => {
                let detail = "the credential for the cluster may not create tokenreviews (403): bind it to the \
                              ClusterRole system:auth-delegator";
                return Err(ClusterError::Forbidden { detail: detail.to_owned() });
            }
            _ => return Err(response.error(self.server(), "create tokenreviews")),
        }
        let review: Option<TokenReview> = response.json();
        review.and_then(|review| review.status).ok_or_else(|| ClusterError::Unreachable {
            detail: format!("{} sent an incomplete token review", self.server()),
        })
    }
}

/// Requires the audience in the response: an API server that does not support audiences omits them
/// and has checked none (`TokenReviewStatus.audiences`).
fn authenticated(status: TokenReviewStatus, audience: &str) -> Option<ReviewedServiceAccount> {
    let has_audience = status.audiences.unwrap_or_default().iter().any(|reviewed| reviewed == audience);
    if status.authenticated != Some(true) || !has_audience {
        return None;
    }
    service_account(status.user?)
}

fn service_account(user: UserInfo) -> Option<ReviewedServiceAccount> {
    let (namespace, name) = user.username.as_deref()?.strip_prefix(SERVICE_ACCOUNT)?.split_once(':')?;
    if namespace.is_empty() || name.is_empty() {
        return None;
    }
    let extra = user.extra.unwrap_or_default();
    let one = |key: &str| match extra.get(key).map(Vec::as_slice) {
        Some([value]) => Some(value.clone()),
        _ => None,
    };
    Some(ReviewedServiceAccount {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: user.uid.filter(|uid| !uid.is_empty()),
        pod_name: one(POD_NAME),
        pod_uid: one(POD_UID),
        node_name: one(NODE_NAME),
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    fn names(status: Value) -> Option<(String, String)> {
        let account = authenticated(serde_json::from_value(status).unwrap(), "regcred")?;
        Some((account.namespace, account.name))
    }

    #[rstest]
    #[case(json!({"authenticated": true, "audiences": ["regcred"], "user": {"username": "system:serviceaccount:a:ci"}}), true)]
    #[case(json!({"authenticated": true, "audiences": ["x", "regcred"], "user": {"username": "system:serviceaccount:a:ci"}}), true)]
    #[case(json!({"authenticated": false, "audiences": ["regcred"], "user": {"username": "system:serviceaccount:a:ci"}}), false)]
    #[case(json!({"audiences": ["regcred"], "user": {"username": "system:serviceaccount:a:ci"}}), false)]
    #[case(json!({"authenticated": true, "user": {"username": "system:serviceaccount:a:ci"}}), false)]
    #[case(json!({"authenticated": true, "audiences": [], "user": {"username": "system:serviceaccount:a:ci"}}), false)]
    #[case(json!({"authenticated": true, "audiences": ["other"], "user": {"username": "system:serviceaccount:a:ci"}}), false)]
    #[case(json!({"authenticated": true, "audiences": ["regcred"], "user": {"username": "alice"}}), false)]
    #[case(json!({"authenticated": true, "audiences": ["regcred"], "user": {"username": "system:serviceaccount:a"}}), false)]
    #[case(json!({"authenticated": true, "audiences": ["regcred"], "user": {"username": "system:serviceaccount::ci"}}), false)]
    #[case(json!({"authenticated": true, "audiences": ["regcred"]}), false)]
    #[case(json!({}), false)]
    fn review_must_confirm_service_account_and_audience(#[case] status: Value, #[case] accepted: bool) {
        assert_eq!(names(status), accepted.then(|| ("a".to_owned(), "ci".to_owned())));
    }

    #[test]
    fn pod_is_read_from_the_review() {
        let user = json!({"username": "system:serviceaccount:a:ci", "uid": "u-1", "extra": {
            "authentication.kubernetes.io/pod-name": ["job-1"], "authentication.kubernetes.io/pod-uid": ["u-2"],
            "authentication.kubernetes.io/node-name": ["n-1", "n-2"],
        }});
        let status = json!({"authenticated": true, "audiences": ["regcred"], "user": user});
        let account = authenticated(serde_json::from_value(status).unwrap(), "regcred").unwrap();
        assert_eq!((account.uid.as_deref(), account.pod_name.as_deref()), (Some("u-1"), Some("job-1")));
        assert_eq!((account.pod_uid.as_deref(), account.node_name), (Some("u-2"), None));
    }
}
