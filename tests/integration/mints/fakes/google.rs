//! Google's token service, security token service, IAM credentials API and metadata server.
//!
//! Contracts: RFC 7523 and RFC 8693, the discovery documents `sts.v1` and `iamcredentials.v1`, and what
//! google-auth accepts.

use chrono::{SecondsFormat, TimeDelta, Utc};
use parking_lot::Mutex;
use serde_json::{Value, json};

use super::{
    Form, Provider, Reply, Request,
    jwt::{Jwt, Rejection, TrustedIssuer},
};

/// Service account with a key.
pub const ACCOUNT: &str = "pull@project.iam.gserviceaccount.com";
/// Id of its key.
pub const KEY_ID: &str = "k1";
/// Service account that `ACCOUNT` and the workload identity may impersonate.
pub const IMPERSONATED: &str = "reader@project.iam.gserviceaccount.com";
/// Service account of the instance.
pub const INSTANCE: &str = "instance@project.iam.gserviceaccount.com";
/// Provider of the workload identity pool.
pub const POOL_PROVIDER: &str = "projects/1/locations/global/workloadIdentityPools/regcred/providers/dev";
pub const READ_ONLY: &str = "https://www.googleapis.com/auth/cloud-platform.read-only";
const CLOUD_PLATFORM: &str = "https://www.googleapis.com/auth/cloud-platform";
const IAM: &str = "https://www.googleapis.com/auth/iam";
/// Audience of assertions.
const TOKEN_URI: &str = "https://oauth2.googleapis.com/token";

/// Google, with the keys that it trusts.
pub struct Google {
    /// Public key of `ACCOUNT`, PKCS#1 DER.
    pub account_key: Vec<u8>,
    pub issuer: Option<TrustedIssuer>,
    issued: Mutex<Vec<Issued>>,
}

/// Access token that was issued.
#[derive(Debug, Clone)]
pub struct Issued {
    token: String,
    pub principal: String,
    pub scopes: Vec<String>,
}

impl Google {
    pub fn new(account_key: Vec<u8>, issuer: Option<TrustedIssuer>) -> Self {
        Self { account_key, issuer, issued: Mutex::default() }
    }

    /// Principal and scopes of a token.
    #[track_caller]
    pub fn issued(&self, token: &str) -> (String, Vec<String>) {
        let Issued { principal, scopes, .. } = self.find(token).expect("an issued token");
        (principal, scopes)
    }

    fn find(&self, token: &str) -> Option<Issued> {
        self.issued.lock().iter().find(|issued| issued.token == token).cloned()
    }

