//! Certificates of registries: good ones and all kinds of bad ones.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, date_time_ymd};

/// A certificate for a server, with its key, as PEM.
pub struct ServerCertificate {
    pub certificate: String,
    pub key: String,
}

/// A private CA.
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

    /// A certificate for 127.0.0.1 and localhost.
    pub fn certify(&self) -> ServerCertificate {
        self.sign(&server(&["127.0.0.1", "localhost"]))
    }

    /// One that has expired.
    pub fn certify_expired(&self) -> ServerCertificate {
        let mut params = server(&["127.0.0.1"]);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
        self.sign(&params)
    }

    /// One that will be valid some day.
    pub fn certify_future(&self) -> ServerCertificate {
        let mut params = server(&["127.0.0.1"]);
        params.not_before = date_time_ymd(2090, 1, 1);
        params.not_after = date_time_ymd(2091, 1, 1);
        self.sign(&params)
    }

    /// One for another host.
    pub fn certify_other(&self) -> ServerCertificate {
        self.sign(&server(&["other.example"]))
    }

    fn sign(&self, params: &CertificateParams) -> ServerCertificate {
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        ServerCertificate { certificate: certificate.pem(), key: key.serialize_pem() }
    }
}

/// A certificate that nobody but itself vouches for; as `openssl req -x509` makes it, it is a CA's, too.
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
