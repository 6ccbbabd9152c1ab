//! AWS: ECR, ECR Public, STS, the instance metadata service and the credential service of containers.
//!
//! Contracts: botocore's models of `ecr`, `ecr-public` and `sts`, AWS's document on Signature Version 4,
//! and what botocore accepts.

use aws_lc_rs::{digest, hmac};
use base64::{Engine, prelude::BASE64_STANDARD};
use chrono::{DateTime, NaiveDateTime, SecondsFormat, TimeDelta, Utc};
use parking_lot::Mutex;
use regcred::domain::audit::hex;
use serde_json::json;

use super::{
    Form, Provider, Reply, Request,
    jwt::{Rejection, TrustedIssuer},
};

/// User that may mint and may assume [`ROLE`].
pub const USER: Key<'static> = Key { id: "AKIAPULL", secret: "canary-aws-secret", token: "" };
/// User without rights.
pub const DENIED: Key<'static> = Key { id: "AKIADENIED", secret: "canary-aws-secret-2", token: "" };
pub const ROLE: &str = "arn:aws:iam::123456789012:role/pull";
pub const EXTERNAL_ID: &str = "external-1";
/// Role of the ServiceAccount of [`Aws::issuer`].
pub const FEDERATED_ROLE: &str = "arn:aws:iam::123456789012:role/federated";
/// Role of the instance.
pub const INSTANCE_ROLE: &str = "instance-role";
/// Content of the token file of a container.
pub const CONTAINER_TOKEN: &str = "canary-container-token";
/// Lifetime of a login.
pub const LIFETIME: TimeDelta = TimeDelta::hours(12);
const FORM_ERROR: &str = "application/xml";

/// Access key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    pub id: &'a str,
    pub secret: &'a str,
    /// Empty for a key without an end.
    pub token: &'a str,
}

/// AWS, with the keys that it has issued.
pub struct Aws {
    pub issuer: Option<TrustedIssuer>,
    /// Whether the next requests for logins are throttled.
    pub throttles: Mutex<bool>,
    /// Whether STS cannot reach the issuer.
    pub issuer_is_away: Mutex<bool>,
    /// Issues the login with this number: user name and password.
    issue: Box<dyn Fn(usize) -> (String, String) + Send + Sync>,
    sessions: Mutex<Vec<Session>>,
    logins: Mutex<Vec<Login>>,
}

/// Login that was issued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    pub password: String,
    /// User or role.
    pub principal: String,
    /// Name of the service in signatures.
    pub service: String,
}

/// Temporary key.
#[derive(Debug, Clone)]
struct Session {
    id: String,
    secret: String,
    token: String,
    role: String,
}

/// Refusal: status, code and text.
type Refusal = (u16, &'static str, &'static str);

impl Aws {
    pub fn new(issuer: Option<TrustedIssuer>) -> Self {
        Self::issuing(issuer, |number| ("AWS".to_owned(), format!("canary-login-{number}")))
    }

    /// Issues logins by a function of their number.
    pub fn issuing(
        issuer: Option<TrustedIssuer>,
        issue: impl Fn(usize) -> (String, String) + Send + Sync + 'static,
    ) -> Self {
        Self {
            issuer,
            throttles: Mutex::default(),
            issuer_is_away: Mutex::default(),
            issue: Box::new(issue),
            sessions: Mutex::default(),
            logins: Mutex::default(),
        }
    }

    /// Returns the login with a password.
    #[track_caller]
    pub fn login(&self, password: &str) -> Login {
        let logins = self.logins.lock();
        logins.iter().find(|login| login.password == password).expect("an issued login").clone()
    }

