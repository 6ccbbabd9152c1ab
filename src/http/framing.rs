//! Where each request on a connection begins and ends.
//!
//! The parser of actix-http accepts lines that end with a bare line feed. A proxy that does not
//! would see other requests than regcred (request smuggling). Therefore the bytes of a connection
//! pass a [`Scanner`] first, which follows heads and bodies. It is as strict as the parser or
//! stricter: what it refuses, the parser never accepts.

/// Length up to which a header line is kept. Lines that decide the framing are shorter.
const LINE_MAX: usize = 256;

/// Follows the requests of a connection.
#[derive(Debug)]
pub struct Scanner {
    state: State,
    head: Head,
    /// Current line of a head, without its end, up to [`LINE_MAX`].
    line: Vec<u8>,
    line_len: usize,
    has_body: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before a head: empty lines are skipped.
    Between { returned: bool },
    /// In a line of a head.
    Line { returned: bool },
    /// In a body of this many more bytes.
    Body(u64),
    /// In a chunked body.
    Chunked(Chunked),
    /// After a corrupted byte, at which the parser ends.
    Refused,
}

/// State in a chunked body (RFC 9112, section 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunked {
    Size {
        size: u64,
        digits: u8,
    },
    /// After the size: optional whitespace, then an extension or the end of the line.
    Space {
        size: u64,
    },
    Extension {
        size: u64,
    },
    SizeEnd {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataReturn,
    DataEnd,
    /// In a line after the last chunk. An empty one ends the body.
    Trailer {
        is_empty: bool,
    },
    TrailerEnd {
        is_empty: bool,
    },
}

/// Lines of a head that decide the framing.
#[derive(Debug, Default)]
struct Head {
    has_request_line: bool,
    length: Option<u64>,
    is_chunked: bool,
}

/// The bytes are no request, and the connection must end.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

impl Default for Scanner {
    fn default() -> Self {
        let state = State::Between { returned: false };
        Self { state, head: Head::default(), line: Vec::new(), line_len: 0, has_body: false }
    }
}

impl Scanner {
    /// Follows received bytes to the end of the current request. Returns the length up to there, or
    /// `None` if the request goes on after these bytes.
    ///
    /// A head with a bare line feed, or with ambiguous framing, is corrupted: the parser refuses it
    /// with 400.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if a chunked body is invalid.
    pub fn scan(&mut self, bytes: &mut [u8]) -> Result<Option<usize>, Malformed> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &mut bytes[at..];
            at += match self.state {
                State::Between { returned } => self.between(returned, rest),
                State::Line { .. } => self.line(rest),
                State::Body(left) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    self.state = State::Body(left - taken as u64);
                    taken
                }
                State::Chunked(Chunked::Data { left }) => {
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
                    let left = left - taken as u64;
                    self.state = State::Chunked(if left > 0 { Chunked::Data { left } } else { Chunked::DataReturn });
                    taken
                }
                State::Chunked(chunked) => {
                    self.state = chunked.after(rest[0])?.map_or(State::Body(0), State::Chunked);
                    1
                }
                State::Refused => rest.len(),
            };
            if self.state == State::Body(0) {
                self.state = State::Between { returned: false };
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// Whether a request has begun whose end was not seen.
    #[must_use]
    pub fn is_within(&self) -> bool {
        !matches!(self.state, State::Between { .. })
    }

    /// Whether the request whose head was seen last has a body.
    #[must_use]
    pub fn has_body(&self) -> bool {
        self.has_body
    }

    /// Skips empty lines before a head.
    fn between(&mut self, returned: bool, bytes: &mut [u8]) -> usize {
        match bytes[0] {
            b'\r' if !returned => self.state = State::Between { returned: true },
            b'\n' if returned => self.state = State::Between { returned: false },
            b'\r' | b'\n' => return self.refuse(bytes),
            _ => {
                self.head = Head::default();
                self.new_line();
                return 0;
            }
        }
        1
    }

    fn new_line(&mut self) {
        self.state = State::Line { returned: false };
        self.line.clear();
        self.line_len = 0;
    }

    /// Follows a line of a head.
    fn line(&mut self, bytes: &mut [u8]) -> usize {
        let Some(end) = memchr::memchr(b'\n', bytes) else {
            self.keep(bytes);
            return bytes.len();
        };
        self.keep(&bytes[..end]);
        let returned = self.state == State::Line { returned: true };
        let is_accepted = returned && self.end_line();
        if is_accepted { end + 1 } else { end + self.refuse(&mut bytes[end..]) }
    }

    /// Keeps a part of a line, without a carriage return at its end.
    fn keep(&mut self, part: &[u8]) {
        let Some(last) = part.last() else { return };
        let was_returned = self.state == State::Line { returned: true };
        // A carriage return within a line is part of it; the parser refuses that.
        let pending: &[u8] = if was_returned { b"\r" } else { b"" };
        let returned = *last == b'\r';
        let part = if returned { &part[..part.len() - 1] } else { part };
        for part in [pending, part] {
            self.line_len = self.line_len.saturating_add(part.len());
            let room = LINE_MAX - self.line.len();
            self.line.extend_from_slice(&part[..part.len().min(room)]);
        }
        self.state = State::Line { returned };
    }

    /// Ends a line. Returns whether it is acceptable.
    fn end_line(&mut self) -> bool {
        if self.line_len == 0 {
            if !self.head.has_request_line {
                return false;
            }
            self.state = self.head.body();
            self.has_body = self.state != State::Body(0);
            return true;
        }
        let is_accepted = self.head.take(&self.line, self.line_len > self.line.len());
        self.new_line();
        is_accepted
    }

    /// Corrupts a byte, so that the parser refuses the head.
    fn refuse(&mut self, bytes: &mut [u8]) -> usize {
        bytes[0] = 0;
        self.state = State::Refused;
        1
    }
}

