//! Closed-loop load generator: each connection sends its next request after the previous response.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Results of one window of load.
pub struct Load {
    /// Requests per second.
    pub rate: f64,
    /// Number of answered requests.
    pub requests: usize,
    /// Sorted.
    latencies: Vec<Duration>,
}

impl Load {
    /// Merges the latencies of several windows.
    pub fn merged(windows: Vec<Self>) -> Self {
        let rate = windows.iter().map(|window| window.rate).sum::<f64>() / super::report::float(windows.len());
        let mut latencies: Vec<Duration> = windows.into_iter().flat_map(|window| window.latencies).collect();
        latencies.sort_unstable();
        Self { rate, requests: latencies.len(), latencies }
    }

    /// Latency at this quantile.
    pub fn quantile(&self, share: f64) -> Duration {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an index"
        )]
        let index = (self.latencies.len() as f64 * share) as usize;
        self.latencies.get(index.min(self.latencies.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// Requests to send. Each connection cycles through its share.
pub struct Ask<'a> {
    /// Server.
    pub address: SocketAddr,
    /// Raw requests.
    pub requests: &'a [Vec<u8>],
    /// Accepted statuses. Any other ends the run with an error.
    pub expected: &'static [u16],
}

/// Serializes a request.
pub fn request(method: &str, path: &str, key: Option<&str>, body: &str) -> Vec<u8> {
    let authorization = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let content = if body.is_empty() {
        String::new()
    } else {
        format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
    };
    format!("{method} {path} HTTP/1.1\r\nHost: bench\r\n{authorization}{content}\r\n{body}").into_bytes()
}

/// Sends one request on a new connection and returns status and body.
pub fn once(address: SocketAddr, request: &[u8]) -> anyhow::Result<(u16, String)> {
    on_this_thread(async {
        let mut connection = Connection::open(address).await?;
        let status = connection.exchange(request).await?;
        Ok((status, String::from_utf8_lossy(connection.body()).into_owned()))
    })
}

/// Sends one request repeatedly. Only status 200 is accepted.
pub fn run(address: SocketAddr, request: &[u8], connections: usize, time: Duration) -> anyhow::Result<Load> {
    run_mix(&Ask { address, requests: &[request.to_vec()], expected: &[200] }, connections, time)
}

/// Generates load from one thread per core.
pub fn run_mix(ask: &Ask<'_>, connections: usize, time: Duration) -> anyhow::Result<Load> {
    let threads = super::process::cores().min(connections);
    let start = Instant::now();
    let of_threads = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads)
            .map(|thread| {
                scope.spawn(move || {
                    let mine = (thread..connections).step_by(threads);
                    let loops = mine.map(|first| keep_asking(ask, (first, connections), start + time));
                    on_this_thread(futures_util::future::try_join_all(loops))
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread of the load panicked")))
            .collect()
    });
    let of_threads: anyhow::Result<Vec<Vec<Vec<Duration>>>> = of_threads;
    let took = start.elapsed();
    let mut latencies: Vec<Duration> = of_threads?.into_iter().flatten().flatten().collect();
    latencies.sort_unstable();
    let requests = latencies.len();
    Ok(Load { rate: super::report::float(requests) / took.as_secs_f64(), requests, latencies })
}

/// Runs a future on a current-thread runtime.
pub fn on_this_thread<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// Runs one connection until `until`. The connections share the requests.
async fn keep_asking(
    ask: &Ask<'_>,
    (first, connections): (usize, usize),
    until: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let mut connection = Connection::open(ask.address).await?;
    let mut requests = ask.requests.iter().cycle().skip(first % ask.requests.len()).step_by(connections);
    let mut latencies = Vec::new();
    let mut sent = Instant::now();
    while sent < until {
        let request = requests.next().context("no requests")?;
        match connection.exchange(request).await? {
            status if ask.expected.contains(&status) => {}
            status => bail!("{status}: {}", String::from_utf8_lossy(connection.body())),
        }
        let answered = Instant::now();
        latencies.push(answered - sent);
        sent = answered;
    }
    Ok(latencies)
}

/// Keep-alive connection with one request in flight.
pub struct Connection {
    stream: TcpStream,
    answer: Vec<u8>,
    body_at: usize,
}

impl Connection {
    /// Connects.
    pub async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, answer: Vec::with_capacity(16 * 1024), body_at: 0 })
    }

    /// Body of the last response.
    pub fn body(&self) -> &[u8] {
        &self.answer[self.body_at..]
    }

    /// Sends a request, reads the complete response and returns its status.
    ///
    /// The response needs `Content-Length` unless it has no body.
    pub async fn exchange(&mut self, request: &[u8]) -> anyhow::Result<u16> {
        self.stream.write_all(request).await?;
        self.answer.clear();
        self.body_at = loop {
            self.read().await?;
            if let Some(end) = find(&self.answer, b"\r\n\r\n") {
                break end + 4;
            }
        };
        let head = &self.answer[..self.body_at];
        let status = number(head.get(9..12).context("response without a status")?)?;
        if status == 204 {
            return Ok(204);
        }
        let length_at = find(head, b"\r\ncontent-length: ").context("response without Content-Length")? + 18;
        let length_end = length_at + find(&head[length_at..], b"\r").context("unterminated header")?;
        let end = self.body_at + number(&head[length_at..length_end])?;
        while self.answer.len() < end {
            self.read().await?;
        }
        Ok(u16::try_from(status)?)
    }

    async fn read(&mut self) -> anyhow::Result<()> {
        if self.stream.read_buf(&mut self.answer).await? == 0 {
            bail!("the server closed the connection");
        }
        Ok(())
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

fn number(digits: &[u8]) -> anyhow::Result<usize> {
    Ok(str::from_utf8(digits)?.parse()?)
}
