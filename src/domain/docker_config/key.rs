//! Under which key a reader finds a scope.

use super::Profile;
use crate::domain::registry::{DOCKER_HUB, RegistryScope};

/// The one key for Docker Hub that the kubelet, k8schain, podman and the docker CLI all find. It is also what `docker
/// login` and `kubectl create secret docker-registry` write when no server is named.
pub const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// The key under which the profile's reader finds a scope.
///
/// - Docker Hub as a whole: [`DOCKER_HUB_KEY`], for every reader.
/// - The kubelet (`pkg/credentialprovider/keyring.go`) and podman (`containers/image`, `pkg/docker/config/config.go`,
///   `authKeysForKey`) know paths: the scope as it stands, for a part of Docker Hub `docker.io/ORG`, since both look up
///   `docker.io/ORG/…`. No slash at the end: with one, podman finds nothing and the kubelet misses the repository that
///   is the scope itself; without one, the kubelet also tries the entry for `docker.io/ORGANIC`, one attempt too many
///   at the same registry.
/// - The docker CLI knows hosts only (`cli/config/credentials/file_store.go`, `Get`): the path is cut here, where it
///   can be warned about, and not there. From `DOCKER_AUTH_CONFIG` it takes exact keys only
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

/// A second key, `docker.io`, for the account that is for all of Docker Hub, where the kubelet needs one.
///
/// The kubelet looks under `index.docker.io` only if no other key matches (`BasicDockerKeyring.Lookup`), and
/// `docker.io/acme` matches `docker.io/acmeworks/app` as well: the account for one organisation would hide the one for
/// all others.
pub(super) fn second_for_docker_hub<'b, T>(
    profile: Profile,
    entries: &[(&str, &'b T)],
) -> Option<(&'static str, &'b T)> {
    let has_default = matches!(profile, Profile::Kubernetes | Profile::Dockercfg);
    let has_part = entries.iter().any(|(key, _)| key.starts_with("docker.io/"));
    let (_, whole) = entries.iter().find(|(key, _)| *key == DOCKER_HUB_KEY)?;
    (has_default && has_part).then_some((DOCKER_HUB, *whole))
}
