//! What regcred is compared with: the same libraries, workers, pool and runtime, and nothing around them.

use std::{net::TcpListener, time::Duration};

use actix_web::{
    App, HttpResponse, HttpServer,
    error::ErrorInternalServerError,
    get,
    web::{Data, Path},
};
use anyhow::Context;
use regcred::storage::pool;
use secrecy::SecretString;
use sqlx::PgPool;

/// With this argument the bench is the bare server: `--bare ADDRESS WORKERS CONNECTIONS`, the database in `DATABASE_URL`.
pub const ARGUMENT: &str = "--bare";

#[get("/hello")]
async fn hello() -> &'static str {
    "hello"
}

#[derive(serde::Serialize)]
struct Row {
    name: String,
    registry: String,
    username: String,
}

/// One row by its unique name, through the pool, as JSON.
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
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let pool = pool::lazy(pool::parse_url(&url)?, connections.parse()?, Duration::from_secs(3));
        let pool = Data::new(pool);
        let server = HttpServer::new(move || App::new().app_data(pool.clone()).service(hello).service(select));
        Ok(server.workers(workers.parse()?).listen(TcpListener::bind(address)?)?.run().await?)
    })
}
