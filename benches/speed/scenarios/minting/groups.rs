//! Storage of mint results in groups, against bare UPDATEs of the same rows in the same groups.
//!
//! A result is stored with its audit event, its event for streams and the generations of the pull
//! secrets that use the account. The bare UPDATE writes the same logins, once with the triggers of
//! the table, which announce the change, and once without.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use regcred::{
    clients::{
        cluster::ClusterClientConfig,
        mint::{MintClient, MintClientConfig},
        outbound::{AllowList, Guard},
    },
    crypto::{
        pepper::{Pepper, Peppers},
        ring::Ring as _,
        sealer::{KeyRing, Sealer},
    },
    domain::{
        account::{Password, Username},
        mint::{Minted, Source, Validity},
    },
    service::{
        audit::TransactionalAudit,
        clusters::Clusters,
        mints::{MintAttempt, Mints},
        row_cache::RowCache,
    },
    storage::{PgConnection, pool},
};
use secrecy::SecretString;
use serde_json::json;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::single;
use crate::{
    report::{Goals, Rounds, float, progress, row, table},
    sandbox::{Sandbox, TEST_KEY},
    scenarios::Stage,
};

const ACCOUNTS: usize = 2_048;
/// Size of a group: as many as mints in flight.
const GROUP: usize = 64;
const ROUNDS: usize = 6;
/// Length of a password, as of ECR's.
pub const PASSWORD: usize = 1_500;

const ACCOUNTS_SQL: &str = r"INSERT INTO registry_accounts (id, name, registry, username, password, password_key_id)
    SELECT gen_random_uuid(), 'minted-' || n, 'registry.example.com', 'robot', '\x00', 'bench'
    FROM generate_series(1, $1) AS n";
const MINTS_SQL: &str = r"INSERT INTO account_mints (account_id, source, secret, secret_key_id, valid_until, refresh_at,
        next_attempt_at)
    SELECT id, $1, '\x00', 'bench', now() + interval '1 hour', now(), now() FROM registry_accounts";
const BARE_SQL: &str = "UPDATE registry_accounts SET username = new.username, password = new.password,
        password_key_id = 'bench', login_changed_at = now()
    FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS new (id, username, password)
    WHERE registry_accounts.id = new.id";

/// Rows per second of one round.
struct Round {
    stored: f64,
    bare: f64,
    without_triggers: f64,
}

/// Measures the storage of results.
pub fn stored(_: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let sandbox = Sandbox::new()?;
    sandbox.prepare()?;
    let mut conn = runtime.block_on(sandbox.connect())?;
    runtime.block_on(fill(&mut conn))?;
    let mints = {
        let _context = runtime.enter();
        service(&sandbox)?
    };
    let mut rounds = Vec::new();
    for number in 1..=ROUNDS {
        progress(&format!("storing the results of {ACCOUNTS} mints, round {number} of {ROUNDS}"));
        rounds.push(round(&runtime, &mints, &mut conn, number % 2 == 0)?);
    }
    let of = |figure: fn(&Round) -> f64| rounds.iter().map(figure).collect::<Rounds>();
    let (of_bare, of_plain) =
        (of(|round| round.stored / round.bare), of(|round| round.stored / round.without_triggers));
    let shown = |what: &str, rates: &Rounds, ratio: Option<&Rounds>| {
        let [ratio, spread] = ratio.map_or_else(|| [String::new(), String::new()], |ratio| ratio.spread(2));
        vec![what.to_owned(), format!("{:.0}", rates.median()), ratio, spread]
    };
    table(
        &format!(
            "Results of {ACCOUNTS} mints, stored in groups of {GROUP} on one connection; medians of {ROUNDS} rounds"
        ),
        &[
            row(["", "rows/s", "results relative to it", "spread"]),
            shown("mint results", &of(|round| round.stored), None),
            shown("bare UPDATE", &of(|round| round.bare), Some(&of_bare)),
            shown("bare UPDATE without triggers", &of(|round| round.without_triggers), Some(&of_plain)),
        ],
    )?;
    goals.at_least("Mint results in groups: rows/s relative to a bare UPDATE", 0.33, of_bare.median());
    drop((mints, conn));
    single::measure(&runtime)
}

async fn fill(conn: &mut PgConnection) -> anyhow::Result<()> {
    let identity = json!({"type": "clientSecret", "clientId": "c", "clientSecret": "s"});
    let source =
        json!({"type": "oauth2", "tokenUrl": "https://auth.example.com", "username": "robot", "identity": identity});
    let source = Source::parse(serde_json::from_value(source)?).map_err(|refused| anyhow!("{refused:?}"))?;
    sqlx::query(ACCOUNTS_SQL).bind(i32::try_from(ACCOUNTS)?).execute(&mut *conn).await?;
    sqlx::query(MINTS_SQL).bind(source.source.as_text()).execute(&mut *conn).await?;
    sqlx::query("VACUUM ANALYZE registry_accounts, account_mints").execute(&mut *conn).await?;
    Ok(())
}

