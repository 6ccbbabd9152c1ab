//! Timeouts for slow clients, per connection.
//!
//! actix-web limits the time for the first request head, and [`body`](super::body) the time for a
//! body that a handler reads. This module limits the rest: receiving a response, sending an unread
//! body, and sending the next head.
//!
//! When a response is ready, the client has [`CLIENT_TIMEOUT`] to receive it, to finish its request
//! and to send the complete head of the next one. No limit applies while a handler runs. While a
//! response streams ([`StreamGuard`]), the limit applies only as long as a write is blocked.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use actix_web::HttpRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};
use tokio_rustls::server::TlsStream;

/// Time for the client to act.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time to receive a response that closes the connection.
const CLIENT_TIMEOUT_BEFORE_CLOSE: Duration = Duration::from_secs(2);
/// Maximum number of bytes read between a response and the next head, which may have 128 KiB. They
/// are the rest of a refused body. More bytes fill the system's buffers until the client reads the
/// response.
const UNREAD_MAX: usize = 160 * 1024;

/// Maximum number of bytes read from the client of a streaming response, including the request
/// head.
const STREAM_READ_MAX: usize = 64 * 1024;

/// Deadline of a connection, shared by its stream and its requests.
#[derive(Debug)]
pub struct Clock {
    /// Time by which the client must act; `None` while a handler runs.
    deadline: Cell<Option<Instant>>,
    read: Cell<usize>,
    head: Cell<Head>,
    /// Whether a response is streaming.
    is_streaming: Cell<bool>,
}

/// Parsing state of the next request head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    /// Only empty lines so far.
    Before,
    /// Inside a line.
    Within(Line),
    /// Complete, or already passed to the parser.
    After,
}

/// Parsing state of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    /// Contains nothing, or one carriage return.
    is_empty: bool,
    /// Ends with a carriage return.
    returned: bool,
}

impl Line {
    const NEW: Self = Self { is_empty: true, returned: false };

    fn and(self, more: &[u8]) -> Self {
        match more {
            [] => self,
            [b'\r'] => Self { is_empty: self.is_empty && !self.returned, returned: true },
            [.., last] => Self { is_empty: false, returned: *last == b'\r' },
        }
    }
}

impl Clock {
    fn new() -> Self {
        Self {
            deadline: Cell::new(Some(Instant::now() + CLIENT_TIMEOUT)),
            read: Cell::new(0),
            head: Cell::new(Head::Before),
            is_streaming: Cell::new(false),
        }
    }

    /// Records whether a write of a streaming response succeeded or is blocked.
    fn sent(&self, could: bool) {
        if !self.is_streaming.get() {
            return;
        }
        if could {
            self.deadline.set(None);
        } else if self.deadline.get().is_none() {
            self.deadline.set(Some(Instant::now() + CLIENT_TIMEOUT));
        }
    }

    /// The clock of a request's connection.
    pub fn of(request: &HttpRequest) -> Option<Rc<Self>> {
        request.conn_data::<Rc<Self>>().map(Rc::clone)
    }

    /// Stops the clock: a request head is complete and its handler runs.
    pub fn request_received(&self) {
        self.deadline.set(None);
        self.head.set(Head::After);
    }

    /// Starts the clock: a response is ready. A streaming response keeps the clock stopped.
    pub fn response_ready(&self, is_last: bool) {
        if !self.is_streaming.get() {
            self.start(is_last);
        }
    }

    fn start(&self, is_last: bool) {
        let timeout = if is_last { CLIENT_TIMEOUT_BEFORE_CLOSE } else { CLIENT_TIMEOUT };
        self.deadline.set(Some(Instant::now() + timeout));
        self.read.set(0);
        self.head.set(Head::Before);
    }

    /// Whether the client of a streaming response has sent too many bytes.
    fn exceeds_stream_limit(&self) -> bool {
        self.read.get() >= STREAM_READ_MAX
    }

    fn exceeds_unread_limit(&self) -> bool {
        self.deadline.get().is_some() && self.read.get() >= UNREAD_MAX
    }

    /// Counts received bytes, and corrupts a head in which a line lacks its carriage return.
    ///
    /// The parser accepts such lines. A proxy that does not would see a different request (request
    /// smuggling).
    fn received(&self, bytes: &mut [u8]) {
        self.read.set(self.read.get().saturating_add(bytes.len()));
        self.head.set(self.head.get().and(bytes));
    }
}

impl Head {
    fn and(self, bytes: &mut [u8]) -> Self {
        let (mut line, mut rest) = match self {
            Self::After => return self,
            Self::Within(line) => (line, bytes),
            Self::Before => match bytes.iter().position(|byte| !matches!(byte, b'\r' | b'\n')) {
                None => return self,
                Some(start) => (Line::NEW, &mut bytes[start..]),
            },
        };
        while let Some(end) = memchr::memchr(b'\n', rest) {
            line = line.and(&rest[..end]);
            match line {
                Line { is_empty: true, returned: true } => return Self::After,
                Line { returned: true, .. } => line = Line::NEW,
                Line { returned: false, .. } => {
                    rest[end] = 0;
                    line = Line { is_empty: false, returned: false };
                }
            }
            rest = &mut rest[end + 1..];
        }
        Self::Within(line.and(rest))
    }
}

/// Keeps the timeout from a streaming response, whose body must own this guard. The connection
/// closes afterwards.
#[derive(Debug)]
pub struct StreamGuard(Rc<Clock>);

impl StreamGuard {
    /// Creates a guard. Returns `None` if the client sent many bytes after its request, which would
    /// keep the parser busy.
    pub fn begin(request: &HttpRequest) -> Option<Self> {
        let clock = request.conn_data::<Rc<Clock>>().filter(|clock| !clock.exceeds_stream_limit())?;
        clock.is_streaming.set(true);
        Some(Self(Rc::clone(clock)))
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.is_streaming.set(false);
        self.0.start(true);
    }
}

