//! Source of a minted account as JSON: in requests with its secret, in answers and in the database
//! without.

use std::fmt;

use secrecy::SecretString;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

/// Type of a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum SourceType {
    /// Private registries of AWS.
    Ecr,
    /// The public registry of AWS.
    EcrPublic,
    /// Google Artifact Registry and gcr.io.
    GoogleArtifactRegistry,
    /// Azure Container Registry.
    AzureContainerRegistry,
    /// Any token service with OAuth 2.0 client credentials (RFC 6749, section 4.4).
    Oauth2,
}

impl SourceType {
    /// All types.
    pub const ALL: [Self; 5] =
        [Self::Ecr, Self::EcrPublic, Self::GoogleArtifactRegistry, Self::AzureContainerRegistry, Self::Oauth2];

    /// Returns the name in the API and in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ecr => "ecr",
            Self::EcrPublic => "ecrPublic",
            Self::GoogleArtifactRegistry => "googleArtifactRegistry",
            Self::AzureContainerRegistry => "azureContainerRegistry",
            Self::Oauth2 => "oauth2",
        }
    }
}

impl fmt::Display for SourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Type of an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum IdentityType {
    /// AWS access key.
    AccessKey,
    /// Key file of a Google service account.
    ServiceAccountKey,
    /// Client with a secret.
    ClientSecret,
    /// Azure client with a certificate.
    ClientCertificate,
    /// `ServiceAccount` of a registered cluster.
    WebIdentity,
    /// Identity of the host or pod on which regcred runs.
    Ambient,
}

/// How an OAuth 2.0 client authenticates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum ClientAuthentication {
    /// In the header `Authorization: Basic`.
    #[default]
    Basic,
    /// As `client_id` and `client_secret` in the body.
    Body,
}

/// Defines the JSON form of a source with this form of its identity. Answers omit what is not set, and
/// never have `null`.
macro_rules! source_document {
    ($(#[$attribute:meta])* $name:ident, $identity:ident, nullable = $nullable:tt) => {
        $(#[$attribute])*
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Type of the source.
            #[serde(rename = "type")]
            pub source_type: SourceType,
            /// Identity under which logins are requested.
            pub identity: $identity,
            /// AWS region of the registry. Required for `ecr`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            #[schema(example = "eu-central-1")]
            pub region: Option<String>,
            /// AWS role to assume, for `ecr` and `ecrPublic`. Required with `webIdentity`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub assume_role: Option<AssumeRoleDocument>,
            /// Whether the FIPS endpoints of AWS are called, for `ecr`. They do not exist in every region.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub fips: Option<bool>,
            /// URL in place of the provider's, for `ecr`, `ecrPublic` and `googleArtifactRegistry`. Only
            /// callers with all grants may set it, and not with an `ambient` identity.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub endpoint: Option<String>,
            /// URL in place of that of AWS STS, for `ecr` and `ecrPublic`. Only callers with all grants may
            /// set it, and not with an `ambient` identity.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub sts_endpoint: Option<String>,
            /// E-mail address of a Google service account to impersonate, for `googleArtifactRegistry`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub impersonate: Option<String>,
            /// Scope of the token, for `googleArtifactRegistry` and `oauth2`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub scope: Option<String>,
            /// Azure tenant, for `azureContainerRegistry`. Required unless the identity is `ambient`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub tenant_id: Option<String>,
            /// URL of the Azure login service, for `azureContainerRegistry`. Only callers with all grants may
            /// set one that is not Microsoft's, and not with an `ambient` identity.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            #[schema(example = "https://login.microsoftonline.com")]
            pub authority: Option<String>,
            /// Repositories that the login can pull from, for `azureContainerRegistry`; all that the identity
            /// can pull from if absent.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub repositories: Option<Vec<String>>,
            /// URL of the token service. Required for `oauth2`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub token_url: Option<String>,
            /// User name of the login. Required for `oauth2`; other providers determine it.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub username: Option<String>,
            /// How the client authenticates, for `oauth2`; `basic` by default.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub authentication: Option<ClientAuthentication>,
            /// Lifetime of the token, in seconds, if the answers of the token service do not state it, for
            /// `oauth2`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            #[schema(minimum = 300, maximum = 2_592_000)]
            pub lifetime_seconds: Option<u64>,
        }
    };
}

source_document!(
    /// Source of a minted account. Which fields are required and allowed depends on its `type`.
    #[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    #[schema(as = SourceInput)]
    SourceDocument,
    IdentityDocument,
    nullable = true
);

source_document!(
    /// Source of a minted account, without its secret. Which fields it has depends on its `type`.
    #[derive(Debug, Serialize, ToSchema)]
    #[schema(as = Source)]
    SourceInAnswers,
    IdentityInAnswers,
    nullable = false
);

/// AWS role.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AssumeRoleDocument {
    /// ARN of the role.
    #[schema(example = "arn:aws:iam::123456789012:role/regcred")]
    pub role_arn: String,
    /// External id that the role's trust policy requires.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external_id: Option<String>,
}

