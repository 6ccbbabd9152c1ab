//! Source of a minted account: the provider, and the identity under which logins are requested.

use std::time::Duration;

use secrecy::SecretString;

use super::{
    ClientAuthentication, IdentityType, SourceDocument, SourceType,
    aws::{ECR_PUBLIC_HOSTS, Region},
    parse,
};
use crate::domain::{
    account::Username,
    cluster::{ServerUrl, ServiceAccountRef},
    invalid::{FieldError, Invalid},
    names::{Name, NamespaceName, ServiceAccountName},
    registry::RegistryScope,
};

/// Login services of Azure's clouds.
pub(super) const AZURE_AUTHORITIES: [&str; 3] =
    ["https://login.microsoftonline.com", "https://login.microsoftonline.us", "https://login.chinacloudapi.cn"];
/// Domains of Azure's registries.
const AZURE_DOMAINS: [&str; 4] = ["azurecr.io", "azurecr.cn", "azurecr.us", "azurecr.de"];

/// Maximum length of a stored source, in bytes. Also in the migration.
const TEXT_MAX: usize = 64 * 1024;
/// User name of logins at ECR.
pub const ECR_USERNAME: &str = "AWS";
/// User name of logins with an access token of Google.
pub const GOOGLE_USERNAME: &str = "oauth2accesstoken";
/// User name of logins with a token of a registry of Azure.
pub const AZURE_USERNAME: &str = "00000000-0000-0000-0000-000000000000";

/// Validated source, without its secret.
#[derive(Debug, Clone)]
pub struct Source {
    /// Validated form of the document.
    pub provider: Provider,
    /// JSON form, without secrets.
    document: SourceDocument,
    /// The document as stored. The secret is bound to these bytes.
    text: String,
}

impl PartialEq for Source {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Source {}

/// Source of a request.
#[derive(Debug, Clone)]
pub struct NewSource {
    /// The source.
    pub source: Source,
    /// Secret of the identity; empty for an identity without one.
    pub secret: SecretString,
}

/// Provider of logins.
#[derive(Debug, Clone)]
pub enum Provider {
    /// AWS.
    Ecr(EcrSource),
    /// Google.
    Google(GoogleSource),
    /// Azure.
    Azure(AzureSource),
    /// OAuth 2.0 client credentials.
    OAuth2(OAuth2Source),
}

/// Logins of ECR or ECR Public.
#[derive(Debug, Clone)]
pub struct EcrSource {
    /// Whether this is ECR Public.
    pub is_public: bool,
    /// Region of the API.
    pub region: Region,
    /// Identity.
    pub identity: AwsIdentity,
    /// Role to assume.
    pub assume_role: Option<AssumeRole>,
    /// Whether the FIPS endpoints of AWS are called.
    pub fips: bool,
    /// API in place of AWS's.
    pub endpoint: Option<ServerUrl>,
    /// STS in place of AWS's.
    pub sts_endpoint: Option<ServerUrl>,
}

/// Identity at AWS.
#[derive(Debug, Clone)]
pub enum AwsIdentity {
    /// Access key, whose secret is sealed.
    AccessKey {
        /// Id of the key.
        id: String,
    },
    /// `ServiceAccount` of a cluster, which assumes the source's role.
    WebIdentity(WebIdentity),
    /// Identity of regcred's host or pod.
    Ambient,
}

/// AWS role.
#[derive(Debug, Clone)]
pub struct AssumeRole {
    /// ARN of the role.
    pub role_arn: String,
    /// External id that its trust policy requires.
    pub external_id: Option<String>,
}

/// Logins of Google's registries.
#[derive(Debug, Clone)]
pub struct GoogleSource {
    /// Identity.
    pub identity: GoogleIdentity,
    /// Service account to impersonate.
    pub impersonate: Option<String>,
    /// Scope of the token.
    pub scope: Option<String>,
    /// Host of all APIs in place of Google's.
    pub endpoint: Option<ServerUrl>,
}

/// Identity at Google.
#[derive(Debug, Clone)]
pub enum GoogleIdentity {
    /// Key of a service account; the private key is sealed.
    ServiceAccountKey {
        /// E-mail address of the service account.
        email: String,
        /// Id of the key.
        key_id: Option<String>,
    },
    /// `ServiceAccount` of a cluster that a workload identity pool trusts.
    WebIdentity {
        /// The `ServiceAccount`.
        identity: WebIdentity,
        /// Provider of the pool: `projects/…/providers/…`.
        provider: String,
    },
    /// Identity of regcred's host or pod.
    Ambient,
}

/// Logins of Azure Container Registry.
#[derive(Debug, Clone)]
pub struct AzureSource {
    /// Identity.
    pub identity: AzureIdentity,
    /// Login service.
    pub authority: ServerUrl,
    /// Repositories of a scoped login; empty for an unscoped one.
    pub repositories: Vec<String>,
}

/// Identity at Azure.
#[derive(Debug, Clone)]
pub enum AzureIdentity {
    /// Client secret, which is sealed.
    ClientSecret {
        /// Tenant of the client.
        tenant: String,
        /// Id of the client.
        client_id: String,
    },
    /// Client certificate; its private key is sealed.
    ClientCertificate {
        /// Tenant of the client.
        tenant: String,
        /// Id of the client.
        client_id: String,
        /// DER of the certificate.
        certificate: Vec<u8>,
    },
    /// `ServiceAccount` of a cluster that a federated credential of the client trusts.
    WebIdentity {
        /// Tenant of the client.
        tenant: String,
        /// Id of the client.
        client_id: String,
        /// The `ServiceAccount`.
        identity: WebIdentity,
    },
    /// Identity of regcred's host or pod.
    Ambient {
        /// Id of a user-assigned identity.
        client_id: Option<String>,
    },
}

/// Tokens of OAuth 2.0 client credentials.
#[derive(Debug, Clone)]
pub struct OAuth2Source {
    /// URL of the token service, with the slash at its end if it has one.
    pub token_url: String,
    /// Id of the client.
    pub client_id: String,
    /// How the client authenticates.
    pub authentication: ClientAuthentication,
    /// Scope of the token.
    pub scope: Option<String>,
    /// User name of the login.
    pub username: Username,
    /// Lifetime of the token if the answer does not state it.
    pub lifetime: Option<Duration>,
}

/// `ServiceAccount` of a registered cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebIdentity {
    /// Cluster.
    pub cluster: Name,
    /// Namespace.
    pub namespace: NamespaceName,
    /// `ServiceAccount`.
    pub service_account: ServiceAccountName,
    /// Audience of its token.
    pub audience: String,
}

