//! Connection to a Kubernetes cluster: the API server and regcred's credential.
//!
//! A [`ClusterConnection`] is complete and consistent: the URL can be called, every certificate
//! parses, a private key belongs to its certificate, and no credential is sent in the clear to
//! another host.

use std::{fmt, net::IpAddr, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::CertifiedKey,
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use url::{Host, Url};
use utoipa::ToSchema;

use super::{
    invalid::{FieldError, Invalid},
    names::{NamespaceName, ServiceAccountName},
    sealed::{Ca, ClusterDestination},
};

mod expiry;

pub use self::expiry::{audiences_of_token, service_account_of_token};

const SERVER_MAX: usize = 2048;
const PEM_MAX: usize = 256 * 1024;
const TOKEN_MAX: usize = 64 * 1024;
/// Time after its end at which a credential is refused.
const LEEWAY: TimeDelta = TimeDelta::minutes(1);

/// How regcred authenticates to a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum AuthType {
    /// A bearer token, as of a `ServiceAccount`.
    Token,
    /// A token of a `ServiceAccount` that regcred replaces before its end.
    ServiceAccount,
    /// A client certificate and its private key.
    ClientCertificate,
    /// The `ServiceAccount` of the pod in which regcred itself runs.
    InCluster,
    /// No credential, for an API server behind a proxy such as `kubectl proxy`.
    None,
}

impl AuthType {
    /// Name in the API and the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::ServiceAccount => "serviceAccount",
            Self::ClientCertificate => "clientCertificate",
            Self::InCluster => "inCluster",
            Self::None => "none",
        }
    }
}

impl fmt::Display for AuthType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AuthType {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        [Self::Token, Self::ServiceAccount, Self::ClientCertificate, Self::InCluster, Self::None]
            .into_iter()
            .find(|kind| kind.as_str() == name)
            .ok_or_else(|| Invalid::new("must be one of token, serviceAccount, clientCertificate, inCluster, none"))
    }
}

/// A `ServiceAccount` of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccountRef {
    /// Namespace.
    pub namespace: NamespaceName,
    /// Name.
    pub name: ServiceAccountName,
}

impl fmt::Display for ServiceAccountRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Credential for a cluster. `Debug` prints only its type.
#[derive(Clone)]
pub enum ClusterAuth {
    /// A bearer token.
    Token {
        /// One line of visible ASCII.
        token: SecretString,
    },
    /// A token that regcred replaces by tokens of a `ServiceAccount`.
    ServiceAccount {
        /// One line of visible ASCII. May request tokens of the `ServiceAccount`.
        token: SecretString,
        /// The `ServiceAccount`.
        account: ServiceAccountRef,
    },
    /// A client certificate.
    ClientCertificate {
        /// The certificate and its intermediates, PEM. Public, so stored unencrypted.
        certificate: String,
        /// Its private key, PEM.
        key: SecretString,
    },
    /// The `ServiceAccount` of regcred's own pod.
    InCluster,
    /// No credential.
    None,
}

impl ClusterAuth {
    /// Builds a credential from the columns in storage.
    ///
    /// # Errors
    ///
    /// The parts do not match the type.
    pub fn from_parts(
        auth_type: AuthType,
        certificate: Option<String>,
        secret: Option<SecretString>,
        account: Option<ServiceAccountRef>,
    ) -> Result<Self, Invalid> {
        match (auth_type, certificate, secret, account) {
            (AuthType::Token, None, Some(token), None) => Ok(Self::Token { token }),
            (AuthType::ServiceAccount, None, Some(token), Some(account)) => Ok(Self::ServiceAccount { token, account }),
            (AuthType::ClientCertificate, Some(certificate), Some(key), None) => {
                Ok(Self::ClientCertificate { certificate, key })
            }
            (AuthType::InCluster, None, None, None) => Ok(Self::InCluster),
            (AuthType::None, None, None, None) => Ok(Self::None),
            (kind, ..) => Err(Invalid::new(format!("the parts do not match authentication of type {kind}"))),
        }
    }

