//! Clients that send slowly, or too much.

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

/// When a client is given up that should have been cut off.
const GIVEN_UP: Duration = Duration::from_secs(30);
/// Connections that are opened and never send a whole head.
const HALF_OPEN: usize = 4000;
/// They are cut off after 5 seconds: good requests are measured before that.
const BESIDE_HALF_OPEN: Duration = Duration::from_secs(3);

/// A1: how soon who trickles is cut off, and how well others are served beside many who wait.
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
    goals.at_most("A1 slow head: 408 after, s", 6.0, head.0.as_secs_f64());
    let last = bodies.iter().map(|(took, _)| took.as_secs_f64()).fold(0.0, f64::max);
    goals.at_most("A1 trickled bodies and second heads: cut off after, s", 15.0, last);

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
        // It says how many are open, or has failed.
        let count = is_open.recv();
        let load = load::run(address, &request, 8, BESIDE_HALF_OPEN);
        let _ = done.send(());
        holder.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        ensure!(count? == HALF_OPEN, "too few are open");
        load
    })?;
    goals.at_most("A1 p99 beside 4,000 half-open connections, ms", 50.0, load.quantile(0.99).as_secs_f64() * 1e3);
    Ok(())
}

/// Sends a little now and then until the connection is closed: how long that took, and what was answered.
async fn trickle(address: SocketAddr, first: String, drop: &str) -> anyhow::Result<(Duration, String)> {
    let start = Instant::now();
    let (mut reader, mut writer) = TcpStream::connect(address).await?.into_split();
    writer.write_all(first.as_bytes()).await?;
    let mut answer = Vec::new();
    let reading = async {
        // A reset is an end, too.
        let _ = reader.read_to_end(&mut answer).await;
    };
    let writing = async {
        while writer.write_all(drop.as_bytes()).await.is_ok() {
            sleep(Duration::from_millis(200)).await;
        }
    };
    let _ = timeout(GIVEN_UP, async {
        tokio::select! {
            () = reading => (),
            () = writing => (),
        }
    })
    .await;
    Ok((start.elapsed(), String::from_utf8_lossy(&answer).into_owned()))
}

/// A2: what is refused unread, and what is refused fast.
pub fn too_much(stage: &Stage, goals: &mut Goals) -> anyhow::Result<()> {
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
    for (name, bytes) in [("10 MB", announced), ("10 MB in chunks", chunked.into_bytes())] {
        let asked = ask(address, &bytes)?;
        ensure!(asked.status == 413, "{name} were answered {}", asked.status);
        goals.at_most(&format!("A2 {name}: read, MB"), 1.0, float(asked.read) / 1e6);
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
        ensure!((400..500).contains(&asked.status), "{path} answered {}", asked.status);
        slowest = slowest.max(asked.answered_after);
    }
    goals.at_most("A2 200,000 levels, 1,000,000 keys: answered 4xx after, ms", 50.0, slowest.as_secs_f64() * 1e3);
    let asked = ask(address, &load::request("POST", import, Some(key), &fitting))?;
    let took = asked.answered_after.as_secs_f64() * 1e3;
    goals.at_most(&format!("A2 as many keys as fit into a body: answered {} after, ms", asked.status), 1000.0, took);

    let headers = (0..10_000).map(|number| format!("X-{number}: y\r\n")).collect::<Vec<_>>().concat();
    let asked = ask(address, format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes())?;
    ensure!([400, 431].contains(&asked.status), "10,000 headers were answered {}", asked.status);
    goals.at_most("A2 memory grew by, MiB", 20.0, server.resident_mib()? - before);
    Ok(())
}

/// What became of a request that was sent while its answer was read.
struct Asked {
    status: u16,
    answered_after: Duration,
    /// How much of it the server has read: what was sent, without what waits in the buffers of the system.
    read: usize,
}

/// Sends bytes and reads at the same time, until there is an answer.
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
                // It may be closed before all is sent.
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
            // A connection with an unread body is closed after a second; before that nothing more is read.
            sleep(Duration::from_millis(300)).await;
            let read = sent.get().saturating_sub(buffered(own_address, address)?);
            anyhow::Ok(Asked { status, answered_after, read })
        };
        tokio::select! {
            asked = timeout(GIVEN_UP, reading) => asked?,
            () = writing => unreachable!("it goes on until there is an answer"),
        }
    })
}

/// How many bytes wait between two ends of a connection on this machine: not yet taken by the other's system, or not yet read
/// by its program.
fn buffered(from: SocketAddr, to: SocketAddr) -> anyhow::Result<usize> {
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let mut waiting = 0;
    for line in table.lines().skip(1) {
        // Number, local and remote address, state, and the two queues, as hexadecimal numbers.
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