    /// `GetAuthorizationToken` of `ecr` or `ecr-public`.
    fn authorization_token(&self, request: &Request, service: &str) -> Result<Reply, Refusal> {
        let principal = self.authenticate(request, service)?;
        if *self.throttles.lock() {
            return Err((400, "ThrottlingException", "Rate exceeded"));
        }
        if principal == DENIED.id {
            return Err((400, "AccessDeniedException", "not authorized to perform GetAuthorizationToken"));
        }
        if request.body != "{}" {
            return Err((400, "InvalidParameterException", "Invalid parameter"));
        }
        let mut logins = self.logins.lock();
        let (username, password) = (self.issue)(logins.len() + 1);
        let token = BASE64_STANDARD.encode(format!("{username}:{password}"));
        logins.push(Login { password, principal, service: service.to_owned() });
        // Milliseconds, as a fraction of seconds.
        #[expect(clippy::cast_precision_loss, reason = "the value is below 2^53")]
        let expires_at = (Utc::now() + LIFETIME).timestamp_millis() as f64 / 1_000.0;
        let data = json!({"authorizationToken": token, "expiresAt": expires_at});
        let data = if service == "ecr" { json!([data]) } else { data };
        Ok(Reply::json(200, &json!({"authorizationData": data})))
    }

    /// `AssumeRole`
    fn assume_role(&self, request: &Request, form: &Form) -> Result<Reply, Refusal> {
        let principal = self.authenticate(request, "sts")?;
        check_session_parameters(form)?;
        let is_trusted = principal == USER.id && form.get("RoleArn") == ROLE && form.get("ExternalId") == EXTERNAL_ID;
        if !is_trusted {
            return Err((403, "AccessDenied", "not authorized to perform sts:AssumeRole"));
        }
        Ok(self.session_reply("AssumeRole", ROLE))
    }

    /// `AssumeRoleWithWebIdentity`
    fn assume_role_with_web_identity(&self, form: &Form) -> Result<Reply, Refusal> {
        check_session_parameters(form)?;
        let issuer = self.issuer.as_ref().expect("an issuer");
        if *self.issuer_is_away.lock() {
            return Err((400, "IDPCommunicationError", "The issuer could not be reached"));
        }
        issuer.check(form.get("WebIdentityToken"), "sts.amazonaws.com").map_err(|rejection| match rejection {
            Rejection::Invalid => (400, "InvalidIdentityToken", "Couldn't retrieve verification key"),
            Rejection::Audience => (400, "InvalidIdentityToken", "Incorrect token audience"),
            Rejection::Expired => (400, "ExpiredTokenException", "Token expired"),
            Rejection::Subject => (403, "AccessDenied", "not authorized to perform sts:AssumeRoleWithWebIdentity"),
        })?;
        if form.get("RoleArn") != FEDERATED_ROLE {
            return Err((403, "AccessDenied", "not authorized to perform sts:AssumeRoleWithWebIdentity"));
        }
        Ok(self.session_reply("AssumeRoleWithWebIdentity", FEDERATED_ROLE))
    }

    fn session_reply(&self, action: &str, role: &str) -> Reply {
        let Session { id, secret, token, .. } = self.new_session(role);
        let expiration = expiration(TimeDelta::minutes(15));
        let body = format!(
            "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><{action}Result><AssumedRoleUser>\
             <AssumedRoleId>AROA:regcred</AssumedRoleId><Arn>{role}</Arn></AssumedRoleUser><Credentials>\
             <AccessKeyId>{id}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey>\
             <SessionToken>{token}</SessionToken><Expiration>{expiration}</Expiration></Credentials></{action}Result>\
             <ResponseMetadata><RequestId>0</RequestId></ResponseMetadata></{action}Response>"
        );
        Reply::text(200, "text/xml", &body)
    }

    fn new_session(&self, role: &str) -> Session {
        let mut sessions = self.sessions.lock();
        let number = sessions.len();
        let session = Session {
            id: format!("ASIA{number}"),
            // As in AWS's, with characters that need care.
            secret: format!("session/secret+{number}="),
            token: format!("IQoJb3/session+token=={number}"),
            role: role.to_owned(),
        };
        sessions.push(session.clone());
        session
    }

