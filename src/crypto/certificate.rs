//! The certificate that regcred's own listener shows, and its key: from two files that are looked at again while it serves.

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

/// The longest file that is taken for a certificate chain or a key.
const FILE_MAX_BYTES: u64 = 1024 * 1024;

/// A pair of files, and what was in them when they last made a good pair.
pub struct ServerCertificate {
    certificate_file: PathBuf,
    key_file: PathBuf,
    served: RwLock<Served>,
    /// What was read last, good or not, so that each bad pair is reported once.
    seen: Mutex<Fingerprint>,
}

#[derive(Clone)]
struct Served {
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
    /// Reads a chain in PEM, the server's own certificate first, and its private key.
    ///
    /// # Errors
    ///
    /// [`Invalid`] says which file is at fault and why, and shows nothing of the key.
    pub fn load(certificate_file: PathBuf, key_file: PathBuf) -> Result<Self, Invalid> {
        let files = Files::read(&certificate_file, &key_file)?;
        let served = RwLock::new(files.parse(&certificate_file, &key_file)?);
        Ok(Self { certificate_file, key_file, served, seen: Mutex::new(files.fingerprint()) })
    }

    /// Looks at the files again. Whether there is another pair now; a pair that is not good leaves the old one in use.
    ///
    /// # Errors
    ///
    /// [`Invalid`] the first time that this pair is found to be bad; and whenever a file cannot be read.
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
        let served = files.parse(&self.certificate_file, &self.key_file)?;
        *self.served.write() = served;
        Ok(true)
    }

    /// When the certificate that is shown now ends.
    #[must_use]
    pub fn not_after(&self) -> DateTime<Utc> {
        self.served.read().not_after
    }

    /// How TLS is spoken: 1.2 or 1.3, HTTP/1.1, without client certificates.
    ///
    /// # Errors
    ///
    /// What rustls says if it does not know the versions of TLS.
    pub fn server_config(self: Arc<Self>) -> Result<ServerConfig, rustls::Error> {
        let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let mut config =
            builder.with_protocol_versions(&versions)?.with_no_client_auth().with_cert_resolver(Arc::new(Shown(self)));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Hands each handshake the pair of the moment.
#[derive(Debug)]
struct Shown(Arc<ServerCertificate>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.served.read().key))
    }
}

/// What is in the two files.
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
        // The length parts the two.
        context.update(&self.certificate.len().to_be_bytes());
        context.update(&self.certificate);
        context.update(&self.key);
        let mut fingerprint = Fingerprint::default();
        fingerprint.copy_from_slice(context.finish().as_ref());
        fingerprint
    }

    fn parse(&self, certificate_file: &Path, key_file: &Path) -> Result<Served, Invalid> {
        let of = |file: &Path, what: &str| Invalid::new(format!("{}: {what}", file.display()));
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.map_err(|_| of(certificate_file, "this is not a chain of certificates in PEM"))?;
        let own = chain.first().ok_or_else(|| of(certificate_file, "there is no certificate in it"))?;
        let (_, parsed) = x509_parser::parse_x509_certificate(own)
            .map_err(|_| of(certificate_file, "its first certificate cannot be read"))?;
        let not_after = DateTime::from_timestamp(parsed.validity().not_after.timestamp(), 0)
            .ok_or_else(|| of(certificate_file, "its first certificate ends at no time"))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| of(key_file, "this is not a private key in PEM without a passphrase"))?;
        let key = CertifiedKey::from_der(chain, key, &default_provider()).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                of(key_file, &format!("this is not the key of the certificate in {}", certificate_file.display()))
            }
            _ => of(key_file, "this key cannot be used"),
        })?;
        Ok(Served { key: Arc::new(key), not_after })
    }
}

fn read(file: &Path) -> Result<Vec<u8>, Invalid> {
    let refused = |what: &dyn fmt::Display| Invalid::new(format!("{}: {what}", file.display()));
    let length = fs::metadata(file).map_err(|error| refused(&error))?.len();
    if length > FILE_MAX_BYTES {
        return Err(refused(&"this is longer than 1 MiB"));
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
    fn another_pair_is_taken_and_a_bad_one_is_not() {
        let folder = Folder::new();
        let ((old_certificate, old_key), (new_certificate, new_key)) = (pair(2040), pair(2050));
        let (certificate_file, key_file) =
            (folder.write("tls.crt", &old_certificate), folder.write("tls.key", &old_key));
        let certificate = ServerCertificate::load(certificate_file, key_file).unwrap();
        let year = || certificate.not_after().format("%Y").to_string();
        assert_eq!((certificate.reload(), year().as_str()), (Ok(false), "2040"));

        // One file of the new pair alone is no pair; it is said once.
        folder.write("tls.crt", &new_certificate);
        assert!(certificate.reload().unwrap_err().to_string().contains("tls.key: this is not the key of"));
        assert_eq!((certificate.reload(), year().as_str()), (Ok(false), "2040"));

        folder.write("tls.key", &new_key);
        assert_eq!((certificate.reload(), year().as_str()), (Ok(true), "2050"));

        folder.write("tls.crt", "nothing");
        assert!(certificate.reload().is_err());
        assert_eq!(year(), "2050");
    }

    #[test]
    fn a_bad_pair_is_refused_by_file_and_shows_no_key() {
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
