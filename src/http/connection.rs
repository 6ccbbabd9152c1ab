//! A connection under a clock. actix-web cuts off a client that is slow to send its first head, and `body` one that is slow to send
//! a body that somebody reads. Everything else that a client can do slowly is cut off here: to take an answer, to end a body
//! that nobody reads, to send the next head on the same connection.
//!
//! There is one rule. From the moment that an answer is ready, the client has [`PATIENCE`] to take it, to end its own
//! request and to send the head of the next one, whole. While a request is being handled there is no such limit: it is
//! not the client who is waited for. Nor while an answer goes on for long ([`LongAnswer`]), but then the client has that time to
//! take on what could not be sent, whenever that is.

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

/// How much is read of whoever is given a long answer, the head of his request included.
const SAID_MAX: usize = 64 * 1024;

/// Where the clock of a connection stands. The stream and the requests on it share it.
#[derive(Debug)]
pub struct Clock {
    /// When the client's turn ends; `None` while it is ours.
    deadline: Cell<Option<Instant>>,
    read: Cell<usize>,
    head: Cell<Head>,
    /// An answer goes on for long.
    is_long: Cell<bool>,
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
        Self {
            deadline: Cell::new(Some(Instant::now() + PATIENCE)),
            read: Cell::new(0),
            head: Cell::new(Head::Before),
            is_long: Cell::new(false),
        }
    }

    /// Something of an answer that goes on for long could be sent, or could not.
    fn sent(&self, could: bool) {
        if !self.is_long.get() {
            return;
        }
        if could {
            self.deadline.set(None);
        } else if self.deadline.get().is_none() {
            self.deadline.set(Some(Instant::now() + PATIENCE));
        }
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

    /// An answer is ready, after which the connection is closed or not. One that goes on for long keeps the clock.
    pub fn answered(&self, is_last: bool) {
        if !self.is_long.get() {
            self.theirs(is_last);
        }
    }

    fn theirs(&self, is_last: bool) {
        let patience = if is_last { PATIENCE_BEFORE_CLOSE } else { PATIENCE };
        self.deadline.set(Some(Instant::now() + patience));
        self.read.set(0);
        self.head.set(Head::Before);
    }

    /// Whoever is told something for long has nothing more to say.
    fn has_said_enough(&self) -> bool {
        self.read.get() >= SAID_MAX
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

/// An answer that goes on for as long as there is something to tell, and closes its connection then. To be kept with its body.
#[derive(Debug)]
pub struct LongAnswer(Rc<Clock>);

impl LongAnswer {
    /// Begins one; none for whoever sent so much beside his request that the parser would be busy with it all the time.
    pub fn begin(request: &HttpRequest) -> Option<Self> {
        let clock = request.conn_data::<Rc<Clock>>().filter(|clock| !clock.has_said_enough())?;
        clock.is_long.set(true);
        Some(Self(Rc::clone(clock)))
    }
}

impl Drop for LongAnswer {
    fn drop(&mut self) {
        self.0.is_long.set(false);
        self.0.theirs(true);
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
        // Whoever has hung up is told no more: otherwise it would be noticed only when something is sent.
        let has_hung_up = buf.filled().len() == before;
        if self.clock.is_long.get() && (has_hung_up || self.clock.has_said_enough()) {
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

    #[tokio::test]
    async fn who_does_not_take_a_long_answer_is_cut_off() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut timed = Timed::new(Stream::Plain(stream));
        timed.clock.ours();
        timed.clock.is_long.set(true);
        let (began, chunk) = (Instant::now(), vec![b'x'; 64 * 1024]);

        // Until the buffers of the system are full, and then for as long as there is patience.
        let error = loop {
            if let Err(error) = timed.write_all(&chunk).await {
                break error;
            }
        };

        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() >= PATIENCE);
        drop(silent);
    }

    #[tokio::test]
    async fn a_long_answer_is_cut_where_it_is_not_taken_and_nowhere_else() {
        let clock = Rc::new(Clock::new());
        clock.ours();
        clock.sent(false);
        assert_eq!(clock.deadline.get(), None, "an answer that is not long has its time when it is ready");
        clock.is_long.set(true);
        let answer = LongAnswer(Rc::clone(&clock));
        assert_eq!(clock.deadline.get(), None);
        clock.sent(false);
        let deadline = clock.deadline.get();
        assert!(deadline.is_some());
        clock.sent(false);
        assert_eq!(clock.deadline.get(), deadline, "it does not get more time by asking again");
        clock.sent(true);
        assert_eq!(clock.deadline.get(), None);
        drop(answer);
        assert!(clock.deadline.get().is_some() && !clock.is_long.get());
    }
}
