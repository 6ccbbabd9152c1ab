//! A database for the run, and regcred processes on it with one account and one API key.

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, anyhow, ensure};
use chrono::Utc;
use regcred::{
    crypto::{api_key, pepper::Pepper},
    domain::caller::{ApiKeyFields, NewApiKey},
    storage::{self, api_keys, pool},
};
use secrecy::{ExposeSecret, SecretString};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

use crate::{
    load,
    process::{Postgres, Server, cores, free_address},
};

/// The executable under test, built by Cargo for this bench.
pub const REGCRED: &str = env!("CARGO_BIN_EXE_regcred");
/// Test key of 32 bytes.
pub const TEST_KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
/// Name of the account.
pub const ACCOUNT: &str = "martin-5000";

/// The database, dropped at the end.
pub struct Sandbox {
    runtime: tokio::runtime::Runtime,
    server: PgConnectOptions,
    name: String,
    url: String,
    /// Postgres server of the database, if it is local.
    pub postgres: Option<Postgres>,
}

impl Sandbox {
    /// Creates the database on the server of `DATABASE_URL`, whose role needs CREATEDB.
    pub fn new() -> anyhow::Result<Self> {
        Self::on(&std::env::var("DATABASE_URL").context("DATABASE_URL is not set: run this with dev/with-services")?)
    }

