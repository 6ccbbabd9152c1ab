//! Whether a consumer reads back the credential that was written.

use secrecy::ExposeSecret;

use super::{Credential, Profile, RenderError};

/// Refuses a credential that the consumer would split, trim or drop.
///
/// - Every consumer splits `auth` at the first colon, so a user name cannot contain one.
/// - An empty user fails the complete file in the docker CLI (`cli/config/configfile/file.go`,
///   `decodeAuth`). podman ignores an entry without user or password
///   (`pkg/docker/config/config.go`, `getCredentialsWithHomeDir`).
/// - The docker CLI and podman strip NUL from both ends of a password
///   (`strings.Trim(password, "\x00")`). The kubelet does not.
pub(super) fn check(profile: Profile, credential: &Credential<'_>) -> Result<(), RenderError> {
    let password = credential.password.expose_secret();
    let detail = if credential.username.is_empty() {
        "has no username: no consumer can log in with it"
    } else if credential.username.contains(':') {
        "has a colon in its username: every consumer reads the text after the first colon as the password"
    } else if password.is_empty() {
        "has no password: podman ignores such an entry, and no consumer can log in with it"
    } else if trims_nul(profile) && (password.starts_with('\0') || password.ends_with('\0')) {
        "has a password that starts or ends with a NUL character, which this consumer strips: change the password"
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
