//! One document of an issuer: from a host that the guard admits, at the addresses that it saw, within bounds.

use std::{error::Error, io};

use http::header;
use reqwest::{Client, redirect};
use tokio::time::{Instant, timeout_at};
use url::Url;

use super::{IssuerError, Issuers};
use crate::{
    clients::{guard::NotAdmitted, registry::NoResolver},
    domain::cluster::CaCertificate,
};

const USER_AGENT: &str = concat!("regcred/", env!("CARGO_PKG_VERSION"));

impl Issuers {
    /// Reads the document at `url`, which is called `what` in texts, of at most `limit` bytes.
    pub(super) async fn get(
        &self,
        url: &Url,
        what: &'static str,
        ca_certificate: Option<&CaCertificate>,
        limit: usize,
        deadline: Instant,
    ) -> Result<Vec<u8>, IssuerError> {
        let unreachable = |detail: &str| IssuerError::Unreachable(format!("{what} {detail}"));
        let slow = || unreachable("did not come in time");
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or_default();
        let admitted = timeout_at(deadline, self.guard.admit(host, port)).await.map_err(|_| slow())?;
        let addresses = admitted.map_err(|error| match error {
            NotAdmitted::Refused(kind) => IssuerError::Refused(format!(
                "the host of {what} {kind}, which regcred does not call unless REGCRED_ISSUER_ALLOW allows it"
            )),
            NotAdmitted::Unresolved => IssuerError::Unreachable(format!("the host of {what} {error}")),
        })?;
        let client = Client::builder()
            .tls_backend_preconfigured(self.tls(ca_certificate))
            .resolve_to_addrs(host, &addresses)
            .dns_resolver(NoResolver)
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .http1_only()
            .timeout(self.config.timeout)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|_| unreachable("cannot be asked for: the HTTP client cannot be set up on this host"))?;
        let request = client.get(url.clone()).header(header::ACCEPT, "application/json");
        let sent = timeout_at(deadline, request.send()).await.map_err(|_| slow())?;
        let mut response = sent.map_err(|error| unreachable(explain(&error)))?;
        // The client had nowhere else to go; this is the proof.
        if !response.remote_addr().is_some_and(|peer| addresses.contains(&peer)) {
            return Err(IssuerError::Refused(format!("the host of {what} was not at its address")));
        }
        match response.status().as_u16() {
            200 => {}
            status @ 300..=399 => {
                let detail = format!("{what} was answered with a redirect ({status}), which is not followed");
                return Err(IssuerError::Invalid(detail));
            }
            status @ (429 | 500..=599) => return Err(unreachable(&format!("was answered with {status}"))),
            status => return Err(IssuerError::Invalid(format!("{what} was answered with {status}"))),
        }
        let mut body = Vec::new();
        loop {
            let chunk = timeout_at(deadline, response.chunk()).await.map_err(|_| slow())?;
            let Some(chunk) = chunk.map_err(|error| unreachable(explain(&error)))? else { return Ok(body) };
            if body.len() + chunk.len() > limit {
                return Err(IssuerError::Invalid(format!("{what} is longer than {limit} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
    }
}

/// Puts into words why no answer came, by types alone: the texts of errors may hold what came over the wire.
fn explain(error: &reqwest::Error) -> &'static str {
    let mut current: Option<&(dyn Error + 'static)> = Some(error);
    let mut kind = None;
    // Error chains are short; a bound keeps a cyclic one from hanging us.
    for _ in 0..16 {
        let Some(cause) = current else { break };
        match cause.downcast_ref::<rustls::Error>() {
            Some(rustls::Error::InvalidCertificate(_)) => {
                return "cannot be had: the certificate of its host does not verify; is caCertificate missing or another's?";
            }
            Some(_) => return "cannot be had: the TLS handshake with its host failed",
            None => {}
        }
        current = match cause.downcast_ref::<io::Error>() {
            Some(io) => {
                kind.get_or_insert(io.kind());
                // An io::Error hides the error inside it from `source`.
                io.get_ref().map(|inner| inner as &(dyn Error + 'static))
            }
            None => cause.source(),
        };
    }
    match kind {
        _ if error.is_timeout() => "did not come in time",
        Some(io::ErrorKind::ConnectionRefused) => "cannot be had: its host refused the connection",
        Some(io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable) => {
            "cannot be had: no route to its host"
        }
        _ => "broke off, or is no HTTP answer",
    }
}
