//! Clients that send too slowly or too much.

use std::{
    cell::Cell,
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use futures_util::future::try_join_all;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{sleep, timeout},
};

use super::Stage;
use crate::{
    load::{self, on_this_thread},
    report::{Goals, float},
};

/// Deadline for a connection that the server should have closed.
const DEADLINE: Duration = Duration::from_secs(30);
/// Connections that send an incomplete head.
const HALF_OPEN: usize = 4000;
/// Half-open connections are closed after 5 seconds; measuring ends before that.
const BESIDE_HALF_OPEN: Duration = Duration::from_secs(3);

/// A1 slow clients: time until they are cut off, and latency for others beside half-open
/// connections.
pub fn slow(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let server = stage.sandbox.serve()?;
    let (address, key) = (server.address, stage.key.as_str());
    let keyed = format!("Host: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n");
    let chunked = "Transfer-Encoding: chunked\r\n\r\n";
    let (head, bodies) = on_this_thread(async {
        let head = trickle(address, "GET /healthz HTTP/1.1\r\n".to_owned(), "X: y\r\n");
        let bodies = [
            (format!("POST /v1/clusters HTTP/1.1\r\n{keyed}Content-Length: 100000\r\n\r\n"), " "),
            (format!("POST /v1/clusters HTTP/1.1\r\n{keyed}{chunked}"), "1\r\n \r\n"),
            (format!("GET /v1/me HTTP/1.1\r\n{keyed}{chunked}"), "1\r\n \r\n"),
            (format!("POST /v1/clusters HTTP/1.1\r\nHost: x\r\n{chunked}"), "1\r\n \r\n"),
            ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\n".to_owned(), "X: y\r\n"),
        ];
        let bodies = try_join_all(bodies.into_iter().map(|(first, drop)| trickle(address, first, drop)));
        tokio::try_join!(head, bodies)
    })?;
    ensure!(head.1.starts_with("HTTP/1.1 408 "), "a slow head was answered {:?}", head.1);
    goals.at_most("A1 slow clients: 408 to a slow head, s", 6.0, head.0.as_secs_f64());
    let last = bodies.iter().map(|(took, _)| took.as_secs_f64()).fold(0.0, f64::max);
    goals.at_most("A1 slow clients: trickled bodies and second heads cut off, s", 15.0, last);

    let request = load::request("GET", "/v1/me", Some(key), "");
    load::run(address, &request, 8, Duration::from_millis(500))?;
    let (opened, is_open) = std::sync::mpsc::channel();
    let (done, until) = tokio::sync::oneshot::channel::<()>();
    let load = std::thread::scope(|scope| {
        let holder = scope.spawn(move || {
            on_this_thread(async {
                let open = (0..HALF_OPEN).map(|_| async move {
                    let mut stream = TcpStream::connect(address).await?;
                    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n").await?;
                    anyhow::Ok(stream)
                });
                let waiting: Vec<TcpStream> = try_join_all(open).await.context("ulimit -n may be too low")?;
                opened.send(waiting.len())?;
                let _ = until.await;
                Ok(())
            })
        });
        // The holder reports the number of open connections, or has failed.
        let count = is_open.recv();
        let load = load::run(address, &request, 8, BESIDE_HALF_OPEN);
        let _ = done.send(());
        holder.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(count? == HALF_OPEN, "too few connections are open");
        load
    })?;
    goals.at_most(
        "A1 slow clients: p99 beside 4,000 half-open connections, ms",
        50.0,
        load.quantile(0.99).as_secs_f64() * 1e3,
    );
    Ok(())
}

/// Sends `first`, then `drop` every 200 ms until the connection is closed. Returns the time and the
/// response.
async fn trickle(address: SocketAddr, first: String, drop: &str) -> anyhow::Result<(Duration, String)> {
    let start = Instant::now();
    let (mut reader, mut writer) = TcpStream::connect(address).await?.into_split();
    writer.write_all(first.as_bytes()).await?;
    let mut answer = Vec::new();
    let reading = async {
        // A reset ends the response, too.
        let _ = reader.read_to_end(&mut answer).await;
    };
    let writing = async {
        while writer.write_all(drop.as_bytes()).await.is_ok() {
            sleep(Duration::from_millis(200)).await;
        }
    };
    let _ = timeout(DEADLINE, async {
        tokio::select! {
            () = reading => (),
            () = writing => (),
        }
    })
    .await;
    Ok((start.elapsed(), String::from_utf8_lossy(&answer).into_owned()))
}

