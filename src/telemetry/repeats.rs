//! Repeated warnings: the first is logged, the following ones are counted.
//!
//! A cluster or a database that is away makes background work fail in the same way every few
//! seconds. A warning or error with the same message and the same fields is therefore logged once,
//! and then as a count every [`INTERVAL`]. Another field, such as another cluster or another error,
//! is another line: nothing that differs is left out. Events in a span, such as a request, are
//! always logged.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    subscriber::Interest,
};
use tracing_subscriber::{
    filter::LevelFilter,
    layer::{Context, Filter},
    registry::LookupSpan,
};

/// Time after which the repetitions of a line are reported.
const INTERVAL: Duration = Duration::from_mins(5);
/// Maximum number of lines whose repetitions are counted. Further ones are logged each time.
const LINES_MAX: usize = 1_000;

/// Counts repetitions once [`report`](Self::report) is called regularly.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    is_reported: AtomicBool,
    lines: Mutex<HashMap<String, Line>>,
}

#[derive(Debug)]
struct Line {
    /// Time at which the line or its count was logged.
    logged_at: Instant,
    repeated: u64,
}

/// A line and the number of its repetitions.
#[derive(Debug, PartialEq, Eq)]
struct Repeated {
    line: String,
    count: u64,
    within: Duration,
}

impl Repeats {
    /// Logs the counts that are due.
    pub(super) fn report(&self) {
        self.is_reported.store(true, Ordering::Relaxed);
        for Repeated { line, count, within } in self.due(Instant::now()) {
            tracing::warn!(count, within_seconds = within.as_secs(), line, "warning repeated");
        }
    }

    /// Whether a line is to be logged. Counts it otherwise.
    fn is_new(&self, line: String, now: Instant) -> bool {
        let mut lines = self.lines.lock();
        if let Some(known) = lines.get_mut(&line) {
            known.repeated += 1;
            return false;
        }
        if lines.len() < LINES_MAX {
            lines.insert(line, Line { logged_at: now, repeated: 0 });
        }
        true
    }

    /// Takes the counts of lines that were logged an interval ago, and forgets lines that were not
    /// repeated since.
    fn due(&self, now: Instant) -> Vec<Repeated> {
        let mut due = Vec::new();
        self.lines.lock().retain(|line, known| {
            let within = now.duration_since(known.logged_at);
            if within < INTERVAL {
                return true;
            }
            let count = std::mem::take(&mut known.repeated);
            known.logged_at = now;
            if count > 0 {
                due.push(Repeated { line: line.clone(), count, within });
            }
            count > 0
        });
        due
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Filter<S> for &'static Repeats {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    // Only events are filtered, so the level and the callsites of other filters decide. Not `always`:
    // tracing-subscriber would not ask again for the next event, and `enabled!`, which sqlx calls for
    // each statement, leaves its answer behind. The event after a statement would be lost.
    fn callsite_enabled(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::TRACE)
    }

    fn event_enabled(&self, event: &Event<'_>, context: &Context<'_, S>) -> bool {
        let metadata = event.metadata();
        let is_counted = *metadata.level() <= Level::WARN
            && metadata.target() != module_path!()
            && self.is_reported.load(Ordering::Relaxed)
            && context.event_span(event).is_none();
        if !is_counted {
            return true;
        }
        let mut text = Text::default();
        event.record(&mut text);
        self.is_new(format!("{}{}", text.message, text.fields), Instant::now())
    }
}

/// Message and fields of an event, as in the text format.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::{Layer, filter::FilterExt, layer::SubscriberExt};

    use super::*;

    #[test]
    fn repeated_line_is_logged_once_and_then_counted() {
        let repeats = Repeats::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(repeats.is_new("resync failed cluster=a".to_owned(), at(0)));
        assert!(repeats.is_new("resync failed cluster=b".to_owned(), at(1)));
        for second in 15..60 {
            assert!(!repeats.is_new("resync failed cluster=a".to_owned(), at(second)));
        }
        assert_eq!(repeats.due(at(299)), []);

        let within = Duration::from_secs(301);
        let expected = Repeated { line: "resync failed cluster=a".to_owned(), count: 45, within };
        assert_eq!(repeats.due(at(301)), [expected]);
        // The line that was not repeated is forgotten: its next occurrence is logged.
        assert!(repeats.is_new("resync failed cluster=b".to_owned(), at(302)));
        assert!(!repeats.is_new("resync failed cluster=a".to_owned(), at(302)));
        assert_eq!(repeats.due(at(602)).iter().map(|one| one.count).collect::<Vec<_>>(), [1]);
        assert_eq!(repeats.due(at(903)), []);
        assert!(repeats.is_new("resync failed cluster=a".to_owned(), at(904)));
    }

    #[test]
    fn number_of_counted_lines_is_bounded() {
        let repeats = Repeats::default();
        for number in 0..2 * LINES_MAX {
            assert!(repeats.is_new(number.to_string(), Instant::now()));
        }
        assert_eq!(repeats.lines.lock().len(), LINES_MAX);
        assert!(repeats.is_new("one more".to_owned(), Instant::now()));
        assert!(repeats.is_new("one more".to_owned(), Instant::now()));
    }

    struct Count(std::sync::Arc<Mutex<Vec<String>>>);

    impl<S: Subscriber> Layer<S> for Count {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut text = Text::default();
            event.record(&mut text);
            self.0.lock().push(format!("{}{}", text.message, text.fields));
        }
    }

    #[test]
    fn event_after_a_question_about_another_one_is_logged() {
        let repeats: &'static Repeats = Box::leak(Box::default());
        let logged = std::sync::Arc::<Mutex<Vec<String>>>::default();
        // Other tests use the callsites of the crate with subscribers of their own.
        let filter = tracing_subscriber::EnvFilter::new("info").and(repeats);
        let subscriber = tracing_subscriber::registry().with(Count(std::sync::Arc::clone(&logged)).with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..2 {
                assert!(!tracing::enabled!(Level::DEBUG));
                tracing::info!("server started");
            }
        });
        assert_eq!(*logged.lock(), ["server started"; 2]);
    }

    #[test]
    fn only_equal_warnings_outside_spans_are_counted() {
        let repeats: &'static Repeats = Box::leak(Box::default());
        let logged = std::sync::Arc::<Mutex<Vec<String>>>::default();
        let subscriber =
            tracing_subscriber::registry().with(Count(std::sync::Arc::clone(&logged)).with_filter(repeats));
        let warn = |cluster: &str, error: &str| tracing::warn!(cluster, %error, "resync failed");
        tracing::subscriber::with_default(subscriber, || {
            warn("a", "before counts are reported");
            warn("a", "before counts are reported");
            repeats.report();
            for _ in 0..3 {
                warn("a", "timed out");
                warn("b", "timed out");
                tracing::info!("done");
            }
            warn("a", "refused");
            tracing::info_span!("request").in_scope(|| {
                warn("a", "timed out");
                warn("a", "timed out");
            });
        });
        let logged = logged.lock();
        let count = |line: &str| logged.iter().filter(|one| one.as_str() == line).count();
        assert_eq!(count("resync failed cluster=a error=before counts are reported"), 2);
        assert_eq!(count("resync failed cluster=a error=timed out"), 3, "{logged:?}");
        assert_eq!(count("resync failed cluster=b error=timed out"), 1);
        assert_eq!(count("resync failed cluster=a error=refused"), 1);
        assert_eq!(count("done"), 3);
    }
}