    /// Type of authentication.
    #[must_use]
    pub const fn auth_type(&self) -> AuthType {
        match self {
            Self::Token { .. } => AuthType::Token,
            Self::ServiceAccount { .. } => AuthType::ServiceAccount,
            Self::ClientCertificate { .. } => AuthType::ClientCertificate,
            Self::InCluster => AuthType::InCluster,
            Self::None => AuthType::None,
        }
    }

    /// The part that must be sealed: the token or the private key.
    #[must_use]
    pub const fn secret(&self) -> Option<&SecretString> {
        match self {
            Self::Token { token } | Self::ServiceAccount { token, .. } => Some(token),
            Self::ClientCertificate { key, .. } => Some(key),
            Self::InCluster | Self::None => None,
        }
    }

    /// The public part: the client certificate.
    #[must_use]
    pub fn certificate(&self) -> Option<&str> {
        match self {
            Self::ClientCertificate { certificate, .. } => Some(certificate),
            Self::Token { .. } | Self::ServiceAccount { .. } | Self::InCluster | Self::None => None,
        }
    }

    /// The `ServiceAccount` whose tokens replace the credential.
    #[must_use]
    pub const fn service_account(&self) -> Option<&ServiceAccountRef> {
        match self {
            Self::ServiceAccount { account, .. } => Some(account),
            Self::Token { .. } | Self::ClientCertificate { .. } | Self::InCluster | Self::None => None,
        }
    }

    /// End of the credential; `None` if it has none or does not state it.
    #[must_use]
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        match self {
            Self::Token { token } | Self::ServiceAccount { token, .. } => expiry::of_token(token.expose_secret()),
            Self::ClientCertificate { certificate, .. } => {
                expiry::of_certificate(parse_certificates(certificate).ok()?.first()?)
            }
            Self::InCluster | Self::None => None,
        }
    }

    /// Refuses a credential that has ended. API servers accept tokens for [`LEEWAY`] after their
    /// end, and clocks differ.
    ///
    /// # Errors
    ///
    /// The field of the credential, with the time of its end.
    pub fn require_current(&self, now: DateTime<Utc>) -> Result<(), FieldError> {
        let Some(ended) = self.expires_at().filter(|at| *at <= now - LEEWAY) else { return Ok(()) };
        let field = if self.certificate().is_some() { "auth.certificate" } else { "auth.token" };
        let ended = ended.to_rfc3339_opts(SecondsFormat::Secs, true);
        Err(FieldError::new(field, Invalid::new(format!("ended at {ended}: create a new one"))))
    }
}

impl fmt::Debug for ClusterAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ClusterAuth").field(&self.auth_type()).finish()
    }
}

/// URL of an API server: scheme, host, port and, behind gateways such as Rancher's, a path.
///
/// Normalized: host in lower case, no default port, no trailing slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl {
    text: String,
    host: String,
    https: bool,
    loopback: bool,
}

