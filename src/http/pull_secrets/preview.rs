//! Dry run of a declaration.

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::{PullSecret, TargetError};
use crate::{
    domain::{
        caller::Call,
        docker_config::Warning,
        names::Name,
        pull_secret::{Declaration, LeftOut, PreviewAction},
    },
    http::problem::ApiError,
    service::{
        pull_secrets::{Precondition, PullSecrets},
        reconcile::{Previewed, PreviewedTarget, Reconciler},
    },
};

/// The pull secret; for a dry run, the planned changes.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum ReplacedOrPreview {
    /// Without a dry run.
    Replaced(Box<PullSecret>),
    /// For a dry run.
    Preview(PullSecretPreview),
}

/// Result of a dry run.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretPreview {
    /// Always `true`.
    dry_run: bool,
    /// Planned actions, ordered by cluster and namespace.
    targets: Vec<PullSecretTargetPreview>,
    /// Accounts that the selector matches and that the document would leave out, by name.
    left_out: Vec<LeftOut>,
    /// Selectors that match nothing.
    warnings: Vec<Warning>,
}

/// Planned action for a target.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PullSecretTargetPreview {
    /// Name of the cluster.
    cluster: String,
    /// Namespace; `null` if the cluster could not be read.
    namespace: Option<String>,
    /// Action.
    action: PreviewAction,
    /// Reason of a conflict, or why the action is unknown.
    error: Option<TargetError>,
}

impl From<PreviewedTarget> for PullSecretTargetPreview {
    fn from(target: PreviewedTarget) -> Self {
        let error =
            target.error.map(|error| TargetError { slug: error.error_type.as_str().to_owned(), detail: error.detail });
        Self { cluster: target.cluster, namespace: target.namespace, action: target.action, error }
    }
}

/// Responds with the planned changes of a declaration.
pub(super) async fn preview(
    caller: &Call,
    (pull_secrets, previews): (&PullSecrets, &Reconciler),
    name: &Name,
    declaration: &Declaration,
    condition: &Precondition,
) -> Result<HttpResponse, ApiError> {
    let existing = pull_secrets.validate(caller, name, declaration, condition).await?;
    let Previewed { targets, left_out, warnings } = previews.preview(caller, declaration, existing.as_ref()).await?;
    let targets = targets.into_iter().map(PullSecretTargetPreview::from).collect();
    let preview = PullSecretPreview { dry_run: true, targets, left_out, warnings };
    Ok(HttpResponse::Ok().json(ReplacedOrPreview::Preview(preview)))
}