    /// Creates the database on this server.
    pub fn on(url: &str) -> anyhow::Result<Self> {
        let server = pool::parse_url(&SecretString::from(url))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let name = format!("bench_{}", uuid::Uuid::now_v7().simple());
        let backend = runtime.block_on(async {
            let mut conn = server.connect().await?;
            sqlx::raw_sql(AssertSqlSafe(format!("CREATE DATABASE {name}"))).execute(&mut conn).await?;
            let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut conn).await?;
            anyhow::Ok(pid)
        })?;
        let url = server.clone().database(&name).to_url_lossy().to_string();
        let postgres = u32::try_from(backend).ok().and_then(Postgres::of_backend);
        Ok(Self { runtime, server, name, url, postgres })
    }

    /// Opens a connection to the database on the caller's runtime.
    pub async fn connect(&self) -> anyhow::Result<storage::PgConnection> {
        let options = pool::bounded(pool::parse_url(&SecretString::from(self.url.as_str()))?);
        Ok(options.connect().await?.into())
    }

    /// A regcred command, configured as in production but for its test keys.
    pub fn regcred(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("REGCRED_DATABASE_URL", &self.url)
            .env("REGCRED_MASTER_KEYS", format!("bench:{TEST_KEY}"))
            .env("REGCRED_API_KEY_PEPPER", TEST_KEY)
            .env("REGCRED_LOG_FORMAT", "json");
        command
    }

    /// Migrates the database, creates an API key and returns its text.
    pub fn prepare(&self) -> anyhow::Result<String> {
        self.prepare_with(REGCRED)
    }

    /// The same with another build.
    pub fn prepare_with(&self, program: &str) -> anyhow::Result<String> {
        run(&mut self.regcred(program, &["migrate"]))?;
        let made = run(&mut self.regcred(program, &["api-key", "create", "--name", "bench", "--role", "admin"]))?;
        Ok(made.trim().to_owned())
    }

    /// Starts the service without a rate limit.
    pub fn serve(&self) -> anyhow::Result<Server> {
        self.serve_program(REGCRED)
    }

    /// Starts the service with its default rate limits.
    pub fn serve_limited(&self) -> anyhow::Result<Server> {
        self.start(REGCRED, &["serve"], &[], Stdio::null())
    }

    /// Starts a replica that migrates the database first.
    pub fn serve_migrating(&self) -> anyhow::Result<Server> {
        self.start(REGCRED, &["serve", "--migrate"], &[("REGCRED_HTTP_REQUESTS_PER_SECOND", "0")], Stdio::null())
    }

    /// Starts another build of the service without a rate limit.
    pub fn serve_program(&self, program: &str) -> anyhow::Result<Server> {
        self.start(program, &["serve"], &[("REGCRED_HTTP_REQUESTS_PER_SECOND", "0")], Stdio::null())
    }

    /// The same, with another URL of the database.
    pub fn with_url(&self, url: &str) -> anyhow::Result<Server> {
        self.serve_with(&[("REGCRED_DATABASE_URL", url)], None)
    }

    /// Starts a replica with extra variables and without a rate limit. Its log goes to the given
    /// file, if any.
    pub fn serve_with(&self, variables: &[(&str, &str)], log: Option<&Path>) -> anyhow::Result<Server> {
        let log = log.map_or_else(|| Ok(Stdio::null()), |path| File::create(path).map(Stdio::from))?;
        self.start(REGCRED, &["serve"], &[&[("REGCRED_HTTP_REQUESTS_PER_SECOND", "0")], variables].concat(), log)
    }

    /// URL of the database, with its owner's login.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn start(
        &self,
        program: &str,
        arguments: &[&str],
        variables: &[(&str, &str)],
        log: Stdio,
    ) -> anyhow::Result<Server> {
        let (address, operations) = (free_address()?, free_address()?);
        let mut command = self.regcred(program, arguments);
        command.env("REGCRED_HTTP_LISTEN", address.to_string()).envs(variables.iter().copied());
        command.env("REGCRED_OPERATIONS_LISTEN", operations.to_string());
        let mut server = Server::start_logging(&mut command, address, "/readyz", log)?;
        server.operations = operations;
        Ok(server)
    }

    /// Inserts one viewer API key per number directly into the database, in parallel, and returns
    /// their texts.
    pub fn make_keys(&self, numbers: std::ops::Range<usize>) -> anyhow::Result<Vec<String>> {
        let threads = cores();
        std::thread::scope(|scope| {
            let makers: Vec<_> = (0..threads)
                .map(|thread| {
                    let numbers = numbers.clone();
                    scope
                        .spawn(move || load::on_this_thread(self.make_some_keys(numbers.skip(thread).step_by(threads))))
                })
                .collect();
            let made = makers.into_iter().map(|maker| maker.join().map_err(|_| anyhow!("a thread panicked"))?);
            Ok(made.collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
        })
    }

    async fn make_some_keys(&self, numbers: impl Iterator<Item = usize>) -> anyhow::Result<Vec<String>> {
        let pepper = Pepper::parse(&SecretString::from(TEST_KEY))?;
        let mut conn = pool::parse_url(&SecretString::from(self.url.as_str()))?.connect().await?.into();
        let mut keys = Vec::new();
        for number in numbers {
            let name = format!("key-{number}");
            let fields = ApiKeyFields { name: &name, role: "viewer", ..ApiKeyFields::default() };
            let new = NewApiKey::parse(fields, Utc::now(), None);
            let new = new.map_err(|refused| anyhow!("{refused:?}"))?;
            let key = api_key::generate(&pepper)?;
            api_keys::insert(&mut conn, key.id, &new, &key.verifier).await?;
            keys.push(key.text.expose_secret().to_owned());
        }
        Ok(keys)
    }

    /// Postgres backends of the connections that listen for change notifications.
    pub fn listener_backends(&self) -> anyhow::Result<Vec<i32>> {
        let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'regcred changes' AND datname = $1";
        self.runtime.block_on(async {
            let mut conn = PgConnection::connect_with(&self.server).await?;
            Ok(sqlx::query_scalar(query).bind(&self.name).fetch_all(&mut conn).await?)
        })
    }

    /// Starts the baseline server.
    pub fn serve_bare(&self, connections: usize) -> anyhow::Result<Server> {
        let address = free_address()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args([crate::bare::ARGUMENT, &address.to_string(), &cores().to_string(), &connections.to_string()]);
        command.env("DATABASE_URL", &self.url);
        Server::start(&mut command, address, "/hello")
    }
}

/// Runs a command, which must succeed, and returns its output.
pub fn run(command: &mut Command) -> anyhow::Result<String> {
    let done = command.stdin(Stdio::null()).output()?;
    ensure!(done.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&done.stderr));
    Ok(String::from_utf8(done.stdout)?)
}

/// Registers the account.
pub fn register(server: &Server, key: &str) -> anyhow::Result<()> {
    let account = format!(
        r#"{{"name":"{ACCOUNT}","registry":"registry.example.com:5000","username":"martin","password":"xxx1"}}"#
    );
    let request = load::request("POST", "/v1/registry-accounts", Some(key), &account);
    let (status, body) = load::once(server.address, &request)?;
    ensure!(status == 201, "the account was not registered: {status} {body}");
    Ok(())
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let dropped = self.runtime.block_on(async {
            let mut conn = PgConnection::connect_with(&self.server).await?;
            sqlx::raw_sql(AssertSqlSafe(format!("DROP DATABASE {} WITH (FORCE)", self.name))).execute(&mut conn).await
        });
        if let Err(error) = dropped {
            eprintln!("bench: the database {} is left: {error}", self.name);
        }
    }
}
