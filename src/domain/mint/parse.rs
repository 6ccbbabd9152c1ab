//! Validation of a source, field by field.

use std::time::Duration;

use secrecy::SecretString;

use super::{
    IdentityDocument, IdentityType, SourceDocument, SourceType,
    aws::Region,
    key_file::KeyFile,
    source::{
        AZURE_AUTHORITIES, AssumeRole, AwsIdentity, AzureIdentity, AzureSource, EcrSource, GoogleIdentity,
        GoogleSource, OAuth2Source, Provider, WebIdentity,
    },
};
use crate::domain::{
    account::{Password, Username},
    cluster::{CaCertificate, ServerUrl},
    identity_provider::Audience,
    invalid::{FieldError, FieldErrors, Invalid},
    names::{Name, NamespaceName, ServiceAccountName},
};

/// Maximum number of repositories of a scoped login.
const REPOSITORIES_MAX: usize = 20;
/// Range of a configured lifetime, in seconds.
const LIFETIME: std::ops::RangeInclusive<u64> = 300..=2_592_000;

type Parsed<T> = Result<T, Vec<FieldError>>;

/// Takes the secret out of the source of a request. What remains is public.
///
/// # Errors
///
/// Missing or unexpected secrets, and fields that only answers have.
pub(super) fn take_secret(document: &mut SourceDocument) -> Parsed<SecretString> {
    let identity = &mut document.identity;
    let mut errors = FieldErrors::default();
    for (field, is_set) in [("clientEmail", &identity.client_email), ("privateKeyId", &identity.private_key_id)]
        .map(|(field, value)| (field, value.is_some()))
    {
        if is_set {
            errors.refuse(&format!("source.identity.{field}"), "is read from `keyFile`: leave it out");
        }
    }
    let secrets = [
        ("secretAccessKey", identity.secret_access_key.take()),
        ("keyFile", identity.key_file.take()),
        ("clientSecret", identity.client_secret.take()),
        ("privateKey", identity.private_key.take()),
    ];
    let needed = match identity.identity_type {
        IdentityType::AccessKey => Some("secretAccessKey"),
        IdentityType::ServiceAccountKey => Some("keyFile"),
        IdentityType::ClientSecret => Some("clientSecret"),
        IdentityType::ClientCertificate => Some("privateKey"),
        IdentityType::WebIdentity | IdentityType::Ambient => None,
    };
    let mut secret = needed.is_none().then(|| SecretString::from(""));
    for (name, value) in secrets {
        let field = format!("source.identity.{name}");
        match (value, needed == Some(name)) {
            (Some(value), true) => secret = errors.take(&field, check_secret(value)),
            (None, true) => errors.refuse(&field, "is required for this type"),
            (Some(_), false) => errors.refuse(&field, "is not allowed for this type"),
            (None, false) => {}
        }
    }
    if let (IdentityType::ServiceAccountKey, Some(file)) = (identity.identity_type, &secret) {
        let file = errors.take("source.identity.keyFile", KeyFile::parse(file));
        identity.client_email = file.as_ref().map(|file| file.client_email.clone());
        identity.private_key_id = file.as_ref().and_then(|file| file.private_key_id.clone());
        secret = file.map(|file| file.private_key);
    }
    errors.finish(|| secret)
}

/// A secret has the limits of a password.
fn check_secret(secret: SecretString) -> Result<SecretString, Invalid> {
    Password::parse(secret).map(|password| password.secret().clone())
}

/// Validates the public part of a source.
pub(super) fn provider(document: &SourceDocument) -> Parsed<Provider> {
    let mut errors = FieldErrors::default();
    check_fields(document, &mut errors);
    let provider = match document.source_type {
        SourceType::Ecr | SourceType::EcrPublic => ecr(document, &mut errors).map(Provider::Ecr),
        SourceType::GoogleArtifactRegistry => google(document, &mut errors).map(Provider::Google),
        SourceType::AzureContainerRegistry => azure(document, &mut errors).map(Provider::Azure),
        SourceType::Oauth2 => oauth2(document, &mut errors).map(Provider::OAuth2),
    };
    errors.finish(|| provider)
}

