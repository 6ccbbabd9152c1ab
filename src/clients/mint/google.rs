//! Google Artifact Registry and gcr.io: access tokens.

use chrono::{DateTime, TimeDelta, Utc};
use http::header;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;

use super::{
    answer::{Answer, TokenAnswer},
    attempt::{Attempt, FORM, Target, form, secret_header, unusable_key},
};
use crate::{
    crypto::jwt_signer::{JwtSigner, SigningAlgorithm},
    domain::mint::{GOOGLE_USERNAME, GoogleIdentity, GoogleSource, MintError, Minted},
};

/// Audience of assertions, wherever they are sent.
const ASSERTION_AUDIENCE: &str = "https://oauth2.googleapis.com/token";
/// Default scope of logins: enough to pull.
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform.read-only";
/// Scope of a token that impersonates a service account.
const SCOPE_IMPERSONATE: &str = "https://www.googleapis.com/auth/cloud-platform";
/// Part of an assertion's life that lies before the provider's time: its clock may be behind.
const BACKDATED: TimeDelta = TimeDelta::seconds(10);
/// Lifetime of an impersonated token: the longest without a policy of the organisation.
const IMPERSONATED_LIFETIME: &str = "3600s";
const TOKEN_SERVICE: &str = "Google's token service";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ImpersonatedToken {
    access_token: SecretString,
    expire_time: DateTime<Utc>,
}

impl Attempt<'_> {
    /// Mints a login of a Google identity.
    pub(super) async fn google(&self, source: &GoogleSource) -> Result<Minted, MintError> {
        let scope = source.scope.as_deref().unwrap_or(SCOPE);
        let base_scope = if source.impersonate.is_some() { SCOPE_IMPERSONATE } else { scope };
        let answer = match &source.identity {
            GoogleIdentity::ServiceAccountKey { email, key_id } => {
                self.google_assertion(source, email, key_id.as_deref(), base_scope).await?
            }
            GoogleIdentity::WebIdentity { provider, .. } => self.google_exchange(source, provider, base_scope).await?,
            GoogleIdentity::Ambient => self.ambient_google(base_scope).await?,
        };
        let token: TokenAnswer = answer.json()?;
        if let Some(email) = &source.impersonate {
            return self.impersonate(source, email, scope, &token.access_token).await;
        }
        let lifetime = token.lifetime().ok_or_else(|| answer.malformed("states no expiry"))?;
        answer.login_for(GOOGLE_USERNAME, token.access_token, lifetime)
    }

    /// Requests a token with an assertion that the key of a service account signs (RFC 7523).
    async fn google_assertion(
        &self,
        source: &GoogleSource,
        email: &str,
        key_id: Option<&str>,
        scope: &str,
    ) -> Result<Answer, MintError> {
        let target = self.google_target(source, "oauth2", "/token", TOKEN_SERVICE)?;
        let signer = JwtSigner::parse(self.order.secret).map_err(|invalid| unusable_key(&invalid))?;
        self.call_timed(&target, |http, now| {
            let issued_at = (now - BACKDATED).timestamp();
            let claims = json!({
                "iss": email, "scope": scope, "aud": ASSERTION_AUDIENCE, "iat": issued_at, "exp": issued_at + 3600,
            });
            let header = key_id.map_or_else(|| json!({}), |key_id| json!({"kid": key_id}));
            let assertion =
                signer.sign(SigningAlgorithm::Rs256, header, &claims).map_err(|invalid| unusable_key(&invalid))?;
            let body = form(&[
                ("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"),
                ("assertion", assertion.expose_secret()),
            ]);
            Ok(http.post(target.url.clone()).header(header::CONTENT_TYPE, FORM).body(body))
        })
        .await
    }

    /// Exchanges a token of a `ServiceAccount` (RFC 8693).
    async fn google_exchange(&self, source: &GoogleSource, provider: &str, scope: &str) -> Result<Answer, MintError> {
        let target = self.google_target(source, "sts", "/v1/token", "Google's security token service")?;
        let token = self.web_identity_token()?;
        let audience = format!("//iam.googleapis.com/{provider}");
        let form = [
            ("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange"),
            ("audience", audience.as_str()),
            ("scope", scope),
            ("requested_token_type", "urn:ietf:params:oauth:token-type:access_token"),
            ("subject_token_type", "urn:ietf:params:oauth:token-type:jwt"),
            ("subject_token", token.expose_secret()),
        ];
        self.post_form(&target, &form).await
    }

    async fn impersonate(
        &self,
        source: &GoogleSource,
        email: &str,
        scope: &str,
        token: &SecretString,
    ) -> Result<Minted, MintError> {
        let path = format!("/v1/projects/-/serviceAccounts/{email}:generateAccessToken");
        let target = self.google_target(source, "iamcredentials", &path, "Google's IAM credentials API")?;
        let bearer = secret_header(&SecretString::from(format!("Bearer {}", token.expose_secret())))?;
        let body = json!({"scope": [scope], "lifetime": IMPERSONATED_LIFETIME}).to_string();
        let answer = self.call(&target, |http| {
            let request = http.post(target.url.clone()).header(header::AUTHORIZATION, bearer);
            Ok(request.header(header::CONTENT_TYPE, "application/json").body(body))
        });
        let answer = answer.await?;
        let ImpersonatedToken { access_token, expire_time } = answer.json()?;
        answer.login_until(GOOGLE_USERNAME, access_token, expire_time)
    }

    fn google_target(
        &self,
        source: &GoogleSource,
        api: &str,
        path: &str,
        label: &'static str,
    ) -> Result<Target, MintError> {
        self.provider_target(&format!("https://{api}.googleapis.com"), source.endpoint.as_ref(), path, label)
    }
}
