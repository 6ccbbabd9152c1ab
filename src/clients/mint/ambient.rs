//! Identities of the host or pod on which regcred runs.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use http::{StatusCode, header};
use secrecy::SecretString;
use serde::Deserialize;
use tokio::task::spawn_blocking;

use super::{
    answer::Answer,
    attempt::{Attempt, Target, form, secret_header},
};
use crate::{
    clients::outbound::AllowList,
    domain::{
        cluster::ServerUrl,
        mint::{EcrSource, MintError, MintReason, aws::AwsKey},
    },
};

/// Metadata service of instances at AWS, Google and Azure.
const INSTANCE_METADATA: &str = "http://169.254.169.254";
/// Services that give containers of ECS and pods of EKS their keys.
const CONTAINER_SERVICES: [&str; 3] = ["http://169.254.170.2", "http://169.254.170.23", "http://[fd00:ec2::23]"];
/// The addresses of all of these.
const ADDRESSES: &str = "169.254.169.254,169.254.170.2,169.254.170.23,fd00:ec2::23";
/// Maximum length of a token file, in bytes.
const TOKEN_FILE_MAX: u64 = 64 * 1024;
/// Lifetime of a session of the instance metadata service, in seconds.
const SESSION_SECONDS: &str = "60";

/// Addresses of metadata services. No name is looked up to reach them.
#[derive(Debug, Clone)]
pub struct MetadataConfig {
    /// Metadata service of instances.
    pub instance: String,
    /// Services that give containers their keys.
    pub containers: Vec<String>,
    /// The addresses of all of these.
    pub allowed: AllowList,
}

impl Default for MetadataConfig {
    fn default() -> Self {
        Self {
            instance: INSTANCE_METADATA.to_owned(),
            containers: CONTAINER_SERVICES.map(str::to_owned).to_vec(),
            allowed: ADDRESSES.parse().unwrap_or_default(),
        }
    }
}

/// Ambient identities that sources may use.
#[derive(Debug, Clone, Default)]
pub struct AmbientConfig {
    /// AWS, with the variables that describe the identity.
    pub aws: Option<AwsEnvironment>,
    /// Whether sources may use the identity at Google.
    pub gcp: bool,
    /// Azure, with the variables that describe the identity.
    pub azure: Option<AzureEnvironment>,
}

/// Variables that AWS sets in a pod or container.
#[derive(Debug, Clone, Default)]
pub struct AwsEnvironment {
    /// `AWS_ROLE_ARN`
    pub role_arn: Option<String>,
    /// `AWS_WEB_IDENTITY_TOKEN_FILE`
    pub web_identity_token_file: Option<PathBuf>,
    /// `AWS_CONTAINER_CREDENTIALS_FULL_URI`
    pub credentials_full_uri: Option<String>,
    /// `AWS_CONTAINER_CREDENTIALS_RELATIVE_URI`
    pub credentials_relative_uri: Option<String>,
    /// `AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE`
    pub authorization_token_file: Option<PathBuf>,
}

/// Variables that Azure workload identity sets in a pod.
#[derive(Debug, Clone, Default)]
pub struct AzureEnvironment {
    /// `AZURE_CLIENT_ID`
    pub client_id: Option<String>,
    /// `AZURE_TENANT_ID`
    pub tenant_id: Option<String>,
    /// `AZURE_FEDERATED_TOKEN_FILE`
    pub federated_token_file: Option<PathBuf>,
    /// `AZURE_AUTHORITY_HOST`
    pub authority_host: Option<String>,
}

/// Keys of a container or instance.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MetadataKey {
    access_key_id: String,
    secret_access_key: SecretString,
    token: SecretString,
}

impl From<MetadataKey> for AwsKey {
    fn from(key: MetadataKey) -> Self {
        Self {
            access_key_id: key.access_key_id,
            secret_access_key: key.secret_access_key,
            session_token: Some(key.token),
        }
    }
}

