//! Whose token it is, asked of the cluster that made it.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo};
use kube::{Resource, api::PostParams};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::Instant;

use super::{ClusterClient, ClusterError, post};

/// The longest that what a cluster said of a token may count, in seconds: a deleted `ServiceAccount` is one for so long.
pub const REVIEW_REMEMBERED_MAX: u64 = 60;

const SERVICE_ACCOUNT: &str = "system:serviceaccount:";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// The `ServiceAccount` that a cluster says that a token is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReviewedServiceAccount {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uid: Option<String>,
    /// Name of the pod that the token was made for, where it was made for one.
    pub pod_name: Option<String>,
    /// Identity of that pod.
    pub pod_uid: Option<String>,
    /// Name of the node that the pod is on, where the cluster tells it (1.30 and newer).
    pub node_name: Option<String>,
}

impl ClusterClient {
    /// Asks the cluster whose token this is, and whether it was made for `audience`. None if the cluster does not vouch for it,
    /// it was made for others, or it is no `ServiceAccount`'s.
    ///
    /// # Errors
    ///
    /// See [`ClusterError`]: the cluster gave no answer, or regcred may not ask.
    #[tracing::instrument(name = "cluster.review_token", skip_all, fields(server = %self.server()))]
    pub async fn review_token(
        &self,
        token: &SecretString,
        audience: &str,
    ) -> Result<Option<ReviewedServiceAccount>, ClusterError> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![audience.to_owned()]),
                token: token.expose_secret().to_owned(),
            },
            ..TokenReview::default()
        };
        let request = post(TokenReview::url_path(&(), None), &PostParams::default(), &review)?;
        let answer = self.call(request, Instant::now() + self.timeout).await?;
        if !answer.is_success() {
            return Err(match answer.failure(self.server()) {
                ClusterError::Forbidden { .. } => ClusterError::Forbidden {
                    detail: "regcred's credential for the cluster may not create tokenreviews (403): bind it to system:auth-delegator"
                        .to_owned(),
                },
                other => other,
            });
        }
        let review: Option<TokenReview> = answer.body.as_deref().and_then(|body| serde_json::from_slice(body).ok());
        let status = review
            .and_then(|review| review.status)
            .ok_or_else(|| ClusterError::Unreachable { detail: format!("{} broke off its answer", self.server()) })?;
        Ok(vouched(status, audience))
    }
}

/// An API server that does not know audiences leaves them out, and has looked at none (`TokenReviewStatus.audiences`).
fn vouched(status: TokenReviewStatus, audience: &str) -> Option<ReviewedServiceAccount> {
    let is_for_us = status.audiences.unwrap_or_default().iter().any(|made_for| made_for == audience);
    if status.authenticated != Some(true) || !is_for_us {
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
        let account = vouched(serde_json::from_value(status).unwrap(), "regcred")?;
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
    fn a_cluster_has_to_vouch_for_the_account_and_the_audience(#[case] status: Value, #[case] vouched: bool) {
        assert_eq!(names(status), vouched.then(|| ("a".to_owned(), "ci".to_owned())));
    }

    #[test]
    fn the_pod_is_told_where_the_cluster_tells_it() {
        let user = json!({"username": "system:serviceaccount:a:ci", "uid": "u-1", "extra": {
            "authentication.kubernetes.io/pod-name": ["job-1"], "authentication.kubernetes.io/pod-uid": ["u-2"],
            "authentication.kubernetes.io/node-name": ["n-1", "n-2"],
        }});
        let status = json!({"authenticated": true, "audiences": ["regcred"], "user": user});
        let account = vouched(serde_json::from_value(status).unwrap(), "regcred").unwrap();
        assert_eq!((account.uid.as_deref(), account.pod_name.as_deref()), (Some("u-1"), Some("job-1")));
        assert_eq!((account.pod_uid.as_deref(), account.node_name), (Some("u-2"), None));
    }
}