/// A2 oversized requests: rejected without being read, and quickly.
pub fn oversized(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
    let server = stage.sandbox.serve()?;
    let (address, key) = (server.address, stage.key.as_str());
    load::run(address, &load::request("GET", "/v1/me", Some(key), ""), 8, Duration::from_millis(500))?;
    let before = server.resident_mib()?;

    let large = " ".repeat(10 * 1024 * 1024);
    let announced = load::request("POST", "/v1/clusters", Some(key), &large);
    let chunked = format!(
        "POST /v1/clusters HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\nA00000\r\n{large}\r\n0\r\n\r\n"
    );
    for (name, bytes) in [("10 MB", announced), ("10 MB chunked", chunked.into_bytes())] {
        let asked = ask(address, &bytes)?;
        ensure!(asked.status == 413, "{name}: status {}", asked.status);
        goals.at_most(&format!("A2 oversized requests: {name}, bytes read, MB"), 1.0, float(asked.read) / 1e6);
    }

    let import = "/v1/registry-accounts:import?dryRun=true";
    let keys = (0..1_000_000).map(|number| format!("\"k{number}\":{{}},")).collect::<Vec<_>>().concat();
    let many = format!("{{\"auths\":{{{keys}\"k\":{{}}}}}}");
    let fitting = format!("{{\"auths\":{{{}\"k\":{{}}}}}}", &keys[..=keys[..2_000_000].rfind(',').unwrap_or(0)]);
    let (deep, deep_object) = ("[".repeat(200_000), "{\"a\":".repeat(100_000));
    let mut slowest = Duration::ZERO;
    for (path, body) in [
        ("/v1/clusters", &deep),
        ("/v1/docker-configs", &deep_object),
        (import, &deep),
        (import, &deep_object),
        ("/v1/docker-configs", &many),
        (import, &many),
    ] {
        let asked = ask(address, &load::request("POST", path, Some(key), body))?;
        ensure!((400..500).contains(&asked.status), "{path}: status {}", asked.status);
        slowest = slowest.max(asked.answered_after);
    }
    goals.at_most(
        "A2 oversized requests: 4xx to 200,000 levels or 1,000,000 keys, ms",
        50.0,
        slowest.as_secs_f64() * 1e3,
    );
    let asked = ask(address, &load::request("POST", import, Some(key), &fitting))?;
    let took = asked.answered_after.as_secs_f64() * 1e3;
    goals.at_most(
        &format!("A2 oversized requests: {} to as many keys as fit into a body, ms", asked.status),
        1000.0,
        took,
    );

    let headers = (0..10_000).map(|number| format!("X-{number}: y\r\n")).collect::<Vec<_>>().concat();
    let asked = ask(address, format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes())?;
    ensure!([400, 431].contains(&asked.status), "10,000 headers: status {}", asked.status);
    goals.at_most("A2 oversized requests: memory growth, MiB", 20.0, server.resident_mib()? - before);
    Ok(())
}

/// Response to a request that is read while the request is still being sent.
struct Asked {
    status: u16,
    answered_after: Duration,
    /// Bytes that the server has read: those sent, without those in the kernel's buffers.
    read: usize,
}

/// Sends bytes and reads at the same time until there is a response.
fn ask(address: SocketAddr, bytes: &[u8]) -> anyhow::Result<Asked> {
    on_this_thread(async {
        let socket = TcpSocket::new_v4()?;
        socket.set_send_buffer_size(16 * 1024)?;
        let stream = socket.connect(address).await?;
        let own_address = stream.local_addr()?;
        let (mut reader, mut writer) = stream.into_split();
        let start = Instant::now();
        let sent = Cell::new(0);
        let writing = async {
            for piece in bytes.chunks(8 * 1024) {
                // The server may close the connection before all bytes are sent.
                if writer.write_all(piece).await.is_err() {
                    break;
                }
                sent.set(sent.get() + piece.len());
            }
            std::future::pending::<()>().await;
        };
        let reading = async {
            let mut head = [0; 12];
            reader.read_exact(&mut head).await.context("no answer")?;
            let answered_after = start.elapsed();
            let status = str::from_utf8(&head[9..])?.parse()?;
            // The server closes a connection with an unread body after a second and reads nothing
            // until then.
            sleep(Duration::from_millis(300)).await;
            let read = sent.get().saturating_sub(buffered(own_address, address)?);
            anyhow::Ok(Asked { status, answered_after, read })
        };
        tokio::select! {
            asked = timeout(DEADLINE, reading) => asked?,
            () = writing => unreachable!("pending until there is a response"),
        }
    })
}

/// Bytes in the kernel's buffers of a loopback connection: unsent at `from` and unread at `to`.
fn buffered(from: SocketAddr, to: SocketAddr) -> anyhow::Result<usize> {
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let mut waiting = 0;
    for line in table.lines().skip(1) {
        // Columns: number, local and remote address, state, and both queues in hexadecimal.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, local, remote, _, queues, ..] = fields.as_slice() else { continue };
        let port = |address: &str| address.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        let (unsent, unread) = queues.split_once(':').context("no queues")?;
        if (port(local), port(remote)) == (Some(from.port()), Some(to.port())) {
            waiting += usize::from_str_radix(unsent, 16)?;
        } else if (port(local), port(remote)) == (Some(to.port()), Some(from.port())) {
            waiting += usize::from_str_radix(unread, 16)?;
        }
    }
    Ok(waiting)
}
