//! Slow clients.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use sqlx::PgPool;

use super::{connect, pause, read_head, read_to_the_end, statuses};
use crate::support::{PATIENCE, app::TestApp};

/// Time after which a slow client must be disconnected.
const CUT_WITHIN: Duration = Duration::from_secs(15);

/// Sends a few bytes now and then until the server closes the connection. Returns the elapsed time.
fn trickle(mut stream: TcpStream, drop: &[u8]) -> Duration {
    let start = Instant::now();
    stream.set_read_timeout(Some(Duration::from_millis(300))).expect("set");
    let mut chunk = [0; 4096];
    loop {
        assert!(start.elapsed() < PATIENCE, "the connection is still open");
        if stream.write_all(drop).is_err() {
            return start.elapsed();
        }
        match stream.read(&mut chunk) {
            Ok(0) => return start.elapsed(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return start.elapsed(),
            _ => {}
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn slow_requests_are_disconnected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("slow", None).await;
    let authorization = format!("Host: x\r\nAuthorization: Bearer {key}\r\n");
    let json = "Content-Type: application/json\r\n";
    let length = "Content-Length: 100000\r\n\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n\r\n";
    // Name, first bytes, and the bytes that are sent slowly afterwards.
    let cases: Vec<(&str, String, &[u8])> = vec![
        ("the first head", "GET /healthz HTTP/1.1\r\n".to_owned(), b"X: y\r\n"),
        (
            "the second head",
            "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\n".to_owned(),
            b"X: y\r\n",
        ),
        ("a body that is read", format!("POST /v1/registry-accounts HTTP/1.1\r\n{authorization}{json}{length}"), b" "),
        (
            "a body in chunks that is read",
            format!("POST /v1/registry-accounts HTTP/1.1\r\n{authorization}{json}{chunked}"),
            b"1\r\n \r\n",
        ),
        ("an unread body", format!("GET /v1/me HTTP/1.1\r\n{authorization}{length}"), b" "),
        ("an unread body in chunks", format!("GET /v1/me HTTP/1.1\r\n{authorization}{chunked}"), b"1\r\nx\r\n"),
        ("an unauthenticated body", format!("POST /v1/clusters HTTP/1.1\r\nHost: x\r\n{chunked}"), b"1\r\nx\r\n"),
        ("a body for an unknown path", format!("POST /nowhere HTTP/1.1\r\nHost: x\r\n{chunked}"), b"1\r\nx\r\n"),
    ];

    let address = app.address;
    let took = thread::scope(|scope| {
        let running: Vec<_> = cases
            .iter()
            .map(|(name, first, drop)| {
                scope.spawn(move || {
                    let mut stream = connect(address);
                    stream.write_all(first.as_bytes()).expect("sent");
                    (*name, trickle(stream, drop))
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().expect("cut off")).collect::<Vec<_>>()
    });

    let late: Vec<_> = took.iter().filter(|(_, took)| *took > CUT_WITHIN).collect();
    assert!(late.is_empty(), "{late:?}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_client_that_reads_no_responses_is_disconnected(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = app.anonymous().get("/openapi.json").await.body.len();
    // More than the buffers of the system hold.
    let count = 32 * 1024 * 1024 / document;
    let request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut stream = connect(app.address);
    stream.write_all(&request.repeat(count)).expect("sent");
    let start = Instant::now();

    // An empty line between two requests is allowed, and shows whether the connection is open.
    while stream.write_all(b"\r\n").is_ok() {
        assert!(start.elapsed() < PATIENCE, "the connection is still open");
        pause(200);
    }

    assert!(start.elapsed() < CUT_WITHIN, "{:?}", start.elapsed());
    app.anonymous().get("/readyz").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_connection_is_reused_and_closed_when_idle(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut stream = connect(app.address);
    for _ in 0..100 {
        stream.write_all(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").expect("sent");
        assert!(read_head(&mut stream).starts_with("HTTP/1.1 405 "));
    }
    let start = Instant::now();

    read_to_the_end(&mut stream);

    assert!(start.elapsed() < CUT_WITHIN, "{:?}", start.elapsed());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_large_unauthenticated_body_is_refused_unread(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    for framing in
        ["Content-Length: 10485760\r\n\r\n".to_owned(), "Transfer-Encoding: chunked\r\n\r\nA00000\r\n".to_owned()]
    {
        let mut stream = connect(app.address);
        let head = format!("POST /v1/registry-accounts HTTP/1.1\r\nHost: x\r\n{framing}");
        stream.write_all(head.as_bytes()).expect("sent");
        let mut reader = stream.try_clone().expect("a handle");
        let sending = thread::spawn(move || {
            let piece = [b' '; 8 * 1024];
            (0..1280).take_while(|_| stream.write_all(&piece).is_ok()).count() * piece.len()
        });

        let answer = read_to_the_end(&mut reader);

        assert_eq!(statuses(&answer), ["401"], "{answer}");
        // The rest of the body filled the buffers of the system.
        let sent = sending.join().expect("sent");
        assert!(sent < 10 * 1024 * 1024, "the server read the complete body");
    }
}
