//! Processes of the compiled binary.

use std::{
    ffi::OsStr,
    io::Read,
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
};

use parking_lot::Mutex;
use regcred::crypto::sealer::generate_ring_line;
use secrecy::ExposeSecret;
use serde_json::Value;

use super::{client::Client, eventually, files::TempDir};

/// Configuration that all processes of an installation share: database, master keys, pepper and
/// further variables.
pub struct Installation {
    folder: TempDir,
    variables: Vec<(String, String)>,
}

impl Installation {
    /// Generates the secrets as files. The database need not exist yet.
    pub fn new(database_url: &str) -> Self {
        let folder = TempDir::new();
        let mut installation = Self { folder, variables: Vec::new() };
        let [ring, pepper] = [(); 2].map(|()| generate_ring_line().expect("random bytes"));
        let (_, pepper) = pepper.expose_secret().split_once(':').expect("32 bytes in base64");
        installation.file("REGCRED_DATABASE_URL_FILE", database_url);
        installation.file("REGCRED_MASTER_KEYS_FILE", ring.expose_secret());
        installation.file("REGCRED_API_KEY_PEPPER_FILE", pepper);
        installation
            .with("REGCRED_HTTP_LISTEN", "127.0.0.1:0")
            .with("REGCRED_OPERATIONS_LISTEN", "127.0.0.1:0")
            .with("REGCRED_HTTP_WORKERS", "2")
            .with("REGCRED_DATABASE_MAX_CONNECTIONS", "8")
            .with("REGCRED_LOG_FORMAT", "json")
    }

    fn file(&mut self, variable: &str, content: &str) {
        let path = self.folder.write(variable, content);
        self.variables.push((variable.to_owned(), path.display().to_string()));
    }

    /// Sets a variable; an empty value unsets it.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.retain(|(other, _)| other != name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Returns the value of a variable.
    pub fn variable(&self, name: &str) -> String {
        let (_, value) = self.variables.iter().find(|(other, _)| other == name).expect("variable is set");
        value.clone()
    }

    /// Starts `regcred` with arguments.
    pub fn spawn(&self, arguments: &[&str]) -> Process {
        self.spawn_program(env!("CARGO_BIN_EXE_regcred"), arguments)
    }

    /// Starts another program with the same variables.
    pub fn spawn_program(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Process {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
        Process::start(command)
    }

    /// Runs `regcred` until it exits.
    pub async fn run(&self, arguments: &[&str]) -> Exit {
        self.spawn(arguments).wait().await
    }

    /// Runs `regcred`, which must succeed, and returns its output.
    pub async fn must_run(&self, arguments: &[&str]) -> String {
        let exit = self.run(arguments).await;
        assert_eq!(exit.code, Some(0), "regcred {arguments:?}: {exit:?}");
        exit.stdout
    }

    /// Migrates the database, starts the service and waits until it serves.
    pub async fn serve(&self) -> Service {
        let process = self.spawn(&["serve", "--migrate"]);
        Service::of(process).await
    }

    /// Creates an API key.
    pub async fn new_key(&self, name: &str) -> String {
        self.must_run(&["api-key", "create", "--name", name, "--role", "admin"]).await.trim().to_owned()
    }
}

/// Running service. Dropping it kills the process.
pub struct Service {
    pub process: Process,
    pub address: SocketAddr,
    operations: Option<SocketAddr>,
}

impl Service {
    /// Waits until the server or worker has started.
    pub async fn of(mut process: Process) -> Self {
        let addresses = eventually("service started", async || {
            if let Some(status) = process.ended() {
                panic!("exited ({status}) during startup: {}", process.stderr());
            }
            let stderr = process.stderr();
            let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let started =
                lines.find(|line| line["message"] == "server started" || line["message"] == "worker started")?;
            let address = |field: &str| started[field].as_str()?.parse().ok();
            Some((address("address")?, address("operations_address")))
        });
        let (address, operations) = addresses.await;
        Self { process, address, operations }
    }

    pub fn client(&self, key: &str) -> Client {
        Client::new(format!("http://{}", self.address), Some(key))
    }

    pub fn anonymous(&self) -> Client {
        Client::new(format!("http://{}", self.address), None)
    }

    /// Client of the operations listener.
    pub fn operations(&self) -> Client {
        Client::new(format!("http://{}", self.operations.expect("the listener is on")), None)
    }
}

/// Running process with its output so far. Dropping it kills the process.
pub struct Process {
    child: Child,
    stdout: Stream,
    stderr: Stream,
}

/// Exit code and output of a process.
#[derive(Debug)]
pub struct Exit {
    /// `None` if a signal ended the process.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Stream::follow(child.stdout.take().expect("pipe"));
        let stderr = Stream::follow(child.stderr.take().expect("pipe"));
        Self { child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Returns the standard error output so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Returns the exit status if the process has exited.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("child")
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &self.id().to_string()]).status();
        assert!(sent.expect("shell").success(), "process exited");
    }

    /// Waits until the process exits.
    pub async fn wait(mut self) -> Exit {
        let status = eventually("process exits", async || self.ended()).await;
        Exit { code: status.code(), stdout: self.stdout.finish(), stderr: self.stderr.finish() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if it has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Collected output of a pipe.
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    fn follow(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let gathered = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut chunk = [0; 8192];
            while let Ok(count @ 1..) = pipe.read(&mut chunk) {
                gathered.lock().extend_from_slice(&chunk[..count]);
            }
        });
        Self { bytes, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock()).into_owned()
    }

    /// Returns the complete output of an exited process.
    fn finish(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("pipe read to its end");
        }
        self.text()
    }
}
