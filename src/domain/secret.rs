//! Pull secrets as Kubernetes objects: their types, and the manifest of one.

use std::{collections::BTreeMap, str::FromStr};

use base64::{Engine, prelude::BASE64_STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;

use crate::domain::{
    docker_config::Profile,
    invalid::Invalid,
    names::{Labels, NamespaceName, SecretName},
};

/// The label by which people find what regcred made.
pub const MANAGED_BY_LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "regcred");

/// The two types of Secret that the kubelet takes registry credentials from (`k8s.io/api/core/v1/types.go`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SecretType {
    /// `kubernetes.io/dockerconfigjson`: a docker `config.json`.
    #[default]
    DockerConfigJson,
    /// `kubernetes.io/dockercfg`: the legacy form, the bare map without `auths`.
    Dockercfg,
}

impl SecretType {
    /// The type as it stands in the Secret.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DockerConfigJson => "kubernetes.io/dockerconfigjson",
            Self::Dockercfg => "kubernetes.io/dockercfg",
        }
    }

    /// The key of the document in the Secret's data.
    #[must_use]
    pub const fn data_key(self) -> &'static str {
        match self {
            Self::DockerConfigJson => ".dockerconfigjson",
            Self::Dockercfg => ".dockercfg",
        }
    }

    /// The profile of the document in a Secret of this type.
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

/// A Secret as `kubectl apply -f -` takes it.
#[derive(Debug)]
pub struct Manifest<'a> {
    /// Name of the Secret.
    pub name: &'a SecretName,
    /// Namespace, where it is said.
    pub namespace: Option<&'a NamespaceName>,
    /// Type, which must be the one whose profile the document was rendered for.
    pub secret_type: SecretType,
    /// Labels.
    pub labels: &'a Labels,
    /// The docker config.
    pub document: &'a SecretString,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a> {
    api_version: &'static str,
    kind: &'static str,
    metadata: Metadata<'a>,
    #[serde(rename = "type")]
    secret_type: &'static str,
    data: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Metadata<'a> {
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace: Option<&'a str>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    labels: &'a BTreeMap<String, String>,
}

impl Manifest<'_> {
    fn object(&self) -> Object<'_> {
        let value = BASE64_STANDARD.encode(self.document.expose_secret());
        Object {
            api_version: "v1",
            kind: "Secret",
            metadata: Metadata {
                name: self.name.as_str(),
                namespace: self.namespace.map(NamespaceName::as_str),
                labels: self.labels.as_map(),
            },
            secret_type: self.secret_type.as_str(),
            data: BTreeMap::from([(self.secret_type.data_key(), value)]),
        }
    }

    /// The manifest as JSON.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it cannot be written, which nothing in it can cause.
    pub fn to_json(&self) -> Result<SecretString, Invalid> {
        serde_json::to_string_pretty(&self.object())
            .map(SecretString::from)
            .map_err(|_| Invalid::new("the manifest cannot be written as JSON"))
    }

    /// The manifest as YAML.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it cannot be written, which nothing in it can cause.
    pub fn to_yaml(&self) -> Result<SecretString, Invalid> {
        // One line for the value, as `base64 -w 0` gives it.
        let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
        serde_saphyr::to_string_with_options(&self.object(), options)
            .map(SecretString::from)
            .map_err(|_| Invalid::new("the manifest cannot be written as YAML"))
    }
}