impl ServerUrl {
    /// Parses a URL. [`ClusterConnection::new`] decides about `http://`.
    ///
    /// # Errors
    ///
    /// The text is not such a URL. The refusal never repeats user information.
    pub fn parse(server: &str) -> Result<Self, Invalid> {
        if server.len() > SERVER_MAX {
            return Err(Invalid::new("must not be longer than 2048 characters"));
        }
        // The url crate silently corrects white space, backslashes and missing slashes.
        if !server.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'\\') {
            return Err(Invalid::new("must be a URL of visible ASCII characters such as https://10.0.0.1:6443"));
        }
        let scheme_end = server.find("://").ok_or_else(not_a_url)?;
        let https = match server[..scheme_end].to_ascii_lowercase().as_str() {
            "https" => true,
            "http" => false,
            _ => return Err(not_a_url()),
        };
        if server[scheme_end + 3..].starts_with('/') {
            return Err(not_a_url());
        }
        let url = Url::parse(server).map_err(|_| not_a_url())?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Invalid::new("must not contain a user name or password: set auth instead"));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(Invalid::new("must not have a query or fragment"));
        }
        if url.port() == Some(0) {
            return Err(Invalid::new("must not have port 0"));
        }
        let loopback = match url.host().ok_or_else(not_a_url)? {
            Host::Domain(name) => name == "localhost",
            Host::Ipv4(address) => IpAddr::from(address).is_loopback(),
            Host::Ipv6(address) => IpAddr::from(address).to_canonical().is_loopback(),
        };
        let host = url.host_str().ok_or_else(not_a_url)?.to_owned();
        let text = url.as_str().trim_end_matches('/').to_owned();
        text.parse::<http::Uri>().map_err(|_| not_a_url())?;
        Ok(Self { text, host, https, loopback })
    }

    /// Normalized URL, without a trailing slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Host: a name in lower case or an address (IPv6 in brackets).
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Whether the API server is called over TLS.
    #[must_use]
    pub const fn is_https(&self) -> bool {
        self.https
    }

    /// Whether the host is this machine, so that no network is involved.
    #[must_use]
    pub const fn is_loopback(&self) -> bool {
        self.loopback
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

fn not_a_url() -> Invalid {
    Invalid::new("must be a URL such as https://10.0.0.1:6443")
}

/// CA certificates that may sign a server's certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct CaCertificate {
    pem: String,
    certificates: Vec<CertificateDer<'static>>,
}

impl CaCertificate {
    /// Parses one or more PEM certificates, each of which must be usable as a trust anchor. Text
    /// around them is dropped.
    ///
    /// # Errors
    ///
    /// There is no certificate, an invalid one, or a private key.
    pub fn parse(pem: &str) -> Result<Self, Invalid> {
        let certificates = parse_certificates(pem)?;
        let mut roots = RootCertStore::empty();
        for certificate in &certificates {
            roots.add(certificate.clone()).map_err(|_| broken_certificate())?;
        }
        Ok(Self { pem: to_pem(&certificates), certificates })
    }

    /// The certificates as PEM.
    #[must_use]
    pub fn as_pem(&self) -> &str {
        &self.pem
    }

    /// The certificates as DER.
    pub fn as_der(&self) -> impl Iterator<Item = &[u8]> {
        self.certificates.iter().map(AsRef::as_ref)
    }
}

impl fmt::Debug for CaCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaCertificate").field("certificates", &self.certificates.len()).finish_non_exhaustive()
    }
}

/// API server of a cluster, how it is verified, and regcred's credential.
#[derive(Debug, Clone)]
pub struct ClusterConnection {
    /// API server. None for [`ClusterAuth::InCluster`] only.
    pub server: Option<ServerUrl>,
    /// Authorities that may sign the API server's certificate; the host's trust store if absent.
    pub ca_certificate: Option<CaCertificate>,
    /// Name that the API server's certificate must contain instead of the URL's host.
    pub tls_server_name: Option<String>,
    /// Credential.
    pub auth: ClusterAuth,
    /// Whether `http://` is allowed.
    pub allow_plain_http: bool,
}

impl ClusterConnection {
    /// Where the credential is sent.
    #[must_use]
    pub fn destination(&self) -> ClusterDestination<'_> {
        ClusterDestination {
            server: self.server.as_ref().map(ServerUrl::as_str),
            ca: self.ca_certificate.as_ref().map(|ca| Ca::Pem(ca.as_pem())),
            tls_server_name: self.tls_server_name.as_deref(),
        }
    }

    /// Validates the parts and their combination.
    ///
    /// `http://` requires `allow_plain_http` and excludes a client certificate. A bearer token over
    /// `http://` can be read on the network and gives access to the cluster. So it is refused even
    /// with `allow_plain_http`, except on loopback.
    ///
    /// # Errors
    ///
    /// All problems, with fields named as in the API.
    pub fn new(
        server: Option<&str>,
        ca_certificate: Option<&str>,
        tls_server_name: Option<&str>,
        auth: ClusterAuth,
        allow_plain_http: bool,
    ) -> Result<Self, Vec<FieldError>> {
        let mut problems = Problems(Vec::new());
        let input = ServerInput { server, ca_certificate, tls_server_name };
        let auth = problems.take(check_auth(auth));
        let in_cluster = matches!(auth, Some(ClusterAuth::InCluster));
        let connection = if in_cluster {
            input.refuse_all(&mut problems);
            auth.map(|auth| Self { server: None, ca_certificate: None, tls_server_name: None, auth, allow_plain_http })
        } else {
            input.check(auth, allow_plain_http, &mut problems)
        };
        match connection {
            Some(connection) if problems.0.is_empty() => Ok(connection),
            _ => Err(problems.0),
        }
    }
}

