//! Audience that the tokens of a provider must have.

use url::Url;

use crate::domain::invalid::Invalid;

/// Maximum length of an audience, in bytes.
const AUDIENCE_MAX: usize = 256;

/// Names that API servers use as audiences: in pods, an older default of kubeadm, k3s and RKE2.
const API_SERVER_NAMES: [&str; 6] =
    ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "api", "k3s", "rke2"];

/// Value that a token must contain in `aud`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audience(String);

impl Audience {
    /// Parses an audience.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if the audience is empty, too long, or not visible ASCII.
    pub fn parse(audience: &str) -> Result<Self, Invalid> {
        if audience.is_empty() {
            return Err(Invalid::new("must not be empty: tokens for other audiences are never accepted"));
        }
        if audience.len() > AUDIENCE_MAX || !audience.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Invalid::new("must be at most 256 visible ASCII characters without spaces"));
        }
        Ok(Self(audience.to_owned()))
    }

    /// Returns the audience as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether API servers use this audience for themselves. Every pod has a token for it.
    #[must_use]
    pub(in crate::domain) fn is_of_api_servers(&self) -> bool {
        let audience = self.0.to_ascii_lowercase();
        let url = Url::parse(&audience).or_else(|_| Url::parse(&format!("https://{audience}")));
        let Some(host) = url.ok().and_then(|url| url.host_str().map(str::to_owned)) else { return false };
        API_SERVER_NAMES.contains(&host.as_str())
            || host.starts_with("kubernetes.default.svc.")
            // EKS, GKE and AKS.
            || host.starts_with("oidc.eks.")
            || host == "container.googleapis.com"
            || host.ends_with(".azmk8s.io")
    }

    /// Whether the audience is the URL of this API server, with or without a slash at the end.
    #[must_use]
    pub fn is_server(&self, server: &str) -> bool {
        self.0.trim_end_matches('/').eq_ignore_ascii_case(server.trim_end_matches('/'))
    }
}

/// Refusal of an audience that API servers use for themselves.
#[must_use]
pub fn api_server_audience() -> Invalid {
    Invalid::new(
        "is an audience of the API server itself, so the default token of every pod would be accepted: choose one of your \
         own, such as `regcred-dev`",
    )
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("https://kubernetes.default.svc", true)]
    #[case("https://kubernetes.default.svc.cluster.local", true)]
    #[case("https://kubernetes.default.svc.cluster.local/", true)]
    #[case("https://kubernetes.default.svc.prod.example.com", true)]
    #[case("https://Kubernetes.Default.svc:443", true)]
    #[case("kubernetes.default.svc", true)]
    #[case("kubernetes.default.svc.cluster.local", true)]
    #[case("https://kubernetes.default", true)]
    #[case("kubernetes", true)]
    #[case("api", true)]
    #[case("k3s", true)]
    #[case("https://container.googleapis.com/v1/projects/p/locations/l/clusters/c", true)]
    #[case("https://oidc.eks.eu-central-1.amazonaws.com/id/0123", true)]
    #[case("https://dev-dns-0123.hcp.westeurope.azmk8s.io", true)]
    #[case("regcred", false)]
    #[case("regcred-dev", false)]
    #[case("https://regcred.example.com", false)]
    #[case("api-of-regcred", false)]
    #[case("https://kubernetes.example.com", false)]
    #[case("urn:regcred", false)]
    fn audience_of_api_servers_is_known(#[case] audience: &str, #[case] expected: bool) {
        assert_eq!(Audience::parse(audience).unwrap().is_of_api_servers(), expected);
    }

    #[test]
    fn audience_is_compared_with_the_servers_url() {
        let audience = Audience::parse("https://10.0.0.1:6443/").unwrap();
        assert!(audience.is_server("https://10.0.0.1:6443") && !audience.is_server("https://10.0.0.1"));
    }
}
