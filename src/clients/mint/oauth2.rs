//! OAuth 2.0 client credentials (RFC 6749, section 4.4).

use chrono::TimeDelta;
use http::header;
use secrecy::{ExposeSecret, SecretString};
use url::form_urlencoded;

use super::{
    answer::TokenAnswer,
    attempt::{Attempt, FORM, form, secret_header},
};
use crate::domain::mint::{ClientAuthentication, MintError, Minted, OAuth2Source};

impl Attempt<'_> {
    /// Mints a login whose password is an access token.
    pub(super) async fn oauth2(&self, source: &OAuth2Source) -> Result<Minted, MintError> {
        let target = self.configured_target(&source.token_url, "the token service")?;
        let mut pairs = vec![("grant_type", "client_credentials")];
        pairs.extend(source.scope.as_deref().map(|scope| ("scope", scope)));
        let authorization = match source.authentication {
            ClientAuthentication::Basic => Some(secret_header(&self.basic(source))?),
            ClientAuthentication::Body => {
                pairs.extend([
                    ("client_id", source.client_id.as_str()),
                    ("client_secret", self.order.secret.expose_secret()),
                ]);
                None
            }
        };
        let body = form(&pairs);
        let answer = self.call(&target, |http| {
            let post = http.post(target.url.clone()).header(header::CONTENT_TYPE, FORM).body(body);
            Ok(match authorization {
                Some(authorization) => post.header(header::AUTHORIZATION, authorization),
                None => post,
            })
        });
        let answer = answer.await?;
        let token: TokenAnswer = answer.json()?;
        let configured = || source.lifetime.and_then(|lifetime| TimeDelta::from_std(lifetime).ok());
        let lifetime = token.lifetime().or_else(configured);
        let lifetime = lifetime.ok_or_else(|| answer.malformed("states no expiry: set `lifetimeSeconds`"))?;
        answer.login_for(source.username.as_str(), token.access_token, lifetime)
    }

    /// Value of `Authorization`: id and secret are encoded as in a form (RFC 6749, section 2.3.1).
    fn basic(&self, source: &OAuth2Source) -> SecretString {
        use base64::{Engine, prelude::BASE64_STANDARD};
        let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        let login = format!("{}:{}", encode(&source.client_id), encode(self.order.secret.expose_secret()));
        SecretString::from(format!("Basic {}", BASE64_STANDARD.encode(login)))
    }
}