/// Problems found so far.
struct Problems(Vec<FieldError>);

impl Problems {
    fn take<T>(&mut self, parsed: Result<T, FieldError>) -> Option<T> {
        parsed.map_err(|problem| self.0.push(problem)).ok()
    }

    fn push(&mut self, field: &str, detail: &str) {
        self.0.push(FieldError::new(field, detail));
    }
}

/// Unparsed parts that identify the API server.
struct ServerInput<'a> {
    server: Option<&'a str>,
    ca_certificate: Option<&'a str>,
    tls_server_name: Option<&'a str>,
}

impl ServerInput<'_> {
    fn refuse_all(&self, problems: &mut Problems) {
        let parts =
            [("server", self.server), ("caCertificate", self.ca_certificate), ("tlsServerName", self.tls_server_name)];
        for (field, _) in parts.iter().filter(|(_, value)| value.is_some()) {
            problems.push(field, "must not be set with auth.type inCluster: the pod provides it");
        }
    }

    fn check(
        &self,
        auth: Option<ClusterAuth>,
        allow_plain_http: bool,
        problems: &mut Problems,
    ) -> Option<ClusterConnection> {
        let field = |name: &'static str| move |invalid: Invalid| FieldError::new(name, invalid);
        let server = match self.server {
            Some(server) => problems.take(ServerUrl::parse(server).map_err(field("server"))),
            None => problems.take(Err(FieldError::new("server", "is required unless auth.type is inCluster"))),
        };
        let ca_certificate = self
            .ca_certificate
            .and_then(|pem| problems.take(CaCertificate::parse(pem).map_err(field("caCertificate"))));
        let tls_server_name = self
            .tls_server_name
            .and_then(|name| problems.take(check_tls_server_name(name).map_err(field("tlsServerName"))));
        if let Some(server) = server.as_ref().filter(|server| !server.is_https()) {
            self.check_plain_http(server, auth.as_ref(), allow_plain_http, problems);
        }
        Some(ClusterConnection {
            server: Some(server?),
            ca_certificate,
            tls_server_name,
            auth: auth?,
            allow_plain_http,
        })
    }

    fn check_plain_http(
        &self,
        server: &ServerUrl,
        auth: Option<&ClusterAuth>,
        allow_plain_http: bool,
        problems: &mut Problems,
    ) {
        if !allow_plain_http {
            problems.push("server", "must be https://: http:// requires allowPlainHttp: true");
        }
        if self.ca_certificate.is_some() {
            problems.push("caCertificate", "must not be set with an http:// server");
        }
        if self.tls_server_name.is_some() {
            problems.push("tlsServerName", "must not be set with an http:// server");
        }
        match auth {
            Some(ClusterAuth::ClientCertificate { .. }) => {
                problems.push("auth.type", "a client certificate requires an https:// server");
            }
            Some(ClusterAuth::Token { .. } | ClusterAuth::ServiceAccount { .. }) if !server.is_loopback() => problems.push(
                "auth.type",
                "a token is never sent over http:// to another host, because it could be read on the network: use https://",
            ),
            _ => {}
        }
    }
}

