//! A private Postgres, which a scenario stops and starts. Durable, unlike that of the tests.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use sqlx::{Connection, PgConnection};

use crate::load::on_this_thread;

/// Deadline for each wait.
const DEADLINE: Duration = Duration::from_mins(1);

/// A server in a folder of its own. Both are removed on drop.
pub struct Postgres {
    server: Option<Child>,
    port: u16,
    folder: PathBuf,
}

impl Postgres {
    /// Creates a database cluster and starts its server.
    pub fn start_new() -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join(format!("regcred-bench-{}", uuid::Uuid::now_v7()));
        fs::create_dir(&folder)?;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut postgres = Self { server: None, port, folder };
        let data = postgres.data();
        fs::create_dir(&data)?;
        if let Some(user) = user()? {
            chown(&data, Some(id("-u", &user)?), Some(id("-g", &user)?))?;
        }
        let mut create = program("initdb")?;
        create.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]);
        let created = create.output()?;
        ensure!(created.status.success(), "initdb: {}", String::from_utf8_lossy(&created.stderr));
        postgres.start()?;
        Ok(postgres)
    }

    /// Starts the server and waits until it accepts connections. Returns that time.
    pub fn start(&mut self) -> anyhow::Result<Instant> {
        let mut server = program("postgres")?;
        server.arg("-D").arg(self.data()).args(["-p", &self.port.to_string()]);
        for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200"] {
            server.args(["-c", setting]);
        }
        self.server = Some(server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        let begin = Instant::now();
        while self.execute("SELECT 1").is_err() {
            let ended = self.server.as_mut().and_then(|server| server.try_wait().transpose());
            if let Some(status) = ended.transpose()? {
                bail!("Postgres ended with {status}");
            }
            ensure!(begin.elapsed() < DEADLINE, "Postgres does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Instant::now())
    }

    /// Stops the server at once, like `pg_ctl stop -m immediate`.
    pub fn stop_at_once(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server runs")?;
        signal("QUIT", &[server.id()])?;
        server.wait()?;
        Ok(())
    }

    /// Kills all processes of the server, as a loss of power would end them.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server runs")?;
        let pid = server.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let children: Vec<u32> = children.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        // The server first, so that it cannot end its children in order. A child may have ended.
        signal("KILL", &[pid])?;
        let _ = signal("KILL", &children);
        server.wait()?;
        let is_alive = |pid: &u32| fs::exists(format!("/proc/{pid}/fd/0")).unwrap_or(false);
        let begin = Instant::now();
        while children.iter().any(is_alive) {
            ensure!(begin.elapsed() < DEADLINE, "a process of Postgres survives");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Executes statements as superuser.
    pub fn execute(&self, sql: &'static str) -> anyhow::Result<()> {
        on_this_thread(async {
            let mut conn = PgConnection::connect(&self.url()).await?;
            sqlx::raw_sql(sql).execute(&mut conn).await?;
            Ok(conn.close().await?)
        })
    }

    /// Executes a query with one number.
    pub fn number(&self, sql: &'static str) -> anyhow::Result<i64> {
        on_this_thread(async {
            let mut conn = PgConnection::connect(&self.url()).await?;
            Ok(sqlx::query_scalar(sql).fetch_one(&mut conn).await?)
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.server.is_some() {
            let _ = self.stop_at_once();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn signal(signal: &str, pids: &[u32]) -> anyhow::Result<()> {
    let pids = pids.iter().map(ToString::to_string);
    ensure!(Command::new("kill").args(["-s", signal]).args(pids).status()?.success(), "the process is gone");
    Ok(())
}

/// User that runs Postgres, which refuses to run as root.
fn user() -> anyhow::Result<Option<String>> {
    Ok(Some(given("REGCRED_TEST_PG_USER")?).filter(|user| !user.is_empty()))
}

fn id(option: &str, user: &str) -> anyhow::Result<u32> {
    let output = Command::new("id").args([option, user]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Command for one of the Postgres programs, which ends with this process.
fn program(name: &str) -> anyhow::Result<Command> {
    let mut command = Command::new("setpriv");
    if let Some(user) = user()? {
        command.args(["--reuid", &user, "--regid", &id("-g", &user)?.to_string(), "--init-groups"]);
    }
    command.args(["--pdeathsig", "KILL", "--"]).arg(PathBuf::from(given("REGCRED_TEST_PG_BIN")?).join(name));
    command.env("LC_ALL", "C").current_dir("/");
    Ok(command)
}

fn given(variable: &str) -> anyhow::Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run this with dev/with-services"))
}
