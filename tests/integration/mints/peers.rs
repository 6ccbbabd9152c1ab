//! Programs of others: AWS emulators, an OAuth 2.0 server and the vendors' own clients. Their versions
//! are pinned in `dev`, and installed once.

use std::{
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::Value;
use tokio::net::TcpStream;

use crate::support::{eventually, process::Process};

/// A running server, which ends with the test.
pub struct Peer {
    pub url: String,
    _process: Process,
}

impl Peer {
    /// Starts a program of a folder. `PORT` in arguments and variables becomes its port.
    pub async fn start(folder: &Path, program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let fill = |text: &str| text.replace("PORT", &port.to_string());
        let mut command = in_folder(folder, program);
        command.args(arguments.iter().map(|argument| fill(argument)));
        command.envs(variables.iter().map(|(name, value)| ((*name).to_owned(), fill(value))));
        let mut process = Process::start(command);
        eventually("the peer listens", async || {
            if let Some(status) = process.ended() {
                panic!("{program} ended ({status}): {}", process.stderr());
            }
            TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await;
        Self { url: format!("http://127.0.0.1:{port}"), _process: process }
    }

    /// AWS emulator that checks signatures, policies and trust policies.
    pub async fn ministack() -> Self {
        Self::ministack_with(&[("AUTH", "true")]).await
    }

    /// The same without these checks, but with an instance metadata service that requires sessions.
    pub async fn ministack_instance() -> Self {
        Self::ministack_with(&[("MINISTACK_IMDS_V2_REQUIRED", "1")]).await
    }

    async fn ministack_with(variables: &[(&str, &str)]) -> Self {
        // Without a worker process, which would outlive a killed parent.
        let arguments = ["-m", "hypercorn", "-w", "0", "-b", "127.0.0.1:PORT", "ministack.app:app"];
        let variables: Vec<(&str, &str)> = [("GATEWAY_PORT", "PORT")].iter().chain(variables).copied().collect();
        Self::start(&python("aws-peers"), "python", &arguments, &variables).await
    }

    /// AWS emulator that checks signatures, and whose logins have expired.
    pub async fn moto() -> Self {
        // The three calls that create the user are not authenticated.
        let variables = [("INITIAL_NO_AUTH_ACTION_COUNT", "3")];
        Self::start(&python("aws-peers"), "moto_server", &["-H", "127.0.0.1", "-p", "PORT"], &variables).await
    }

    /// OAuth 2.0 server.
    pub async fn oauth2_mock_server() -> Self {
        let folder = installed("dev/node-tool", "dev/oauth2-mock-server");
        Self::start(&folder, "oauth2-mock-server", &["-a", "127.0.0.1", "-p", "PORT"], &[]).await
    }
}

/// Runs a script of this folder with an installed Python environment, and returns what it prints.
pub fn run_script(environment: &str, script: &str, arguments: &[&str], input: &Value) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/integration/mints").join(script);
    let mut command = in_folder(&python(environment), "python");
    command.arg(script).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("python");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.to_string().as_bytes()).expect("the script reads");
    drop(stdin);
    let output = child.wait_with_output().expect("the script ends");
    assert!(output.status.success(), "{arguments:?} failed: its errors are above");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Makes calls with the vendors' own clients, all in one process.
pub fn vendor_calls(calls: &Value) -> Vec<Value> {
    let results = run_script("mint-clients", "vendor_clients.py", &[], calls);
    results.as_array().expect("a list").clone()
}

/// Asserts that a vendor's client reported this error.
#[track_caller]
pub fn assert_vendor_refused(result: &Value, code: &str) {
    let error = result["error"].as_str().unwrap_or_else(|| panic!("not refused: {result}"));
    assert!(error.contains(code), "{error}");
}

fn in_folder(folder: &Path, program: &str) -> Command {
    let mut command = Command::new(folder.join(program));
    // Programs of npm packages look node up.
    command.env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default()));
    command
}

fn python(environment: &str) -> PathBuf {
    installed("dev/python-tool", environment)
}

/// Folder with the programs of an installed environment.
fn installed(tool: &str, name: &str) -> PathBuf {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(project.join(tool));
    let output = command.arg(name).stderr(Stdio::inherit()).output().expect("a tool of dev");
    assert!(output.status.success(), "{name} was not installed");
    PathBuf::from(String::from_utf8(output.stdout).expect("a path").trim())
}
