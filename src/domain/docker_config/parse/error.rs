//! Why a docker config could not be taken apart.

use std::{borrow::Cow, fmt};

/// Why the input could not be read, and where. Never contains a part of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// Where, if it is at one place.
    pub position: Option<Position>,
    /// What is wrong, and what to do.
    pub detail: Cow<'static, str>,
}

/// A place in a text, both counted from 1; columns are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl Position {
    /// The place of the byte at `offset`.
    pub(super) fn at(input: &[u8], offset: usize) -> Self {
        let before = input.get(..offset).unwrap_or(input);
        let mut lines = before.rsplit(|byte| *byte == b'\n');
        Self { column: lines.next().map_or(0, <[u8]>::len) + 1, line: lines.count() + 1 }
    }

    /// The offset of this place's byte.
    fn offset(self, input: &[u8]) -> usize {
        let lines = input.split_inclusive(|byte| *byte == b'\n');
        let before: usize = lines.take(self.line.saturating_sub(1)).map(<[u8]>::len).sum();
        before + self.column.saturating_sub(1)
    }
}

impl ParseError {
    pub(super) fn at(position: Position, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { position: Some(position), detail: detail.into() }
    }

    /// The same error, in a document that was itself found inside of the input.
    pub(super) fn inside(self, place: &str) -> Self {
        Self { detail: format!("inside {place}: {}", self.detail).into(), ..self }
    }
}

/// An error of the whole: the input is well formed, and something else than is needed.
pub(super) fn shape(detail: impl Into<Cow<'static, str>>) -> ParseError {
    ParseError { position: None, detail: detail.into() }
}

/// Says in a sentence what `serde_json` found. Its own words are only compared, since others of them repeat the input.
pub(super) fn json(error: &serde_json::Error, input: &[u8]) -> ParseError {
    let position = position(error, input);
    let words = error.to_string();
    let said = |part: &str| words.starts_with(part);
    let detail = if said("trailing characters") {
        after_the_end(input, position)
    } else if said("EOF") {
        "the document ends too early: is it complete, with its last brace?"
    } else if said("trailing comma") {
        "a comma stands before a closing brace or bracket: delete it"
    } else if said("key must be a string") {
        "a key stands in double quotes"
    } else if said("control character") {
        "a text goes on to the next line, or contains a control character: look for a missing double quote"
    } else if said("recursion limit") || said(super::node::TOO_DEEP) {
        super::node::TOO_DEEP
    } else if said(super::node::TOO_MANY) {
        super::node::TOO_MANY
    } else if said(super::node::TWICE) {
        super::node::TWICE
    } else {
        "this is not JSON: look for a missing double quote, colon, comma or brace just before"
    };
    ParseError::at(position, detail)
}

/// `serde_json` calls the end of a line column 0 of the next.
fn position(error: &serde_json::Error, input: &[u8]) -> Position {
    let position = Position { line: error.line(), column: error.column() };
    if position.column > 0 {
        return position;
    }
    Position::at(input, position.offset(input).saturating_sub(1))
}

/// zsh marks the end of output without a newline: `%`, for root `#`. Copied along with a file, it ends up here.
fn after_the_end(input: &[u8], position: Position) -> &'static str {
    match input.get(position.offset(input)) {
        Some(b'#') => {
            "a stray `#` stands after the document's last brace: delete it (zsh prints one after output without a newline)"
        }
        Some(b'%') => {
            "a stray `%` stands after the document's last brace: delete it (zsh prints one after output without a newline)"
        }
        _ => "something stands after the document's last brace: delete it",
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Position { line, column }) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        f.write_str(&self.detail)
    }
}

impl std::error::Error for ParseError {}