fn check_auth(auth: ClusterAuth) -> Result<ClusterAuth, FieldError> {
    match auth {
        ClusterAuth::Token { ref token } | ClusterAuth::ServiceAccount { ref token, .. } => {
            check_token(token.expose_secret()).map_err(|invalid| FieldError::new("auth.token", invalid))?;
            Ok(auth)
        }
        ClusterAuth::ClientCertificate { certificate, key } => {
            let certificates =
                parse_certificates(&certificate).map_err(|invalid| FieldError::new("auth.certificate", invalid))?;
            let certificate = to_pem(&certificates);
            check_key(certificates, key.expose_secret())?;
            Ok(ClusterAuth::ClientCertificate { certificate, key })
        }
        ClusterAuth::InCluster | ClusterAuth::None => Ok(auth),
    }
}

/// Checks that a token can be sent in a header.
///
/// # Errors
///
/// The token is empty, too long, or not one line of visible ASCII.
pub fn check_token(token: &str) -> Result<(), Invalid> {
    if token.is_empty() || token.len() > TOKEN_MAX {
        return Err(Invalid::new("must have 1 to 65536 characters"));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Invalid::new("must be one line of visible ASCII characters, without a line break at the end"));
    }
    Ok(())
}

fn check_key(certificates: Vec<CertificateDer<'static>>, key: &str) -> Result<(), FieldError> {
    let key_problem = |detail: &str| FieldError::new("auth.key", detail);
    if key.len() > PEM_MAX {
        return Err(key_problem("must not be longer than 262144 bytes"));
    }
    let der = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|_| key_problem("must be an unencrypted private key in PEM (PKCS#8, PKCS#1 or SEC1)"))?;
    let signing_key =
        any_supported_type(&der).map_err(|_| key_problem("must be a private key of type RSA, ECDSA or Ed25519"))?;
    match CertifiedKey::new(certificates, signing_key).keys_match() {
        // Some keys do not reveal their public half. The API server decides about these.
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(key_problem("does not belong to the (first) certificate in auth.certificate"))
        }
        Err(_) => Err(FieldError::new("auth.certificate", broken_certificate())),
    }
}

fn check_tls_server_name(name: &str) -> Result<String, Invalid> {
    match ServerName::try_from(name) {
        Ok(_) => Ok(name.to_owned()),
        Err(_) => Err(Invalid::new("must be a host name or an IP address")),
    }
}

fn parse_certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, Invalid> {
    if pem.len() > PEM_MAX {
        return Err(Invalid::new("must not be longer than 262144 bytes"));
    }
    if pem.contains("PRIVATE KEY-----") {
        return Err(Invalid::new("must not contain a private key: certificates are stored unencrypted"));
    }
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().map_err(|_| broken_certificate())?;
    if certificates.is_empty() {
        return Err(Invalid::new("must contain at least one PEM certificate (-----BEGIN CERTIFICATE-----)"));
    }
    Ok(certificates)
}

fn broken_certificate() -> Invalid {
    Invalid::new("contains an invalid certificate")
}