/// Refuses fields that do not belong to the types of the source and its identity.
fn check_fields(document: &SourceDocument, errors: &mut FieldErrors) {
    let (source_type, identity) = (document.source_type, &document.identity);
    let allowed: &[&str] = match source_type {
        SourceType::Ecr => &["region", "assumeRole", "fips", "endpoint", "stsEndpoint"],
        SourceType::EcrPublic => &["assumeRole", "endpoint", "stsEndpoint"],
        SourceType::GoogleArtifactRegistry => &["impersonate", "scope", "endpoint"],
        SourceType::AzureContainerRegistry => &["tenantId", "authority", "repositories"],
        SourceType::Oauth2 => &["tokenUrl", "username", "scope", "authentication", "lifetimeSeconds"],
    };
    for (field, is_set) in document.fields() {
        if is_set && !allowed.contains(&field) {
            errors.refuse(&format!("source.{field}"), "is not allowed for this type of source");
        }
    }
    let allowed: &[&str] = match (identity.identity_type, source_type) {
        (IdentityType::AccessKey, _) => &["accessKeyId"],
        (IdentityType::ServiceAccountKey, _) => &["clientEmail", "privateKeyId"],
        (IdentityType::ClientSecret, _) | (IdentityType::Ambient, SourceType::AzureContainerRegistry) => &["clientId"],
        (IdentityType::ClientCertificate, _) => &["clientId", "certificate"],
        (IdentityType::WebIdentity, SourceType::GoogleArtifactRegistry) => {
            &["cluster", "namespace", "serviceAccount", "audience", "workloadIdentityProvider"]
        }
        (IdentityType::WebIdentity, SourceType::AzureContainerRegistry) => {
            &["cluster", "namespace", "serviceAccount", "audience", "clientId"]
        }
        (IdentityType::WebIdentity, _) => &["cluster", "namespace", "serviceAccount", "audience"],
        (IdentityType::Ambient, _) => &[],
    };
    for (field, is_set) in identity.fields() {
        if is_set && !allowed.contains(&field) {
            errors.refuse(&format!("source.identity.{field}"), "is not allowed for this type");
        }
    }
}

fn ecr(document: &SourceDocument, errors: &mut FieldErrors) -> Option<EcrSource> {
    let is_public = document.source_type == SourceType::EcrPublic;
    let region = if is_public {
        Some(Region::of_ecr_public())
    } else {
        required(errors, "source.region", document.region.as_deref(), Region::parse)
    };
    let assume_role = assume_role(document, errors);
    let endpoint = optional(errors, "source.endpoint", document.endpoint.as_deref(), aws_endpoint);
    let sts_endpoint = optional(errors, "source.stsEndpoint", document.sts_endpoint.as_deref(), aws_endpoint);
    let identity = &document.identity;
    let identity = match identity.identity_type {
        IdentityType::AccessKey => {
            let id = required(errors, "source.identity.accessKeyId", identity.access_key_id.as_deref(), access_key_id);
            id.map(|id| AwsIdentity::AccessKey { id })
        }
        IdentityType::WebIdentity => {
            if document.assume_role.is_none() {
                errors.refuse("source.assumeRole", "is required with this identity");
            }
            web_identity(identity, "sts.amazonaws.com", errors).map(AwsIdentity::WebIdentity)
        }
        IdentityType::Ambient => Some(AwsIdentity::Ambient),
        _ => wrong_identity(errors, "accessKey, webIdentity or ambient"),
    };
    Some(EcrSource {
        is_public,
        region: region?,
        identity: identity?,
        assume_role: assume_role?,
        fips: document.fips.unwrap_or_default(),
        endpoint: endpoint?,
        sts_endpoint: sts_endpoint?,
    })
}

fn assume_role(document: &SourceDocument, errors: &mut FieldErrors) -> Option<Option<AssumeRole>> {
    let Some(role) = &document.assume_role else { return Some(None) };
    let role_arn = errors.take("source.assumeRole.roleArn", role_arn(&role.role_arn));
    let external_id = optional(errors, "source.assumeRole.externalId", role.external_id.as_deref(), external_id);
    Some(Some(AssumeRole { role_arn: role_arn?, external_id: external_id? }))
}

