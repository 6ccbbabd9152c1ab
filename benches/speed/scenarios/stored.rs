//! Accounts inserted directly: `stored-N` with `password-N`, sealed in the form that all releases
//! open.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow};
use regcred::{
    crypto::{
        ring::Ring as _,
        sealer::{KeyRing, Sealer},
    },
    domain::sealed::{RegistryDestination, SealForm},
    storage::sealed::SealedColumn,
};
use secrecy::SecretString;
use serde_json::Value;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::load::{self, on_this_thread};

/// Accounts per statement.
const CHUNK: usize = 10_000;
/// Accounts per document that is read back.
const READ_CHUNK: usize = 500;

/// Inserts the accounts with numbers below `count`, sealed with the first key of a ring.
pub fn fill(url: &str, ring: &str, count: usize) -> anyhow::Result<()> {
    let ring = KeyRing::parse(&SecretString::from(ring)).map_err(|error| anyhow!("{error:?}"))?;
    let sealer = Sealer::new(ring, None);
    on_this_thread(async {
        let mut conn = PgConnection::connect(url).await?;
        for start in (0..count).step_by(CHUNK) {
            insert(&mut conn, &sealer, start..count.min(start + CHUNK)).await?;
        }
        sqlx::raw_sql("ANALYZE registry_accounts").execute(&mut conn).await?;
        Ok(conn.close().await?)
    })
}

async fn insert(conn: &mut PgConnection, sealer: &Sealer, numbers: std::ops::Range<usize>) -> anyhow::Result<()> {
    let (mut ids, mut names, mut passwords) = (Vec::new(), Vec::new(), Vec::new());
    for number in numbers {
        let (id, authority) = (Uuid::now_v7(), authority(number));
        let destination = RegistryDestination { authority: &authority, plain_http: false, ca: None };
        let password = SecretString::from(password(number));
        let slot = SealedColumn::account_password(id, &destination);
        let value = sealer.seal(SealForm::Unbound, &slot, &password).map_err(|error| anyhow!("{error:?}"))?;
        ids.push(id);
        names.push(name(number));
        passwords.push(value.bytes);
    }
    sqlx::query(
        "INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id)
         SELECT id, name, name || '.example.com', 'martin', password, $4
         FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS new (id, name, password)",
    )
    .bind(&ids)
    .bind(&names)
    .bind(&passwords)
    .bind(sealer.sealing_key_id())
    .execute(conn)
    .await?;
    Ok(())
}

/// Name of an account.
pub fn name(number: usize) -> String {
    format!("stored-{number}")
}

/// Password of an account.
pub fn password(number: usize) -> String {
    format!("password-{number}")
}

fn authority(number: usize) -> String {
    format!("{}.example.com", name(number))
}

/// Reads all accounts through the API. Returns the number of those without their password.
pub fn wrong(address: std::net::SocketAddr, key: &str, count: usize) -> anyhow::Result<usize> {
    let mut wrong = 0;
    for start in (0..count).step_by(READ_CHUNK) {
        let numbers = start..count.min(start + READ_CHUNK);
        let names: Vec<String> = numbers.clone().map(name).collect();
        let body = serde_json::to_string(&BTreeMap::from([("accounts", names)]))?;
        let (status, answer) = load::once(address, &load::request("POST", "/v1/docker-configs", Some(key), &body))?;
        if status != 200 {
            wrong += numbers.len();
            continue;
        }
        let answer: Value = serde_json::from_str(&answer)?;
        let entries = answer["config"]["auths"].as_object().context("no entries")?;
        let is_right =
            |number: &usize| entries.get(&authority(*number)).is_some_and(|one| one["password"] == password(*number));
        wrong += numbers.filter(|number| !is_right(number)).count();
    }
    Ok(wrong)
}
