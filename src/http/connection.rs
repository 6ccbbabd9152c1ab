//! A connection under a clock. actix-web cuts off a client that is slow to send its first head, and `body` one that is slow to send
//! a body that somebody reads. Everything else that a client can do slowly is cut off here: to take an answer, to end a body
//! that nobody reads, to send the next head on the same connection.
//!
//! There is one rule. From the moment that an answer is ready, the client has [`PATIENCE`] to take it, to end its own
//! request and to send the head of the next one, whole. While a request is being handled there is no such limit: it is
//! not the client who is waited for.

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

/// How long a client may take for what is its turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where the connection is closed after the answer: it is small, and nothing more is waited for.
const PATIENCE_BEFORE_CLOSE: Duration = Duration::from_secs(2);
/// How much is read between an answer and the next head, which may be 128 KiB long: the rest of a body that was refused, then
/// nothing more. What is longer fills the buffers of the system, and its sender finds the answer.
const UNREAD_MAX: usize = 160 * 1024;

/// Where the clock of a connection stands. The stream and the requests on it share it.
#[derive(Debug)]
pub struct Clock {
    /// When the client's turn ends; `None` while it is ours.
    deadline: Cell<Option<Instant>>,
    read: Cell<usize>,
    head: Cell<Head>,
}

/// What was seen of the head that is being sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    /// Nothing but empty lines.
    Before,
    /// The beginning of a line.
    Within(Line),
    /// It is whole, or was seen by the parser already.
    After,
}

/// What was seen of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    /// There is nothing in it but perhaps one carriage return.
    is_empty: bool,
    /// It ended with a carriage return so far.
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
        Self { deadline: Cell::new(Some(Instant::now() + PATIENCE)), read: Cell::new(0), head: Cell::new(Head::Before) }
    }

    /// The clock of the connection that a request came on.
    pub fn of(request: &HttpRequest) -> Option<Rc<Self>> {
        request.conn_data::<Rc<Self>>().map(Rc::clone)
    }

    /// A head is whole, and its request is being handled.
    pub fn ours(&self) {
        self.deadline.set(None);
        self.head.set(Head::After);
    }

    /// An answer is ready, after which the connection is closed or not.
    pub fn theirs(&self, is_last: bool) {
        let patience = if is_last { PATIENCE_BEFORE_CLOSE } else { PATIENCE };
        self.deadline.set(Some(Instant::now() + patience));
        self.read.set(0);
        self.head.set(Head::Before);
    }

    fn has_read_enough(&self) -> bool {
        self.deadline.get().is_some() && self.read.get() >= UNREAD_MAX
    }

    /// Counts what was read, and spoils a head in which a line ends without a carriage return, so that the parser refuses
    /// it. The parser itself takes such lines, and a proxy that does not would see another request than we do.
    fn saw(&self, bytes: &mut [u8]) {
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

/// A stream, with or without TLS.
#[derive(Debug)]
pub enum Stream {
    /// As it comes.
    Plain(TcpStream),
    /// After the handshake.
    Tls(Box<TlsStream<TcpStream>>),
}

/// A stream that ends when the client's turn is over.
#[derive(Debug)]
pub struct Timed {
    stream: Stream,
    clock: Rc<Clock>,
    /// Never later than the deadline; looked at again when it is over, so that a request costs no timer.
    sleep: Pin<Box<Sleep>>,
}

impl Timed {
    /// Starts the clock of a new connection.
    pub fn new(stream: Stream) -> Self {
        Self { stream, clock: Rc::new(Clock::new()), sleep: Box::pin(tokio::time::sleep(PATIENCE)) }
    }

    /// The clock, for the requests of this connection.
    pub fn clock(&self) -> Rc<Clock> {
        Rc::clone(&self.clock)
    }

    /// What cannot go on now ends if the client's turn is over; otherwise it is woken up when it will be.
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
                None => self.sleep.as_mut().reset(now + PATIENCE),
            }
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.clock.has_read_enough() {
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
        self.clock.saw(&mut buf.filled_mut()[before..]);
        polled
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
        };
        if polled.is_pending() { self.wait(cx) } else { polled }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        };
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

    use super::*;

    /// What the parser gets of a head that comes in pieces of this size.
    fn seen(sent: &str, piece: usize) -> String {
        let clock = Clock::new();
        let mut bytes = sent.as_bytes().to_vec();
        bytes.chunks_mut(piece).for_each(|piece| clock.saw(piece));
        String::from_utf8(bytes).unwrap()
    }

    #[rstest]
    #[case("GET / HTTP/1.1\r\nHost: x\r\n\r\nbody\nof\n\nlines\n", None)]
    #[case("\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n\n", None)]
    #[case("GET / HTTP/1.1\nHost: x\r\n\r\n", Some(14))]
    #[case("GET / HTTP/1.1\r\nHost: x\n\r\n", Some(23))]
    #[case("GET / HTTP/1.1\r\nHost: x\r\n\n", Some(25))]
    #[case("\r\n\r\nGET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", Some(27))]
    fn a_line_of_a_head_that_ends_without_a_return_is_spoilt(#[case] sent: &str, #[case] spoilt: Option<usize>) {
        let mut expected = sent.as_bytes().to_vec();
        if let Some(at) = spoilt {
            expected[at] = 0;
        }
        for piece in [1, 2, 3, 1024] {
            assert_eq!(seen(sent, piece), String::from_utf8_lossy(&expected), "in pieces of {piece}");
        }
    }

    #[test]
    fn only_what_follows_an_answer_is_counted() {
        let clock = Clock::new();
        clock.ours();
        clock.saw(&mut vec![b'x'; 2 * UNREAD_MAX]);
        assert!(!clock.has_read_enough());
        clock.theirs(false);
        assert!(!clock.has_read_enough());
        clock.saw(&mut vec![b'x'; UNREAD_MAX]);
        assert!(clock.has_read_enough());
        clock.ours();
        assert!(!clock.has_read_enough());
    }
}
