//! Key of a scope in a document.

use super::Profile;
use crate::domain::registry::{DOCKER_HUB, RegistryScope};

/// The only key for Docker Hub that the kubelet, k8schain, podman and the docker CLI all find.
/// `docker login` and `kubectl create secret docker-registry` write it by default.
pub const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Returns the key under which the profile's consumer finds a scope.
///
/// - All of Docker Hub: [`DOCKER_HUB_KEY`], for every consumer.
/// - The kubelet (`pkg/credentialprovider/keyring.go`) and podman (`containers/image`,
///   `pkg/docker/config/config.go`, `authKeysForKey`) match paths: the key is the scope, for a part
///   of Docker Hub `docker.io/ORG`. It has no trailing slash: with one, podman finds nothing and
///   the kubelet misses the repository with that exact name. Without one, the kubelet also tries
///   `docker.io/ORG` for `docker.io/ORGANIC`, which costs one failed attempt.
/// - The docker CLI matches hosts only (`cli/config/credentials/file_store.go`, `Get`). The path is
///   removed here, so that a warning can say so. In `DOCKER_AUTH_CONFIG` it matches exact keys only
///   (`cli/config/memorystore/store.go`, `Get`).
#[must_use]
pub fn key_for(profile: Profile, scope: &RegistryScope) -> &str {
    let knows_paths = match profile {
        Profile::Kubernetes | Profile::Dockercfg | Profile::Podman => true,
        Profile::Docker | Profile::DockerAuthConfig => false,
    };
    if scope.path().is_some() && knows_paths {
        scope.as_str()
    } else if scope.is_docker_hub() {
        DOCKER_HUB_KEY
    } else {
        scope.authority()
    }
}

/// Returns a second key, `docker.io`, for the account of all of Docker Hub if the kubelet needs
/// one.
///
/// The kubelet falls back to `index.docker.io` only if no other key matches
/// (`BasicDockerKeyring.Lookup`). `docker.io/acme` also matches `docker.io/acmeworks/app`, so an
/// account for one organisation would hide the account for all.
pub(super) fn second_docker_hub_key<'b, T>(
    profile: Profile,
    entries: &[(&str, &'b T)],
) -> Option<(&'static str, &'b T)> {
    let has_default = matches!(profile, Profile::Kubernetes | Profile::Dockercfg);
    let has_part = entries.iter().any(|(key, _)| key.starts_with("docker.io/"));
    let (_, credential) = entries.iter().find(|(key, _)| *key == DOCKER_HUB_KEY)?;
    (has_default && has_part).then_some((DOCKER_HUB, *credential))
}
