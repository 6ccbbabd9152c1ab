//! The two registries of `dev/with-services`, which require a login, and skopeo as their client.

use std::process::Command;

use super::{files::TempDir, given};

/// A registry with a user that may pull.
pub struct Registry {
    /// `host:port`.
    pub address: String,
    pub username: String,
    pub password: String,
}

/// First registry.
pub fn a() -> Registry {
    registry("REGCRED_TEST_REGISTRY_A", "REGCRED_TEST_REGISTRY_PASSWORD_A")
}

/// Second registry: same user, other password.
pub fn b() -> Registry {
    registry("REGCRED_TEST_REGISTRY_B", "REGCRED_TEST_REGISTRY_PASSWORD_B")
}

fn registry(address: &str, password: &str) -> Registry {
    let username = given("REGCRED_TEST_REGISTRY_USER");
    Registry { address: given(address), username, password: given(password) }
}

impl Registry {
    /// Reads the image that both registries hold, using only this docker config.
    pub fn read_image(&self, docker_config: &str) -> Result<(), String> {
        let image = given("REGCRED_TEST_REGISTRY_IMAGE");
        skopeo_reads(docker_config, &format!("{}/{image}", self.address))
    }

    /// Asserts that the registry refuses a client with only this docker config.
    #[track_caller]
    pub fn assert_refuses(&self, docker_config: &str) {
        assert_refused(self.read_image(docker_config));
    }
}

/// Reads an image with skopeo and this file alone. The error is skopeo's output.
pub fn skopeo_reads(authfile: &str, image: &str) -> Result<(), String> {
    let folder = TempDir::new();
    let mut inspect = skopeo("inspect", &folder, authfile);
    let inspect = inspect.arg("--tls-verify=false").arg(format!("docker://{image}"));
    let output = inspect.output().expect("skopeo is on PATH");
    if output.status.success() {
        let inspected: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(inspected["Digest"].is_string(), "{inspected}");
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

/// A skopeo command that reads this file and no other.
pub fn skopeo(command: &str, folder: &TempDir, authfile: &str) -> Command {
    let authfile = folder.write("auth.json", authfile);
    let mut skopeo = Command::new("skopeo");
    skopeo.args([command, "--authfile"]).arg(authfile).env("HOME", folder.path());
    skopeo
}

/// Asserts that a registry answered 401. Other failures prove nothing.
#[track_caller]
pub fn assert_refused(read: Result<(), String>) {
    let refused = read.expect_err("the registry must not give the image");
    // Messages for 401 of the docker CLI and of both libraries that skopeo is built with.
    let is_refusal = ["unauthorized", "authentication required", "no basic auth"];
    assert!(is_refusal.iter().any(|text| refused.to_lowercase().contains(text)), "{refused}");
}
