//! Client with the kubeconfig of a person, for the command line.
//!
//! As `kubectl` does, it reads files and runs the programs that the kubeconfig names (exec plugins).
//! The service must never use it: it imports kubeconfigs with [`kubeconfig`](super::kubeconfig),
//! which refuses all of that. `tests/integration/architecture.rs` enforces it.

use std::{borrow::Cow, path::Path, sync::Arc};

use http::{HeaderValue, header};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::{ClusterClient, ClusterClientConfig, ClusterError, ClusterMetrics, connection::USER_AGENT};
use crate::clients::outbound::{Peer, TlsHints, Trust};

impl ClusterClient {
    /// Creates a client from a kubeconfig: `file`, or else those of `KUBECONFIG`, or
    /// `~/.kube/config`. Returns the namespace of the context, too.
    ///
    /// An exec plugin runs now, and again when its credential expires.
    ///
    /// # Errors
    ///
    /// [`ClusterError::Misconfigured`] if the kubeconfig or its credential cannot be used.
    pub async fn of_user(file: Option<&Path>, context: Option<&str>) -> Result<(Self, String), ClusterError> {
        let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
        let read = async {
            match file {
                Some(file) => Config::from_custom_kubeconfig(Kubeconfig::read_from(file)?, &options).await,
                None => Config::from_kubeconfig(&options).await,
            }
        };
        let mut config = read.await.map_err(|error: KubeconfigError| {
            misconfigured(format!("the kubeconfig cannot be used: {}", explain(&error)))
        })?;
        let limits = ClusterClientConfig::default();
        config.connect_timeout = Some(limits.connect_timeout);
        config.default_retry = false;
        config.headers.push((header::USER_AGENT, HeaderValue::from_static(USER_AGENT)));
        let namespace = config.default_namespace.clone();
        let peer = Peer {
            label: config.cluster_url.to_string().trim_end_matches('/').to_owned(),
            trust: if config.root_cert.is_some() { Trust::Ca } else { Trust::Host },
            expected_name: config.tls_server_name.clone().or_else(|| config.cluster_url.host().map(str::to_owned)),
            hints: TlsHints { wrong_name: ": set tls-server-name in the kubeconfig", not_tls: "" },
        };
        // The error of an exec plugin has its output, which may be a credential.
        let client = Client::try_from(config).map_err(|error| {
            misconfigured(match error {
                kube::Error::Auth(_) => {
                    "the credential of the kubeconfig cannot be loaded: try `kubectl auth can-i get \
                                         pods`, which runs the same plugin"
                        .to_owned()
                }
                _ => "the certificates or the proxy of the kubeconfig cannot be used".to_owned(),
            })
        })?;
        let client = Self {
            client,
            peer: Arc::new(peer),
            timeout: limits.timeout,
            runtime: None,
            pinned: None,
            metrics: ClusterMetrics::default(),
            name: Arc::from("kubeconfig"),
        };
        Ok((client, namespace))
    }
}

/// Explains an error in fixed words: the error quotes lines of the file, or data of it, which may be
/// credentials.
fn explain(error: &KubeconfigError) -> Cow<'static, str> {
    match error {
        KubeconfigError::CurrentContextNotSet => "it has no current context: name one with --context".into(),
        KubeconfigError::KindMismatch | KubeconfigError::ApiVersionMismatch => "its files cannot be merged".into(),
        KubeconfigError::LoadContext(_) => "it has no such context".into(),
        KubeconfigError::LoadClusterOfContext(_) => "it lacks the cluster of the context".into(),
        KubeconfigError::FindPath => "there is none: name one with --kubeconfig".into(),
        KubeconfigError::ReadConfig(error, _) => format!("it cannot be read ({})", error.kind()).into(),
        KubeconfigError::Parse(error) => match error.location() {
            Some(at) => format!("it is no kubeconfig: see line {}, column {}", at.line(), at.column()).into(),
            None => "it is no kubeconfig".into(),
        },
        KubeconfigError::MissingClusterUrl => "its cluster has no server".into(),
        KubeconfigError::ParseClusterUrl(_) => "the server of its cluster is no URL".into(),
        KubeconfigError::ParseProxyUrl(_) => "the proxy of its cluster is no URL".into(),
        KubeconfigError::LoadCertificateAuthority(_) | KubeconfigError::ParseCertificates(_) => {
            "the certificate authority of its cluster cannot be loaded".into()
        }
        KubeconfigError::LoadClientCertificate(_) | KubeconfigError::LoadClientKey(_) => {
            "the certificate or key of its user cannot be loaded".into()
        }
    }
}

const fn misconfigured(detail: String) -> ClusterError {
    ClusterError::Misconfigured { detail }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parser quotes the lines around an error.
    #[test]
    fn error_of_a_kubeconfig_quotes_nothing_of_it() {
        for text in ["users:\n- name: u\n  user:\n    token: CANARY\n   x: y\n", "users: CANARY\n", "token: 'CANARY\n"]
        {
            let error = Kubeconfig::from_yaml(text).unwrap_err();
            let shown = explain(&error);
            assert!(!shown.contains("CANARY") && shown.contains("kubeconfig"), "{shown}");
        }
    }
}
