//! Entra ID, Azure's instance metadata service and a container registry, in one.
//!
//! Contracts: Microsoft's documents on client credentials and certificate credentials, the API
//! specification of containerregistry 2021-07-01, and what azure-identity and azure-containerregistry
//! accept.

use std::sync::OnceLock;

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use chrono::Utc;
use parking_lot::Mutex;
use regcred::domain::audit::hex;
use serde_json::{Value, json};

use super::{
    Form, Provider, Reply, Request,
    jwt::{Jwt, Rejection, TrustedIssuer, token_of},
};

pub const TENANT: &str = "11111111-2222-4333-8444-555555555555";
pub const CLIENT: &str = "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee";
pub const SECRET: &str = "canary-client-secret";
/// User-assigned identity of the host.
pub const MANAGED: &str = "99999999-bbbb-4ccc-8ddd-eeeeeeeeeeee";
/// Repository of the registry.
pub const REPOSITORY: &str = "os/alpine";
pub const TAG: &str = "3";
/// User name of logins with a token.
pub const USERNAME: &str = "00000000-0000-0000-0000-000000000000";
const RESOURCE: &str = "https://containerregistry.azure.net";
const MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Azure, with the credentials of one client.
#[derive(Default)]
pub struct Azure {
    certificate: Option<(Vec<u8>, Vec<u8>)>,
    issuer: Option<TrustedIssuer>,
    /// `host:port` of Entra ID and of the registry.
    pub host: OnceLock<String>,
    issued: Mutex<Vec<Issued>>,
}

/// Token that was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    token: String,
    /// `entra`, `managed`, `refresh` or `access`.
    pub kind: &'static str,
    /// Repositories of an access token.
    pub repositories: Vec<String>,
}

impl Azure {
    /// Azure with a registered certificate: DER, and its public key as PKCS#1 DER.
    pub fn with_certificate(certificate: Vec<u8>, key: Vec<u8>) -> Self {
        Self { certificate: Some((certificate, key)), ..Self::default() }
    }

    /// Azure with a federated credential.
    pub fn with_issuer(issuer: TrustedIssuer) -> Self {
        Self { issuer: Some(issuer), ..Self::default() }
    }

    fn host(&self) -> &str {
        self.host.get().expect("the host")
    }

