//! kube configuration of a [`ClusterConnection`]: by URL, or by the `ServiceAccount` of regcred's
//! own pod.

use std::net::{IpAddr, SocketAddr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderValue, header};
use kube::{Config, config::AuthInfo};
use secrecy::{ExposeSecret, SecretString};
use url::Url;

use super::{ClusterClientConfig, ClusterError};
use crate::{
    clients::outbound::{Guard, GuardError, Peer, TlsHints, Trust},
    domain::cluster::{CaCertificate, ClusterAuth, ClusterConnection, ServerUrl},
};

pub(super) const USER_AGENT: &str = concat!("regcred/", env!("CARGO_PKG_VERSION"));
const HINTS: TlsHints =
    TlsHints { wrong_name: ": set tlsServerName to a name in the certificate", not_tls: ": is it an http:// server?" };

/// Returns the admitted addresses of the API server at this URL, or none if its host is an address
/// itself.
///
/// # Errors
///
/// [`ClusterError::Misconfigured`] if the guard refuses, [`ClusterError::Unreachable`] if the name
/// has no address.
pub async fn admit(guard: &Guard, server: &str) -> Result<Vec<IpAddr>, ClusterError> {
    let url = Url::parse(server).map_err(|_| unusable_url())?;
    let (host, port) = url.host_str().zip(url.port_or_known_default()).ok_or_else(unusable_url)?;
    let admitted = guard.admit(host, port).await.map_err(|error| {
        let detail = error.describe(server, "REGCRED_CLUSTER_ALLOW");
        match error {
            GuardError::Forbidden(_) => ClusterError::Misconfigured { detail },
            GuardError::NotResolved => ClusterError::Unreachable { detail },
        }
    })?;
    let is_name = matches!(url.host(), Some(url::Host::Domain(_)));
    Ok(admitted.into_iter().map(|address| address.ip()).filter(|_| is_name).collect())
}

/// Returns the addresses of the API server of regcred's own cluster, or none if its host is an
/// address itself. No user names the host, so the guard admits every address.
///
/// # Errors
///
/// [`ClusterError::Unreachable`] if the name has no address.
pub async fn resolve_in_cluster(guard: &Guard, config: &ClusterClientConfig) -> Result<Vec<IpAddr>, ClusterError> {
    match &config.service_host {
        Some(host) if host.parse::<IpAddr>().is_err() => guard
            .addresses(host)
            .await
            .map_err(|error| ClusterError::Unreachable { detail: error.describe(host, "REGCRED_CLUSTER_ALLOW") }),
        _ => Ok(Vec::new()),
    }
}

/// Builds kube's configuration, and the description of the API server for error texts.
///
/// The client connects to `pinned` if given, whatever the host name resolves to.
pub(super) fn kube_config(
    connection: &ClusterConnection,
    pinned: Option<IpAddr>,
    config: &ClusterClientConfig,
) -> Result<(Config, Peer), ClusterError> {
    let (mut kube_config, peer) = match &connection.server {
        Some(server) => at_server(connection, server, pinned)?,
        None => in_cluster(config, pinned)?,
    };
    match &connection.auth {
        ClusterAuth::Token { token } | ClusterAuth::ServiceAccount { token, .. } => {
            kube_config.auth_info.token = Some(token.clone());
        }
        ClusterAuth::ClientCertificate { certificate, key } => {
            kube_config.auth_info = AuthInfo {
                client_certificate_data: Some(STANDARD.encode(certificate)),
                client_key_data: Some(STANDARD.encode(key.expose_secret()).into()),
                ..AuthInfo::default()
            };
        }
        ClusterAuth::InCluster | ClusterAuth::None => {}
    }
    kube_config.connect_timeout = Some(config.connect_timeout.min(config.timeout));
    // A repeated POST could get a 409 caused by its own first attempt.
    kube_config.default_retry = false;
    kube_config.headers.push((header::USER_AGENT, HeaderValue::from_static(USER_AGENT)));
    Ok((kube_config, peer))
}

