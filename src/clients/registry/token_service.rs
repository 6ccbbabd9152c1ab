//! Token service of a registry (`distribution`, `docs/spec/auth/token.md` and `oauth.md`).

use http::{StatusCode, header};
use reqwest::RequestBuilder;
use secrecy::ExposeSecret;
use url::{Url, form_urlencoded};

use super::{
    Login,
    check::{LoginCheck, Step, end},
    endpoint::RegistryEndpoint,
    token::Token,
};
use crate::domain::verification::VerificationResult as Found;

/// Client identifier that token services require.
const CLIENT_ID: &str = "regcred";
/// User name under which docker stores an identity token, which is exchanged for other tokens.
const IDENTITY_TOKEN_USER: &str = "<token>";

/// Token service that a registry named.
pub(super) struct TokenService<'a, 'e> {
    pub(super) check: &'a LoginCheck<'a>,
    pub(super) endpoint: &'a RegistryEndpoint<'e>,
    pub(super) realm: Url,
    pub(super) service: Option<&'a str>,
}

/// Response of a token service.
pub(super) enum TokenResponse {
    Token(Token),
    /// Refused with this status.
    Refused(StatusCode),
    /// The service does not support this method.
    MethodNotSupported,
}

impl TokenService<'_, '_> {
    /// Requests a token for the login: by GET, which every service supports, else by POST.
    ///
    /// For an identity token the order is reversed.
    pub(super) async fn token_for_login(&self, scope: Option<&str>) -> Step<TokenResponse> {
        if self.check.login.username == IDENTITY_TOKEN_USER {
            return match self.post(scope, true).await? {
                TokenResponse::MethodNotSupported => self.get(scope, true).await,
                response => Ok(response),
            };
        }
        match self.get(scope, true).await? {
            TokenResponse::MethodNotSupported => self.post(scope, false).await,
            response => Ok(response),
        }
    }

    /// Requests a token without a login.
    pub(super) async fn anonymous_token(&self, scope: Option<&str>) -> Step<TokenResponse> {
        self.get(scope, false).await
    }

    async fn get(&self, scope: Option<&str>, with_login: bool) -> Step<TokenResponse> {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(self.service.map(|service| ("service", service)));
            query.extend_pairs(scope.map(|scope| ("scope", scope)));
            query.append_pair("client_id", CLIENT_ID);
            if with_login {
                query.append_pair("account", self.check.login.username);
            }
        }
        let request = self.endpoint.http().get(url);
        self.send(if with_login { self.check.with_basic(request) } else { request }).await
    }

    async fn post(&self, scope: Option<&str>, is_identity_token: bool) -> Step<TokenResponse> {
        let form = self.form(scope, is_identity_token);
        let request = self.endpoint.http().post(self.realm.clone());
        let request = request.header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        self.send(request.body(form)).await
    }

    fn form(&self, scope: Option<&str>, is_identity_token: bool) -> String {
        let Login { username, password, .. } = self.check.login;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("client_id", CLIENT_ID);
        form.extend_pairs(self.service.map(|service| ("service", service)));
        form.extend_pairs(scope.map(|scope| ("scope", scope)));
        if is_identity_token {
            form.append_pair("grant_type", "refresh_token").append_pair("refresh_token", password.expose_secret());
        } else {
            form.append_pair("grant_type", "password");
            form.append_pair("username", username).append_pair("password", password.expose_secret());
        }
        form.finish()
    }

    async fn send(&self, request: RequestBuilder) -> Step<TokenResponse> {
        let response = self.endpoint.send(request).await?;
        let status = response.status;
        match status.as_u16() {
            200 => match Token::parse(&self.endpoint.read_body(response).await?) {
                Some(token) => Ok(TokenResponse::Token(token)),
                None => end(Found::NotARegistry, "the token service of the registry answers without a token"),
            },
            404 | 405 => Ok(TokenResponse::MethodNotSupported),
            300..=399 => end(
                Found::NotARegistry,
                format!("the token service of the registry redirects ({}), which is not followed", status.as_u16()),
            ),
            _ => Ok(TokenResponse::Refused(status)),
        }
    }
}
