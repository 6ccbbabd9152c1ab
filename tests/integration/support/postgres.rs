//! A Postgres of one test, which can be stopped and started without disturbing the others.

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

/// The password in the URL; Postgres itself asks for none here.
pub const PASSWORD: &str = "canary-of-the-database";

/// A URL of this database for the role that a service runs as: it owns nothing, and has what `regcred migrate --grant-to`
/// gives it. A database on another server than that of `dev/with-services` has no such role, and keeps its own.
pub async fn service_url(pool: &PgPool) -> String {
    let options = pool.connect_options();
    let service: PgConnectOptions = given("REGCRED_TEST_PG_SERVICE_URL").parse().expect("a URL");
    if options.get_port() != service.get_port() {
        return options.to_url_lossy().to_string();
    }
    schema::grant(pool, service.get_username()).await.expect("granted");
    with_login_of(&options, &given("REGCRED_TEST_PG_SERVICE_URL"))
}

/// A connection to this database that may do everything.
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

/// A Postgres of one test. It is killed when it is dropped.
pub struct Postgres {
    process: Option<Process>,
    port: u16,
    data: PathBuf,
    // Last, so that it is removed after the server has ended.
    _folder: TempDir,
}

impl Postgres {
    /// Makes the files of a server without starting it.
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

    /// Starts the server and waits until it answers.
    pub async fn start(&mut self) {
        for _ in 0..5 {
            let mut server = command("postgres");
            server.arg("-D").arg(&self.data).args(["-p", &self.port.to_string()]);
            for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"] {
                server.args(["-c", setting]);
            }
            let mut process = Process::start(server);
            let is_up = eventually("Postgres answers", async || {
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
            // Somebody else may have been faster to take the port.
            assert!(process.stderr().contains("in use"), "{}", process.stderr());
            self.port = free_port();
        }
        panic!("no free port");
    }

    /// Stops it at once, without a word to its clients, as `pg_ctl stop -m immediate` does.
    pub async fn stop(&mut self) {
        let process = self.process.take().expect("it runs");
        process.signal("QUIT");
        process.wait().await;
    }

    /// Stands still, with all its connections open, until [`thaw`](Self::thaw).
    pub fn freeze(&self) {
        self.signal_all("STOP");
    }

    pub fn thaw(&self) {
        self.signal_all("CONT");
    }

    fn signal_all(&self, signal: &str) {
        let Some(process) = &self.process else { return };
        // The server first, so that it makes no more children.
        process.signal(signal);
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", process.id())).expect("Linux");
        for child in children.split_whitespace() {
            // It may have ended meanwhile.
            let _ =
                Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", signal, child]).stderr(Stdio::null()).status();
        }
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres:{PASSWORD}@127.0.0.1:{}/postgres", self.port)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // What stands still would not notice that the server has gone.
        if self.process.as_mut().is_some_and(|process| process.ended().is_none()) {
            self.thaw();
        }
    }
}

/// The user to run Postgres as, which refuses to be root.
fn user() -> Option<String> {
    Some(given("REGCRED_TEST_PG_USER")).filter(|user| !user.is_empty())
}

/// One of Postgres' programs.
fn command(program: &str) -> Command {
    let program = PathBuf::from(given("REGCRED_TEST_PG_BIN")).join(program);
    let mut command = Command::new("setpriv");
    if let Some(user) = user() {
        let group = text_of(Command::new("id").args(["-g", &user]));
        command.args(["--reuid", &user, "--regid", &group, "--init-groups"]);
    }
    // It ends with the test, however that ends.
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).env("LC_ALL", "C").current_dir("/");
    command
}

fn text_of(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
}

/// A port below the range from which outgoing connections take theirs, so that it stays free while nobody listens there.
fn free_port() -> u16 {
    let random = || {
        let mut bytes = [0; 2];
        aws_lc_rs::rand::fill(&mut bytes).expect("random bytes");
        20_000 + u16::from_be_bytes(bytes) % 12_000
    };
    std::iter::repeat_with(random).find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a free port")
}