/// Defines the JSON form of an identity: the public fields, and further ones.
macro_rules! identity_document {
    ($(#[$attribute:meta])* $name:ident, nullable = $nullable:tt { $($(#[$more:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Type of the identity.
            #[serde(rename = "type")]
            pub identity_type: IdentityType,
            /// Id of the key, for `accessKey`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub access_key_id: Option<String>,
            /// Id of the client, for `clientSecret` and `clientCertificate`, for `webIdentity` of Azure, and
            /// optionally for `ambient` of Azure.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub client_id: Option<String>,
            /// Certificate (PEM), for `clientCertificate`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub certificate: Option<String>,
            /// Registered cluster that issues the token, for `webIdentity`. The caller must be granted it and
            /// the namespace.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub cluster: Option<String>,
            /// Namespace of the `ServiceAccount`, for `webIdentity`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub namespace: Option<String>,
            /// Name of the `ServiceAccount`, for `webIdentity`.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub service_account: Option<String>,
            /// Audience of the token, for `webIdentity`; the usual one of the provider by default. One of the
            /// API server or of an identity provider is refused.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            pub audience: Option<String>,
            /// Provider of a workload identity pool, for `webIdentity` of Google.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            #[schema(nullable = $nullable)]
            #[schema(example = "projects/123456/locations/global/workloadIdentityPools/regcred/providers/dev")]
            pub workload_identity_provider: Option<String>,
            $($(#[$more])* pub $field: $type,)*
        }
    };
}

identity_document!(
    /// Identity under which logins are requested. Which fields are required and allowed depends on its
    /// `type`.
    #[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    #[schema(as = IdentityInput)]
    IdentityDocument, nullable = true {
        /// Secret of the key, for `accessKey`. It is sealed before it is stored, and no response returns
        /// it.
        #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "conceal")]
        #[schema(value_type = Option<String>, format = Password)]
        pub secret_access_key: Option<SecretString>,
        /// Content of the JSON key file, for `serviceAccountKey`. Its private key is sealed before it is
        /// stored, and no response returns it.
        #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "conceal")]
        #[schema(value_type = Option<String>, format = Password)]
        pub key_file: Option<SecretString>,
        /// Secret of the client, for `clientSecret`. It is sealed before it is stored, and no response
        /// returns it.
        #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "conceal")]
        #[schema(value_type = Option<String>, format = Password)]
        pub client_secret: Option<SecretString>,
        /// Private key of the certificate (PEM, RSA), for `clientCertificate`. It is sealed before it is
        /// stored, and no response returns it.
        #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "conceal")]
        #[schema(value_type = Option<String>, format = Password)]
        pub private_key: Option<SecretString>,
        /// E-mail address in the key file. Refused: only responses have it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(ignore)]
        pub client_email: Option<String>,
        /// Id of the key in the key file. Refused: only responses have it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(ignore)]
        pub private_key_id: Option<String>,
    }
);

identity_document!(
    /// Identity under which logins are requested, without its secret.
    #[derive(Debug, Serialize, ToSchema)]
    #[schema(as = Identity)]
    IdentityInAnswers, nullable = false {
        /// E-mail address in the key file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(nullable = false)]
        pub client_email: Option<String>,
        /// Id of the key in the key file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(nullable = false)]
        pub private_key_id: Option<String>,
    }
);

/// Serialises a secret as `null`: [`Source::parse`](super::Source::parse) takes it out before.
#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn conceal<S: Serializer>(_: &Option<SecretString>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_none()
}

impl SourceDocument {
    /// Returns the optional fields by name, and whether they are set.
    pub(super) fn fields(&self) -> [(&'static str, bool); 14] {
        [
            ("region", self.region.is_some()),
            ("assumeRole", self.assume_role.is_some()),
            ("fips", self.fips.is_some()),
            ("endpoint", self.endpoint.is_some()),
            ("stsEndpoint", self.sts_endpoint.is_some()),
            ("impersonate", self.impersonate.is_some()),
            ("scope", self.scope.is_some()),
            ("tenantId", self.tenant_id.is_some()),
            ("authority", self.authority.is_some()),
            ("repositories", self.repositories.is_some()),
            ("tokenUrl", self.token_url.is_some()),
            ("username", self.username.is_some()),
            ("authentication", self.authentication.is_some()),
            ("lifetimeSeconds", self.lifetime_seconds.is_some()),
        ]
    }
}

impl IdentityDocument {
    /// Returns the optional fields by name, and whether they are set.
    pub(super) fn fields(&self) -> [(&'static str, bool); 14] {
        [
            ("accessKeyId", self.access_key_id.is_some()),
            ("secretAccessKey", self.secret_access_key.is_some()),
            ("keyFile", self.key_file.is_some()),
            ("clientEmail", self.client_email.is_some()),
            ("privateKeyId", self.private_key_id.is_some()),
            ("clientId", self.client_id.is_some()),
            ("clientSecret", self.client_secret.is_some()),
            ("certificate", self.certificate.is_some()),
            ("privateKey", self.private_key.is_some()),
            ("cluster", self.cluster.is_some()),
            ("namespace", self.namespace.is_some()),
            ("serviceAccount", self.service_account.is_some()),
            ("audience", self.audience.is_some()),
            ("workloadIdentityProvider", self.workload_identity_provider.is_some()),
        ]
    }
}
