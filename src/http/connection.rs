//! Timeouts for slow clients, and the order of requests, per connection.
//!
//! actix-web limits the time for the first request head, and [`body`](super::body) the time for a
//! body that a handler reads. This module limits the rest: receiving a response, sending an unread
//! body, and sending the next head.
//!
//! When a response is ready, the client has [`CLIENT_TIMEOUT`] to receive it, to finish its request
//! and to send the complete head of the next one. No limit applies while a handler runs. While a
//! response streams ([`StreamGuard`]), the limit applies only as long as a write is blocked.
//!
//! The parser receives one request at a time. What follows a request waits until its response is
//! ready, and never arrives if that response closes the connection. The parser could otherwise
//! serve bytes that a client or a proxy takes for the rest of a body.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use actix_web::HttpRequest;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, Sleep},
};
use tokio_rustls::server::TlsStream;

use crate::http::framing::{Malformed, Scanner};

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
    turn: Cell<Turn>,
    /// Wakes the connection if received bytes wait for their turn.
    waiting: RefCell<Option<Waker>>,
    /// Whether the parser has received only a part of the current request.
    is_within_request: Cell<bool>,
    has_body: Cell<bool>,
    /// Whether a response is streaming.
    is_streaming: Cell<bool>,
}

/// What happens to received bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// They belong to the request that the parser reads.
    Request,
    /// They follow a complete request, and wait for its response.
    Response,
    /// The response closes the connection: they are discarded, once the request is complete.
    Close,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            deadline: Cell::new(Some(Instant::now() + CLIENT_TIMEOUT)),
            read: Cell::new(0),
            turn: Cell::new(Turn::Request),
            waiting: RefCell::default(),
            is_within_request: Cell::new(false),
            has_body: Cell::new(false),
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
    }

    /// Whether the current request has a body.
    pub fn has_body(&self) -> bool {
        self.has_body.get()
    }

    /// Starts the clock: a response is ready. A streaming response keeps the clock stopped.
    ///
    /// The connection ends with this response if the response or the request says so, and if the
    /// request is not complete.
    pub fn response_ready(&self, response_closes: bool, request_closes: bool) {
        if !self.is_streaming.get() {
            self.start(response_closes);
        }
        let closes = response_closes || request_closes || self.is_streaming.get() || self.is_within_request.get();
        self.turn.set(if closes { Turn::Close } else { Turn::Request });
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    fn start(&self, is_last: bool) {
        let timeout = if is_last { CLIENT_TIMEOUT_BEFORE_CLOSE } else { CLIENT_TIMEOUT };
        self.deadline.set(Some(Instant::now() + timeout));
        self.read.set(0);
    }

    /// Whether the client of a streaming response has sent too many bytes.
    fn exceeds_stream_limit(&self) -> bool {
        self.read.get() >= STREAM_READ_MAX
    }

    fn exceeds_unread_limit(&self) -> bool {
        self.deadline.get().is_some() && self.read.get() >= UNREAD_MAX
    }

    fn received(&self, count: usize) {
        self.read.set(self.read.get().saturating_add(count));
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

/// A stream that fails once the client exceeds its timeout, and that yields one request at a time.
#[derive(Debug)]
pub struct Timed {
    stream: Stream,
    clock: Rc<Clock>,
    scanner: Scanner,
    /// Received bytes that wait for their turn. At most one read.
    held: Vec<u8>,
    /// Fires at or before the deadline and is then reset, so that a request does not cost a timer.
    sleep: Pin<Box<Sleep>>,
}

impl Timed {
    /// Starts the timeout of a new connection.
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            clock: Rc::new(Clock::new()),
            scanner: Scanner::default(),
            held: Vec::new(),
            sleep: Box::pin(tokio::time::sleep(CLIENT_TIMEOUT)),
        }
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

    /// Reads from the client. Returns false at the end of the stream.
    fn receive(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = buf.filled().len();
        ready!(match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        })?;
        let count = buf.filled().len() - before;
        self.clock.received(count);
        // Ends the stream of a client that hung up. Otherwise only the next write would notice.
        if self.clock.is_streaming.get() && (count == 0 || self.clock.exceeds_stream_limit()) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(count > 0))
    }

    /// Passes on bytes of the current request.
    fn poll_request(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        loop {
            if self.clock.exceeds_unread_limit() {
                return Poll::Pending;
            }
            let turn = self.clock.turn.get();
            let is_discarded = turn == Turn::Close && !self.scanner.is_within();
            if is_discarded {
                self.held.clear();
            }
            if self.held.is_empty() {
                if !ready!(self.receive(cx, buf))? {
                    return Poll::Ready(Ok(()));
                }
            } else if turn == Turn::Response {
                self.clock.waiting.replace(Some(cx.waker().clone()));
                return Poll::Pending;
            } else {
                let count = self.held.len().min(buf.remaining());
                buf.put_slice(&self.held[..count]);
                self.held.drain(..count);
            }
            if is_discarded {
                buf.set_filled(before);
            } else if turn == Turn::Response {
                self.held.extend_from_slice(&buf.filled()[before..]);
                buf.set_filled(before);
            } else {
                return Poll::Ready(self.pass_on(buf, before));
            }
        }
    }

    /// Scans the bytes after `before`. Keeps those that follow the request.
    fn pass_on(&mut self, buf: &mut ReadBuf<'_>, before: usize) -> io::Result<()> {
        let scanned = self.scanner.scan(&mut buf.filled_mut()[before..]);
        let end = scanned.map_err(|Malformed| io::ErrorKind::InvalidData)?;
        self.clock.is_within_request.set(end.is_none());
        self.clock.has_body.set(self.scanner.has_body());
        if let Some(end) = end {
            let end = before + end;
            self.held.splice(0..0, buf.filled()[end..].iter().copied());
            buf.set_filled(end);
            if self.clock.turn.get() == Turn::Request {
                self.clock.turn.set(Turn::Response);
            }
        }
        Ok(())
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let polled = self.poll_request(cx, buf);
        if polled.is_pending() { self.wait(cx) } else { polled }
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[test]
    fn only_bytes_after_a_response_are_counted() {
        let clock = Clock::new();
        clock.request_received();
        clock.received(2 * UNREAD_MAX);
        assert!(!clock.exceeds_unread_limit());
        clock.start(false);
        assert!(!clock.exceeds_unread_limit());
        clock.received(UNREAD_MAX);
        assert!(clock.exceeds_unread_limit());
        clock.request_received();
        assert!(!clock.exceeds_unread_limit());
    }

    async fn connected() -> (TcpStream, Timed) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        (client, Timed::new(Stream::Plain(stream)))
    }

    /// Returns what the parser receives at once; `None` if it must wait.
    async fn next(timed: &mut Timed) -> Option<String> {
        let mut bytes = vec![0; 1024];
        let count = tokio::time::timeout(Duration::from_millis(50), timed.read(&mut bytes)).await.ok()?.unwrap();
        Some(String::from_utf8_lossy(&bytes[..count]).into_owned())
    }

    #[tokio::test]
    async fn the_parser_receives_one_request_at_a_time() {
        let (mut client, mut timed) = connected().await;
        let (first, second) = ("GET /1 HTTP/1.1\r\n\r\n", "POST /2 HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
        client.write_all(format!("{first}{second}GET /3").as_bytes()).await.unwrap();

        assert_eq!(next(&mut timed).await.as_deref(), Some(first));
        assert_eq!(next(&mut timed).await, None, "the response is not ready");
        timed.clock.response_ready(false, false);
        assert_eq!(next(&mut timed).await.as_deref(), Some(second));
        assert!(timed.clock.has_body());
        timed.clock.response_ready(false, false);
        assert_eq!(next(&mut timed).await.as_deref(), Some("GET /3"));
        client.write_all(b" HTTP/1.1\n").await.unwrap();
        assert_eq!(next(&mut timed).await.as_deref(), Some(" HTTP/1.1\0"));
    }

    #[tokio::test]
    async fn nothing_follows_a_response_that_closes_the_connection() {
        let (mut client, mut timed) = connected().await;
        client.write_all(b"POST /1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{").await.unwrap();
        assert!(next(&mut timed).await.is_some());
        // A body of which the rest has not arrived is not read.
        timed.clock.response_ready(false, false);
        client.write_all(b"}\r\n0\r\n\r\nGET /2 HTTP/1.1\r\n\r\n").await.unwrap();

        assert_eq!(next(&mut timed).await.as_deref(), Some("}\r\n0\r\n\r\n"));
        assert_eq!(next(&mut timed).await, None);
        drop(client);
        assert_eq!(next(&mut timed).await.as_deref(), Some(""), "the end of the stream");
    }

    #[tokio::test]
    async fn a_blocked_streaming_response_times_out() {
        let (silent, mut timed) = connected().await;
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