fn google(document: &SourceDocument, errors: &mut FieldErrors) -> Option<GoogleSource> {
    let impersonate = optional(errors, "source.impersonate", document.impersonate.as_deref(), service_account_email);
    let scope = optional(errors, "source.scope", document.scope.as_deref(), scope);
    let endpoint = optional(errors, "source.endpoint", document.endpoint.as_deref(), ServerUrl::parse);
    let identity = &document.identity;
    let identity = match identity.identity_type {
        IdentityType::ServiceAccountKey => {
            let email = identity.client_email.as_deref();
            let email = required(errors, "source.identity.keyFile", email, service_account_email);
            let key_id = optional(errors, "source.identity.keyFile", identity.private_key_id.as_deref(), identifier);
            email.zip(key_id).map(|(email, key_id)| GoogleIdentity::ServiceAccountKey { email, key_id })
        }
        IdentityType::WebIdentity => {
            let provider = identity.workload_identity_provider.as_deref();
            let provider =
                required(errors, "source.identity.workloadIdentityProvider", provider, workload_identity_provider);
            let audience = format!("https://iam.googleapis.com/{}", provider.as_deref().unwrap_or_default());
            let identity = web_identity(identity, &audience, errors);
            identity.zip(provider).map(|(identity, provider)| GoogleIdentity::WebIdentity { identity, provider })
        }
        IdentityType::Ambient => Some(GoogleIdentity::Ambient),
        _ => wrong_identity(errors, "serviceAccountKey, webIdentity or ambient"),
    };
    Some(GoogleSource { identity: identity?, impersonate: impersonate?, scope: scope?, endpoint: endpoint? })
}

fn azure(document: &SourceDocument, errors: &mut FieldErrors) -> Option<AzureSource> {
    let authority = document.authority.as_deref().unwrap_or(AZURE_AUTHORITIES[0]);
    let authority = errors.take("source.authority", ServerUrl::parse(authority));
    let repositories = repositories(document.repositories.as_deref().unwrap_or_default(), errors);
    let identity = azure_identity(document, errors);
    Some(AzureSource { identity: identity?, authority: authority?, repositories: repositories? })
}

fn azure_identity(document: &SourceDocument, errors: &mut FieldErrors) -> Option<AzureIdentity> {
    let identity = &document.identity;
    let (tenant, client) = ("source.tenantId", "source.identity.clientId");
    if identity.identity_type == IdentityType::Ambient {
        if document.tenant_id.is_some() {
            errors.refuse(tenant, "is not allowed with this identity, which belongs to one tenant");
        }
        let client_id = optional(errors, client, identity.client_id.as_deref(), identifier)?;
        return Some(AzureIdentity::Ambient { client_id });
    }
    let tenant = required(errors, tenant, document.tenant_id.as_deref(), tenant_id);
    let client_id = required(errors, client, identity.client_id.as_deref(), identifier);
    match identity.identity_type {
        IdentityType::ClientSecret => Some(AzureIdentity::ClientSecret { tenant: tenant?, client_id: client_id? }),
        IdentityType::ClientCertificate => {
            let certificate = identity.certificate.as_deref();
            let certificate = required(errors, "source.identity.certificate", certificate, first_certificate);
            Some(AzureIdentity::ClientCertificate { tenant: tenant?, client_id: client_id?, certificate: certificate? })
        }
        IdentityType::WebIdentity => {
            let identity = web_identity(identity, "api://AzureADTokenExchange", errors);
            Some(AzureIdentity::WebIdentity { tenant: tenant?, client_id: client_id?, identity: identity? })
        }
        _ => wrong_identity(errors, "clientSecret, clientCertificate, webIdentity or ambient"),
    }
}

/// Parses the URL of a token service. A slash at its end is part of its path.
fn token_url(url: &str) -> Result<String, Invalid> {
    let server = ServerUrl::parse(url)?;
    let slash = if url.ends_with('/') { "/" } else { "" };
    Ok(format!("{}{slash}", server.as_str()))
}

