//! Connections to an address that the guard saw, in place of whatever a name means when the connection comes about.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderValue, header};
use kube::Config;
use url::Url;

use super::{ClusterError, to_uri};
use crate::clients::guard::{Guard, NotAdmitted};

/// Asks the guard where the API server at this URL may be called: all addresses of a host that has a name, none of one
/// that is an address itself, which needs no pinning.
///
/// # Errors
///
/// [`ClusterError::Misconfigured`] if the guard refuses, [`ClusterError::Unreachable`] if the name has no address.
pub async fn admit(guard: &Guard, server: &str) -> Result<Vec<IpAddr>, ClusterError> {
    let unusable = || ClusterError::Misconfigured { detail: "the URL of the cluster cannot be used".to_owned() };
    let url = Url::parse(server).map_err(|_| unusable())?;
    let (host, port) = url.host_str().zip(url.port_or_known_default()).ok_or_else(unusable)?;
    let admitted = guard.admit(host, port).await.map_err(|error| match error {
        NotAdmitted::Refused(kind) => ClusterError::Misconfigured {
            detail: format!("{server} {kind}, which regcred does not call unless REGCRED_CLUSTER_ALLOW allows it"),
        },
        NotAdmitted::Unresolved => ClusterError::Unreachable {
            detail: format!("{server} cannot be reached: its host name cannot be resolved"),
        },
    })?;
    let is_name = matches!(url.host(), Some(url::Host::Domain(_)));
    Ok(admitted.into_iter().map(|address| address.ip()).filter(|_| is_name).collect())
}

/// Has kube connect to `address`, and tell the server the name that it was called by.
pub(super) fn pin(config: &mut Config, is_https: bool, address: IpAddr) -> Result<(), ClusterError> {
    let unusable = || ClusterError::Misconfigured { detail: "the URL of the cluster cannot be used".to_owned() };
    let authority = config.cluster_url.authority().ok_or_else(unusable)?;
    let (host, port) = (authority.host().to_owned(), authority.port_u16());
    let named = HeaderValue::from_str(authority.as_str()).map_err(|_| unusable())?;
    let (scheme, default) = if is_https { ("https", 443) } else { ("http", 80) };
    let address = SocketAddr::new(address, port.unwrap_or(default));
    config.cluster_url = to_uri(&format!("{scheme}://{address}{}", config.cluster_url.path()))?;
    config.headers.push((header::HOST, named));
    if is_https {
        config.tls_server_name = Some(host);
    }
    Ok(())
}