    /// Version 2 of the instance metadata service.
    fn metadata(&self, request: &Request) -> Reply {
        const SESSION: &str = "imds-session==";
        const PATH: &str = "/latest/meta-data/iam/security-credentials/";
        if request.path == "/latest/api/token" {
            let seconds = request.header("x-aws-ec2-metadata-token-ttl-seconds").parse::<u32>();
            let is_valid = request.method == "PUT" && seconds.is_ok_and(|seconds| (1..=21_600).contains(&seconds));
            return if is_valid { Reply::text(200, "text/plain", SESSION) } else { Reply::text(400, "text/plain", "") };
        }
        if request.header("x-aws-ec2-metadata-token") != SESSION {
            return Reply::text(401, "text/plain", "");
        }
        match request.path.strip_prefix(PATH) {
            Some("") => Reply::text(200, "text/plain", INSTANCE_ROLE),
            Some(INSTANCE_ROLE) => self.key_reply(INSTANCE_ROLE),
            _ => Reply::not_found(),
        }
    }

    fn key_reply(&self, role: &str) -> Reply {
        let Session { id, secret, token, .. } = self.new_session(role);
        Reply::json(
            200,
            &json!({
                "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": expiration(TimeDelta::zero()),
                "AccessKeyId": id, "SecretAccessKey": secret, "Token": token,
                "Expiration": expiration(TimeDelta::hours(6)),
            }),
        )
    }

    /// Checks the signature of a request, and returns the user or role.
    fn authenticate(&self, request: &Request, service: &str) -> Result<String, Refusal> {
        let signature = Signature::of(request).ok_or(MISSING)?;
        let (secret, token, principal) = self.key(signature.key_id).ok_or(UNKNOWN_KEY)?;
        if token != request.header("x-amz-security-token") {
            return Err(UNKNOWN_KEY);
        }
        if signature.service != service || (service == "ecr-public" && signature.region != "us-east-1") {
            return Err((403, "SignatureDoesNotMatch", "Credential should be scoped to a valid region"));
        }
        let must_be_signed = |name: &str| name == "host" || name.starts_with("x-amz-");
        let is_signed = |name: &str| signature.signed_headers.split(';').any(|signed| signed == name);
        if !request.header_names().filter(|name| must_be_signed(name)).all(is_signed) {
            return Err((403, "SignatureDoesNotMatch", "'host' or x-amz headers must be signed"));
        }
        if signature.of_secret(request, &secret) != signature.value {
            return Err((403, "SignatureDoesNotMatch", "The request signature we calculated does not match"));
        }
        let at = NaiveDateTime::parse_from_str(request.header("x-amz-date"), "%Y%m%dT%H%M%SZ");
        let at: DateTime<Utc> = at.map_err(|_| MISSING)?.and_utc();
        if (Utc::now() - at).abs() > TimeDelta::minutes(5) {
            return Err((403, "SignatureDoesNotMatch", "Signature expired"));
        }
        Ok(principal)
    }

    /// Secret, token and principal of a key.
    fn key(&self, id: &str) -> Option<(String, String, String)> {
        if let Some(user) = [USER, DENIED].into_iter().find(|user| user.id == id) {
            return Some((user.secret.to_owned(), String::new(), id.to_owned()));
        }
        let sessions = self.sessions.lock();
        let session = sessions.iter().find(|session| session.id == id)?;
        Some((session.secret.clone(), session.token.clone(), session.role.clone()))
    }
}

const MISSING: Refusal = (403, "MissingAuthenticationToken", "Missing Authentication Token");
const UNKNOWN_KEY: Refusal = (403, "InvalidClientTokenId", "The security token included in the request is invalid");