impl WebIdentity {
    /// Refusal of an audience or a `ServiceAccount`. The same text for each, because only callers with
    /// all grants may learn the audiences of identity providers.
    #[must_use]
    pub fn reserved() -> Invalid {
        Invalid::new("is reserved for API servers or for regcred itself: choose another one")
    }

    /// Returns the `ServiceAccount` without its cluster.
    #[must_use]
    pub fn account(&self) -> ServiceAccountRef {
        ServiceAccountRef { namespace: self.namespace.clone(), name: self.service_account.clone() }
    }
}

impl Source {
    /// Validates the source of a request, and takes its secret out of it.
    ///
    /// # Errors
    ///
    /// All invalid fields, as `source.…`.
    pub fn parse(mut document: SourceDocument) -> Result<NewSource, Vec<FieldError>> {
        let secret = parse::take_secret(&mut document);
        match (secret, Self::from_document(document)) {
            (Ok(secret), Ok(source)) => Ok(NewSource { source, secret }),
            (secret, source) => {
                let mut errors = secret.err().unwrap_or_default();
                let more = source.err().unwrap_or_default();
                let fields: Vec<String> = errors.iter().map(|error| error.field.clone()).collect();
                errors.extend(more.into_iter().filter(|error| !fields.contains(&error.field)));
                Err(errors)
            }
        }
    }

    /// Reads a stored source.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if it is not one that [`Source::as_text`] returned.
    pub fn from_stored(text: &str) -> Result<Self, Invalid> {
        let document = serde_json::from_str(text).map_err(|_| Invalid::new("is not a source"))?;
        let source = Self::from_document(document)?;
        Ok(Self { text: text.to_owned(), ..source })
    }

    fn from_document(document: SourceDocument) -> Result<Self, Vec<FieldError>> {
        let provider = parse::provider(&document)?;
        let text = serde_json::to_string(&document).map_err(|_| vec![FieldError::new("source", "cannot be stored")])?;
        if text.len() > TEXT_MAX {
            return Err(vec![FieldError::new("source", "must be at most 65536 bytes long without its secret")]);
        }
        Ok(Self { provider, document, text })
    }

    /// Returns the text to store. Secrets are not part of it.
    #[must_use]
    pub fn as_text(&self) -> &str {
        &self.text
    }

    /// Returns the type.
    #[must_use]
    pub const fn source_type(&self) -> SourceType {
        self.document.source_type
    }