    fn issue<'a>(&self, principal: &str, scopes: impl IntoIterator<Item = &'a str>) -> Result<String, Reply> {
        let scopes: Vec<String> = scopes.into_iter().map(str::to_owned).collect();
        let is_known = |scope: &String| [READ_ONLY, CLOUD_PLATFORM, IAM].contains(&scope.as_str());
        if scopes.is_empty() || !scopes.iter().all(is_known) {
            return Err(refusal("invalid_scope", "Invalid OAuth scope or ID token audience provided."));
        }
        let mut issued = self.issued.lock();
        let token = format!("ya29.fake-{}", issued.len());
        issued.push(Issued { token: token.clone(), principal: principal.to_owned(), scopes });
        Ok(token)
    }

    /// `POST https://oauth2.googleapis.com/token`
    fn assertion(&self, form: &Form) -> Result<Reply, Reply> {
        if form.get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
            return Err(refusal("unsupported_grant_type", "Invalid grant_type"));
        }
        let invalid = |why: &str| refusal("invalid_grant", why);
        let jwt = Jwt::parse(form.get("assertion")).ok_or_else(|| invalid("Invalid JWT"))?;
        if jwt.claim("iss") != ACCOUNT {
            return Err(invalid("Invalid grant: account not found"));
        }
        let is_key = ["", KEY_ID].contains(&jwt.parameter("kid"));
        if jwt.parameter("alg") != "RS256" || !is_key || !jwt.is_signed_by(&self.account_key) {
            return Err(invalid("Invalid JWT Signature."));
        }
        if !jwt.is_for(TOKEN_URI) {
            return Err(invalid("Invalid JWT: Failed audience check."));
        }
        if !jwt.is_current(3_600.0) {
            return Err(invalid("Invalid JWT: Token must be a short-lived token (60 minutes)"));
        }
        let token = self.issue(ACCOUNT, jwt.claim("scope").split_ascii_whitespace())?;
        Ok(Reply::json(200, &json!({"access_token": token, "expires_in": 3599, "token_type": "Bearer"})))
    }

    /// `POST https://sts.googleapis.com/v1/token`
    fn exchange(&self, form: &Form) -> Result<Reply, Reply> {
        if form.get("grant_type") != "urn:ietf:params:oauth:grant-type:token-exchange" {
            return Err(refusal("unsupported_grant_type", "Invalid grant type"));
        }
        let access_token = "urn:ietf:params:oauth:token-type:access_token";
        if form.get("requested_token_type") != access_token {
            return Err(refusal("invalid_request", "Invalid value for \"requested_token_type\""));
        }
        let types = ["urn:ietf:params:oauth:token-type:jwt", "urn:ietf:params:oauth:token-type:id_token"];
        if !types.contains(&form.get("subject_token_type")) {
            return Err(refusal("invalid_request", "Invalid value for \"subject_token_type\""));
        }
        if form.get("audience") != format!("//iam.googleapis.com/{POOL_PROVIDER}") {
            return Err(refusal("invalid_target", "The target service indicated by the \"audience\" is invalid."));
        }
        let issuer = self.issuer.as_ref().expect("an issuer");
        let audience = format!("https://iam.googleapis.com/{POOL_PROVIDER}");
        let remaining = issuer.check(form.get("subject_token"), &audience).map_err(|rejection| match rejection {
            Rejection::Invalid => refusal("invalid_grant", "Error connecting to the given credential's issuer."),
            Rejection::Expired => refusal("invalid_grant", "ID Token is stale to sign-in."),
            Rejection::Audience => refusal("invalid_grant", "The audience in ID Token does not match."),
            Rejection::Subject => refusal("unauthorized_client", "Rejected by the attribute condition."),
        })?;
        let token = self.issue(&issuer.subject, form.get("scope").split_ascii_whitespace())?;
        #[expect(clippy::cast_possible_truncation, reason = "at most an hour")]
        let expires_in = remaining.min(3_600.0) as i64;
        Ok(Reply::json(
            200,
            &json!({
                "access_token": token, "expires_in": expires_in, "issued_token_type": access_token,
                "token_type": "Bearer",
            }),
        ))
    }

    /// `POST https://iamcredentials.googleapis.com/v1/projects/-/serviceAccounts/…:generateAccessToken`
    fn impersonate(&self, email: &str, request: &Request) -> Result<Reply, Reply> {
        let bearer = request.header("authorization").strip_prefix("Bearer ").unwrap_or_default();
        let caller = self.find(bearer).ok_or_else(|| error(401, "UNAUTHENTICATED"))?;
        let may_call = caller.scopes.iter().any(|scope| [CLOUD_PLATFORM, IAM].contains(&scope.as_str()));
        if !may_call || email != IMPERSONATED {
            return Err(error(403, "PERMISSION_DENIED"));
        }
        let body: Value = serde_json::from_str(&request.body).map_err(|_| error(400, "INVALID_ARGUMENT"))?;
        let lifetime = body["lifetime"].as_str().and_then(|text| text.strip_suffix('s')?.parse().ok());
        let lifetime = lifetime.filter(|seconds| (1..=3_600_i64).contains(seconds));
        let lifetime = lifetime.ok_or_else(|| error(400, "INVALID_ARGUMENT"))?;
        let scopes = body["scope"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let token = self.issue(IMPERSONATED, scopes).map_err(|_| error(400, "INVALID_ARGUMENT"))?;
        let expire_time = (Utc::now() + TimeDelta::seconds(lifetime)).to_rfc3339_opts(SecondsFormat::Secs, true);
        Ok(Reply::json(200, &json!({"accessToken": token, "expireTime": expire_time})))
    }

    /// `GET http://metadata.google.internal/computeMetadata/v1/…`
    fn metadata(&self, request: &Request) -> Result<Reply, Reply> {
        let is_forwarded = !request.header("x-forwarded-for").is_empty();
        if request.header("metadata-flavor") != "Google" || is_forwarded {
            return Err(Reply::text(403, "text/html", "Missing Metadata-Flavor:Google header."));
        }
        let body = match request.path.as_str() {
            "/computeMetadata/v1/instance/service-accounts/default/" => {
                json!({"aliases": ["default"], "email": INSTANCE, "scopes": [CLOUD_PLATFORM, READ_ONLY]})
            }
            "/computeMetadata/v1/instance/service-accounts/default/token" => {
                let scopes = Some(request.query.get("scopes")).filter(|scopes| !scopes.is_empty());
                let token = self.issue(INSTANCE, scopes.unwrap_or(CLOUD_PLATFORM).split(','))?;
                json!({"access_token": token, "expires_in": 3_000, "token_type": "Bearer"})
            }
            _ => return Err(Reply::not_found()),
        };
        Ok(Reply::json(200, &body).with("Metadata-Flavor", "Google"))
    }
}

impl Provider for Google {
    fn respond(&self, request: &Request) -> Reply {
        let path = request.path.as_str();
        let email = path.strip_prefix("/v1/projects/-/serviceAccounts/");
        let replied = match (request.method.as_str(), email.and_then(|rest| rest.strip_suffix(":generateAccessToken")))
        {
            ("POST", Some(email)) => self.impersonate(email, request),
            ("POST", None) if path == "/token" => self.assertion(&request.form()),
            ("POST", None) if path == "/v1/token" => self.exchange(&request.form()),
            ("GET", None) => self.metadata(request),
            _ => Err(Reply::not_found()),
        };
        replied.unwrap_or_else(|refused| refused)
    }
}

/// Refusal of a token service.
fn refusal(error: &str, description: &str) -> Reply {
    Reply::json(400, &json!({"error": error, "error_description": description}))
}

/// Error of an API (`google.rpc.Status`).
fn error(code: u16, status: &str) -> Reply {
    Reply::json(code, &json!({"error": {"code": code, "message": "refused", "status": status}}))
}
