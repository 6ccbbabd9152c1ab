//! Whether a reader gets back what was written.

use secrecy::ExposeSecret;

use super::{Credential, Profile, RenderError};

/// Refuses a credential that the reader would split, trim or drop.
///
/// - Every reader splits `auth` at the first colon, so a user cannot have one.
/// - An empty user fails the whole file in the docker CLI (`cli/config/configfile/file.go`, `decodeAuth`); podman takes
///   an entry without user or password for none (`pkg/docker/config/config.go`, `getCredentialsWithHomeDir`).
/// - The docker CLI and podman cut NUL from both ends of a password (`strings.Trim(password, "\x00")`); the kubelet
///   does not.
pub(super) fn check(profile: Profile, credential: &Credential<'_>) -> Result<(), RenderError> {
    let password = credential.password.expose_secret();
    let detail = if credential.username.is_empty() {
        "has no username: no reader can log in with it"
    } else if credential.username.contains(':') {
        "has a colon in its username: every reader takes what follows the first colon for the password"
    } else if password.is_empty() {
        "has no password: podman takes such an entry for none, and no reader can log in with it"
    } else if trims_nul(profile) && (password.starts_with('\0') || password.ends_with('\0')) {
        "has a password that starts or ends with a NUL character, which this reader cuts off: change the password"
    } else {
        return Ok(());
    };
    Err(RenderError::Unsupported {
        accounts: vec![credential.account.to_owned()],
        detail: format!("the account `{}` {detail}", credential.account),
    })
}

fn trims_nul(profile: Profile) -> bool {
    match profile {
        Profile::Docker | Profile::DockerAuthConfig | Profile::Podman => true,
        Profile::Kubernetes | Profile::Dockercfg => false,
    }
}
