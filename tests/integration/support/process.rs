//! The real binary, in processes of its own.

use std::{
    io::Read,
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use regcred::crypto::sealer::generate_ring_line;
use secrecy::ExposeSecret;
use serde_json::Value;

use super::{client::Client, eventually, files::TempDir};

/// What all processes of one regcred share: a database, master keys, a pepper, and further variables.
pub struct Installation {
    folder: TempDir,
    variables: Vec<(String, String)>,
}

impl Installation {
    /// Makes the secrets, as files, for a database that need not be there yet.
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
            .with("REGCRED_HTTP_WORKERS", "2")
            .with("REGCRED_DATABASE_MAX_CONNECTIONS", "8")
            .with("REGCRED_LOG_FORMAT", "json")
    }

    fn file(&mut self, variable: &str, content: &str) {
        let path = self.folder.write(variable, content);
        self.variables.push((variable.to_owned(), path.display().to_string()));
    }

    /// Sets a variable; an empty value takes one away.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.retain(|(other, _)| other != name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The value of a variable.
    pub fn variable(&self, name: &str) -> String {
        let (_, value) = self.variables.iter().find(|(other, _)| other == name).expect("the variable is set");
        value.clone()
    }

    /// Starts `regcred` with these arguments.
    pub fn spawn(&self, arguments: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_regcred"));
        command.args(arguments).env_clear().envs(self.variables.iter().map(|(name, value)| (name, value)));
        Process::start(command)
    }

    /// Runs `regcred` with these arguments to its end.
    pub async fn run(&self, arguments: &[&str]) -> Exit {
        self.spawn(arguments).wait().await
    }

    /// Runs `regcred` with these arguments, which must do; what it printed.
    pub async fn must_run(&self, arguments: &[&str]) -> String {
        let exit = self.run(arguments).await;
        assert_eq!(exit.code, Some(0), "regcred {arguments:?}: {exit:?}");
        exit.stdout
    }

    /// Starts the service, migrates its database first, and waits until it serves.
    pub async fn serve(&self) -> Service {
        let process = self.spawn(&["serve", "--migrate"]);
        Service::of(process).await
    }

    /// Makes an API key.
    pub async fn new_key(&self, name: &str) -> String {
        self.must_run(&["api-key", "create", "--name", name]).await.trim().to_owned()
    }
}

/// A process that serves. It is killed when it is dropped.
pub struct Service {
    pub process: Process,
    pub address: SocketAddr,
}

impl Service {
    /// Waits until the process serves, or works.
    pub async fn of(mut process: Process) -> Self {
        let address = eventually("it serves", async || {
            if let Some(status) = process.ended() {
                panic!("it ended ({status}) before it served: {}", process.stderr());
            }
            let stderr = process.stderr();
            let mut lines = stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
            let serving = lines.find(|line| line["message"] == "serving" || line["message"] == "working")?;
            serving["address"].as_str()?.parse().ok()
        });
        let address = address.await;
        Self { process, address }
    }

    pub fn client(&self, key: &str) -> Client {
        Client::new(format!("http://{}", self.address), Some(key))
    }

    pub fn anonymous(&self) -> Client {
        Client::new(format!("http://{}", self.address), None)
    }
}

/// A running process and what it has written so far. It is killed when it is dropped.
pub struct Process {
    child: Child,
    stdout: Stream,
    stderr: Stream,
}

/// How a process ended and what it wrote.
#[derive(Debug)]
pub struct Exit {
    /// None if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let stdout = Stream::follow(child.stdout.take().expect("a pipe"));
        let stderr = Stream::follow(child.stderr.take().expect("a pipe"));
        Self { child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, &self.id().to_string()]).status();
        assert!(sent.expect("a shell").success(), "the process is gone");
    }

    /// Waits for its end.
    pub async fn wait(mut self) -> Exit {
        let status = eventually("it ends", async || self.ended()).await;
        Exit { code: status.code(), stdout: self.stdout.finish(), stderr: self.stderr.finish() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What comes out of a pipe, gathered as it comes.
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
                gathered.lock().expect("the text").extend_from_slice(&chunk[..count]);
            }
        });
        Self { bytes, reader: Some(reader) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("the text")).into_owned()
    }

    /// The whole text of a process that has ended.
    fn finish(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("read to the end");
        }
        self.text()
    }
}
