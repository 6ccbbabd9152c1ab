//! Traces over OTLP: HTTP with protobuf. The OpenTelemetry SDK reads its other variables itself,
//! such as `OTEL_TRACES_SAMPLER`.
//!
//! Only spans of this crate are exported, with their fields: ids, names, and paths without queries.
//! Log events are not, so nothing else reaches a collector. The log filter does not apply: a
//! collector gets all spans.
//!
//! Names with a dot are parts of a trace, such as `db.api_keys.find`. All others start one unless
//! they are in another span. So polls of the worker, which are in no span, are not exported.

use std::{error::Error, sync::OnceLock, time::Duration};

use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator},
    trace::{SpanKind, Status, TraceContextExt, TracerProvider},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{SdkTracerProvider, SpanData},
};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use tracing::{Metadata, Span, Subscriber, subscriber::Interest};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, dynamic_filter_fn},
    layer,
    registry::LookupSpan,
};

use crate::domain::invalid::Invalid;

/// Maximum duration of an export. Spans beyond the SDK's queue are dropped meanwhile.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum duration of the last export.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Exporter of the process. There is one, as there is one subscriber.
static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// Configuration of the export.
#[derive(Debug)]
pub struct TracesConfig {
    /// URL for traces.
    pub endpoint: String,
    /// Name of the service.
    pub service: String,
    /// Headers for the collector. Their values are percent-encoded.
    pub headers: Vec<(String, SecretString)>,
}

/// Returns the URL for traces of a collector.
///
/// # Errors
///
/// [`Invalid`] if the URL of the collector is invalid. The SDK would replace it by its default.
pub fn parse_endpoint(collector: &str) -> Result<String, Invalid> {
    let url = reqwest::Url::parse(collector).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let url = url.ok_or_else(|| Invalid::new("must be a URL such as http://collector:4318"))?;
    Ok(format!("{}/v1/traces", url.as_str().trim_end_matches('/')))
}

/// Parses headers in the form of OpenTelemetry: `name=value,name=value`, with percent-encoded
/// values.
///
/// # Errors
///
/// [`Invalid`] if one is invalid. The SDK would leave it out.
pub fn parse_headers(headers: &str) -> Result<Vec<(String, SecretString)>, Invalid> {
    let header = |header: &str| {
        let (name, value) = header.trim().split_once('=')?;
        http::HeaderName::try_from(name).ok()?;
        http::HeaderValue::from_str(&percent_decode_str(value).decode_utf8().ok()?).ok()?;
        Some((name.to_owned(), SecretString::from(value)))
    };
    let headers: Option<Vec<_>> = headers.trim().split(',').map(header).collect();
    headers.ok_or_else(|| Invalid::new("must be headers such as `Authorization=Bearer%20TOKEN`, separated by commas"))
}

/// Starts the export. Must be called before [`super::start`], outside an asynchronous runtime.
///
/// # Errors
///
/// Returns an error if a variable of the SDK is invalid.
pub fn start(config: TracesConfig) -> Result<(), Box<dyn Error>> {
    // As all calls of regcred, it ignores the proxies of the environment.
    let client = reqwest::blocking::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
    let client = client.timeout(EXPORT_TIMEOUT).build()?;
    let headers = config.headers.into_iter().map(|(name, value)| (name, value.expose_secret().to_owned()));
    let exporter = SpanExporter::builder().with_http().with_http_client(client).with_endpoint(config.endpoint);
    let exporter = exporter.with_headers(headers.collect()).build()?;
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_service_name(config.service).with_attribute(version).build();
    let provider = SdkTracerProvider::builder().with_batch_exporter(Reporting(exporter)).with_resource(resource);
    // The first call in a process counts.
    let _ = PROVIDER.set(provider.build());
    Ok(())
}

/// Exports the remaining spans.
pub fn stop() {
    if let Some(provider) = PROVIDER.get() {
        // A collector that does not answer is no reason to fail.
        let _ = provider.shutdown_with_timeout(STOP_TIMEOUT);
    }
}

