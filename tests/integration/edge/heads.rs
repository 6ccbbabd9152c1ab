//! Limits of request heads, and request smuggling.

use sqlx::PgPool;

use super::{answers, statuses};
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
];

/// Each request is followed by one that another parser would treat as part of its body, or the
/// other way round.
#[sqlx::test(migrator = "regcred::storage::schema::MIGRATOR")]
async fn an_ambiguous_request_is_refused_and_closes_the_connection(pool: PgPool) {
    let app = TestApp::spawn(pool).await;
    let key = app.new_key("smuggler", None).await;
    let hidden = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let start = format!(
        "POST /v1/docker-configs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    );
    let mut wrong = Vec::new();
    for (name, rest) in HEADS {
        let answer = answers(app.address, format!("{start}{rest}{hidden}").as_bytes());
        let statuses = statuses(&answer);
        if statuses.is_empty() || statuses.iter().any(|status| *status != "400") {
            wrong.push(format!("{name}: {answer:?}"));
        }
    }
    for (name, rest) in CHUNKS {
        let bytes = format!("{start}Transfer-Encoding: chunked\r\n\r\n{rest}{hidden}");
        let answer = answers(app.address, bytes.as_bytes());
        if statuses(&answer).iter().any(|status| *status != "400") {
            wrong.push(format!("{name}: {answer:?}"));
        }
    }
    for (name, request) in REQUESTS {
        let answer = answers(app.address, format!("{request}{hidden}").as_bytes());
        let statuses: Vec<&str> = answer.match_indices("HTTP/1.").map(|(at, _)| &answer[at + 9..at + 12]).collect();
        if statuses != ["400"] {
            wrong.push(format!("{name}: {answer:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
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