fn oauth2(document: &SourceDocument, errors: &mut FieldErrors) -> Option<OAuth2Source> {
    let token_url = required(errors, "source.tokenUrl", document.token_url.as_deref(), token_url);
    let username = required(errors, "source.username", document.username.as_deref(), Username::parse);
    let scope = optional(errors, "source.scope", document.scope.as_deref(), scope);
    let lifetime = match document.lifetime_seconds {
        Some(seconds) if !LIFETIME.contains(&seconds) => {
            errors.refuse("source.lifetimeSeconds", "must be from 300 to 2592000");
            None
        }
        seconds => Some(seconds.map(Duration::from_secs)),
    };
    let identity = &document.identity;
    if identity.identity_type != IdentityType::ClientSecret {
        return wrong_identity(errors, "clientSecret");
    }
    let client_id = required(errors, "source.identity.clientId", identity.client_id.as_deref(), identifier);
    Some(OAuth2Source {
        token_url: token_url?,
        client_id: client_id?,
        authentication: document.authentication.unwrap_or_default(),
        scope: scope?,
        username: username?,
        lifetime: lifetime?,
    })
}

fn web_identity(identity: &IdentityDocument, audience: &str, errors: &mut FieldErrors) -> Option<WebIdentity> {
    let field = |name: &str| format!("source.identity.{name}");
    let cluster = required(errors, &field("cluster"), identity.cluster.as_deref(), Name::parse);
    let namespace = required(errors, &field("namespace"), identity.namespace.as_deref(), NamespaceName::parse);
    let service_account = identity.service_account.as_deref();
    let service_account = required(errors, &field("serviceAccount"), service_account, ServiceAccountName::parse);
    let audience = identity.audience.as_deref().unwrap_or(audience);
    let audience = errors.take(&field("audience"), foreign_audience(audience));
    Some(WebIdentity {
        cluster: cluster?,
        namespace: namespace?,
        service_account: service_account?,
        audience: audience?,
    })
}

fn repositories(repositories: &[String], errors: &mut FieldErrors) -> Option<Vec<String>> {
    if repositories.len() > REPOSITORIES_MAX {
        errors.refuse("source.repositories", format!("must be at most {REPOSITORIES_MAX}"));
    }
    let parsed = repositories.iter().enumerate().map(|(index, name)| {
        let is_name = (1..=255).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-/".contains(&b));
        let checked =
            if is_name { Ok(name.clone()) } else { Err(Invalid::new("must be a repository such as os/alpine")) };
        errors.take(&format!("source.repositories[{index}]"), checked)
    });
    parsed.collect::<Vec<_>>().into_iter().collect()
}

fn wrong_identity<T>(errors: &mut FieldErrors, allowed: &str) -> Option<T> {
    errors.refuse("source.identity.type", format!("must be {allowed} for this type of source"));
    None
}

fn required<T>(
    errors: &mut FieldErrors,
    field: &str,
    value: Option<&str>,
    parse: impl FnOnce(&str) -> Result<T, Invalid>,
) -> Option<T> {
    let Some(value) = value else {
        errors.refuse(field, "is required for this type");
        return None;
    };
    errors.take(field, parse(value))
}

fn optional<T>(
    errors: &mut FieldErrors,
    field: &str,
    value: Option<&str>,
    parse: impl FnOnce(&str) -> Result<T, Invalid>,
) -> Option<Option<T>> {
    errors.take(field, value.map(parse).transpose())
}

fn checked(text: &str, length: std::ops::RangeInclusive<usize>, byte: fn(u8) -> bool) -> Option<String> {
    (length.contains(&text.len()) && text.bytes().all(byte)).then(|| text.to_owned())
}

fn visible(text: &str, max: usize) -> Result<String, Invalid> {
    let text = checked(text, 1..=max, |byte| byte.is_ascii_graphic());
    text.ok_or_else(|| Invalid::new(format!("must be 1 to {max} visible ASCII characters")))
}

fn identifier(text: &str) -> Result<String, Invalid> {
    visible(text, 255)
}