fn to_pem(certificates: &[CertificateDer<'_>]) -> String {
    let mut pem = String::new();
    for certificate in certificates {
        pem.push_str("-----BEGIN CERTIFICATE-----\n");
        let base64 = STANDARD.encode(certificate);
        for (position, character) in base64.chars().enumerate() {
            if position > 0 && position % 64 == 0 {
                pem.push('\n');
            }
            pem.push(character);
        }
        pem.push_str("\n-----END CERTIFICATE-----\n");
    }
    pem
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rstest::rstest;

    use super::*;

    fn ca() -> String {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
    }

    fn client_pair() -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let issuer = Issuer::new(CertificateParams::new(Vec::new()).unwrap(), &ca_key);
        let certificate = CertificateParams::new(Vec::new()).unwrap().signed_by(&key, &issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    fn token(token: &str) -> ClusterAuth {
        ClusterAuth::Token { token: token.into() }
    }

    fn fields(connection: Result<ClusterConnection, Vec<FieldError>>) -> Vec<String> {
        connection.expect_err("refused").into_iter().map(|problem| problem.field).collect()
    }

    #[rstest]
    #[case("https://127.0.0.1:16443", "https://127.0.0.1:16443", "127.0.0.1")]
    #[case("https://10.0.0.1:6443/", "https://10.0.0.1:6443", "10.0.0.1")]
    #[case("HTTPS://K8S.Example.COM", "https://k8s.example.com", "k8s.example.com")]
    #[case("https://k8s.example.com:443", "https://k8s.example.com", "k8s.example.com")]
    #[case("https://[FD00::1]:6443", "https://[fd00::1]:6443", "[fd00::1]")]
    #[case(
        "https://rancher.example.com/k8s/clusters/c-m-x7k2",
        "https://rancher.example.com/k8s/clusters/c-m-x7k2",
        "rancher.example.com"
    )]
    #[case(
        "https://rancher.example.com/k8s/clusters/c-1/",
        "https://rancher.example.com/k8s/clusters/c-1",
        "rancher.example.com"
    )]
    #[case("http://127.0.0.1:8001", "http://127.0.0.1:8001", "127.0.0.1")]
    #[case("https://0x7f.1", "https://127.0.0.1", "127.0.0.1")]
    fn server_url_is_normalized(#[case] given: &str, #[case] normal: &str, #[case] host: &str) {
        let server = ServerUrl::parse(given).unwrap();
        assert_eq!((server.as_str(), server.host()), (normal, host));
    }

    #[rstest]
    #[case("")]
    #[case("127.0.0.1:6443")]
    #[case("k8s.example.com")]
    #[case("ftp://k8s.example.com")]
    #[case("https:k8s.example.com")]
    #[case("https:///k8s.example.com")]
    #[case("https://")]
    #[case("https://k8s.example.com:0")]
    #[case("https://k8s.example.com:65536")]
    #[case("https://k8s.example.com:port")]
    #[case("https://user@k8s.example.com")]
    #[case("https://user:password@k8s.example.com")]
    #[case("https://:password@k8s.example.com")]
    #[case("https://k8s.example.com?a=b")]
    #[case("https://k8s.example.com/#a")]
    #[case("https://k8s.example.com\\@evil.example.com")]
    #[case(" https://k8s.example.com")]
    #[case("https://k8s.example.com\n")]
    #[case("https://k8s.exa\tmple.com")]
    #[case("https://kübernetes.example.com")]
    #[case("https://k8s .example.com")]
    #[case("unix:///var/run/kube.sock")]
    fn invalid_server_url_is_refused(#[case] given: &str) {
        let refused = ServerUrl::parse(given).expect_err("refused").to_string();
        assert!(!refused.contains("password@"), "{refused}");
    }

    #[rstest]
    #[case("http://localhost:8001", true)]
    #[case("http://127.0.0.1", true)]
    #[case("http://127.8.9.10:1", true)]
    #[case("http://[::1]:8001", true)]
    #[case("http://[::ffff:127.0.0.1]:8001", true)]
    #[case("http://localhost.example.com", false)]
    #[case("http://10.0.0.1:8001", false)]
    #[case("http://0.0.0.0:8001", false)]
    fn only_addresses_of_this_machine_are_loopback(#[case] server: &str, #[case] loopback: bool) {
        assert_eq!(ServerUrl::parse(server).unwrap().is_loopback(), loopback);
    }

    proptest! {
        #[test]
        fn normalized_url_is_stable(text in "https?://[a-zA-Z0-9.:/\\[\\]%-]{1,40}") {
            if let Ok(server) = ServerUrl::parse(&text) {
                prop_assert_eq!(ServerUrl::parse(server.as_str()), Ok(server));
            }
        }
    }

    #[rstest]
    #[case::over_tls("https://k8s.example.com", token("t"), false, &[])]
    #[case::proxy("http://127.0.0.1:8001", ClusterAuth::None, true, &[])]
    #[case::proxy_elsewhere("http://10.0.0.1:8001", ClusterAuth::None, true, &[])]
    #[case::not_allowed("http://127.0.0.1:8001", ClusterAuth::None, false, &["server"])]
    #[case::token_on_loopback("http://localhost:8001", token("t"), true, &[])]
    #[case::token_in_the_clear("http://10.0.0.1:8001", token("t"), true, &["auth.type"])]
    fn plain_http_carries_no_token_to_another_host(
        #[case] server: &str,
        #[case] auth: ClusterAuth,
        #[case] allow_plain_http: bool,
        #[case] refused: &[&str],
    ) {
        let connection = ClusterConnection::new(Some(server), None, None, auth, allow_plain_http);
        assert_eq!(connection.map_or_else(|refused| fields(Err(refused)), |_| Vec::new()), refused);
    }

    #[rstest]
    #[case("eyJhbGciOiJSUzI1NiIsImtpZCI6IiJ9.e30.c2ln", true)]
    #[case("abcdef.0123456789abcdef", true)]
    #[case("", false)]
    #[case("two words", false)]
    #[case("token\n", false)]
    #[case("line\r\nX-Injected: yes", false)]
    #[case("tøken", false)]
    fn token_is_one_line_of_visible_ascii(#[case] text: &str, #[case] good: bool) {
        let connection = ClusterConnection::new(Some("https://k8s.example.com"), None, None, token(text), false);
        assert_eq!(
            connection.map(|_| ()).map_err(|problems| problems[0].field.clone()),
            if good { Ok(()) } else { Err("auth.token".to_owned()) }
        );
    }

    #[test]
    fn text_around_ca_certificates_is_dropped() {
        let (first, second) = (ca(), ca());
        let input = format!("subject=CN = one\n{first}\r\nsome words\n{second}");

        let kept = CaCertificate::parse(&input).unwrap();

        assert_eq!(kept.as_der().count(), 2);
        assert!(!kept.as_pem().contains("words") && !kept.as_pem().contains("subject"));
        assert_eq!(CaCertificate::parse(kept.as_pem()), Ok(kept));
    }

    #[rstest]
    #[case::empty("")]
    #[case::no_pem("hello")]
    #[case::no_base64("-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n")]
    #[case::no_certificate("-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n")]
    #[case::cut_short("-----BEGIN CERTIFICATE-----\naGVsbG8=\n")]
    #[case::other_section("-----BEGIN PUBLIC KEY-----\naGVsbG8=\n-----END PUBLIC KEY-----\n")]
    fn invalid_ca_certificate_is_refused(#[case] pem: &str) {
        let connection = ClusterConnection::new(Some("https://k8s.example.com"), Some(pem), None, token("t"), false);
        assert_eq!(fields(connection), ["caCertificate"]);
    }

    #[test]
    fn private_key_among_certificates_is_refused() {
        let (certificate, key) = client_pair();
        let mixed = format!("{certificate}{key}");
        let auth = ClusterAuth::ClientCertificate { certificate: mixed.clone(), key: key.into() };

        let connection = ClusterConnection::new(Some("https://k8s.example.com"), Some(&mixed), None, auth, false);

        assert_eq!(fields(connection), ["auth.certificate", "caCertificate"]);
    }

    #[test]
    fn client_key_must_belong_to_its_certificate() {
        let (certificate, key) = client_pair();
        let (_, other_key) = client_pair();
        let connect = |key: &str| {
            let auth = ClusterAuth::ClientCertificate { certificate: certificate.clone(), key: key.into() };
            ClusterConnection::new(Some("https://k8s.example.com"), Some(&ca()), Some("kubernetes"), auth, false)
        };

        assert!(connect(&key).is_ok());
        assert_eq!(fields(connect(&other_key)), ["auth.key"]);
        assert_eq!(fields(connect("no key")), ["auth.key"]);
        assert_eq!(fields(connect(&key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY"))), ["auth.key"]);
        assert_eq!(fields(connect(&certificate)), ["auth.key"]);
    }

    #[test]
    fn in_cluster_excludes_server_fields() {
        assert!(ClusterConnection::new(None, None, None, ClusterAuth::InCluster, false).is_ok());
        let input = ClusterConnection::new(Some("https://k"), Some("x"), Some("y"), ClusterAuth::InCluster, false);
        assert_eq!(fields(input), ["server", "caCertificate", "tlsServerName"]);
        assert_eq!(fields(ClusterConnection::new(None, None, None, ClusterAuth::None, false)), ["server"]);
    }

    #[test]
    fn all_problems_are_reported_together() {
        let connection = ClusterConnection::new(Some("nowhere"), Some("no pem"), Some("-"), token("a b"), false);
        assert_eq!(fields(connection), ["auth.token", "server", "caCertificate", "tlsServerName"]);
    }

    #[test]
    fn debug_prints_only_the_type() {
        let (certificate, key) = client_pair();
        let pair = ClusterAuth::ClientCertificate { certificate, key: key.into() };
        assert_eq!(format!("{pair:?}"), "ClusterAuth(ClientCertificate)");
        assert_eq!(format!("{:?}", token("canary")), "ClusterAuth(Token)");
        let connection = ClusterConnection::new(Some("https://k8s"), None, None, token("canary"), false).unwrap();
        assert!(!format!("{connection:?}").contains("canary"));
    }

    #[test]
    fn credential_is_rebuilt_from_its_parts() {
        for kind in [AuthType::Token, AuthType::ClientCertificate, AuthType::InCluster, AuthType::None] {
            assert_eq!(kind.as_str().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
            let certificate = (kind == AuthType::ClientCertificate).then(|| "certificate".to_owned());
            let has_secret = matches!(kind, AuthType::Token | AuthType::ClientCertificate);
            let secret = || has_secret.then(|| SecretString::from("secret"));
            let auth = ClusterAuth::from_parts(kind, certificate.clone(), secret(), None).unwrap();
            assert_eq!((auth.auth_type(), auth.certificate()), (kind, certificate.as_deref()));
            assert_eq!(auth.secret().is_some(), has_secret);
            let contrary = if has_secret { None } else { Some(SecretString::from("secret")) };
            assert!(ClusterAuth::from_parts(kind, certificate, contrary, None).is_err());
        }
        assert!("Token".parse::<AuthType>().is_err());
        let account = ServiceAccountRef {
            namespace: NamespaceName::parse("regcred").unwrap(),
            name: ServiceAccountName::parse("broker").unwrap(),
        };
        let renewed = |kind, account| ClusterAuth::from_parts(kind, None, Some("secret".into()), account);
        let auth = renewed(AuthType::ServiceAccount, Some(account.clone())).unwrap();
        assert_eq!((auth.auth_type(), auth.service_account()), (AuthType::ServiceAccount, Some(&account)));
        assert!(renewed(AuthType::ServiceAccount, None).is_err() && renewed(AuthType::Token, Some(account)).is_err());
    }

    #[test]
    fn ended_credential_is_refused_after_the_leeway() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap();
        let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(r#"{"exp":1800000000}"#);
        let auth = token(&format!("e30.{payload}.c2ln"));
        assert_eq!(auth.expires_at(), Some(at(1_800_000_000)));
        assert_eq!(auth.require_current(at(1_800_000_059)), Ok(()));
        let refused = auth.require_current(at(1_800_000_060)).unwrap_err();
        assert_eq!(refused.field, "auth.token");
        assert_eq!(refused.detail, "ended at 2027-01-15T08:00:00Z: create a new one");
        assert_eq!(token("opaque").require_current(at(1_800_000_060)), Ok(()));

        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        let auth = ClusterAuth::ClientCertificate { certificate, key: key.serialize_pem().into() };
        assert_eq!(auth.require_current(at(1_600_000_000)), Ok(()));
        assert_eq!(auth.require_current(at(1_800_000_000)).unwrap_err().field, "auth.certificate");
    }
}