    /// Kinds of all issued tokens, in their order.
    pub fn kinds(&self) -> Vec<&'static str> {
        self.issued.lock().iter().map(|issued| issued.kind).collect()
    }

    /// Returns what a token of this kind is for.
    pub fn find(&self, kind: &str, token: &str) -> Option<Issued> {
        self.issued.lock().iter().find(|issued| issued.kind == kind && issued.token == token).cloned()
    }

    fn issue(&self, kind: &'static str, repositories: Vec<String>, lifetime: i64) -> String {
        let mut issued = self.issued.lock();
        let expires_at = Utc::now().timestamp() + lifetime;
        let claims =
            json!({"aud": self.host(), "sub": CLIENT, "grant_type": kind, "jti": issued.len(), "exp": expires_at});
        let token = token_of(&claims);
        issued.push(Issued { token: token.clone(), kind, repositories });
        token
    }

    /// `GET https://login.microsoftonline.com/TENANT/v2.0/.well-known/openid-configuration`
    fn discovery(&self) -> Reply {
        let base = format!("https://{}/{TENANT}", self.host());
        Reply::json(
            200,
            &json!({
                "issuer": format!("{base}/v2.0"), "token_endpoint": self.token_endpoint(),
                "authorization_endpoint": format!("{base}/oauth2/v2.0/authorize"),
            }),
        )
    }

    fn token_endpoint(&self) -> String {
        format!("https://{}/{TENANT}/oauth2/v2.0/token", self.host())
    }

    /// `POST https://login.microsoftonline.com/TENANT/oauth2/v2.0/token`
    fn client_credentials(&self, form: &Form) -> Result<Reply, Reply> {
        if form.get("grant_type") != "client_credentials" {
            return Err(entra_error(400, "unsupported_grant_type", 70_003));
        }
        if form.get("client_id") != CLIENT {
            return Err(entra_error(400, "unauthorized_client", 700_016));
        }
        match (form.get("client_secret"), form.get("client_assertion")) {
            ("", "") => return Err(entra_error(401, "invalid_client", 7_000_218)),
            (SECRET, "") => {}
            (_, "") => return Err(entra_error(401, "invalid_client", 7_000_215)),
            (_, assertion) => {
                if form.get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
                    return Err(entra_error(400, "invalid_request", 900_144));
                }
                self.check_assertion(assertion)?;
            }
        }
        match form.get("scope").strip_suffix("/.default") {
            Some(RESOURCE) => {}
            Some(_) => return Err(entra_error(400, "invalid_resource", 500_011)),
            None => return Err(entra_error(400, "invalid_scope", 1_002_012)),
        }
        let token = self.issue("entra", Vec::new(), 3_599);
        Ok(Reply::json(
            200,
            &json!({"token_type": "Bearer", "expires_in": 3599, "ext_expires_in": 3599, "access_token": token}),
        ))
    }

    fn check_assertion(&self, assertion: &str) -> Result<(), Reply> {
        let jwt = Jwt::parse(assertion).ok_or_else(|| entra_error(401, "invalid_client", 50_027))?;
        if let Some(issuer) = &self.issuer {
            return issuer.check(assertion, "api://AzureADTokenExchange").map(drop).map_err(|rejection| {
                let code = match rejection {
                    Rejection::Invalid => 700_211,
                    Rejection::Expired => 700_024,
                    Rejection::Audience => 700_212,
                    Rejection::Subject => 700_213,
                };
                entra_error(401, "invalid_client", code)
            });
        }
        let (der, key) = self.certificate.as_ref().ok_or_else(|| entra_error(401, "invalid_client", 700_027))?;
        let digest = |algorithm| BASE64_URL_SAFE_NO_PAD.encode(digest::digest(algorithm, der));
        let thumbprint = |name: &str| jwt.parameter(name).trim_end_matches('=').to_owned();
        let is_named =
            thumbprint("x5t#S256") == digest(&SHA256) || thumbprint("x5t") == digest(&SHA1_FOR_LEGACY_USE_ONLY);
        if !is_named || !jwt.is_signed_by(key) {
            return Err(entra_error(401, "invalid_client", 700_027));
        }
        if !jwt.is_for(&self.token_endpoint()) {
            return Err(entra_error(401, "invalid_client", 700_023));
        }
        let is_client = jwt.claim("iss") == CLIENT && jwt.claim("sub") == CLIENT && !jwt.claim("jti").is_empty();
        if !is_client {
            return Err(entra_error(401, "invalid_client", 700_021));
        }
        if jwt.is_current(600.0) { Ok(()) } else { Err(entra_error(401, "invalid_client", 700_024)) }
    }

    /// `GET http://169.254.169.254/metadata/identity/oauth2/token`
    fn metadata(&self, request: &Request) -> Result<Reply, Reply> {
        let refusal = |description: &str| {
            Reply::json(400, &json!({"error": "invalid_request", "error_description": description}))
        };
        if request.header("metadata") != "true" {
            return Err(refusal("Required metadata header not specified"));
        }
        if !["2018-02-01", "2019-08-01"].contains(&request.query.get("api-version")) {
            return Err(refusal("Required query variable 'api-version' is missing or not supported"));
        }
        if request.query.get("resource") != RESOURCE {
            return Err(Reply::json(400, &json!({"error": "invalid_resource", "error_description": "AADSTS500011"})));
        }
        if request.query.get("client_id") != MANAGED {
            return Err(refusal("Identity not found"));
        }
        let token = self.issue("managed", Vec::new(), 86_399);
        let now = Utc::now().timestamp();
        // All numbers are text.
        Ok(Reply::json(
            200,
            &json!({
                "access_token": token, "client_id": MANAGED, "expires_in": "86399", "ext_expires_in": "86399",
                "expires_on": (now + 86_399).to_string(), "not_before": now.to_string(), "resource": RESOURCE,
                "token_type": "Bearer",
            }),
        ))
    }

    /// `POST https://REGISTRY/oauth2/exchange`
    fn exchange(&self, form: &Form) -> Result<Reply, Reply> {
        if form.get("grant_type") != "access_token" || form.get("service") != self.host() {
            return Err(registry_error(400, "UNSUPPORTED"));
        }
        let token = form.get("access_token");
        if self.find("entra", token).is_none() && self.find("managed", token).is_none() {
            return Err(registry_error(401, "UNAUTHORIZED"));
        }
        Ok(Reply::json(200, &json!({"refresh_token": self.issue("refresh", Vec::new(), 10_800)})))
    }

    /// `POST https://REGISTRY/oauth2/token`
    fn access_token(&self, form: &Form) -> Result<Reply, Reply> {
        if form.get("grant_type") != "refresh_token" || form.get("service") != self.host() {
            return Err(registry_error(400, "UNSUPPORTED"));
        }
        self.issue_access(form.get("refresh_token"), form)
    }

    /// `GET https://REGISTRY/oauth2/token`, as docker's clients log in.
    fn docker_login(&self, request: &Request) -> Result<Reply, Reply> {
        let login = request.header("authorization").strip_prefix("Basic ").unwrap_or_default();
        let login = BASE64_STANDARD.decode(login).ok().and_then(|login| String::from_utf8(login).ok());
        let login = login.unwrap_or_default();
        let token = login.strip_prefix(&format!("{USERNAME}:")).unwrap_or_default();
        self.issue_access(token, &request.query)
    }

    fn issue_access(&self, refresh_token: &str, parameters: &Form) -> Result<Reply, Reply> {
        if self.find("refresh", refresh_token).is_none() {
            return Err(registry_error(401, "UNAUTHORIZED"));
        }
        let repository = |scope: &str| Some(scope.strip_prefix("repository:")?.strip_suffix(":pull")?.to_owned());
        let repositories: Option<Vec<String>> = parameters.all("scope").map(repository).collect();
        let repositories = repositories.ok_or_else(|| registry_error(400, "DENIED"))?;
        Ok(Reply::json(200, &json!({"access_token": self.issue("access", repositories, 4_500)})))
    }

    /// `/v2/`
    fn pull(&self, request: &Request) -> Reply {
        let token = request.header("authorization").strip_prefix("Bearer ").unwrap_or_default();
        let issued = self.find("access", token);
        // azure-containerregistry encodes the slashes of names.
        let path = request.path.replace("%2F", "/");
        let (is_allowed, scope) = if path == "/v2/" {
            (issued.is_some(), String::new())
        } else {
            let is_allowed = issued.is_some_and(|issued| issued.repositories.iter().any(|name| name == REPOSITORY));
            (is_allowed, format!(",scope=\"repository:{REPOSITORY}:pull\""))
        };
        if !is_allowed {
            let host = self.host();
            let challenge = format!("Bearer realm=\"https://{host}/oauth2/token\",service=\"{host}\"{scope}");
            return registry_error(401, "UNAUTHORIZED").with("WWW-Authenticate", challenge);
        }
        if path == "/v2/" {
            return Reply::json(200, &json!({}));
        }
        if path == format!("/v2/{REPOSITORY}/tags/list") {
            return Reply::json(200, &json!({"name": REPOSITORY, "tags": [TAG]}));
        }
        if path != format!("/v2/{REPOSITORY}/manifests/{TAG}") {
            return registry_error(404, "MANIFEST_UNKNOWN");
        }
        let body = json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE}).to_string();
        let digest = digest::digest(&SHA256, body.as_bytes());
        Reply::text(200, MANIFEST_TYPE, &body).with("Docker-Content-Digest", format!("sha256:{}", hex(digest.as_ref())))
    }
}