/// Kind of a span, from which collectors draw a map of services: requests are served, statements and
/// calls are sent.
fn kind(name: &str) -> SpanKind {
    match name.split_once('.') {
        None if name == "request" => SpanKind::Server,
        Some(("cluster", "call") | ("db" | "registry" | "provider", _)) => SpanKind::Client,
        _ => SpanKind::Internal,
    }
}

/// Exporter that completes spans, and logs failures, which the SDK does not.
#[derive(Debug)]
struct Reporting(SpanExporter);

impl opentelemetry_sdk::trace::SpanExporter for Reporting {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        for span in &mut batch {
            span.span_kind = kind(&span.name);
        }
        let exported = self.0.export(batch).await;
        if exported.is_err() {
            // Without the number and the error, so that repetitions are equal and no text of a peer
            // is logged.
            tracing::debug!(spans, "batch of spans lost");
            tracing::warn!("traces not exported");
        }
        exported
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

fn is_own_span(metadata: &Metadata<'_>) -> bool {
    metadata.is_span() && metadata.target().starts_with("regcred")
}

/// Layer that records spans, if the export was started.
pub(super) fn layer<S>() -> Option<impl Layer<S>>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let tracer = PROVIDER.get()?.tracer("regcred");
    let layer = tracing_opentelemetry::layer().with_tracer(tracer).with_location(false).with_threads(false);
    let layer = layer.with_tracked_inactivity(false).with_context_activation(false);
    let filter = dynamic_filter_fn(|metadata: &Metadata<'_>, context: &layer::Context<'_, S>| {
        is_own_span(metadata) && (!metadata.name().contains('.') || context.lookup_current().is_some())
    });
    let filter = filter.with_max_level_hint(LevelFilter::DEBUG);
    // Cached for each place in the code.
    let filter = filter
        .with_callsite_filter(|metadata| if is_own_span(metadata) { Interest::sometimes() } else { Interest::never() });
    Some(layer.with_filter(filter))
}

/// Headers of a request, by name.
struct Headers<'b, 'a>(&'b dyn Fn(&str) -> Option<&'a str>);

impl Extractor for Headers<'_, '_> {
    fn get(&self, name: &str) -> Option<&str> {
        (self.0)(name)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

/// Reads the W3C headers. Without valid ones, the context has no span.
fn extract(headers: &Headers<'_, '_>) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), headers)
}

/// Makes a span part of the trace that the caller names in the W3C headers, if it does.
pub fn continue_trace<'a>(span: &Span, header: &dyn Fn(&str) -> Option<&'a str>) {
    if PROVIDER.get().is_some() {
        // Fails only without the layer.
        let _ = span.set_parent(extract(&Headers(header)));
    }
}

/// Returns the current span as a W3C `traceparent`, if it is exported.
#[must_use]
pub fn current() -> Option<String> {
    PROVIDER.get()?;
    let context = Span::current().context();
    let span = context.span().span_context().clone();
    let is_exported = span.is_valid() && span.is_sampled();
    is_exported.then(|| format!("00-{}-{}-01", span.trace_id(), span.span_id()))
}

/// Whether spans are exported.
#[must_use]
pub fn are_exported() -> bool {
    PROVIDER.get().is_some()
}

/// Links a span to the one of a W3C `traceparent`, which caused it. An invalid one is ignored.
pub fn link(span: &Span, traceparent: &str) {
    let header = |name: &str| (name == "traceparent").then_some(traceparent);
    span.add_link(extract(&Headers(&header)).span().span_context().clone());
}

/// Records the response of a request with its span.
pub fn record_response(span: &Span, method: &str, route: Option<&str>, status: u16) {
    if PROVIDER.get().is_none() {
        return;
    }
    span.set_attribute("http.request.method", method.to_owned());
    if let Some(route) = route {
        span.set_attribute("http.route", route.to_owned());
    }
    span.set_attribute("http.response.status_code", i64::from(status));
    if status >= 500 {
        span.set_status(Status::error(""));
    }
}
