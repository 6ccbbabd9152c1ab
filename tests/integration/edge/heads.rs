//! Limits of request heads, and request smuggling.

use std::io::Write;

use sqlx::PgPool;

use super::{answers, connect, read_head, read_to_the_end, statuses};
use crate::support::app::TestApp;

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_oversized_head_is_refused(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let many = (0..10_000).map(|number| format!("X-{number}: y\r\n")).collect::<Vec<_>>().concat();
    let long = format!("X: {}\r\n", "y".repeat(200_000));
    for headers in [many, long] {
        let answer = answers(app.address, format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
}

/// Ambiguous heads, without the request line and with a body.
const HEADS: &[(&str, &str)] = &[
    ("CL.TE", "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("TE.CL", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"),
    ("TE.TE", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
    ("TE twice", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("TE list", "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    ("TE gzip", "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    ("TE unknown", "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("TE identity with CL", "Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}"),
    ("TE with a control character", "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    ("TE in quotes", "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n"),
    ("TE with a space before the colon", "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    ("TE folded", "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    ("a folded header", "X: y\r\n\tz\r\nContent-Length: 2\r\n\r\n{}"),
    ("a header that starts with a space", " Content-Length: 2\r\n\r\n{}"),
    ("a header without a name", ": y\r\nContent-Length: 2\r\n\r\n{}"),
    ("a header without a colon", "Content-Length\r\n\r\n{}"),
    ("NUL in a header", "X: y\0z\r\nContent-Length: 2\r\n\r\n{}"),
    ("a bare CR in a header", "X: y\rContent-Length: 2\r\n\r\n{}"),
    ("a bare LF after a header", "X: y\nContent-Length: 2\r\n\r\n{}"),
    ("a bare LF hides TE", "X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("a bare LF at the end of the head", "Content-Length: 2\r\n\n{}"),
    ("CL twice", "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    ("CL twice and other", "Content-Length: 2\r\nContent-Length: 0\r\n\r\n{}"),
    ("CL list", "Content-Length: 2, 2\r\n\r\n{}"),
    ("CL with a plus", "Content-Length: +2\r\n\r\n{}"),
    ("CL negative", "Content-Length: -2\r\n\r\n{}"),
    ("CL hexadecimal", "Content-Length: 0x2\r\n\r\n{}"),
    ("CL with a space", "Content-Length: 1 2\r\n\r\n{}"),
    ("CL empty", "Content-Length: \r\n\r\n{}"),
    ("CL over 64 bits", "Content-Length: 18446744073709551618\r\n\r\n{}"),
    ("Host twice", "Host: y\r\nContent-Length: 2\r\n\r\n{}"),
    ("WebSocket", "Upgrade: websocket\r\nContent-Length: 2\r\n\r\n{}"),
];

/// Invalid chunks. They close the connection, with or without a response, so the hidden request is not served.
const CHUNKS: &[(&str, &str)] = &[
    ("chunk size with a sign", "+2\r\n{}\r\n0\r\n\r\n"),
    ("chunk size in another base", "0x2\r\n{}\r\n0\r\n\r\n"),
    ("chunk size over 64 bits", "10000000000000002\r\n{}\r\n0\r\n\r\n"),
    ("chunk size empty", "\r\n{}\r\n0\r\n\r\n"),
    ("chunk size and a bare LF", "2\n{}\r\n0\r\n\r\n"),
    ("chunk extension with a bare LF", "2;a\n{}\r\n0\r\n\r\n"),
    ("chunk extension with NUL", "2;\0\r\n{}\r\n0\r\n\r\n"),
    ("chunk longer than its size", "1\r\n{}\r\n0\r\n\r\n"),
    ("chunk that ends with a bare LF", "2\r\n{}\n0\r\n\r\n"),
    ("trailer that ends with a bare LF", "2\r\n{}\r\n0\r\nA: b\nC: d\r\n\r\n"),
    ("body that ends with a bare LF", "2\r\n{}\r\n0\r\n\n"),
];

/// Malformed requests.
const REQUESTS: &[(&str, &str)] = &[
    ("no Host", "GET /healthz HTTP/1.1\r\n\r\n"),
    ("a bare LF after the first line", "GET /healthz HTTP/1.1\nHost: x\r\n\r\n"),
    ("TE in HTTP/1.0", "POST /healthz HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("HTTP/2 without TLS", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("another version", "GET /healthz HTTP/1.2\r\nHost: x\r\n\r\n"),
    ("no version", "GET /healthz\r\nHost: x\r\n\r\n"),
    ("NUL in the path", "GET /health\0z HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a bare LF before the first line", "\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a tunnel", "CONNECT /healthz HTTP/1.1\r\nHost: x\r\n\r\n"),
];

/// Requests before the ambiguous one on the same connection, with their status.
fn before(key: &str) -> [(&'static str, String, Option<&'static str>); 4] {
    let body = "2\r\n{}\r\n0\r\n\r\n";
    let post = format!(
        "POST /v1/docker-configs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    );
    [
        ("alone", String::new(), None),
        ("after a complete head", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(), Some("200")),
        ("after a body", format!("{post}Content-Length: 2\r\n\r\n{{}}"), Some("422")),
        ("after a body in chunks", format!("{post}Transfer-Encoding: chunked\r\n\r\n{body}"), Some("422")),
    ]
}

/// Each request is followed by one that another parser would treat as part of its body, or the
/// other way round.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_ambiguous_request_is_refused_on_every_place_of_a_connection(pool: PgPool) {
    let app = TestApp::configured(pool, &[("REGCRED_HTTP_REQUESTS_PER_SECOND", "0")]).await;
    let key = app.new_key("smuggler", None).await;
    let hidden = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let start = format!(
        "POST /v1/docker-configs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    );
    let mut wrong = Vec::new();
    for (place, before, first) in before(&key) {
        let mut check = |name: &str, request: &str, must_answer: bool| {
            let answer = answers(app.address, format!("{before}{request}{hidden}").as_bytes());
            let mut statuses: Vec<&str> =
                answer.match_indices("HTTP/1.").map(|(at, _)| &answer[at + 9..at + 12]).collect();
            let is_first_served = first.is_none_or(|first| !statuses.is_empty() && statuses.remove(0) == first);
            let is_refused = statuses == ["400"] || statuses.is_empty() && !must_answer;
            if !is_first_served || !is_refused {
                wrong.push(format!("{name}, {place}: {answer:?}"));
            }
        };
        for (name, rest) in HEADS {
            check(name, &format!("{start}{rest}"), true);
        }
        for (name, rest) in CHUNKS {
            check(name, &format!("{start}Transfer-Encoding: chunked\r\n\r\n{rest}"), false);
        }
        for (name, request) in REQUESTS {
            check(name, request, true);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The rest of an unread body, and what follows it, is not served: a proxy may have sent it for
/// another client.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn nothing_is_served_after_an_unread_body(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let hidden = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    // A head with a bare line feed, hidden in a chunk and after the body.
    let bare = "GET /healthz HTTP/1.1\nHost: x\n\n";
    let framings = [
        format!("Content-Length: 2\r\n\r\n{{}}{hidden}"),
        format!("Content-Length: {}\r\n\r\n{hidden}{hidden}", hidden.len()),
        format!("Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{hidden}"),
        format!("Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{bare}\r\n0\r\n\r\n{bare}", bare.len()),
        format!("Transfer-Encoding: chunked\r\n\r\n{:x};\r\n{bare}\r\n0\r\nA: b\r\n\r\n{hidden}{bare}", bare.len()),
    ];
    // Refused before the body is read, and a route that takes none.
    for (request, status) in [("POST /v1/clusters", "401"), ("GET /healthz", "200"), ("POST /nowhere", "404")] {
        for framing in &framings {
            let head = format!("{request} HTTP/1.1\r\nHost: x\r\n");
            let answer = answers(app.address, format!("{head}{framing}").as_bytes());
            assert_eq!(statuses(&answer), [status], "{framing:?}: {answer}");
            assert!(answer.to_ascii_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");

            // In two parts: the response is ready before the rest arrives.
            let mut stream = connect(app.address);
            let (first, rest) = framing.split_at(framing.find("\r\n\r\n").expect("a head") + 4);
            stream.write_all(format!("{head}{first}").as_bytes()).expect("sent");
            let mut answer = read_head(&mut stream);
            // The server may have closed the connection.
            let _ = stream.write_all(rest.as_bytes());
            answer += &read_to_the_end(&mut stream);
            assert_eq!(statuses(&answer), [status], "{framing:?} in two parts: {answer}");
        }
    }
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn requests_in_advance_are_answered_in_order(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("eager", None).await;
    let request = |method: &str, path: &str, close: &str| {
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{close}\r\n")
    };
    // The response to HEAD has the length of a body and no body.
    let sent = [
        request("HEAD", "/v1/me", ""),
        request("GET", "/nowhere", ""),
        request("HEAD", "/openapi.json", ""),
        request("GET", "/v1/me", ""),
        request("GET", "/healthz", "Connection: close\r\n"),
        request("GET", "/v1/me", ""),
    ];
    let answer = answers(app.address, sent.concat().as_bytes());
    assert_eq!(statuses(&answer), ["200", "404", "200", "200", "200"], "{answer}");
    assert_eq!(answer.matches("\"permissions\"").count(), 1, "{answer}");
    assert!(answer.ends_with("ok\n"), "{answer}");
}

#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn a_body_with_line_feeds_is_one_request(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("honest", None).await;
    let start = format!(
        "POST /v1/docker-configs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    );
    let body = "{\n\"accounts\": [],\n\n\"profile\": \"kubernetes\"\n}\n";
    // Unknown chunk extensions are ignored, as RFC 9112 requires.
    let framings = [
        format!("Content-Length: {}\r\n\r\n{body}", body.len()),
        format!("Transfer-Encoding: chunked\r\n\r\n{:x};a=b\r\n{body}\r\n0\r\n\r\n", body.len()),
    ];
    for framing in framings {
        // Two requests on one connection; the second one closes it.
        let last = start.replace("Host: x", "Host: x\r\nConnection: close");
        let answer = answers(app.address, format!("{start}{framing}{last}{framing}").as_bytes());
        let statuses = statuses(&answer);
        assert!(statuses.len() == 2 && statuses[0] == statuses[1], "{answer}");
        assert!(!answer.contains("malformed-json") && !answer.contains("bad-request"), "{answer}");
    }
}
