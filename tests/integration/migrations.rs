//! Migrations of a database that is in use.

use regcred::storage::{self, schema};
use sqlx::PgPool;

use crate::support::eventually;

/// The migration after this one takes two locks of `registry_accounts`, one after the other.
const BEFORE_DIRECT_SECRETS: i64 = 20_261_201_000_020;

#[sqlx::test(migrations = false)]
async fn migration_gives_way_to_transactions_that_use_its_tables(pool: PgPool) {
    schema::MIGRATOR.run_to(BEFORE_DIRECT_SECRETS, &pool).await.unwrap();
    let mut request = pool.begin().await.unwrap();
    sqlx::query("SELECT FROM registry_accounts").fetch_all(&mut *request).await.unwrap();
    let waiting = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'registry_accounts'::regclass";
    let change = async {
        eventually("the migration waits for the request", async || {
            sqlx::query(waiting).fetch_optional(&pool).await.unwrap().map(drop)
        })
        .await;
        let changed = sqlx::query("UPDATE registry_accounts SET version = version").execute(&mut *request).await;
        changed.expect("the change of the request, without a deadlock");
        request.commit().await.unwrap();
    };

    let migrating = storage::PgPool::from(pool.clone());
    let (migrated, ()) = tokio::join!(schema::migrate(&migrating), change);

    migrated.expect("the migration, after the request");
    let newest: i64 = sqlx::query_scalar("SELECT max(version) FROM _sqlx_migrations").fetch_one(&pool).await.unwrap();
    assert_eq!(Some(newest), schema::MIGRATOR.iter().map(|migration| migration.version).max());
}
