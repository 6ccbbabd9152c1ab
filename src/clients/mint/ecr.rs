//! ECR and ECR Public: `GetAuthorizationToken`.

use base64::{Engine, prelude::BASE64_STANDARD};
use http::header;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::{
    answer::{Answer, unix_time},
    attempt::{Attempt, Target, secret_header},
};
use crate::{
    crypto::sigv4::AwsRequest,
    domain::mint::{
        AwsIdentity, ECR_USERNAME, EcrSource, MintError, MintReason, Minted,
        aws::{AwsKey, Region},
    },
};

const CONTENT_TYPE: &str = "application/x-amz-json-1.1";
const BODY: &str = "{}";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenResponse {
    authorization_data: OneOrMany,
}

/// ECR answers with a list, ECR Public with an object.
#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    Many(Vec<AuthorizationData>),
    One(AuthorizationData),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthorizationData {
    authorization_token: SecretString,
    expires_at: f64,
}

impl Attempt<'_> {
    /// Mints a login for the registries of a region, or for the public registry.
    pub(super) async fn ecr(&self, source: &EcrSource) -> Result<Minted, MintError> {
        let key = Box::pin(self.aws_key(source)).await?;
        let answer = self.authorization_token(source, &key).await?;
        parse(&answer, source.endpoint.is_some())
    }

    async fn aws_key(&self, source: &EcrSource) -> Result<AwsKey, MintError> {
        let key = match &source.identity {
            AwsIdentity::AccessKey { id } => {
                AwsKey { access_key_id: id.clone(), secret_access_key: self.order.secret.clone(), session_token: None }
            }
            AwsIdentity::WebIdentity(_) => {
                // The parser of sources requires the role.
                let missing = || MintError::new(MintReason::Misconfigured, "the source has no role");
                let role = source.assume_role.as_ref().ok_or_else(missing)?;
                let token = self.web_identity_token()?;
                return self.assume_role_with_web_identity(source, &role.role_arn, token).await;
            }
            AwsIdentity::Ambient => self.ambient_aws_key(source).await?,
        };
        match &source.assume_role {
            Some(role) => self.assume_role(source, role, &key).await,
            None => Ok(key),
        }
    }

    async fn authorization_token(&self, source: &EcrSource, key: &AwsKey) -> Result<Answer, MintError> {
        let region = &source.region;
        let (host, label, service, action) = if source.is_public {
            let action = "SpencerFrontendService.GetAuthorizationToken";
            (region.ecr_public_host(), "the ECR Public API", "ecr-public", action)
        } else {
            let action = "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken";
            (region.ecr_host(source.fips), "the ECR API", "ecr", action)
        };
        let target = self.provider_target(&format!("https://{host}"), source.endpoint.as_ref(), "/", label)?;
        self.signed_post(
            &target,
            region,
            service,
            key,
            &[("content-type", CONTENT_TYPE), ("x-amz-target", action)],
            BODY,
        )
        .await
    }

    /// Posts a signed request to the path `/`.
    pub(super) async fn signed_post(
        &self,
        target: &Target,
        region: &Region,
        service: &str,
        key: &AwsKey,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<Answer, MintError> {
        let host = target.host_header();
        let signed: Vec<(&str, &str)> = [("host", host.as_str())].into_iter().chain(headers.iter().copied()).collect();
        let request =
            AwsRequest { method: "POST", region: region.as_str(), service, headers: &signed, body: body.as_bytes() };
        self.call_timed(target, |http, now| {
            let signature = request.sign(key, now);
            let mut post = http.post(target.url.clone());
            for (name, value) in headers {
                post = post.header(*name, *value);
            }
            if let Some(token) = &key.session_token {
                post = post.header("x-amz-security-token", secret_header(token)?);
            }
            let post = post.header("x-amz-date", signature.date).header(header::AUTHORIZATION, signature.authorization);
            Ok(post.body(body.to_owned()))
        })
        .await
    }
}

fn parse(answer: &Answer, has_endpoint: bool) -> Result<Minted, MintError> {
    let data = match answer.json::<TokenResponse>()?.authorization_data {
        OneOrMany::Many(many) => many.into_iter().next().ok_or_else(|| answer.malformed("contains no login"))?,
        OneOrMany::One(one) => one,
    };
    let token = BASE64_STANDARD.decode(data.authorization_token.expose_secret().as_bytes());
    let token = token.ok().and_then(|token| String::from_utf8(token).ok()).map(SecretString::from);
    let token = token.ok_or_else(|| answer.malformed("contains a token that is not base64"))?;
    let (username, password) = token
        .expose_secret()
        .split_once(':')
        .ok_or_else(|| answer.malformed("contains a token without a user name"))?;
    // ECR issues no other one. An emulator may, in a form that repeats nothing of the request.
    let is_name = username.len() <= 32 && username.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if username != ECR_USERNAME && !(has_endpoint && is_name) {
        return Err(answer.malformed("contains another user name than `AWS`"));
    }
    let until = unix_time(data.expires_at).ok_or_else(|| answer.malformed("states no expiry"))?;
    answer.login_until(username, SecretString::from(password), until)
}
