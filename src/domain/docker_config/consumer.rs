//! Programs that read docker configs, each by its own rules.

use std::fmt;

use serde::Serialize;
use utoipa::ToSchema;

use super::Profile;

/// A program that reads docker configs. A [`Profile`] is the document written for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Consumer {
    /// The kubelet, which reads image pull secrets.
    Kubernetes,
    /// Controllers that read image pull secrets through go-containerregistry, such as Flux, Knative
    /// and Tekton.
    K8schain,
    /// The docker CLI, from its file.
    Docker,
    /// The docker CLI, from the variable `DOCKER_AUTH_CONFIG`.
    DockerAuthConfig,
    /// podman, skopeo and buildah.
    Podman,
}

impl Consumer {
    /// All consumers.
    pub const ALL: [Self; 5] = [Self::Kubernetes, Self::K8schain, Self::Docker, Self::DockerAuthConfig, Self::Podman];

    /// Profile of the documents that this program reads.
    #[must_use]
    pub fn profile(self) -> Profile {
        match self {
            Self::Kubernetes | Self::K8schain => Profile::Kubernetes,
            Self::Docker => Profile::Docker,
            Self::DockerAuthConfig => Profile::DockerAuthConfig,
            Self::Podman => Profile::Podman,
        }
    }
}

impl fmt::Display for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kubernetes => "the kubelet",
            Self::K8schain => "k8schain",
            Self::Docker => "the docker CLI",
            Self::DockerAuthConfig => "the docker CLI with DOCKER_AUTH_CONFIG",
            Self::Podman => "podman",
        })
    }
}
