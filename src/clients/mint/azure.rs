//! Azure Container Registry: a token of Entra ID, which the registry exchanges for one of its own.
//!
//! The token of Entra ID is for registries only. One for the resource manager, shown to a false
//! registry, would give the subscription away.

use chrono::TimeDelta;
use http::header;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::{
    answer::{Answer, TokenAnswer, jwt_expiry},
    attempt::{Attempt, FORM, Target, form, unusable_key},
};
use crate::{
    crypto::jwt_signer::{JwtSigner, SigningAlgorithm, thumbprint},
    domain::{
        cluster::ServerUrl,
        mint::{AZURE_USERNAME, AzureIdentity, AzureSource, MintError, Minted},
    },
};

/// Scope of the token of Entra ID.
pub(super) const SCOPE: &str = "https://containerregistry.azure.net/.default";
/// Members of every form to Entra ID, and of those with an assertion.
const CREDENTIALS: (&str, &str) = ("grant_type", "client_credentials");
const ASSERTION: (&str, &str) = ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer");
/// Lifetime of an assertion. Entra ID accepts at most ten minutes.
const ASSERTION_LIFETIME: TimeDelta = TimeDelta::minutes(5);
const LOGIN_SERVICE: &str = "the Azure login service";

#[derive(Deserialize)]
struct RefreshToken {
    refresh_token: SecretString,
}

#[derive(Deserialize)]
struct AccessToken {
    access_token: SecretString,
}

impl Attempt<'_> {
    /// Mints a login of an Azure identity for its registry.
    pub(super) async fn azure(&self, source: &AzureSource) -> Result<Minted, MintError> {
        let token = Box::pin(self.entra_token(source)).await?;
        let service = self.order.registry.authority();
        let exchange = self.registry_target("/oauth2/exchange")?;
        let answer = self
            .post_form(
                &exchange,
                &[("grant_type", "access_token"), ("service", service), ("access_token", token.expose_secret())],
            )
            .await?;
        let RefreshToken { refresh_token } = answer.json()?;
        if source.repositories.is_empty() {
            return login(&answer, refresh_token);
        }
        let scopes: Vec<String> = source.repositories.iter().map(|name| format!("repository:{name}:pull")).collect();
        let mut form = vec![
            ("grant_type", "refresh_token"),
            ("service", service),
            ("refresh_token", refresh_token.expose_secret()),
        ];
        form.extend(scopes.iter().map(|scope| ("scope", scope.as_str())));
        let answer = self.post_form(&self.registry_target("/oauth2/token")?, &form).await?;
        let AccessToken { access_token } = answer.json()?;
        login(&answer, access_token)
    }

    async fn entra_token(&self, source: &AzureSource) -> Result<SecretString, MintError> {
        let answer = match &source.identity {
            AzureIdentity::ClientSecret { tenant, client_id } => {
                let secret = ("client_secret", self.order.secret.expose_secret());
                let target = self.entra_target(&source.authority, tenant)?;
                self.post_form(&target, &[CREDENTIALS, ("client_id", client_id.as_str()), ("scope", SCOPE), secret])
                    .await?
            }
            AzureIdentity::ClientCertificate { tenant, client_id, certificate } => {
                self.entra_certificate(&source.authority, tenant, client_id, certificate).await?
            }
            AzureIdentity::WebIdentity { tenant, client_id, .. } => {
                let token = self.web_identity_token()?;
                self.entra_federated(&source.authority, tenant, client_id, token).await?
            }
            AzureIdentity::Ambient { client_id } => self.ambient_azure(client_id.as_deref()).await?,
        };
        Ok(answer.json::<TokenAnswer>()?.access_token)
    }

    /// Requests a token with a token of a `ServiceAccount` that a federated credential trusts.
    pub(super) async fn entra_federated(
        &self,
        authority: &ServerUrl,
        tenant: &str,
        client_id: &str,
        token: &SecretString,
    ) -> Result<Answer, MintError> {
        let target = self.entra_target(authority, tenant)?;
        let assertion = ("client_assertion", token.expose_secret());
        let form = [CREDENTIALS, ("client_id", client_id), ("scope", SCOPE), ASSERTION, assertion];
        self.post_form(&target, &form).await
    }

    async fn entra_certificate(
        &self,
        authority: &ServerUrl,
        tenant: &str,
        client_id: &str,
        certificate: &[u8],
    ) -> Result<Answer, MintError> {
        let target = self.entra_target(authority, tenant)?;
        let signer = JwtSigner::parse(self.order.secret).map_err(|invalid| unusable_key(&invalid))?;
        self.call_timed(&target, |http, now| {
            let claims = json!({
                "aud": target.url.as_str(), "iss": client_id, "sub": client_id, "jti": Uuid::now_v7(),
                "nbf": now.timestamp(), "exp": (now + ASSERTION_LIFETIME).timestamp(),
            });
            let header = json!({"x5t#S256": thumbprint(certificate)});
            let assertion =
                signer.sign(SigningAlgorithm::Ps256, header, &claims).map_err(|invalid| unusable_key(&invalid))?;
            let assertion = ("client_assertion", assertion.expose_secret());
            let body = form(&[CREDENTIALS, ("client_id", client_id), ("scope", SCOPE), ASSERTION, assertion]);
            Ok(http.post(target.url.clone()).header(header::CONTENT_TYPE, FORM).body(body))
        })
        .await
    }

    fn entra_target(&self, authority: &ServerUrl, tenant: &str) -> Result<Target, MintError> {
        let path = format!("/{tenant}/oauth2/v2.0/token");
        let is_own = self.order.source.overridden().is_none();
        self.provider_target(authority.as_str(), (!is_own).then_some(authority), &path, LOGIN_SERVICE)
    }

    /// URL of the registry itself. The realm of its challenge is not used: a registry must not choose
    /// where the token is shown.
    fn registry_target(&self, path: &str) -> Result<Target, MintError> {
        let scheme = if self.order.plain_http { "http" } else { "https" };
        self.configured_target(&format!("{scheme}://{}{path}", self.order.registry.authority()), "the registry")
    }
}

fn login(answer: &Answer, token: SecretString) -> Result<Minted, MintError> {
    let until = jwt_expiry(&token).ok_or_else(|| answer.malformed("contains a token without an expiry"))?;
    answer.login_until(AZURE_USERNAME, token, until)
}
