//! Diagnosis and coverage through a running service.

use std::time::Duration;

use reqwest::{Method, Url, redirect::Policy};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{Diagnosed, Object, Request, kubeconfig::OBJECTS_MAX};
use crate::{
    cli::CliError,
    config::{Reader, variable},
    domain::names::PodName,
};

/// Time limit of a diagnosis: its limits in the service, and some time for the cluster.
const TIMEOUT: Duration = Duration::from_mins(2);
/// Pods in one page, and maximum number of pages.
const PAGE: usize = 500;
const PAGES_MAX: usize = 50;

impl Request {
    pub(super) async fn diagnose(&self, object: &Object) -> Result<Diagnosed, CliError> {
        let mut reader = Reader::new(&variable);
        let service = reader.service(self.url.clone());
        let (url, token) = reader.finish(|| service)?;
        let url = self.target(&url, object)?;
        let diagnosis = post(url, &token).await?;
        Ok(Diagnosed { object: object.clone(), namespace: self.namespace.clone(), diagnosis })
    }

    /// Diagnoses the pods of the namespace that wait for an image, some at most.
    pub(super) async fn diagnose_waiting(&self) -> Result<Vec<Diagnosed>, CliError> {
        if self.apply {
            return Err(CliError::Usage("name the pod: --apply changes what one pod needs".to_owned()));
        }
        let mut found = Vec::new();
        for name in self.waiting_pods().await? {
            found.push(self.diagnose(&Object { kind: None, name }).await?);
        }
        Ok(found)
    }

    async fn waiting_pods(&self) -> Result<Vec<PodName>, CliError> {
        let mut reader = Reader::new(&variable);
        let service = reader.service(self.url.clone());
        let (url, token) = reader.finish(|| service)?;
        let path =
            format!("/v1/clusters/{}/namespaces/{}/pods?failing=true&limit={PAGE}", self.cluster, self.namespace);
        let (mut pods, mut cursor) = (Vec::new(), String::new());
        for _ in 0..PAGES_MAX {
            let (status, page) = call(Method::GET, resource(&url, &format!("{path}{cursor}"))?, &token, None).await?;
            let page = page.filter(|page| page["items"].is_array());
            let page = page.ok_or_else(|| CliError::Failed(format!("the service answered {status}, and no pods")))?;
            let names = page["items"].as_array().into_iter().flatten().filter_map(|pod| pod["name"].as_str());
            pods.extend(names.filter_map(|name| PodName::parse(name).ok()));
            if pods.len() > OBJECTS_MAX {
                note!("more than {OBJECTS_MAX} pods wait for an image; the first ones are diagnosed");
                pods.truncate(OBJECTS_MAX);
                return Ok(pods);
            }
            match page["next"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(pods),
            }
        }
        note!("the namespace has too many pods: only a part of them was read");
        Ok(pods)
    }

    fn target(&self, base: &str, object: &Object) -> Result<Url, CliError> {
        let apply = if self.apply { "?apply=true" } else { "" };
        let (cluster, namespace, path) = (&self.cluster, &self.namespace, object.path());
        resource(base, &format!("/v1/clusters/{cluster}/namespaces/{namespace}/{path}/diagnose{apply}"))
    }
}

/// URL of a resource of the service.
pub(super) fn resource(base: &str, path: &str) -> Result<Url, CliError> {
    let text = format!("{}{path}", base.trim_end_matches('/'));
    let url = Url::parse(&text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let url = url.ok_or_else(|| {
        CliError::Usage("the URL of the service must be one such as https://regcred.example.com".to_owned())
    })?;
    if url.scheme() == "http" && !is_loopback(&url) {
        let reason = "the URL of the service must begin with https://: the token would be sent unencrypted";
        return Err(CliError::Usage(reason.to_owned()));
    }
    Ok(url)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn post(url: Url, token: &SecretString) -> Result<Value, CliError> {
    let (status, body) = call(Method::POST, url, token, None).await?;
    match body {
        Some(body) if body["images"].is_array() => Ok(body),
        _ => Err(CliError::Failed(format!("the service answered {status}, and no diagnosis"))),
    }
}

/// Calls the service. Returns the status and the body of a success.
///
/// `wait` is the number of seconds that the service may wait for work to end.
pub(super) async fn call(
    method: Method,
    url: Url,
    token: &SecretString,
    wait: Option<u32>,
) -> Result<(u16, Option<Value>), CliError> {
    let failed = |error: &dyn std::fmt::Display| CliError::Failed(format!("the service is unreachable: {error}"));
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().redirect(Policy::none()).build();
    let client = client.map_err(|error| failed(&error.without_url()))?;
    let mut request = client.request(method, url).bearer_auth(token.expose_secret().trim());
    if let Some(seconds) = wait {
        request = request.header("prefer", format!("wait={seconds}"));
    }
    let response = request.send().await.map_err(|error| failed(&error.without_url()))?;
    let status = response.status();
    let body = response.bytes().await.map_err(|error| failed(&error.without_url()))?;
    let body: Option<Value> = serde_json::from_slice(&body).ok();
    match body {
        Some(problem) if !status.is_success() && problem["title"].is_string() => {
            let text = |field: &str| problem[field].as_str().map(super::tree::plain).unwrap_or_default();
            Err(CliError::Failed(format!("{}: {}", text("title"), text("detail"))))
        }
        _ if !status.is_success() => Err(CliError::Failed(format!("the service answered {}", status.as_u16()))),
        body => Ok((status.as_u16(), body)),
    }
}
