//! Clients that take their time.

use std::{
    io::{Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use sqlx::PgPool;

use super::{connect, pause, read_to_the_end, statuses};
use crate::support::{PATIENCE, app::TestApp};

/// Scenario A1: what trickles is cut off by then, whatever it is.
const CUT_WITHIN: Duration = Duration::from_secs(15);

/// Sends a little now and then until the server has closed the connection: how long that took.
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

fn read_one_answer(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    while !read.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).expect("an answer");
        assert!(count > 0, "closed: {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&chunk[..count]);
    }
    String::from_utf8_lossy(&read).into_owned()
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn whatever_trickles_is_cut_off(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("slow", None).await;
    let authorization = format!("Host: x\r\nAuthorization: Bearer {key}\r\n");
    let json = "Content-Type: application/json\r\n";
    let length = "Content-Length: 100000\r\n\r\n";
    let chunked = "Transfer-Encoding: chunked\r\n\r\n";
    // What is sent first, and what then trickles.
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
        ("a body that nobody reads", format!("GET /v1/me HTTP/1.1\r\n{authorization}{length}"), b" "),
        (
            "a body in chunks that nobody reads",
            format!("GET /v1/me HTTP/1.1\r\n{authorization}{chunked}"),
            b"1\r\nx\r\n",
        ),
        ("a body of somebody unknown", format!("POST /v1/clusters HTTP/1.1\r\nHost: x\r\n{chunked}"), b"1\r\nx\r\n"),
        ("a body to nowhere", format!("POST /nowhere HTTP/1.1\r\nHost: x\r\n{chunked}"), b"1\r\nx\r\n"),
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
async fn who_takes_no_answers_is_cut_off(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let document = app.anonymous().get("/openapi.json").await.body.len();
    // As many as no buffer of the system holds.
    let count = 32 * 1024 * 1024 / document;
    let request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut stream = connect(app.address);
    stream.write_all(&request.repeat(count)).expect("sent");
    let start = Instant::now();

    // An empty line between two requests is allowed, and finds out whether somebody is there.
    while stream.write_all(b"\r\n").is_ok() {
        assert!(start.elapsed() < PATIENCE, "the connection is still open");
        pause(200);
    }

    assert!(start.elapsed() < CUT_WITHIN, "{:?}", start.elapsed());
    app.anonymous().get("/readyz").await.expect(200);
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_connection_serves_many_requests_and_ends_when_it_is_idle(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let mut stream = connect(app.address);
    for _ in 0..100 {
        stream.write_all(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").expect("sent");
        assert!(read_one_answer(&mut stream).starts_with("HTTP/1.1 405 "));
    }
    let start = Instant::now();

    read_to_the_end(&mut stream);

    assert!(start.elapsed() < CUT_WITHIN, "{:?}", start.elapsed());
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_large_body_of_somebody_unknown_is_refused_unread(pool: PgPool) {
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
        // What was sent is more than what was read: the rest filled the buffers of the system.
        let sent = sending.join().expect("sent");
        assert!(sent < 10 * 1024 * 1024, "all of it was read");
    }
}
