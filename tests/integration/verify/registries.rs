//! Debian's docker-registry: one process for each test, with the same two images.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use regcred::{
    clients::{
        outbound::Guard,
        registry::{Login, RegistryClient, RegistryClientConfig},
    },
    domain::{
        cluster::CaCertificate,
        registry::{RegistryScope, RepositoryName},
        verification::VerificationReport,
    },
};
use secrecy::SecretString;

use super::certificates::ServerCertificate;
use crate::support::{
    eventually,
    files::TempDir,
    given,
    process::{Exit, Process},
    registry,
};

/// Image without a `latest` tag.
pub const TAGGED: &str = "os/alpine";
/// Image with a `latest` tag.
pub const LATEST: &str = "team/app";

/// Registry process of one test.
pub struct TestRegistry {
    pub address: SocketAddr,
    process: Process,
    folder: TempDir,
}

/// Configuration of a registry.
#[derive(Default)]
pub struct Setup<'a> {
    /// `auth: htpasswd` with these users.
    pub users: &'a [(&'a str, &'a str)],
    /// `auth: token`: URL of the token service, and the file with its certificate.
    pub token_service: Option<(String, PathBuf)>,
    pub tls: Option<&'a ServerCertificate>,
}

impl TestRegistry {
    pub async fn start(setup: Setup<'_>) -> Self {
        Self::over(images().await, setup).await
    }

    async fn over(storage: &Path, setup: Setup<'_>) -> Self {
        let folder = TempDir::new();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\nhttp:\n  addr: 127.0.0.1:0\n",
            storage.display()
        );
        if let Some(tls) = setup.tls {
            let (certificate, key) = (folder.write("tls.crt", &tls.certificate), folder.write("tls.key", &tls.key));
            writeln!(config, "  tls: {{certificate: {}, key: {}}}", certificate.display(), key.display())
                .expect("usable");
        }
        if !setup.users.is_empty() {
            let lines: String = setup.users.iter().map(|(user, password)| htpasswd(user, password)).collect();
            let file = folder.write("htpasswd", lines);
            write!(config, "auth:\n  htpasswd: {{realm: sandbox, path: {}}}\n", file.display()).expect("usable");
        }
        if let Some((realm, certificate)) = setup.token_service {
            write!(
                config,
                "auth:\n  token: {{realm: \"{realm}\", service: test-registry, issuer: test-issuer, rootcertbundle: {}}}\n",
                certificate.display()
            )
            .expect("usable");
        }
        let file = folder.write("config.yml", config);
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(file);
        let mut process = Process::start(command);
        let address = eventually("a registry listens", async || {
            if let Some(status) = process.ended() {
                panic!("the registry ended ({status}): {}", process.stderr());
            }
            let log = process.stderr();
            let (_, rest) = log.split_once("listening on ")?;
            rest.split(['"', ',', ' ', '\n']).next()?.parse().ok()
        })
        .await;
        Self { address, process, folder }
    }

    /// File with its users, which it reads again after a change.
    pub fn htpasswd(&self) -> PathBuf {
        self.folder.path().join("htpasswd")
    }

    /// Its log.
    pub fn log(&self) -> String {
        self.process.stderr()
    }
}

/// Line of an htpasswd file.
pub fn htpasswd(user: &str, password: &str) -> String {
    let made = Command::new("htpasswd").args(["-nbB", "-C", "5", user, password]).output().expect("htpasswd");
    String::from_utf8(made.stdout).expect("UTF-8").trim().to_owned() + "\n"
}

/// Directory with the images, filled once per process.
async fn images() -> &'static Path {
    static IMAGES: OnceLock<TempDir> = OnceLock::new();
    static FILLING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _one_at_a_time = FILLING.lock().await;
    if let Some(images) = IMAGES.get() {
        return images.path();
    }
    let folder = TempDir::new();
    let open = TestRegistry::over(folder.path(), Setup::default()).await;
    let (source, image) = (registry::a(), given("REGCRED_TEST_REGISTRY_IMAGE"));
    for target in [format!("{TAGGED}:3"), format!("{LATEST}:latest")] {
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]);
        copy.arg(format!("--src-creds={}:{}", source.username, source.password));
        copy.arg(format!("docker://{}/{image}", source.address)).arg(format!("docker://{}/{target}", open.address));
        let Exit { code, stderr, .. } = Process::start(copy).wait().await;
        assert_eq!(code, Some(0), "{stderr}");
    }
    assert!(fs::read_dir(folder.path()).is_ok_and(|mut entries| entries.next().is_some()));
    IMAGES.get_or_init(|| folder).path()
}

/// Registry client that may call loopback.
pub fn registry_client() -> RegistryClient {
    RegistryClient::new(Guard::new("127.0.0.0/8".parse().expect("usable")), RegistryClientConfig::default())
}

/// Login to verify.
pub struct Attempt {
    pub scope: RegistryScope,
    pub plain_http: bool,
    pub ca: Option<CaCertificate>,
    pub username: String,
    pub password: SecretString,
}

impl Attempt {
    pub fn plain(registry: &(impl ToString + ?Sized), username: &str, password: &str) -> Self {
        Self {
            scope: RegistryScope::parse(&registry.to_string()).expect("a registry"),
            plain_http: true,
            ca: None,
            username: username.to_owned(),
            password: password.into(),
        }
    }

    pub fn tls(registry: &(impl ToString + ?Sized), ca: Option<&str>, username: &str, password: &str) -> Self {
        let ca = ca.map(|pem| CaCertificate::parse(pem).expect("a CA"));
        Self { plain_http: false, ca, ..Self::plain(registry, username, password) }
    }

    pub async fn verify(&self, client: &RegistryClient, repository: Option<&str>) -> VerificationReport {
        let login = Login {
            registry: &self.scope,
            plain_http: self.plain_http,
            ca_certificate: self.ca.as_ref(),
            username: &self.username,
            password: &self.password,
        };
        let repository = repository.map(|name| RepositoryName::parse(name, &self.scope).expect("a repository"));
        client.verify(&login, repository.as_ref()).await
    }
}