    /// Returns the type of the identity.
    #[must_use]
    pub const fn identity_type(&self) -> IdentityType {
        self.document.identity.identity_type
    }

    /// Returns the user name of the logins, as it is known before a mint.
    #[must_use]
    pub fn username(&self) -> &str {
        match &self.provider {
            Provider::Ecr(_) => ECR_USERNAME,
            Provider::Google(_) => GOOGLE_USERNAME,
            Provider::Azure(_) => AZURE_USERNAME,
            Provider::OAuth2(source) => source.username.as_str(),
        }
    }

    /// Returns the `ServiceAccount` whose token is the identity.
    #[must_use]
    pub const fn web_identity(&self) -> Option<&WebIdentity> {
        match &self.provider {
            Provider::Ecr(EcrSource { identity: AwsIdentity::WebIdentity(identity), .. })
            | Provider::Google(GoogleSource { identity: GoogleIdentity::WebIdentity { identity, .. }, .. })
            | Provider::Azure(AzureSource { identity: AzureIdentity::WebIdentity { identity, .. }, .. }) => {
                Some(identity)
            }
            _ => None,
        }
    }

    /// Whether the identity is that of regcred's host or pod.
    #[must_use]
    pub const fn is_ambient(&self) -> bool {
        matches!(self.identity_type(), IdentityType::Ambient)
    }

    /// Returns the first field that names another host than the provider's own.
    ///
    /// The token service of `oauth2` does not count as one: the secret that it receives is in the same
    /// request.
    #[must_use]
    pub fn overridden(&self) -> Option<&'static str> {
        match &self.provider {
            Provider::Ecr(EcrSource { endpoint: Some(_), .. })
            | Provider::Google(GoogleSource { endpoint: Some(_), .. }) => Some("source.endpoint"),
            Provider::Ecr(EcrSource { sts_endpoint: Some(_), .. }) => Some("source.stsEndpoint"),
            Provider::Azure(AzureSource { authority, .. }) if !AZURE_AUTHORITIES.contains(&authority.as_str()) => {
                Some("source.authority")
            }
            _ => None,
        }
    }

    /// Whether another host than the cloud's own issues the logins, so that any registry fits.
    #[must_use]
    pub fn serves_any_registry(&self) -> bool {
        match &self.provider {
            // With the keys of another STS, the API of AWS still issues the logins.
            Provider::Ecr(source) => source.endpoint.is_some(),
            Provider::Google(_) | Provider::Azure(_) => self.overridden().is_some(),
            Provider::OAuth2(_) => true,
        }
    }

    /// Checks that logins of the source are for a registry, so that none is shown to a foreign host.
    ///
    /// # Errors
    ///
    /// [`Invalid`] with the registries that fit.
    pub fn check_registry(&self, registry: &RegistryScope) -> Result<(), Invalid> {
        if self.serves_any_registry() {
            return Ok(());
        }
        let host = registry.host();
        let (fits, expected) = match &self.provider {
            Provider::Ecr(EcrSource { is_public: true, .. }) => {
                (ECR_PUBLIC_HOSTS.contains(&host), "public.ecr.aws for this source".to_owned())
            }
            Provider::Ecr(EcrSource { region, .. }) => {
                let (region_name, suffix) = (region.as_str(), region.suffix());
                let example = format!("an ECR registry in the source's region: ACCOUNT.dkr.ecr.{region_name}.{suffix}");
                (region.has_registry(host), example)
            }
            Provider::Google(_) => (is_google(host), "LOCATION-docker.pkg.dev or gcr.io for this source".to_owned()),
            Provider::Azure(_) => (is_azure(host), "NAME.azurecr.io for this source".to_owned()),
            Provider::OAuth2(_) => return Ok(()),
        };
        if fits && registry.port().is_none_or(|port| port == 443) {
            Ok(())
        } else {
            Err(Invalid::new(format!("must be {expected}")))
        }
    }
}

/// Whether a host, in lower case, is a registry of Google.
fn is_google(host: &str) -> bool {
    let is_label = |label: &str| !label.is_empty() && !label.contains('.');
    host == "gcr.io"
        || host.strip_suffix(".gcr.io").is_some_and(is_label)
        || host.strip_suffix("-docker.pkg.dev").is_some_and(is_label)
}

/// Whether a host, in lower case, is a registry of Azure.
fn is_azure(host: &str) -> bool {
    host.split_once('.').is_some_and(|(name, domain)| !name.is_empty() && AZURE_DOMAINS.contains(&domain))
}