impl Provider for Aws {
    fn respond(&self, request: &Request) -> Reply {
        match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/") => {}
            ("GET", "/v1/credentials") if request.header("authorization") == CONTAINER_TOKEN => {
                return self.key_reply("container-role");
            }
            ("GET", "/v1/credentials") => return Reply::text(401, "text/plain", ""),
            (_, path) if path.starts_with("/latest/") => return self.metadata(request),
            _ => return Reply::not_found(),
        }
        let service = match request.header("x-amz-target") {
            "SpencerFrontendService.GetAuthorizationToken" => Some("ecr-public"),
            "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" => Some("ecr"),
            _ => None,
        };
        if let Some(service) = service {
            return self.authorization_token(request, service).unwrap_or_else(json_refusal);
        }
        let form = request.form();
        let replied = match (form.get("Version"), form.get("Action")) {
            ("2011-06-15", "AssumeRole") => self.assume_role(request, &form),
            ("2011-06-15", "AssumeRoleWithWebIdentity") => self.assume_role_with_web_identity(&form),
            _ => Err((400, "InvalidAction", "Could not find operation")),
        };
        replied.unwrap_or_else(xml_refusal)
    }
}

fn check_session_parameters(form: &Form) -> Result<(), Refusal> {
    let is_name = |name: &str| {
        (2..=64).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b))
    };
    let seconds = Some(form.get("DurationSeconds")).filter(|seconds| !seconds.is_empty());
    let seconds = seconds.map_or(Ok(3_600), str::parse::<u32>);
    let is_valid = is_name(form.get("RoleSessionName")) && seconds.is_ok_and(|s| (900..=43_200).contains(&s));
    if is_valid { Ok(()) } else { Err((400, "ValidationError", "invalid parameters")) }
}

fn expiration(after: TimeDelta) -> String {
    (Utc::now() + after).to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Refusal of ECR and ECR Public, whose codes and status differ from those of STS.
fn json_refusal((_, code, message): Refusal) -> Reply {
    let code = match code {
        "SignatureDoesNotMatch" => "InvalidSignatureException",
        "InvalidClientTokenId" => "UnrecognizedClientException",
        "MissingAuthenticationToken" => "MissingAuthenticationTokenException",
        other => other,
    };
    Reply::json(400, &json!({"__type": code, "message": message}))
}

fn xml_refusal((status, code, message): Refusal) -> Reply {
    let body = format!(
        "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>\
         <Code>{code}</Code><Message>{message}</Message></Error><RequestId>0</RequestId></ErrorResponse>"
    );
    Reply::text(status, FORM_ERROR, &body)
}

/// Signature Version 4 in the header `Authorization`.
struct Signature<'a> {
    key_id: &'a str,
    day: &'a str,
    region: &'a str,
    service: &'a str,
    signed_headers: &'a str,
    value: &'a str,
}

impl<'a> Signature<'a> {
    fn of(request: &'a Request) -> Option<Self> {
        let parameters = request.header("authorization").strip_prefix("AWS4-HMAC-SHA256 ")?;
        let parameter = |name: &str| {
            let found = parameters.split(',').map(str::trim).find_map(|parameter| parameter.strip_prefix(name));
            found.and_then(|value| value.strip_prefix('='))
        };
        let mut scope = parameter("Credential")?.split('/');
        let mut part = || scope.next();
        let (key_id, day, region, service) = (part()?, part()?, part()?, part()?);
        (part()? == "aws4_request").then_some(())?;
        let (signed_headers, value) = (parameter("SignedHeaders")?, parameter("Signature")?);
        Some(Self { key_id, day, region, service, signed_headers, value })
    }

    /// Signature of the request with a secret.
    fn of_secret(&self, request: &Request, secret: &str) -> String {
        let Self { day, region, service, signed_headers, .. } = self;
        let headers = signed_headers.split(';').map(|name| format!("{name}:{}\n", request.header(name)));
        let headers = headers.collect::<Vec<_>>().concat();
        let (method, path) = (&request.method, &request.path);
        let canonical = format!("{method}\n{path}\n\n{headers}\n{signed_headers}\n{}", sha256(&request.body));
        let scope = format!("{day}/{region}/{service}/aws4_request");
        let date = request.header("x-amz-date");
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", sha256(&canonical));
        let mut key = format!("AWS4{secret}").into_bytes();
        for part in scope.split('/').chain([text.as_str()]) {
            key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), part.as_bytes()).as_ref().to_vec();
        }
        hex(&key)
    }
}

fn sha256(text: &str) -> String {
    hex(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}