/// The service as a replica builds it, with one connection.
fn service(sandbox: &Sandbox) -> anyhow::Result<Mints> {
    let options = pool::parse_url(&SecretString::from(sandbox.url()))?;
    let pool = pool::of_service(options, 1, Duration::from_secs(10));
    let ring = KeyRing::parse(&SecretString::from(format!("bench:{TEST_KEY}")))?;
    let sealer = Arc::new(Sealer::new(ring, None));
    let pepper = Pepper::parse(&SecretString::from(TEST_KEY))?;
    let audit = TransactionalAudit::open(&pool, Arc::new(Peppers::new(pepper.into(), None)));
    let clusters = Clusters::new(pool.clone(), sealer.clone(), ClusterClientConfig::default(), audit.clone());
    let client = MintClient::new(|| Guard::new(AllowList::default()), MintClientConfig::default());
    let row_cache = Arc::new(RowCache::new(pool.clone()));
    Ok(Mints::new(pool, row_cache, sealer, audit, clusters, client))
}

fn round(runtime: &Runtime, mints: &Mints, conn: &mut PgConnection, is_reversed: bool) -> anyhow::Result<Round> {
    let groups = runtime.block_on(claim(mints, conn))?;
    let ids: Vec<Vec<Uuid>> =
        groups.iter().map(|group| group.iter().map(|(claimed, _)| claimed.account_id).collect()).collect();
    let (mut stored, mut bare) = (0.0, 0.0);
    for is_bare in [is_reversed, !is_reversed] {
        if is_bare {
            bare = runtime.block_on(update(conn, &ids))?;
        } else {
            stored = runtime.block_on(store(mints, &groups))?;
        }
    }
    let without_triggers = runtime.block_on(async {
        sqlx::query("ALTER TABLE registry_accounts DISABLE TRIGGER USER").execute(&mut *conn).await?;
        let rate = update(conn, &ids).await?;
        sqlx::query("ALTER TABLE registry_accounts ENABLE TRIGGER USER").execute(&mut *conn).await?;
        anyhow::Ok(rate)
    })?;
    runtime.block_on(sqlx::query("VACUUM registry_accounts, account_mints").execute(&mut *conn))?;
    Ok(Round { stored, bare, without_triggers })
}

/// Claims all mints in groups, and makes a result for each.
async fn claim(mints: &Mints, conn: &mut PgConnection) -> anyhow::Result<Vec<Vec<MintAttempt>>> {
    sqlx::query("UPDATE account_mints SET next_attempt_at = now()").execute(&mut *conn).await?;
    let mut groups = Vec::new();
    loop {
        let claimed = mints.claim(i64::try_from(GROUP)?).await?;
        if claimed.is_empty() {
            ensure!(groups.iter().map(Vec::len).sum::<usize>() == ACCOUNTS, "not all mints were claimed");
            return Ok(groups);
        }
        let group = claimed.into_iter().map(|claimed| Ok((claimed, Ok(minted()?)))).collect::<anyhow::Result<_>>()?;
        groups.push(group);
    }
}

fn minted() -> anyhow::Result<Minted> {
    let password = SecretString::from(format!("{:0>PASSWORD$}", Uuid::now_v7().simple()));
    let username = Username::parse("robot").map_err(|refused| anyhow!("{refused}"))?;
    let password = Password::parse(password).map_err(|refused| anyhow!("{refused}"))?;
    Ok(Minted {
        username,
        password,
        validity: Validity { lifetime: Duration::from_hours(12), received_at: Instant::now() },
    })
}

/// Stores the results. Returns the rows per second.
async fn store(mints: &Mints, groups: &[Vec<MintAttempt>]) -> anyhow::Result<f64> {
    let begin = Instant::now();
    for group in groups {
        mints.record(group).await?;
    }
    Ok(float(ACCOUNTS) / begin.elapsed().as_secs_f64())
}

/// Updates the same rows. Returns the rows per second.
async fn update(conn: &mut PgConnection, groups: &[Vec<Uuid>]) -> anyhow::Result<f64> {
    let begin = Instant::now();
    for ids in groups {
        let usernames = vec!["robot"; ids.len()];
        let passwords: Vec<Vec<u8>> = ids.iter().map(|_| Uuid::now_v7().as_bytes().repeat(PASSWORD / 16 + 2)).collect();
        let updated = sqlx::query(BARE_SQL).bind(ids).bind(&usernames).bind(&passwords).execute(&mut *conn).await?;
        ensure!(updated.rows_affected() == u64::try_from(ids.len())?, "not all rows were updated");
    }
    Ok(float(ACCOUNTS) / begin.elapsed().as_secs_f64())
}