fn at_server(
    connection: &ClusterConnection,
    server: &ServerUrl,
    pinned: Option<IpAddr>,
) -> Result<(Config, Peer), ClusterError> {
    let mut kube_config = Config::new(to_uri(server.as_str())?);
    if let Some(address) = pinned {
        pin(&mut kube_config, server.is_https(), address)?;
    }
    kube_config.root_cert = match &connection.ca_certificate {
        Some(ca) => Some(ca.as_der().map(<[u8]>::to_vec).collect()),
        // Without TLS no trust store is needed, and the host may have none to load.
        None if !server.is_https() => Some(Vec::new()),
        None => None,
    };
    if connection.tls_server_name.is_some() {
        kube_config.tls_server_name.clone_from(&connection.tls_server_name);
    }
    let peer = Peer {
        label: server.to_string(),
        trust: if connection.ca_certificate.is_some() { Trust::Ca } else { Trust::Host },
        expected_name: Some(connection.tls_server_name.clone().unwrap_or_else(|| server.host().to_owned())),
        hints: HINTS,
    };
    Ok((kube_config, peer))
}

/// Makes kube connect to `address`, but keep the host name in the `Host` header and in TLS.
fn pin(config: &mut Config, is_https: bool, address: IpAddr) -> Result<(), ClusterError> {
    let authority = config.cluster_url.authority().ok_or_else(unusable_url)?;
    let (host, port) = (authority.host().to_owned(), authority.port_u16());
    let host_header = HeaderValue::from_str(authority.as_str()).map_err(|_| unusable_url())?;
    let (scheme, default) = if is_https { ("https", 443) } else { ("http", 80) };
    let address = SocketAddr::new(address, port.unwrap_or(default));
    config.cluster_url = to_uri(&format!("{scheme}://{address}{}", config.cluster_url.path()))?;
    config.headers.push((header::HOST, host_header));
    if is_https {
        config.tls_server_name = Some(host);
    }
    Ok(())
}

/// Builds the configuration from the files that the kubelet mounts into every pod.
fn in_cluster(config: &ClusterClientConfig, pinned: Option<IpAddr>) -> Result<(Config, Peer), ClusterError> {
    let (Some(host), Some(port)) = (&config.service_host, &config.service_port) else {
        return Err(misconfigured(
            "regcred does not run in a cluster: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set",
        ));
    };
    let port: u16 = port.parse().map_err(|_| misconfigured("KUBERNETES_SERVICE_PORT is not a port"))?;
    let server = if host.contains(':') { format!("https://[{host}]:{port}") } else { format!("https://{host}:{port}") };

    let ca_file = config.service_account_dir.join("ca.crt");
    let ca =
        std::fs::read_to_string(&ca_file).map_err(|_| misconfigured("the ServiceAccount's ca.crt cannot be read"))?;
    let ca = CaCertificate::parse(&ca)
        .map_err(|_| misconfigured("the ServiceAccount's ca.crt contains no usable certificate"))?;
    let token_file = config.service_account_dir.join("token");
    let token: SecretString = std::fs::read_to_string(&token_file)
        .map_err(|_| misconfigured("the ServiceAccount's token cannot be read"))?
        .into();
    if token.expose_secret().is_empty() || !token.expose_secret().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(misconfigured("the ServiceAccount's token is not one line of visible ASCII characters"));
    }
    let token_file = token_file
        .into_os_string()
        .into_string()
        .map_err(|_| misconfigured("the path of the ServiceAccount's directory is not UTF-8"))?;

    let mut kube_config = Config::new(to_uri(&server)?);
    if let Some(address) = pinned {
        pin(&mut kube_config, true, address)?;
    }
    kube_config.root_cert = Some(ca.as_der().map(<[u8]>::to_vec).collect());
    kube_config.root_cert_file = Some(ca_file);
    kube_config.auth_info.token_file = Some(token_file);
    Ok((kube_config, Peer { label: server, trust: Trust::Ca, expected_name: Some(host.clone()), hints: HINTS }))
}

fn to_uri(server: &str) -> Result<http::Uri, ClusterError> {
    server.parse().map_err(|_| unusable_url())
}

fn unusable_url() -> ClusterError {
    misconfigured("the URL of the cluster cannot be used")
}

fn misconfigured(detail: &str) -> ClusterError {
    ClusterError::Misconfigured { detail: detail.to_owned() }
}
