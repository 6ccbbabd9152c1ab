//! JSON of each profile.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use secrecy::{ExposeSecret, SecretString};
use serde::{Serialize, Serializer};
use zeroize::Zeroizing;

use super::{Credential, Profile, RenderError, zeroizing::ZeroizingBuffer};

/// Writes the entries, sorted by key, as compact JSON.
///
/// - The kubelet reads `username`, `password`, `email` and `auth`
///   (`pkg/credentialprovider/config.go`). `kubectl create secret docker-registry` writes these
///   four in this order (`pkg/cmd/create/create_secret_docker.go`).
/// - The docker CLI writes and prefers `auth` (`cli/config/configfile/file.go`). In
///   `DOCKER_AUTH_CONFIG`, any other field makes it refuse the value (`configEnvAuth`).
/// - podman reads `auth` only (`pkg/docker/config/config.go`, `dockerAuthConfig`).
pub(super) fn write(profile: Profile, entries: &[(&str, &Credential<'_>)]) -> Result<SecretString, RenderError> {
    let mut buffer = ZeroizingBuffer::with_capacity(16 + entries.iter().map(expected_len).sum::<usize>());
    let mut json = serde_json::Serializer::new(&mut buffer);
    let written = match profile {
        Profile::Kubernetes => {
            let auths = Entries(entries, FullEntry::from);
            Document { auths }.serialize(&mut json)
        }
        Profile::Dockercfg => Entries(entries, FullEntry::from).serialize(&mut json),
        Profile::Docker | Profile::DockerAuthConfig | Profile::Podman => {
            let auths = Entries(entries, AuthEntry::from);
            Document { auths }.serialize(&mut json)
        }
    };
    match (written, buffer.to_secret()) {
        (Ok(()), Some(document)) => Ok(document),
        // Unreachable: strings serialized into memory.
        _ => Err(RenderError::Unsupported {
            accounts: Vec::new(),
            detail: "the document could not be written".to_owned(),
        }),
    }
}

/// Estimated length of an entry without escapes.
fn expected_len((key, credential): &(&str, &Credential<'_>)) -> usize {
    let secret = credential.username.len() + 1 + credential.password.expose_secret().len();
    64 + key.len() + secret + secret.div_ceil(3) * 4 + credential.email.map_or(0, str::len)
}

/// Document of every profile but the legacy `.dockercfg`, which is the bare map.
#[derive(Serialize)]
struct Document<T> {
    auths: T,
}

/// Map from key to entry. The function builds the entry.
struct Entries<'a, F>(&'a [(&'a str, &'a Credential<'a>)], F);

impl<'a, F, T> Serialize for Entries<'a, F>
where
    F: Fn(&'a Credential<'a>) -> T,
    T: Serialize,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(entries, form) = self;
        serializer.collect_map(entries.iter().map(|(key, credential)| (key, form(credential))))
    }
}

/// Entry as `kubectl` writes it.
#[derive(Serialize)]
struct FullEntry<'a> {
    username: &'a str,
    password: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    email: Option<&'a str>,
    auth: Auth<'a>,
}

impl<'a> From<&'a Credential<'a>> for FullEntry<'a> {
    fn from(credential: &'a Credential<'a>) -> Self {
        Self {
            username: credential.username,
            password: credential.password.expose_secret(),
            email: credential.email.filter(|email| !email.is_empty()),
            auth: Auth(credential),
        }
    }
}

/// Entry as `docker login` and `podman login` write it.
#[derive(Serialize)]
struct AuthEntry<'a> {
    auth: Auth<'a>,
}

impl<'a> From<&'a Credential<'a>> for AuthEntry<'a> {
    fn from(credential: &'a Credential<'a>) -> Self {
        Self { auth: Auth(credential) }
    }
}

/// Padded base64 of `username:password`, which every consumer decodes.
struct Auth<'a>(&'a Credential<'a>);

impl Serialize for Auth<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (username, password) = (self.0.username, self.0.password.expose_secret());
        let mut pair = Zeroizing::new(String::with_capacity(username.len() + 1 + password.len()));
        pair.push_str(username);
        pair.push(':');
        pair.push_str(password);
        serializer.serialize_str(&Zeroizing::new(STANDARD.encode(pair.as_bytes())))
    }
}
