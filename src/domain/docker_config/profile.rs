//! Programs that a document can be rendered for.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Consumer;
use crate::domain::invalid::Invalid;

/// Program that reads the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum Profile {
    /// The kubelet, from a Secret of type `kubernetes.io/dockerconfigjson`.
    Kubernetes,
    /// The docker CLI, from `~/.docker/config.json`.
    Docker,
    /// The docker CLI or a CI runner, from the variable `DOCKER_AUTH_CONFIG`.
    DockerAuthConfig,
    /// podman, skopeo and buildah, from `auth.json`.
    Podman,
    /// The kubelet, from a Secret of the legacy type `kubernetes.io/dockercfg`.
    Dockercfg,
}

impl Profile {
    /// All profiles.
    pub const ALL: [Self; 5] = [Self::Kubernetes, Self::Docker, Self::DockerAuthConfig, Self::Podman, Self::Dockercfg];

    /// Program that reads the document.
    #[must_use]
    pub fn consumer(self) -> Consumer {
        match self {
            Self::Kubernetes | Self::Dockercfg => Consumer::Kubernetes,
            Self::Docker => Consumer::Docker,
            Self::DockerAuthConfig => Consumer::DockerAuthConfig,
            Self::Podman => Consumer::Podman,
        }
    }

    /// Name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kubernetes => "kubernetes",
            Self::Docker => "docker",
            Self::DockerAuthConfig => "dockerAuthConfig",
            Self::Podman => "podman",
            Self::Dockercfg => "dockercfg",
        }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Profile {
    type Err = Invalid;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|profile| profile.as_str() == s)
            .ok_or_else(|| Invalid::new("a profile is one of kubernetes, docker, dockerAuthConfig, podman, dockercfg"))
    }
}