impl Provider for Azure {
    fn respond(&self, request: &Request) -> Reply {
        let tenant_path = request.path.strip_prefix(&format!("/{TENANT}"));
        let replied = match (request.method.as_str(), tenant_path.unwrap_or(&request.path)) {
            ("GET", "/v2.0/.well-known/openid-configuration") if tenant_path.is_some() => Ok(self.discovery()),
            ("POST", "/oauth2/v2.0/token") if tenant_path.is_some() => self.client_credentials(&request.form()),
            ("GET", "/metadata/identity/oauth2/token") => self.metadata(request),
            ("POST", "/oauth2/exchange") => self.exchange(&request.form()),
            ("POST", "/oauth2/token") => self.access_token(&request.form()),
            ("GET", "/oauth2/token") => self.docker_login(request),
            ("GET" | "HEAD", path) if path.starts_with("/v2/") => Ok(self.pull(request)),
            // A tenant that does not exist.
            ("POST", path) if path.ends_with("/oauth2/v2.0/token") => Err(entra_error(400, "invalid_request", 90_002)),
            _ => Err(Reply::not_found()),
        };
        replied.unwrap_or_else(|refused| refused)
    }
}

fn entra_error(status: u16, error: &str, code: u32) -> Reply {
    let description = format!("AADSTS{code}: refused. Trace ID: 0");
    Reply::json(status, &json!({"error": error, "error_description": description, "error_codes": [code]}))
}

fn registry_error(status: u16, code: &str) -> Reply {
    let errors: Value = json!([{"code": code, "message": "refused"}]);
    Reply::json(status, &json!({"errors": errors}))
}