/// A stream with or without TLS.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Plain(TcpStream),
    /// TLS, after the handshake.
    Tls(Box<TlsStream<TcpStream>>),
}

/// A stream that fails once the client exceeds its timeout.
#[derive(Debug)]
pub struct Timed {
    stream: Stream,
    clock: Rc<Clock>,
    /// Fires at or before the deadline and is then reset, so that a request does not cost a timer.
    sleep: Pin<Box<Sleep>>,
}

impl Timed {
    /// Starts the timeout of a new connection.
    pub fn new(stream: Stream) -> Self {
        Self { stream, clock: Rc::new(Clock::new()), sleep: Box::pin(tokio::time::sleep(CLIENT_TIMEOUT)) }
    }

    /// The clock, for the connection's requests.
    pub fn clock(&self) -> Rc<Clock> {
        Rc::clone(&self.clock)
    }

    /// Fails a blocked operation at the deadline, and registers the wake-up for it.
    fn wait<T>(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        let deadline = self.clock.deadline.get();
        if let Some(deadline) = deadline
            && deadline < self.sleep.deadline()
        {
            self.sleep.as_mut().reset(deadline);
        }
        loop {
            ready!(self.sleep.as_mut().poll(cx));
            let now = Instant::now();
            match deadline {
                Some(deadline) if deadline <= now => return Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Some(deadline) => self.sleep.as_mut().reset(deadline),
                None => self.sleep.as_mut().reset(now + CLIENT_TIMEOUT),
            }
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.clock.exceeds_unread_limit() {
            return self.wait(cx);
        }
        let before = buf.filled().len();
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        };
        if polled.is_pending() {
            return self.wait(cx);
        }
        self.clock.received(&mut buf.filled_mut()[before..]);
        // Ends the stream of a client that hung up. Otherwise only the next write would notice.
        let has_hung_up = buf.filled().len() == before;
        if self.clock.is_streaming.get() && (has_hung_up || self.clock.exceeds_stream_limit()) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        polled
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        };
        self.clock.sent(polled.is_ready());
        if polled.is_pending() { self.wait(cx) } else { polled }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        };
        self.clock.sent(polled.is_ready());
        if polled.is_pending() { self.wait(cx) } else { polled }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        };
        if polled.is_pending() { self.wait(cx) } else { polled }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// What the parser receives of a head that arrives in pieces of this size.
    fn parsed(sent: &str, piece: usize) -> String {
        let clock = Clock::new();
        let mut bytes = sent.as_bytes().to_vec();
        bytes.chunks_mut(piece).for_each(|piece| clock.received(piece));
        String::from_utf8(bytes).unwrap()
    }

    #[rstest]
    #[case("GET / HTTP/1.1\r\nHost: x\r\n\r\nbody\nof\n\nlines\n", None)]
    #[case("\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\n", None)]
    #[case("GET / HTTP/1.1\nHost: x\r\n\r\n", Some(14))]
    #[case("GET / HTTP/1.1\r\nHost: x\n\r\n", Some(23))]
    #[case("GET / HTTP/1.1\r\nHost: x\r\n\n", Some(25))]
    #[case("\r\n\r\nGET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", Some(27))]
    fn a_head_with_a_bare_line_feed_is_corrupted(#[case] sent: &str, #[case] corrupted: Option<usize>) {
        let mut expected = sent.as_bytes().to_vec();
        if let Some(at) = corrupted {
            expected[at] = 0;
        }
        for piece in [1, 2, 3, 1024] {
            assert_eq!(parsed(sent, piece), String::from_utf8_lossy(&expected), "in pieces of {piece}");
        }
    }

    #[test]
    fn only_bytes_after_a_response_are_counted() {
        let clock = Clock::new();
        clock.request_received();
        clock.received(&mut vec![b'x'; 2 * UNREAD_MAX]);
        assert!(!clock.exceeds_unread_limit());
        clock.start(false);
        assert!(!clock.exceeds_unread_limit());
        clock.received(&mut vec![b'x'; UNREAD_MAX]);
        assert!(clock.exceeds_unread_limit());
        clock.request_received();
        assert!(!clock.exceeds_unread_limit());
    }

    #[tokio::test]
    async fn a_blocked_streaming_response_times_out() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut timed = Timed::new(Stream::Plain(stream));
        timed.clock.request_received();
        timed.clock.is_streaming.set(true);
        let (began, chunk) = (Instant::now(), vec![b'x'; 64 * 1024]);

        // Fills the buffers of the system, and then blocks until the timeout.
        let error = loop {
            if let Err(error) = timed.write_all(&chunk).await {
                break error;
            }
        };

        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= CLIENT_TIMEOUT);
        drop(silent);
    }

    #[tokio::test]
    async fn the_timeout_applies_only_while_a_stream_is_blocked() {
        let clock = Rc::new(Clock::new());
        clock.request_received();
        clock.sent(false);
        assert_eq!(clock.deadline.get(), None, "a response that does not stream has its timeout when it is ready");
        clock.is_streaming.set(true);
        let guard = StreamGuard(Rc::clone(&clock));
        assert_eq!(clock.deadline.get(), None);
        clock.sent(false);
        let deadline = clock.deadline.get();
        assert!(deadline.is_some());
        clock.sent(false);
        assert_eq!(clock.deadline.get(), deadline, "a further blocked write does not extend the deadline");
        clock.sent(true);
        assert_eq!(clock.deadline.get(), None);
        drop(guard);
        assert!(clock.deadline.get().is_some() && !clock.is_streaming.get());
    }
}
