//! Secrets of Kubernetes: their types, and the manifest of one.

use std::{collections::BTreeMap, str::FromStr};

use base64::{Engine, prelude::BASE64_STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use crate::domain::{
    docker_config::Profile,
    invalid::Invalid,
    names::{NamespaceName, SecretName},
};

/// Label that marks the Secrets of regcred.
pub const MANAGED_BY_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "regcred");

/// Prefix of regcred's own labels and annotations. They say which pull secret owns a Secret.
const RESERVED_PREFIX: &str = "regcred.dev/";

/// Whether only regcred may set a label or annotation.
///
/// A Secret with the label of a pull secret would pass for one of its Secrets, which the worker
/// overwrites and deletes.
#[must_use]
pub fn is_reserved(key: &str) -> bool {
    key == MANAGED_BY_LABEL.0 || key.starts_with(RESERVED_PREFIX)
}

/// Handling of an existing Secret by a direct delivery.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum IfExists {
    /// Refuse the delivery.
    #[default]
    Refuse,
    /// Replace a Secret that was made by direct delivery. Any other one is kept, and the delivery is
    /// refused.
    Replace,
}

/// Type of a Secret from which the kubelet reads registry credentials
/// (`k8s.io/api/core/v1/types.go`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SecretType {
    /// `kubernetes.io/dockerconfigjson`: a docker `config.json`.
    #[default]
    DockerConfigJson,
    /// `kubernetes.io/dockercfg`: the legacy form, the map without `auths`.
    Dockercfg,
}

impl SecretType {
    /// Value of the Secret's `type`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DockerConfigJson => "kubernetes.io/dockerconfigjson",
            Self::Dockercfg => "kubernetes.io/dockercfg",
        }
    }

    /// Key of the document in the Secret's `data`.
    #[must_use]
    pub const fn data_key(self) -> &'static str {
        match self {
            Self::DockerConfigJson => ".dockerconfigjson",
            Self::Dockercfg => ".dockercfg",
        }
    }

    /// Type of the Secret that a document of the profile goes into, if there is one.
    #[must_use]
    pub fn of_profile(profile: Profile) -> Option<Self> {
        [Self::DockerConfigJson, Self::Dockercfg].into_iter().find(|one| one.profile() == profile)
    }

    /// Profile of the document in a Secret of this type.
    #[must_use]
    pub const fn profile(self) -> Profile {
        match self {
            Self::DockerConfigJson => Profile::Kubernetes,
            Self::Dockercfg => Profile::Dockercfg,
        }
    }
}

impl FromStr for SecretType {
    type Err = Invalid;

    fn from_str(secret_type: &str) -> Result<Self, Invalid> {
        [Self::DockerConfigJson, Self::Dockercfg]
            .into_iter()
            .find(|known| known.as_str() == secret_type)
            .ok_or_else(|| Invalid::new("must be `kubernetes.io/dockerconfigjson` or `kubernetes.io/dockercfg`"))
    }
}

/// Type and encoded document of a Secret. Encoded once, it can be written to many namespaces.
#[derive(Debug)]
pub struct SecretContent {
    secret_type: SecretType,
    base64: SecretString,
    size: usize,
}

impl SecretContent {
    /// Encodes a document, which must be rendered for the profile of the type.
    #[must_use]
    pub fn new(secret_type: SecretType, document: &SecretString) -> Self {
        let document = document.expose_secret();
        Self { secret_type, base64: BASE64_STANDARD.encode(document).into(), size: document.len() }
    }

    /// Length of the document in bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }
}

/// Manifest of a Secret, as `kubectl apply -f -` and the API server accept it.
#[derive(Debug, Clone, Copy)]
pub struct SecretManifest<'a> {
    /// Name.
    pub name: &'a SecretName,
    /// Namespace; without one, the client that applies the manifest chooses.
    pub namespace: Option<&'a NamespaceName>,
    /// Labels.
    pub labels: &'a BTreeMap<String, String>,
    /// Annotations.
    pub annotations: &'a BTreeMap<String, String>,
    /// Version that an update requires.
    pub resource_version: Option<&'a str>,
    /// Type and document.
    pub content: &'a SecretContent,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: Metadata<'a>,
    #[serde(rename = "type")]
    secret_type: &'static str,
    data: BTreeMap<&'static str, &'a str>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Metadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_version: Option<&'a str>,
}

impl Serialize for SecretManifest<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let SecretContent { secret_type, base64, .. } = self.content;
        let object = Object {
            api_version: "v1",
            kind: "Secret",
            metadata: Metadata {
                name: self.name.as_str(),
                namespace: self.namespace.map(NamespaceName::as_str),
                labels: self.labels,
                annotations: self.annotations,
                resource_version: self.resource_version,
            },
            secret_type: secret_type.as_str(),
            data: BTreeMap::from([(secret_type.data_key(), base64.expose_secret())]),
        };
        object.serialize(serializer)
    }
}

impl SecretManifest<'_> {
    /// Renders the manifest as JSON.
    ///
    /// # Errors
    ///
    /// Never for a valid manifest.
    pub fn to_json(&self) -> Result<SecretString, Invalid> {
        serde_json::to_string_pretty(self)
            .map(SecretString::from)
            .map_err(|_| Invalid::new("the manifest cannot be written as JSON"))
    }

    /// Renders the manifest as YAML, with the value on one line.
    ///
    /// # Errors
    ///
    /// Never for a valid manifest.
    pub fn to_yaml(&self) -> Result<SecretString, Invalid> {
        let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
        serde_saphyr::to_string_with_options(self, options)
            .map(SecretString::from)
            .map_err(|_| Invalid::new("the manifest cannot be written as YAML"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::pull_secret::{self, GENERATION_ANNOTATION, ID_LABEL};

    #[test]
    fn every_label_and_annotation_that_regcred_writes_is_reserved() {
        let labels = pull_secret::labels(uuid::Uuid::nil());
        for key in labels.keys().map(String::as_str).chain([ID_LABEL, GENERATION_ANNOTATION, MANAGED_BY_LABEL.0]) {
            assert!(is_reserved(key), "{key}");
        }
        assert!(!is_reserved("team") && !is_reserved("regcred.dev.example.com/team"));
    }

    #[test]
    fn type_of_a_profile_is_the_one_with_that_profile() {
        for profile in Profile::ALL {
            let found = SecretType::of_profile(profile);
            assert!(found.is_none_or(|secret_type| secret_type.profile() == profile));
        }
        assert_eq!(SecretType::of_profile(Profile::Dockercfg), Some(SecretType::Dockercfg));
        assert_eq!(SecretType::of_profile(Profile::Docker), None);
    }
}
