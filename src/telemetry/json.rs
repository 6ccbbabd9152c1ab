//! Log lines as JSON objects, with the fields of the event beside time, level and target, and the span in which it happened.
//!
//! The formatter of `tracing-subscriber` makes the same lines. But it parses and writes anew, for each line, what the span
//! holds; here that is written once, when the span begins, and copied.

use std::fmt::{self, Write};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::Record,
};
use tracing_log::NormalizeEvent;
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// Writes fields as members of an object that is open, each with a comma before it. So whatever comes later is appended.
#[derive(Debug)]
pub struct Members;

impl<'writer> FormatFields<'writer> for Members {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = Line::default();
        fields.record(&mut line);
        writer.write_str(&line.0)
    }

    fn add_fields(&self, current: &'writer mut FormattedFields<Self>, fields: &Record<'_>) -> fmt::Result {
        self.format_fields(current.as_writer(), fields)
    }
}

/// Writes an event as a line.
#[derive(Debug)]
pub struct JsonLine;

impl<S> FormatEvent<S, Members> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, Members>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        // Of what comes from the crate `log`, the place it was said at, not the bridge.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let mut line = Line::default();
        line.0.push_str("{\"timestamp\":\"");
        SystemTime.format_time(&mut Writer::new(&mut line.0))?;
        line.0.push_str("\",\"level\":\"");
        line.0.push_str(metadata.level().as_str());
        line.0.push('"');
        event.record(&mut line);
        line.0.push_str(",\"target\":");
        line.string(metadata.target());
        if let Some(span) = ctx.parent_span() {
            line.0.push_str(",\"span\":{\"name\":");
            line.string(span.name());
            if let Some(members) = span.extensions().get::<FormattedFields<Members>>() {
                line.0.push_str(members);
            }
            line.0.push('}');
        }
        line.0.push_str("}\n");
        out.write_str(&line.0)
    }
}

/// A line that is being made. It is a string of its own, and handed on when it is whole: to write each piece to a writer that is
/// known as a trait alone costs more than the piece.
struct Line(String);

impl Default for Line {
    fn default() -> Self {
        // What the line of a request needs.
        Self(String::with_capacity(512))
    }
}

impl Line {
    /// Begins a member.
    fn name(&mut self, field: &Field) {
        let name = field.name();
        self.0.push(',');
        // A name that is a word of the language.
        self.string(name.strip_prefix("r#").unwrap_or(name));
        self.0.push(':');
    }

    fn string(&mut self, text: &str) {
        self.0.push('"');
        push_escaped(&mut self.0, text);
        self.0.push('"');
    }

    /// Something whose text needs no quotes.
    fn bare(&mut self, field: &Field, value: impl fmt::Display) {
        self.name(field);
        // Nothing that is displayed here fails, and a string takes everything.
        let _ = write!(self.0, "{value}");
    }
}

impl Visit for Line {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() {
            self.bare(field, value);
        } else {
            self.bare(field, "null");
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.name(field);
        self.string(value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.name(field);
        self.0.push('"');
        // What fails to write itself ends where it failed.
        let _ = write!(Escaped(&mut self.0), "{value:?}");
        self.0.push('"');
    }
}

/// The inside of a JSON string.
struct Escaped<'a>(&'a mut String);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        push_escaped(self.0, text);
        Ok(())
    }
}

/// All that needs an escape is one byte long.
const fn needs_escape(byte: u8) -> bool {
    byte < 0x20 || byte == b'"' || byte == b'\\'
}

fn push_escaped(out: &mut String, text: &str) {
    // Looked through to the end, which compiles to few instructions, because hardly any text has one.
    if !text.bytes().fold(false, |any, byte| any | needs_escape(byte)) {
        return out.push_str(text);
    }
    for char in text.chars() {
        match char {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            control if control < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(control));
            }
            plain => out.push(plain),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use tracing_subscriber::{Layer, fmt, layer::SubscriberExt};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        /// The lines, without what differs from run to run.
        fn parsed(&self) -> Vec<Value> {
            let text = String::from_utf8(self.0.lock().clone()).unwrap();
            let lines = text.lines().map(|line| {
                let mut line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
                let time = line.as_object_mut().unwrap().remove("timestamp").unwrap();
                assert!(chrono::DateTime::parse_from_rfc3339(time.as_str().unwrap()).is_ok(), "{time}");
                line
            });
            lines.collect()
        }
    }

    /// What is logged, written by us and by `tracing-subscriber`.
    fn written(log: impl FnOnce()) -> [Vec<Value>; 2] {
        let (ours, theirs) = (Lines::default(), Lines::default());
        let (our_writer, their_writer) = (ours.clone(), theirs.clone());
        let our_layer = fmt::layer().fmt_fields(Members).event_format(JsonLine).with_writer(move || our_writer.clone());
        let their_layer = fmt::layer().json().flatten_event(true).with_current_span(true).with_span_list(false);
        let their_layer = their_layer.with_writer(move || their_writer.clone());
        let subscriber = tracing_subscriber::registry().with(our_layer.boxed()).with(their_layer.boxed());
        tracing::subscriber::with_default(subscriber, log);
        [ours.parsed(), theirs.parsed()]
    }

    #[test]
    fn a_line_holds_the_event_and_its_span() {
        let [ours, theirs] = written(|| {
            let span = tracing::info_span!("request", method = %"GET", path = "/a\"b", late = tracing::field::Empty);
            span.in_scope(|| {
                tracing::info!(status = 200, caller = Some("ci"), none = None::<&str>, "request completed")
            });
            span.record("late", 7);
            span.in_scope(|| tracing::warn!(ratio = 0.5, yes = true, less = -1, r#type = "x", "and\nmore"));
            tracing::error!(odd = f64::NAN, debug = ?["\u{1}", "ü"], "outside");
        });

        assert_eq!(ours, theirs);
        let span = json!({"name": "request", "method": "GET", "path": "/a\"b"});
        let target = "regcred::telemetry::json::tests";
        let done = json!({
            "level": "INFO", "message": "request completed", "status": 200, "caller": "ci", "target": target, "span": span,
        });
        assert_eq!(ours[0], done);
        assert_eq!(ours[1]["span"]["late"], 7);
        assert_eq!(ours[2]["span"], Value::Null);
    }

    proptest! {
        #[test]
        fn whatever_is_logged_is_one_line_that_can_be_read_back(text in any::<String>()) {
            let [ours, theirs] = written(|| {
                tracing::info_span!("span", text).in_scope(|| tracing::info!(text, debug = ?text, "{text}"));
            });

            prop_assert_eq!(&ours, &theirs);
            prop_assert_eq!(&ours[0]["text"], &Value::from(text.as_str()));
            prop_assert_eq!(&ours[0]["message"], &Value::from(text.as_str()));
            prop_assert_eq!(&ours[0]["span"]["text"], &Value::from(text));
        }
    }
}
