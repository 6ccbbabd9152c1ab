//! Exchange of a code for an ID token (`OpenID` Connect Core 1.0, section 3.1.3).

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderValue, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::Instant;
use url::form_urlencoded;

use super::{IssuerClient, LoginEndpoints};
use crate::{clients::outbound::OutboundError, domain::cluster::CaCertificate};

/// Maximum length of an answer, in bytes. It holds up to three tokens of 16 KiB.
const ANSWER_MAX: usize = 64 * 1024;
const FORM: &str = "application/x-www-form-urlencoded";
/// Host in error texts.
const LABEL: &str = "the token endpoint";
/// Errors of a token endpoint (RFC 6749, section 5.2). Only these words reach a log.
const ERRORS: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// A code, and everything that proves that regcred asked for it.
#[derive(Debug)]
pub struct CodeExchange<'a> {
    /// Id of the client.
    pub client_id: &'a str,
    /// Secret of the client.
    pub client_secret: &'a SecretString,
    /// Code that the browser brought.
    pub code: &'a SecretString,
    /// Verifier of the attempt (RFC 7636).
    pub verifier: &'a SecretString,
    /// Address that the browser was sent back to.
    pub redirect_uri: &'a str,
}

/// Why a code was not exchanged. The texts are for the operator's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExchangeError {
    /// The issuer refused the code or the client, with an error of RFC 6749.
    #[error("the token endpoint refused the code: {0}")]
    Refused(&'static str),
    /// No answer, or not one that can be used.
    #[error("{0}")]
    Unavailable(String),
}

impl From<OutboundError> for ExchangeError {
    fn from(error: OutboundError) -> Self {
        Self::Unavailable(error.detail)
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    id_token: SecretString,
}

#[derive(Deserialize)]
struct ErrorAnswer {
    error: String,
}

impl IssuerClient {
    /// Exchanges a code for an ID token, which is not verified.
    ///
    /// # Errors
    ///
    /// [`ExchangeError`]
    pub async fn exchange(
        &self,
        endpoints: &LoginEndpoints,
        ca_certificate: Option<&CaCertificate>,
        exchange: &CodeExchange<'_>,
    ) -> Result<SecretString, ExchangeError> {
        let deadline = Instant::now() + self.config.timeout;
        let url = &endpoints.token;
        let endpoint = self.outbound.endpoint(url, LABEL.to_owned(), ca_certificate, deadline).await?;
        let post = endpoint.http().post(url.clone()).header(header::CONTENT_TYPE, FORM);
        let post = post.header(header::ACCEPT, "application/json");
        let post = if endpoints.posts_secret { post } else { post.header(header::AUTHORIZATION, basic(exchange)?) };
        let response = endpoint.send(post.body(form(endpoints, exchange))).await?;
        let status = response.status();
        if status.is_redirection() || status.is_server_error() || status.as_u16() == 429 {
            return Err(ExchangeError::Unavailable(format!("{LABEL} answered {}", status.as_u16())));
        }
        let body = endpoint.read_body(response, ANSWER_MAX).await?;
        if !status.is_success() {
            return Err(ExchangeError::Refused(refusal(&body)));
        }
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|_| ExchangeError::Unavailable(format!("the answer of {LABEL} lacks an id_token")))?;
        Ok(answer.id_token)
    }
}

fn refusal(body: &[u8]) -> &'static str {
    let answer = serde_json::from_slice::<ErrorAnswer>(body).ok();
    let known = answer.and_then(|answer| ERRORS.into_iter().find(|error| *error == answer.error));
    known.unwrap_or("another error")
}

fn form(endpoints: &LoginEndpoints, exchange: &CodeExchange<'_>) -> String {
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.append_pair("grant_type", "authorization_code")
        .append_pair("code", exchange.code.expose_secret())
        .append_pair("redirect_uri", exchange.redirect_uri)
        .append_pair("code_verifier", exchange.verifier.expose_secret());
    if endpoints.posts_secret {
        form.append_pair("client_id", exchange.client_id)
            .append_pair("client_secret", exchange.client_secret.expose_secret());
    }
    form.finish()
}

/// Value of `Authorization`: id and secret are encoded as in a form (RFC 6749, section 2.3.1).
fn basic(exchange: &CodeExchange<'_>) -> Result<HeaderValue, ExchangeError> {
    let encode = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let login = format!("{}:{}", encode(exchange.client_id), encode(exchange.client_secret.expose_secret()));
    let header = HeaderValue::from_str(&format!("Basic {}", BASE64_STANDARD.encode(login)));
    let mut header =
        header.map_err(|_| ExchangeError::Unavailable("the client does not fit into a header".to_owned()))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(r#"{"error":"invalid_grant","error_description":"secret text"}"#, "invalid_grant")]
    #[case(r#"{"error":"<script>"}"#, "another error")]
    #[case("<html>", "another error")]
    fn only_known_errors_are_named(#[case] body: &str, #[case] expected: &str) {
        assert_eq!(refusal(body.as_bytes()), expected);
    }

    #[rstest]
    #[case(false, Some("Basic cmVnJTNBMTpvbmUlMkIlMkY="), false)]
    #[case(true, None, true)]
    fn secret_is_in_the_header_or_in_the_form(
        #[case] posts_secret: bool,
        #[case] header: Option<&str>,
        #[case] in_form: bool,
    ) {
        let (secret, code) = (SecretString::from("one+/"), SecretString::from("c"));
        let exchange = CodeExchange {
            client_id: "reg:1",
            client_secret: &secret,
            code: &code,
            verifier: &code,
            redirect_uri: "http://127.0.0.1/x",
        };
        let url: url::Url = "https://issuer.example/token".parse().unwrap();
        let endpoints = LoginEndpoints { authorization: url.clone(), token: url, posts_secret, names_issuer: false };
        if let Some(expected) = header {
            assert_eq!(basic(&exchange).unwrap().to_str().unwrap(), expected);
        }
        assert_eq!(form(&endpoints, &exchange).contains("client_secret=one%2B%2F"), in_form);
        assert!(form(&endpoints, &exchange).contains("code_verifier=c"));
    }
}