impl Head {
    /// Takes a line. Returns false if the framing is ambiguous, or another than regcred serves.
    fn take(&mut self, line: &[u8], is_cut: bool) -> bool {
        if !self.has_request_line {
            self.has_request_line = true;
            // The parser would take all that follows as the body.
            return !line.starts_with(b"CONNECT ");
        }
        let Some(colon) = memchr::memchr(b':', line) else { return true };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let is_first = self.length.is_none() && !self.is_chunked;
            let digits = std::str::from_utf8(value).ok().filter(|_| value.iter().all(u8::is_ascii_digit));
            self.length = digits.and_then(|digits| digits.parse().ok());
            return is_first && !is_cut && self.length.is_some();
        }
        if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let is_first = self.length.is_none() && !self.is_chunked;
            self.is_chunked = value.eq_ignore_ascii_case(b"chunked");
            return is_first && !is_cut && self.is_chunked;
        }
        // As for `CONNECT`.
        !name.eq_ignore_ascii_case(b"upgrade") || !value.eq_ignore_ascii_case(b"websocket") && !is_cut
    }

    /// State after the head.
    fn body(&self) -> State {
        if self.is_chunked {
            State::Chunked(Chunked::Size { size: 0, digits: 0 })
        } else {
            State::Body(self.length.unwrap_or(0))
        }
    }
}

