//! Baseline server: the same libraries, workers, pool and runtime as regcred without its code, plus
//! a hello route that logs.

use std::{net::TcpListener, time::Duration};

use actix_web::{
    App, HttpResponse, HttpServer,
    error::ErrorInternalServerError,
    get,
    web::{Data, Path, scope},
};
use anyhow::Context;
use regcred::storage::pool;
use secrecy::SecretString;
use sqlx::PgPool;
use tracing_actix_web::TracingLogger;

/// First argument that starts the baseline server: `--bare ADDRESS WORKERS CONNECTIONS`. The
/// database URL is in `DATABASE_URL`.
pub const ARGUMENT: &str = "--bare";

#[get("/hello")]
async fn hello() -> &'static str {
    "hello"
}

/// Adds one log line per request, formatted by the libraries' defaults.
#[get("/hello")]
async fn hello_logged() -> &'static str {
    tracing::info!("request completed");
    "hello"
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    registry: String,
    username: String,
}

/// Selects one row by its unique name and returns it as JSON.
#[get("/select/{name}")]
async fn select(pool: Data<PgPool>, name: Path<String>) -> actix_web::Result<HttpResponse> {
    let row =
        sqlx::query_as!(Row, "SELECT name, registry, username FROM registry_accounts WHERE name = $1", name.as_str())
            .fetch_one(pool.as_ref())
            .await
            .map_err(ErrorInternalServerError)?;
    Ok(HttpResponse::Ok().json(row))
}

/// Serves until the process is killed.
pub fn serve(arguments: &[String]) -> anyhow::Result<()> {
    let [address, workers, connections] = arguments else {
        anyhow::bail!("usage: {ARGUMENT} ADDRESS WORKERS CONNECTIONS")
    };
    let url = SecretString::from(std::env::var("DATABASE_URL").context("DATABASE_URL")?);
    tracing_subscriber::fmt().json().with_writer(std::io::stderr).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let pool = pool::lazy(pool::parse_url(&url)?, connections.parse()?, Duration::from_secs(3));
        // Without regcred's own types around it.
        let pool = Data::new(pool.sqlx().clone());
        let logged = || scope("/logged").wrap(TracingLogger::default()).service(hello_logged);
        let server =
            HttpServer::new(move || App::new().app_data(pool.clone()).service(hello).service(select).service(logged()));
        Ok(server.workers(workers.parse()?).listen(TcpListener::bind(address)?)?.run().await?)
    })
}