fn access_key_id(id: &str) -> Result<String, Invalid> {
    let id = checked(id, 1..=128, |byte| byte.is_ascii_alphanumeric() || byte == b'_');
    id.ok_or_else(|| Invalid::new("must be the id of an access key, such as AKIAIOSFODNN7EXAMPLE"))
}

/// Requests to AWS are signed for the path `/`.
fn aws_endpoint(url: &str) -> Result<ServerUrl, Invalid> {
    let server = ServerUrl::parse(url)?;
    let has_path = server.as_str().splitn(4, '/').count() > 3;
    if has_path { Err(Invalid::new("must have no path")) } else { Ok(server) }
}

fn role_arn(arn: &str) -> Result<String, Invalid> {
    let is_arn = || {
        let mut parts = arn.splitn(6, ':');
        let part = [parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?];
        let [arn, partition, service, region, account, resource] = part;
        let is_account = account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit());
        let is_role = resource.strip_prefix("role/").is_some_and(|name| !name.is_empty());
        (arn == "arn" && partition.starts_with("aws") && service == "iam" && region.is_empty() && is_account && is_role)
            .then_some(())
    };
    let arn = is_arn().and_then(|()| checked(arn, 20..=2048, |byte| byte.is_ascii_graphic()));
    arn.ok_or_else(|| Invalid::new("must be the ARN of a role, such as arn:aws:iam::123456789012:role/regcred"))
}

fn external_id(id: &str) -> Result<String, Invalid> {
    let id = checked(id, 2..=1224, |byte| byte.is_ascii_alphanumeric() || b"_+=,.@:/-".contains(&byte));
    id.ok_or_else(|| Invalid::new("must be 2 to 1224 letters, digits and characters of _+=,.@:/-"))
}

/// A token for the API server itself is never requested: its receiver could use it there.
fn foreign_audience(audience: &str) -> Result<String, Invalid> {
    if Audience::parse(audience)?.is_of_api_servers() {
        return Err(WebIdentity::reserved());
    }
    Ok(audience.to_owned())
}

/// The address becomes a segment of a path.
fn service_account_email(email: &str) -> Result<String, Invalid> {
    let is_email = email.split_once('@').is_some_and(|(name, domain)| !name.is_empty() && domain.contains('.'));
    let byte = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".@_-".contains(&byte);
    let email = checked(email, 3..=254, byte).filter(|_| is_email);
    email.ok_or_else(|| {
        Invalid::new("must be the e-mail address of a service account, such as pull@project.iam.gserviceaccount.com")
    })
}

fn workload_identity_provider(name: &str) -> Result<String, Invalid> {
    let parts: Vec<&str> = name.split('/').collect();
    let is_name =
        matches!(parts.as_slice(), ["projects", _, "locations", _, "workloadIdentityPools", _, "providers", _]);
    let name = checked(name, 1..=512, |byte| byte.is_ascii_alphanumeric() || b"/_-".contains(&byte));
    name.filter(|_| is_name && parts.iter().all(|part| !part.is_empty())).ok_or_else(|| {
        Invalid::new(
            "must be a provider such as projects/123456/locations/global/workloadIdentityPools/POOL/providers/NAME",
        )
    })
}

/// The tenant becomes a segment of a path.
fn tenant_id(tenant: &str) -> Result<String, Invalid> {
    let byte = |byte: u8| byte.is_ascii_alphanumeric() || b".-".contains(&byte);
    let tenant = checked(tenant, 1..=253, byte).filter(|tenant| !tenant.starts_with('.'));
    tenant.ok_or_else(|| Invalid::new("must be the id or a domain of a tenant"))
}

fn scope(scope: &str) -> Result<String, Invalid> {
    let scope = checked(scope, 1..=1024, |byte| byte.is_ascii_graphic() || byte == b' ');
    scope.ok_or_else(|| Invalid::new("must be 1 to 1024 visible ASCII characters and spaces"))
}

fn first_certificate(pem: &str) -> Result<Vec<u8>, Invalid> {
    let certificates = CaCertificate::parse(pem)?;
    let first = certificates.as_der().next().map(<[u8]>::to_vec);
    first.ok_or_else(|| Invalid::new("must contain a certificate"))
}
