//! The plans of lists and of the summary at 100,000 rows: what a page reads, on any machine.

use regcred::{
    domain::{
        caller::Role,
        grants::Grants,
        listing::{ApiKeySort, ApiKeyState, ListRequest, NamePart, Next, Position, RegistryAccountSort, Sort},
        names::{Labels, NamespaceName},
        pull_secret::TargetState,
        verification::VerificationResult,
    },
    storage::{
        self,
        accounts::AccountFilter,
        api_keys::ApiKeyFilter,
        lists::HIDDEN_MAX,
        summary,
        targets::listing::{Scope, TargetFilter, TargetPosition},
    },
};
use serde_json::json;
use sqlx::PgPool;
use uuid::Uuid;

use super::{insert_accounts, insert_cluster, insert_pull_secret, insert_targets};
use crate::support::eventually;

const ROWS: i32 = 100_000;
const PAGE: usize = 50;
/// Entries and rows that a seek of one page may read, with some slack for combined indexes.
const SEEK: i64 = 1_000;
/// Entries that a search may read.
const SEARCH: i64 = 20_000 + SEEK;

/// Vacuums and analyses a table until all its pages are in the visibility map, on which plans
/// depend: it leaves out rows whose commits are not on disk yet.
async fn vacuum(pool: &PgPool, table: &'static str) {
    eventually("all pages are in the visibility map", async || {
        let vacuum = sqlx::AssertSqlSafe(format!("VACUUM ANALYZE {table}"));
        sqlx::query(vacuum).execute(pool).await.expect("vacuumed");
        let is_complete = "SELECT relallvisible >= relpages FROM pg_class WHERE oid = to_regclass($1)";
        sqlx::query_scalar::<_, bool>(is_complete).bind(table).fetch_one(pool).await.expect("a table").then_some(())
    })
    .await;
}

/// Reads of a table by the statements of an open transaction.
#[derive(Debug, Clone, Copy)]
struct Reads {
    /// Rows read by sequential scans.
    sequential: i64,
    /// Entries read from indexes.
    entries: i64,
}

/// Runs `read` in a transaction, in which the counts of this session only grow.
async fn reads<T>(
    conn: &mut storage::PgConnection,
    table: &str,
    read: impl AsyncFnOnce(&mut storage::PgConnection) -> T,
) -> (T, Reads) {
    sqlx::query("BEGIN").execute(&mut *conn).await.expect("begun");
    let before = counts(conn, table).await;
    let value = read(&mut *conn).await;
    let after = counts(conn, table).await;
    sqlx::query("ROLLBACK").execute(&mut *conn).await.expect("rolled back");
    (value, Reads { sequential: after.0 - before.0, entries: after.1 - before.1 })
}

/// Rows and entries that this session read since it last reported its statistics.
async fn counts(conn: &mut storage::PgConnection, table: &str) -> (i64, i64) {
    let counts = "SELECT seq_tup_read, (
                      SELECT coalesce(sum(pg_stat_get_xact_tuples_returned(indexrelid)), 0)::bigint FROM pg_index WHERE indrelid = relid
                  ) FROM pg_stat_xact_user_tables WHERE relname = $1";
    sqlx::query_as(counts).bind(table).fetch_one(conn).await.expect("counts")
}

fn assert_bounded(what: &str, reads: Reads, most: i64) {
    assert_eq!(reads.sequential, 0, "{what} scans the table");
    assert!(reads.entries <= most, "{what} reads {} entries, more than {most}", reads.entries);
}

fn granted(rules: serde_json::Value) -> Grants {
    Grants::parse(Role::Viewer, serde_json::from_value(rules).expect("grants")).expect("valid")
}

