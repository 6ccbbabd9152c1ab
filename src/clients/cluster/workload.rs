//! What diagnosis and coverage read of workloads.

use serde::Deserialize;

use crate::domain::diagnosis::WorkloadKind;

/// Versions of the API that serves a kind, the newest first: API servers before 1.21 have an older
/// one of `CronJob` only.
pub(super) fn versions(kind: WorkloadKind) -> &'static [&'static str] {
    if kind == WorkloadKind::CronJob { &["v1", "v1beta1"] } else { &["v1"] }
}

/// Spec of a workload of any kind, with what is read of its pods.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WorkloadSpec<P> {
    template: Option<Template<P>>,
    job_template: Option<JobTemplate<P>>,
}

#[derive(Deserialize)]
struct Template<P> {
    spec: P,
}

#[derive(Deserialize)]
struct JobTemplate<P> {
    spec: JobSpec<P>,
}

#[derive(Deserialize)]
struct JobSpec<P> {
    template: Template<P>,
}

impl<P> WorkloadSpec<P> {
    /// Spec of its pods.
    pub(super) fn pod(self) -> Option<P> {
        let of_job = self.job_template.map(|job| job.spec.template);
        Some(self.template.or(of_job)?.spec)
    }
}