impl Attempt<'_> {
    /// Key of the pod, the container or the instance, in the order of AWS's clients.
    pub(super) async fn ambient_aws_key(&self, source: &EcrSource) -> Result<AwsKey, MintError> {
        let environment = self.client.config.ambient.aws.as_ref().ok_or_else(|| disabled("aws"))?;
        if let (Some(role_arn), Some(file)) = (&environment.role_arn, &environment.web_identity_token_file) {
            let token = read_token(file, "AWS_WEB_IDENTITY_TOKEN_FILE").await?;
            return self.assume_role_with_web_identity(source, role_arn, &token).await;
        }
        match self.container_url(environment)? {
            Some(url) => self.container_key(&url, environment).await,
            None => self.instance_key().await,
        }
    }

    /// URL of the service that gives a container its keys. Only the known services are called.
    fn container_url(&self, environment: &AwsEnvironment) -> Result<Option<String>, MintError> {
        let services = &self.client.config.metadata.containers;
        if let Some(uri) = &environment.credentials_full_uri {
            let is_known = services
                .iter()
                .any(|service| uri.strip_prefix(service.as_str()).is_some_and(|path| path.starts_with('/')));
            if is_known {
                return Ok(Some(uri.clone()));
            }
            let detail = "AWS_CONTAINER_CREDENTIALS_FULL_URI is not the address of EKS or ECS";
            return Err(MintError::new(MintReason::Misconfigured, detail));
        }
        let Some(path) = &environment.credentials_relative_uri else { return Ok(None) };
        Ok(services.first().map(|service| format!("{service}/{}", path.trim_start_matches('/'))))
    }

    async fn container_key(&self, url: &str, environment: &AwsEnvironment) -> Result<AwsKey, MintError> {
        let target = Target::metadata(url, "the container credential service")?;
        let token = match &environment.authorization_token_file {
            Some(file) => Some(read_token(file, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").await?),
            None => None,
        };
        let answer = self.call(&target, |http| {
            let get = http.get(target.url.clone());
            Ok(match &token {
                Some(token) => get.header(header::AUTHORIZATION, secret_header(token)?),
                None => get,
            })
        });
        Ok(answer.await?.json::<MetadataKey>()?.into())
    }

    /// Key of the instance's role, by version 2 of the metadata service.
    async fn instance_key(&self) -> Result<AwsKey, MintError> {
        let label = "the instance metadata service";
        let target = |path: &str| Target::metadata(&format!("{}{path}", self.client.config.metadata.instance), label);
        let session = target("/latest/api/token")?;
        let session = self.call(&session, |http| {
            Ok(http.put(session.url.clone()).header("x-aws-ec2-metadata-token-ttl-seconds", SESSION_SECONDS))
        });
        let session = session.await?;
        let session = secret_header(&SecretString::from(session.text()?.trim()))?;
        let roles = target("/latest/meta-data/iam/security-credentials/")?;
        let roles = self.instance_get(&roles, &session).await?;
        let role = roles.text()?.lines().next().unwrap_or_default().trim();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte);
        if role.is_empty() || role.len() > 64 || !role.bytes().all(is_name) {
            return Err(roles.malformed("names no role"));
        }
        let key = target(&format!("/latest/meta-data/iam/security-credentials/{role}"))?;
        Ok(self.instance_get(&key, &session).await?.json::<MetadataKey>()?.into())
    }

    async fn instance_get(&self, target: &Target, session: &http::HeaderValue) -> Result<Answer, MintError> {
        self.call(target, |http| Ok(http.get(target.url.clone()).header("x-aws-ec2-metadata-token", session))).await
    }

    /// Token of the instance's or pod's service account at Google.
    pub(super) async fn ambient_google(&self, scope: &str) -> Result<Answer, MintError> {
        if !self.client.config.ambient.gcp {
            return Err(disabled("gcp"));
        }
        let query = form(&[("scopes", scope)]);
        let path = "/computeMetadata/v1/instance/service-accounts/default/token";
        let url = format!("{}{path}?{query}", self.client.config.metadata.instance);
        let target = Target::metadata(&url, "the metadata service")?;
        self.call(&target, |http| {
            let get = http.get(target.url.clone()).header(header::HOST, "metadata.google.internal");
            Ok(get.header("Metadata-Flavor", "Google"))
        })
        .await
    }

    /// Token of the pod's workload identity or of the host's managed identity at Azure.
    pub(super) async fn ambient_azure(&self, client_id: Option<&str>) -> Result<Answer, MintError> {
        let environment = self.client.config.ambient.azure.as_ref().ok_or_else(|| disabled("azure"))?;
        let AzureEnvironment { client_id: own, tenant_id, federated_token_file, authority_host } = environment;
        if let (Some(file), Some(tenant), Some(client_id)) =
            (federated_token_file, tenant_id, client_id.or(own.as_deref()))
        {
            let token = read_token(file, "AZURE_FEDERATED_TOKEN_FILE").await?;
            let authority = authority_host.as_deref().unwrap_or("https://login.microsoftonline.com");
            let authority = ServerUrl::parse(authority).map_err(|invalid| {
                MintError::new(MintReason::Misconfigured, format!("AZURE_AUTHORITY_HOST {invalid}"))
            })?;
            return self.entra_federated(&authority, tenant, client_id, &token).await;
        }
        let mut pairs = vec![("api-version", "2019-08-01"), ("resource", "https://containerregistry.azure.net")];
        pairs.extend(client_id.map(|client_id| ("client_id", client_id)));
        let url = format!("{}/metadata/identity/oauth2/token?{}", self.client.config.metadata.instance, form(&pairs));
        let target = Target::metadata(&url, "the instance metadata service")?;
        let answer = self.call(&target, |http| Ok(http.get(target.url.clone()).header("Metadata", "true"))).await?;
        match answer.status {
            // The service is being updated, or does not know the identity yet.
            StatusCode::NOT_FOUND | StatusCode::GONE => Err(answer.unavailable()),
            _ => Ok(answer),
        }
    }
}

/// Reads a token that the platform replaces before it expires. It is read at every mint.
async fn read_token(file: &Path, variable: &str) -> Result<SecretString, MintError> {
    let failed =
        |defect: &str| MintError::new(MintReason::InvalidIdentity, format!("the file that {variable} names {defect}"));
    let file = file.to_owned();
    let read = spawn_blocking(move || {
        let mut bytes = Vec::new();
        File::open(file)?.take(TOKEN_FILE_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let bytes: io::Result<Vec<u8>> = read.await.unwrap_or_else(|_| Err(io::ErrorKind::Other.into()));
    let bytes = bytes.map_err(|_| failed("cannot be read"))?;
    let token = bytes.trim_ascii();
    let is_token = !token.is_empty() && token.iter().all(u8::is_ascii_graphic);
    match std::str::from_utf8(token) {
        Ok(token) if is_token && bytes.len() as u64 <= TOKEN_FILE_MAX => Ok(SecretString::from(token)),
        _ => Err(failed("holds no token")),
    }
}

fn disabled(provider: &str) -> MintError {
    let detail = format!("ambient identities of {provider} are off: add it to REGCRED_MINT_AMBIENT");
    MintError::new(MintReason::Misconfigured, detail)
}
