//! TLS certificate of the listener, reloaded from its files while the service runs.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::digest;
use chrono::{DateTime, Utc};
use parking_lot::{Mutex, RwLock};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use zeroize::Zeroizing;

use crate::domain::invalid::Invalid;

/// Maximum size of a certificate or key file.
const FILE_MAX_BYTES: u64 = 1024 * 1024;

/// Certificate and key files, with their last valid content.
pub struct ServerCertificate {
    certificate_file: PathBuf,
    key_file: PathBuf,
    current: RwLock<Current>,
    /// Content read last, valid or not, so that an invalid pair is reported once.
    seen: Mutex<Fingerprint>,
}

#[derive(Clone)]
struct Current {
    key: Arc<CertifiedKey>,
    not_after: DateTime<Utc>,
}

type Fingerprint = [u8; 32];

impl fmt::Debug for ServerCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerCertificate")
            .field("certificate_file", &self.certificate_file)
            .field("key_file", &self.key_file)
            .finish_non_exhaustive()
    }
}

impl ServerCertificate {
    /// Reads a PEM chain, which starts with the certificate of the server, and its private key.
    ///
    /// # Errors
    ///
    /// [`Invalid`] names the file and the problem, without key material.
    pub fn load(certificate_file: PathBuf, key_file: PathBuf) -> Result<Self, Invalid> {
        let files = Files::read(&certificate_file, &key_file)?;
        let current = RwLock::new(files.parse(&certificate_file, &key_file)?);
        Ok(Self { certificate_file, key_file, current, seen: Mutex::new(files.fingerprint()) })
    }

    /// Reads the files again; returns whether the certificate changed. An invalid pair is ignored.
    ///
    /// # Errors
    ///
    /// [`Invalid`] if a file cannot be read, and once for each invalid pair.
    pub fn reload(&self) -> Result<bool, Invalid> {
        let files = Files::read(&self.certificate_file, &self.key_file)?;
        let fingerprint = files.fingerprint();
        {
            let mut seen = self.seen.lock();
            if *seen == fingerprint {
                return Ok(false);
            }
            *seen = fingerprint;
        }
        let current = files.parse(&self.certificate_file, &self.key_file)?;
        *self.current.write() = current;
        Ok(true)
    }

    /// Returns the expiry of the current certificate.
    #[must_use]
    pub fn not_after(&self) -> DateTime<Utc> {
        self.current.read().not_after
    }

    /// Returns the TLS configuration: TLS 1.2 and 1.3, HTTP/1.1, no client certificates.
    ///
    /// # Errors
    ///
    /// [`rustls::Error`] if the provider does not support these versions.
    pub fn server_config(self: Arc<Self>) -> Result<ServerConfig, rustls::Error> {
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let mut config = builder
            .with_protocol_versions(&versions)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Resolver(self)));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Selects the current certificate for each handshake.
#[derive(Debug)]
struct Resolver(Arc<ServerCertificate>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.current.read().key))
    }
}

/// Content of both files.
struct Files {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl Files {
    fn read(certificate_file: &Path, key_file: &Path) -> Result<Self, Invalid> {
        Ok(Self { certificate: read(certificate_file)?, key: Zeroizing::new(read(key_file)?) })
    }

    fn fingerprint(&self) -> Fingerprint {
        let mut context = digest::Context::new(&digest::SHA256);
        // The length separates the two.
        context.update(&self.certificate.len().to_be_bytes());
        context.update(&self.certificate);
        context.update(&self.key);
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(context.finish().as_ref());
        fingerprint
    }

    fn parse(&self, certificate_file: &Path, key_file: &Path) -> Result<Current, Invalid> {
        let of = |file: &Path, what: &str| Invalid::new(format!("{}: {what}", file.display()));
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.map_err(|_| of(certificate_file, "must be a PEM certificate chain"))?;
        let own = chain.first().ok_or_else(|| of(certificate_file, "contains no certificate"))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(own)
            .map_err(|_| of(certificate_file, "the first certificate is malformed"))?;
        let not_after = DateTime::from_timestamp(parsed.validity().not_after.timestamp(), 0)
            .ok_or_else(|| of(certificate_file, "the first certificate has no valid expiry"))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| of(key_file, "must be an unencrypted PEM private key"))?;
        let key = CertifiedKey::from_der(chain, key, &default_provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                of(key_file, &format!("does not belong to the certificate in {}", certificate_file.display()))
            }
            _ => of(key_file, "the private key is not supported"),
        })?;
        Ok(Current { key: Arc::new(key), not_after })
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Invalid> {
    let refused = |what: &dyn fmt::Display| Invalid::new(format!("{}: {what}", file.display()));
    let length = fs::metadata(file).map_err(|error| refused(&error))?.len();
    if length > FILE_MAX_BYTES {
        return Err(refused(&"must not be longer than 1 MiB"));
    }
    fs::read(file).map_err(|error| refused(&error))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("regcred-certificate-{}", uuid::Uuid::now_v7()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, text).unwrap();
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn pair(year: i32) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["regcred.example".to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn valid_pair_is_reloaded_and_invalid_pair_is_ignored() {
        let folder = Folder::new();
        let ((old_certificate, old_key), (new_certificate, new_key)) = (pair(2040), pair(2050));
        let (certificate_file, key_file) =
            (folder.write("tls.crt", &old_certificate), folder.write("tls.key", &old_key));
        let certificate = ServerCertificate::load(certificate_file, key_file).unwrap();
        let year = || certificate.not_after().format("%Y").to_string();
        assert_eq!((certificate.reload(), year().as_str()), (Ok(false), "2040"));

        // One file of the new pair is not a valid pair. It is reported once.
        folder.write("tls.crt", &new_certificate);
        assert!(certificate.reload().unwrap_err().to_string().contains("tls.key: does not belong to"));
        assert_eq!((certificate.reload(), year().as_str()), (Ok(false), "2040"));

        folder.write("tls.key", &new_key);
        assert_eq!((certificate.reload(), year().as_str()), (Ok(true), "2050"));

        folder.write("tls.crt", "nothing");
        assert!(certificate.reload().is_err());
        assert_eq!(year(), "2050");
    }

    #[test]
    fn invalid_pair_is_reported_by_file_without_key_material() {
        let folder = Folder::new();
        let ((certificate, key), (_, other_key)) = (pair(2040), pair(2040));
        let certificate_file = folder.write("tls.crt", &certificate);
        let cut = key.replace("END PRIVATE", "END NOTHING");
        for (name, text) in
            [("other.key", other_key.as_str()), ("cut.key", &cut), ("empty.key", ""), ("a.key", &certificate)]
        {
            let key_file = folder.write(name, text);
            let refused = ServerCertificate::load(certificate_file.clone(), key_file).unwrap_err().to_string();
            assert!(refused.contains(name), "{refused}");
            assert!(!key.lines().any(|line| line.len() > 20 && refused.contains(line)), "{refused}");
        }
        for (name, text) in [("empty.crt", ""), ("key.crt", key.as_str())] {
            let refused = ServerCertificate::load(folder.write(name, text), folder.write("good.key", &key));
            assert!(refused.unwrap_err().to_string().contains(name));
        }
        assert!(ServerCertificate::load(folder.0.join("none"), folder.0.join("good.key")).is_err());
    }
}
