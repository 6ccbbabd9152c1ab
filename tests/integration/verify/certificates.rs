//! Valid and invalid certificates for registries.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd};

/// Server certificate and its key, PEM.
pub struct ServerCertificate {
    pub certificate: String,
    pub key: String,
}

/// Private CA.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

impl Ca {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, "a private CA");
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Issues a certificate for 127.0.0.1 and localhost.
    pub fn certify(&self) -> ServerCertificate {
        self.sign(&server(&["127.0.0.1", "localhost"]))
    }

    /// Issues a certificate for this host.
    pub fn certify_for(&self, host: &str) -> ServerCertificate {
        self.sign(&server(&[host]))
    }

    /// Issues an expired certificate.
    pub fn certify_expired(&self) -> ServerCertificate {
        let mut params = server(&["127.0.0.1"]);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.sign(&params)
    }

    /// Issues a certificate that is not valid yet.
    pub fn certify_future(&self) -> ServerCertificate {
        let mut params = server(&["127.0.0.1"]);
        params.not_before = date_time_ymd(2090, 1, 1);
        params.not_after = date_time_ymd(2091, 1, 1);
        self.sign(&params)
    }

    /// Issues a certificate for another host.
    pub fn certify_other(&self) -> ServerCertificate {
        self.sign(&server(&["other.example"]))
    }

    fn sign(&self, params: &CertificateParams) -> ServerCertificate {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        ServerCertificate { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// Self-signed certificate. With `is_ca` it is also a CA's, as `openssl req -x509` creates it.
pub fn self_signed(is_ca: bool) -> ServerCertificate {
    let mut params = server(&["127.0.0.1"]);
    if is_ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("a certificate");
    ServerCertificate { certificate: certificate.pem(), key: key.serialize_pem() }
}

fn server(names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    CertificateParams::new(names).expect("names")
}
