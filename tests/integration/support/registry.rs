//! The two registries of `dev/with-services`, which refuse whoever has no password, and skopeo to read from them.

use std::process::Command;

use super::{files::TempDir, given};

/// One of the registries and who may read from it.
pub struct Registry {
    /// `host:port`.
    pub address: String,
    pub username: String,
    pub password: String,
}

/// The first registry.
pub fn a() -> Registry {
    registry("REGCRED_TEST_REGISTRY_A", "REGCRED_TEST_REGISTRY_PASSWORD_A")
}

/// The second one: the same user, another password.
pub fn b() -> Registry {
    registry("REGCRED_TEST_REGISTRY_B", "REGCRED_TEST_REGISTRY_PASSWORD_B")
}

fn registry(address: &str, password: &str) -> Registry {
    let username = given("REGCRED_TEST_REGISTRY_USER");
    Registry { address: given(address), username, password: given(password) }
}

impl Registry {
    /// Reads the image that is in every registry, as a pod's node would, with this docker config and nothing else; what
    /// skopeo says where it is refused.
    pub fn read_image(&self, docker_config: &str) -> Result<(), String> {
        let folder = TempDir::new();
        let authfile = folder.write("auth.json", docker_config);
        let image = given("REGCRED_TEST_REGISTRY_IMAGE");
        let output = Command::new("skopeo")
            .args(["inspect", "--tls-verify=false", "--authfile"])
            .arg(authfile)
            .arg(format!("docker://{}/{image}", self.address))
            .env("HOME", folder.path())
            .output()
            .expect("skopeo is on PATH");
        if output.status.success() {
            let inspected: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
            assert!(inspected["Digest"].is_string(), "{inspected}");
            return Ok(());
        }
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Asserts that the registry refuses whoever has no more than this docker config.
    #[track_caller]
    pub fn assert_refuses(&self, docker_config: &str) {
        let refused = self.read_image(docker_config).expect_err("the registry must not give the image");
        // What both libraries that skopeo was built with say to a 401; any other failure would prove nothing.
        let is_refusal = ["unauthorized", "authentication required", "no basic auth"];
        assert!(is_refusal.iter().any(|words| refused.to_lowercase().contains(words)), "{refused}");
    }
}