impl Chunked {
    /// State after a byte; `None` after the last one of the body.
    fn after(self, byte: u8) -> Result<Option<Self>, Malformed> {
        let next = match (self, byte) {
            (Self::Size { size, digits }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                let digit = char::from(byte).to_digit(16).ok_or(Malformed)?;
                // 16 digits fill 64 bits.
                if digits >= 16 {
                    return Err(Malformed);
                }
                Self::Size { size: (size << 4) | u64::from(digit), digits: digits + 1 }
            }
            (Self::Size { digits: 0, .. }, _) => return Err(Malformed),
            (Self::Size { size, .. } | Self::Space { size }, b' ' | b'\t') => Self::Space { size },
            (Self::Size { size, .. } | Self::Space { size } | Self::Extension { size }, b'\r') => {
                Self::SizeEnd { size }
            }
            (Self::Size { size, .. } | Self::Space { size }, b';')
            | (Self::Extension { size }, b'\t' | b' '..=b'~' | 0x80..) => Self::Extension { size },
            (Self::SizeEnd { size: 0 } | Self::TrailerEnd { is_empty: false }, b'\n') => {
                Self::Trailer { is_empty: true }
            }
            (Self::SizeEnd { size: left }, b'\n') => Self::Data { left },
            (Self::DataReturn, b'\r') => Self::DataEnd,
            (Self::DataEnd, b'\n') => Self::Size { size: 0, digits: 0 },
            (Self::Trailer { is_empty }, b'\r') => Self::TrailerEnd { is_empty },
            (Self::Trailer { .. }, b'\t' | b' '..=b'~' | 0x80..) => Self::Trailer { is_empty: false },
            (Self::TrailerEnd { is_empty: true }, b'\n') => return Ok(None),
            _ => return Err(Malformed),
        };
        Ok(Some(next))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    /// Scans bytes that arrive in pieces of this size. Returns the bytes as the parser receives
    /// them, and where requests ended.
    fn scan(sent: &[u8], piece: usize) -> Result<(Vec<u8>, Vec<usize>), Malformed> {
        let (mut scanner, mut bytes, mut ends) = (Scanner::default(), sent.to_vec(), Vec::new());
        let count = bytes.len();
        let mut at = 0;
        while at < count {
            let end = count.min(at + piece);
            at = match scanner.scan(&mut bytes[at..end])? {
                Some(length) => {
                    ends.push(at + length);
                    at + length
                }
                None => end,
            };
        }
        Ok((bytes, ends))
    }

    fn ends(sent: &str) -> Vec<usize> {
        let (bytes, ends) = scan(sent.as_bytes(), 1024).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), sent, "a correct request is changed");
        for piece in [1, 2, 3, 7] {
            assert_eq!(scan(sent.as_bytes(), piece), Ok((bytes.clone(), ends.clone())), "in pieces of {piece}");
        }
        ends
    }

    const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

    #[rstest]
    #[case("")]
    #[case("Content-Length: 0\r\n\r\n")]
    #[case("Content-Length: 5\r\n\r\n\n\nx\r\n")]
    #[case("content-length:\t 005 \r\n\r\n\n\n\n\n\n")]
    #[case("Transfer-Encoding: Chunked\r\n\r\n5\r\n\n\n\n\n\n\r\nA ;a=b\r\n\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n")]
    #[case("Transfer-Encoding: chunked\r\n\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n")]
    #[case("Content-Lengths: 7\r\nUpgrade: h2c\r\nX: Content-Length: 7\r\n\r\n")]
    fn every_request_of_a_connection_is_delimited(#[case] rest: &str) {
        let head = if rest.is_empty() { GET.to_owned() } else { format!("POST / HTTP/1.1\r\nHost: x\r\n{rest}") };
        let sent = format!("{GET}{head}\r\n{GET}");
        let (first, second) = (GET.len(), GET.len() + head.len());
        assert_eq!(ends(&sent), [first, second, sent.len()]);
    }

    #[rstest]
    #[case::request_line("GET / HTTP/1.1\nHost: x\r\n\r\n", 14)]
    #[case::header("GET / HTTP/1.1\r\nHost: x\n\r\n", 23)]
    #[case::last_line("GET / HTTP/1.1\r\nHost: x\r\n\n", 25)]
    #[case::after_an_empty_line("\r\nGET / HTTP/1.1\r\nHost: x\nA: b\r\n\r\n", 25)]
    #[case::before_the_head("\nGET / HTTP/1.1\r\n\r\n", 0)]
    #[case::returned_twice("\r\rGET / HTTP/1.1\r\n\r\n", 1)]
    #[case::length_twice("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 53)]
    #[case::length_list("GET / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n", 37)]
    #[case::length_with_a_sign("GET / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", 35)]
    #[case::length_empty("GET / HTTP/1.1\r\nContent-Length:\r\n\r\n", 32)]
    #[case::coding("GET / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 40)]
    #[case::length_and_coding("GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 62)]
    #[case::coding_and_length("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 62)]
    #[case::tunnel("CONNECT x HTTP/1.1\r\n\r\n", 19)]
    #[case::web_socket("GET / HTTP/1.1\r\nUpgrade: WebSocket\r\n\r\n", 35)]
    fn an_ambiguous_head_is_corrupted_on_every_place(#[case] head: &str, #[case] at: usize) {
        let chunked = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n";
        for before in ["", GET, chunked] {
            let sent = format!("{before}{head}{GET}");
            let mut expected = sent.clone().into_bytes();
            expected[before.len() + at] = 0;
            for piece in [1, 2, 3, 1024] {
                let (bytes, _) = scan(sent.as_bytes(), piece).unwrap();
                assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(&expected), "in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_length_behind_a_long_space_is_refused() {
        let sent = format!("GET / HTTP/1.1\r\nContent-Length:{}5\r\n\r\n", " ".repeat(2 * LINE_MAX));
        assert!(scan(sent.as_bytes(), 1024).unwrap().0.contains(&0));
    }

    #[rstest]
    #[case("+1\r\nx\r\n")]
    #[case("\r\n")]
    #[case("1\nx\r\n")]
    #[case("1;\0\r\nx\r\n")]
    #[case("1;a\nx\r\n")]
    #[case("1\r\nxx\r\n")]
    #[case("1\r\nx\n")]
    #[case("10000000000000000\r\n")]
    #[case("0\r\nTrailer: x\nOther: y\r\n\r\n")]
    #[case("0\r\n\n")]
    fn an_invalid_chunk_is_an_error(#[case] body: &str) {
        let sent = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        for piece in [1, 2, 1024] {
            assert_eq!(scan(sent.as_bytes(), piece), Err(Malformed), "in pieces of {piece}");
        }
    }

    proptest! {
        /// No bare line feed within a head reaches the parser, and no bytes are lost.
        #[test]
        fn the_result_does_not_depend_on_the_pieces(
            parts in prop::collection::vec(prop::sample::select(vec![
                "GET / HTTP/1.1", "\r\n", "\n", "\r", "Content-Length: 3", "Transfer-Encoding: chunked", "3", "abc", "0", ";", ": ",
            ]), 0..24),
            piece in 1_usize..9,
        ) {
            let sent = parts.concat();
            prop_assert_eq!(scan(sent.as_bytes(), piece), scan(sent.as_bytes(), sent.len().max(1)));
        }
    }
}