/// Reads the first pages of a list and its page after the last one in this number of pages.
async fn accounts(
    conn: &mut storage::PgConnection,
    grants: &Grants,
    filter: &AccountFilter,
    sort: RegistryAccountSort,
    pages: usize,
    what: &str,
    most: i64,
) {
    let mut request = ListRequest { order: sort.order(), after: None, limit: PAGE };
    for page in 0..pages {
        let (found, read) = reads(conn, "registry_accounts", async |conn| {
            storage::accounts::list(conn, grants, &request, filter).await.expect("read")
        })
        .await;
        assert_bounded(&format!("page {page} of accounts {what} by {}", sort.as_str()), read, most);
        let Some(Next::Item(position) | Next::Row(position)) = found.next else { return };
        request.after = Some(position);
        if page == 0 && sort == RegistryAccountSort::Name {
            // As the middle of the list.
            request.after = Some(Position::unique("account-050000"));
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_page_of_accounts_reads_few_rows_at_100_000(pool: PgPool) {
    use RegistryAccountSort as S;
    insert_accounts(&pool, ROWS).await;
    vacuum(&pool, "registry_accounts").await;
    let mut conn = pool.acquire().await.expect("a connection").detach().into();
    let labels = |team: &str| Labels::parse([("team".to_owned(), team.to_owned())].into()).expect("labels");
    let part = |part: &str| Some(NamePart::parse(part).expect("a part"));
    let default = AccountFilter::default;
    let filters = [
        ("without a filter", default(), SEEK),
        ("with a rare result", AccountFilter { result: Some(VerificationResult::Invalid), ..default() }, SEEK),
        ("with a common result", AccountFilter { result: Some(VerificationResult::Valid), ..default() }, SEEK),
        ("that expired", AccountFilter { expires_within_seconds: Some(0), ..default() }, SEEK),
        ("with a rare label", AccountFilter { labels: labels("rare"), ..default() }, SEEK),
        ("with a common label", AccountFilter { labels: labels("many"), ..default() }, SEEK),
        ("with a common part", AccountFilter { name_part: part("account"), ..default() }, SEEK),
        ("with a rare part", AccountFilter { name_part: part("nothing"), ..default() }, SEARCH),
    ];
    let all = Grants::everything();
    for (what, filter, most) in &filters {
        for sort in [S::Name, S::NameDescending, S::CreatedAt, S::CreatedAtDescending, S::ExpiresAt] {
            // The index of results is ordered by name.
            let is_searched = filter.result.is_some() && !matches!(sort, S::Name | S::NameDescending);
            let most = if is_searched { SEARCH } else { *most };
            accounts(&mut conn, &all, filter, sort, 3, what, most).await;
        }
    }
    // A caller that may see few accounts.
    let few = granted(json!({"accounts": ["account-0999*"], "clusters": [], "namespaces": []}));
    let hidden = i64::try_from(HIDDEN_MAX).expect("small") + SEEK;
    for (what, filter, _) in filters.iter().filter(|(what, ..)| !what.contains("label")) {
        for sort in [S::NameDescending, S::CreatedAt, S::ExpiresAt] {
            accounts(&mut conn, &few, filter, sort, 3, &format!("{what} and with grants"), hidden).await;
        }
    }
    accounts(&mut conn, &few, &default(), S::Name, 3, "with grants", SEEK).await;

    // The summary reads no more than its limits.
    let counted = 12 * (summary::COUNT_MAX + 1);
    let (counts, read) = reads(&mut conn, "registry_accounts", async |conn| {
        summary::count_accounts(conn, &all, 30 * 86_400).await.expect("read")
    })
    .await;
    assert!(counts.total.has_more && !counts.expired.has_more);
    assert!(read.entries + read.sequential <= counted, "the summary reads {read:?}");
    let (counts, read) = reads(&mut conn, "registry_accounts", async |conn| {
        summary::count_accounts(conn, &few, 30 * 86_400).await.expect("read")
    })
    .await;
    assert_eq!(counts.total.count, 100);
    assert_bounded("the summary with grants", read, SEEK);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_page_of_keys_reads_few_rows_at_100_000(pool: PgPool) {
    let rows = "INSERT INTO api_keys (id, name, role, mac, hash, expires_at, revoked_at)
        SELECT gen_random_uuid(), 'key-' || n / 2, 'viewer', '', '', CASE WHEN n % 1000 = 0 THEN now() - n * interval '1 hour' END,
            CASE WHEN n % 2 = 0 THEN now() END
        FROM generate_series(1, $1) AS n";
    sqlx::query(rows).bind(ROWS).execute(&pool).await.expect("inserted");
    vacuum(&pool, "api_keys").await;
    let mut conn = pool.acquire().await.expect("a connection").detach().into();
    let filters = [
        (ApiKeyFilter::default(), SEEK),
        (ApiKeyFilter { state: Some(ApiKeyState::Active), ..ApiKeyFilter::default() }, SEEK),
        (ApiKeyFilter { state: Some(ApiKeyState::Expired), ..ApiKeyFilter::default() }, SEARCH),
        (ApiKeyFilter { name_part: NamePart::parse("nothing").ok(), ..ApiKeyFilter::default() }, SEARCH),
        (ApiKeyFilter { expires_within_seconds: Some(0), ..ApiKeyFilter::default() }, SEEK),
    ];
    for (filter, most) in &filters {
        for sort in [ApiKeySort::CreatedAt, ApiKeySort::CreatedAtDescending, ApiKeySort::Name, ApiKeySort::ExpiresAt] {
            let mut request = ListRequest { order: sort.order(), after: None, limit: PAGE };
            for page in 0..2 {
                let (found, read) = reads(&mut conn, "api_keys", async |conn| {
                    storage::api_keys::list(conn, &request, filter).await.expect("read")
                })
                .await;
                assert_bounded(&format!("page {page} of keys by {} {filter:?}", sort.as_str()), read, *most);
                let Some(Next::Item(position) | Next::Row(position)) = found.next else { break };
                request.after = Some(position);
            }
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_page_of_targets_reads_few_rows_at_100_000(pool: PgPool) {
    insert_accounts(&pool, 5).await;
    let (dev, rare) = (insert_cluster(&pool, "dev").await, insert_cluster(&pool, "rare").await);
    let mut ids = Vec::new();
    for number in 0..10 {
        let id = insert_pull_secret(&pool, &format!("p-{number}"), "account-000001", "dev").await;
        insert_targets(&pool, id, dev, ROWS / 10).await;
        ids.push(id);
    }
    insert_targets(&pool, ids[9], rare, 100).await;
    vacuum(&pool, "pull_secret_targets").await;
    let mut conn = pool.acquire().await.expect("a connection").detach().into();
    let states = |states: &[TargetState]| TargetFilter { states: states.to_vec(), ..TargetFilter::default() };
    let namespace = |name: &str| NamespaceName::parse(name).ok();
    let broken = [TargetState::Failed, TargetState::Conflict];
    let filters = [
        ("without a filter", TargetFilter::default(), SEEK),
        ("failed", states(&[TargetState::Failed]), SEEK),
        ("broken", states(&broken), SEEK),
        ("synced", states(&[TargetState::Synced]), SEEK),
        ("in a large cluster", TargetFilter { cluster: Some(dev), ..TargetFilter::default() }, SEEK),
        ("in a small cluster", TargetFilter { cluster: Some(rare), ..TargetFilter::default() }, SEARCH),
        ("in a namespace", TargetFilter { namespace: namespace("n-77"), ..TargetFilter::default() }, SEARCH),
        ("broken in a small cluster", TargetFilter { cluster: Some(rare), ..states(&broken) }, SEARCH),
    ];
    let position =
        |id: Uuid| TargetPosition { pull_secret_id: id, target: Some((namespace("n-5").expect("a name"), dev)) };
    for (what, filter, most) in &filters {
        for after in [None, Some(position(ids[5])), Some(position(ids[9]))] {
            let (_, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
                storage::targets::listing::list(conn, Scope::All, filter, after.as_ref(), PAGE).await.expect("read")
            })
            .await;
            assert_bounded(&format!("a page of targets {what} after {after:?}"), read, *most);
        }
        let most = if filter.cluster == Some(rare) || filter.namespace.is_some() {
            i64::from(ROWS / 5) + SEEK
        } else {
            3 * SEEK
        };
        let (_, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
            storage::targets::listing::list(conn, Scope::PullSecrets(&ids[..2]), filter, None, PAGE)
                .await
                .expect("read")
        })
        .await;
        assert_bounded(&format!("a page of two pull secrets {what}"), read, most);
    }
    // The list of one pull secret reads its index entries, and no other's.
    let page = storage::PageRequest { after: Some("dev/n-5".to_owned()), limit: 51 };
    let (found, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
        storage::targets::listing::list_of(conn, ids[3], &TargetFilter::default(), &page).await.expect("read")
    })
    .await;
    assert_eq!(found.len(), 51);
    assert_bounded("a page of one pull secret", read, i64::from(ROWS / 10) + SEEK);

    // While most targets are broken, too.
    sqlx::query("UPDATE pull_secret_targets SET state = CASE WHEN id % 2 = 0 THEN 'failed' ELSE 'pending' END WHERE id % 10 > 0")
        .execute(&pool)
        .await
        .expect("broken");
    vacuum(&pool, "pull_secret_targets").await;
    for (what, states_of, most) in [
        ("failed", states(&[TargetState::Failed]), SEEK),
        ("of three states", states(&[TargetState::Failed, TargetState::Conflict, TargetState::Pending]), SEEK),
        ("broken in a cluster", TargetFilter { cluster: Some(rare), ..states(&broken) }, SEARCH),
    ] {
        let after = position(ids[5]);
        let (_, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
            storage::targets::listing::list(conn, Scope::All, &states_of, Some(&after), PAGE).await.expect("read")
        })
        .await;
        assert_bounded(&format!("a page of many targets {what}"), read, most);
    }
    let (counts, read) =
        reads(&mut conn, "pull_secret_targets", async |conn| summary::count_targets(conn, None).await.expect("read"))
            .await;
    assert!(counts.iter().any(|(state, count)| *state == TargetState::Failed && count.has_more));
    assert!(read.entries + read.sequential <= 3 * (summary::COUNT_MAX + 1) + SEARCH, "the summary reads {read:?}");
    let (oldest, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
        summary::find_oldest_pending(conn, None).await.expect("read")
    })
    .await;
    assert!(oldest.is_some());
    assert_bounded("the oldest pending target", read, SEEK);
    let (_, read) = reads(&mut conn, "pull_secret_targets", async |conn| {
        summary::count_pull_secrets(conn, &Grants::everything()).await.expect("read")
    })
    .await;
    assert_bounded("the states of pull secrets", read, SEEK);
}
