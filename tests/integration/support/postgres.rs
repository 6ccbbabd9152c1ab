//! A Postgres server for one test, which the test can stop and start without affecting others.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
    process::{Command, Stdio},
};

use regcred::storage::schema;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool, postgres::PgConnectOptions};
use url::Url;

use super::{eventually, files::TempDir, given, process::Process};

/// Password in the URL. This server does not check it.
pub const PASSWORD: &str = "canary-of-the-database";

/// Returns a URL of this database for the service role, which owns nothing and has only the grants
/// of `regcred migrate --grant-to`.
///
/// The role exists only on the server of `dev/with-services`. Other servers keep their own login.
pub async fn service_url(pool: &PgPool) -> String {
    let options = pool.connect_options();
    let service: PgConnectOptions = given("REGCRED_TEST_PG_SERVICE_URL").parse().expect("a URL");
    if options.get_port() != service.get_port() {
        return options.to_url_lossy().to_string();
    }
    schema::grant(&pool.clone().into(), service.get_username()).await.expect("granted");
    with_login_of(&options, &given("REGCRED_TEST_PG_SERVICE_URL"))
}

/// Connects to this database as superuser.
pub async fn superuser(pool: &PgPool) -> PgConnection {
    let url = format!("postgres://postgres:{}@localhost", given("REGCRED_TEST_PG_SUPERUSER_PASSWORD"));
    PgConnection::connect(&with_login_of(&pool.connect_options(), &url)).await.expect("a superuser")
}

fn with_login_of(options: &PgConnectOptions, login: &str) -> String {
    let (mut url, login) = (options.to_url_lossy(), Url::parse(login).expect("a URL"));
    url.set_username(login.username()).expect("a user");
    url.set_password(login.password()).expect("a password");
    url.to_string()
}

/// A Postgres server for one test. Killed when dropped.
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    data: PathBuf,
    // Last field: removed after the server has ended.
    _folder: TempDir,
}

impl Postgres {
    /// Creates the data directory without starting the server.
    pub fn prepare() -> Self {
        let folder = TempDir::new();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("set");
        let data = folder.path().join("data");
        fs::create_dir(&data).expect("a folder");
        if let Some(user) = user() {
            let id = |option: &str| text_of(Command::new("id").args([option, &user])).parse().expect("a number");
            chown(&data, Some(id("-u")), Some(id("-g"))).expect("given away");
        }
        let data_path = data.to_str().expect("UTF-8");
        let options = ["-D", data_path, "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"];
        text_of(command("initdb").args(options));
        Self { process: None, port: free_port(), data, _folder: folder }
    }

    /// Starts the server and waits until it accepts connections.
    pub async fn start(&mut self) {
        for _ in 0..5 {
            let mut server = command("postgres");
            server.arg("-D").arg(&self.data).args(["-p", &self.port.to_string()]);
            for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"] {
                server.args(["-c", setting]);
            }
            let mut process = Process::start(server);
            let is_up = eventually("Postgres accepts connections", async || {
                if process.ended().is_some() {
                    return Some(false);
                }
                let conn = PgConnection::connect(&self.url()).await.ok()?;
                conn.close().await.ok().map(|()| true)
            });
            if is_up.await {
                self.process = Some(process);
                return;
            }
            // Another process may have taken the port.
            assert!(process.stderr().contains("in use"), "{}", process.stderr());
            self.port = free_port();
        }
        panic!("no free port");
    }

    /// Stops the server at once without notice to clients, like `pg_ctl stop -m immediate`.
    pub async fn stop(&mut self) {
        let process = self.process.take().expect("the server runs");
        process.signal("QUIT");
        process.wait().await;
    }

    /// Suspends the server with its connections open until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.signal_all("STOP");
    }

    pub fn thaw(&self) {
        self.signal_all("CONT");
    }

    fn signal_all(&self, signal: &str) {
        let Some(process) = &self.process else { return };
        // The server first, so that it forks no more children.
        process.signal(signal);
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", process.id())).expect("Linux");
        for child in children.split_whitespace() {
            // The child may have ended meanwhile.
            let _ =
                Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, child]).stderr(Stdio::null()).status();
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres:{PASSWORD}@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A suspended child would not notice that the server has ended.
        if self.process.as_mut().is_some_and(|process| process.ended().is_none()) {
            self.thaw();
        }
    }
}

/// User that runs Postgres, which refuses to run as root.
fn user() -> Option<String> {
    Some(given("REGCRED_TEST_PG_USER")).filter(|user| !user.is_empty())
}

/// Command for one of the Postgres programs.
fn command(program: &str) -> Command {
    let program = PathBuf::from(given("REGCRED_TEST_PG_BIN")).join(program);
    let mut command = Command::new("setpriv");
    if let Some(user) = user() {
        let group = text_of(Command::new("id").args(["-g", &user]));
        command.args(["--reuid", &user, "--regid", &group, "--init-groups"]);
    }
    // Ends with the test process, even if that crashes.
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).env("LC_ALL", "C").current_dir("/");
    command
}

fn text_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

/// Finds a port below the ephemeral range, so that no outgoing connection takes it.
fn free_port() -> u16 {
    let random = || {
        let mut bytes = [0; 2];
        aws_lc_rs::rand::fill(&mut bytes).expect("random bytes");
        20_000 + u16::from_be_bytes(bytes) % 12_000
    };
    std::iter::repeat_with(random).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}
