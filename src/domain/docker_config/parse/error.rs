//! Errors of parsing a docker config.

use std::{borrow::Cow, fmt};

/// Reason and position of a parse error. Never contains a part of the input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// Position, if there is a single one.
    pub position: Option<Position>,
    /// Problem and remedy.
    pub detail: Cow<'static, str>,
}

/// Position in a text, counted from 1. Columns are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

impl Position {
    /// Position of the byte at `offset`.
    pub(super) fn at(input: &[u8], offset: usize) -> Self {
        let before = input.get(..offset).unwrap_or(input);
        let mut lines = before.rsplit(|byte| *byte == b'\n');
        Self { column: lines.next().map_or(0, <[u8]>::len) + 1, line: lines.count() + 1 }
    }

    /// Offset of the byte at this position.
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

    /// Whether a limit of this parser refuses the input, which others may accept.
    #[must_use]
    pub fn is_limit(&self) -> bool {
        [super::node::TOO_MANY, super::node::TOO_LONG, super::node::TOO_DEEP].contains(&&*self.detail)
    }

    /// Locates the error in a document that is embedded in the input.
    pub(super) fn inside(self, place: &str) -> Self {
        Self { detail: format!("inside {place}: {}", self.detail).into(), ..self }
    }
}

/// Error without a position: the input is well-formed but has the wrong structure.
pub(super) fn shape(detail: impl Into<Cow<'static, str>>) -> ParseError {
    ParseError { position: None, detail: detail.into() }
}

/// Translates an error of `serde_json`. Its text is only compared, because some messages quote the
/// input.
pub(super) fn json(error: &serde_json::Error, input: &[u8]) -> ParseError {
    let position = position(error, input);
    let message = error.to_string();
    let starts_with = |part: &str| message.starts_with(part);
    let detail = if !may_be_json(input) {
        "the text is not JSON"
    } else if starts_with("trailing characters") {
        trailing_characters(input, position)
    } else if starts_with("EOF") {
        "the document ends too early: check that it is complete, up to the last brace"
    } else if starts_with("trailing comma") {
        "a comma precedes a closing brace or bracket: delete it"
    } else if starts_with("key must be a string") {
        "a key must be in double quotes"
    } else if starts_with("control character") {
        "a string spans lines or contains a control character: look for a missing double quote"
    } else if starts_with("recursion limit") || starts_with(super::node::TOO_DEEP) {
        super::node::TOO_DEEP
    } else if starts_with(super::node::TOO_MANY) {
        super::node::TOO_MANY
    } else if starts_with(super::node::TOO_LONG) {
        super::node::TOO_LONG
    } else if starts_with(super::node::TWICE) {
        super::node::TWICE
    } else {
        "invalid JSON: look for a missing double quote, colon, comma or brace just before"
    };
    ParseError::at(position, detail)
}

/// Whether a text begins as an object, a list or a string. Other JSON is no docker config either, and
/// advice about its braces would mislead.
fn may_be_json(input: &[u8]) -> bool {
    matches!(input.trim_ascii_start().first(), Some(b'{' | b'[' | b'"'))
}

/// `serde_json` reports the end of a line as column 0 of the next.
fn position(error: &serde_json::Error, input: &[u8]) -> Position {
    let position = Position { line: error.line(), column: error.column() };
    if position.column > 0 {
        return position;
    }
    Position::at(input, position.offset(input).saturating_sub(1))
}

/// zsh marks output without a final newline with `%`, for root `#`. Copying a terminal's output
/// includes it.
fn trailing_characters(input: &[u8], position: Position) -> &'static str {
    match input.get(position.offset(input)) {
        Some(b'#') => {
            "a stray `#` follows the document's last brace: delete it (zsh prints one after output without a newline)"
        }
        Some(b'%') => {
            "a stray `%` follows the document's last brace: delete it (zsh prints one after output without a newline)"
        }
        _ => "there is text after the document's last brace: delete it",
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
