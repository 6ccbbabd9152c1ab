//! Variables of traces. The OpenTelemetry SDK reads the others itself.

use secrecy::ExposeSecret;

use super::Reader;
use crate::telemetry::traces::{self, TracesConfig};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const HEADERS: &str = "OTEL_EXPORTER_OTLP_HEADERS";
const HEADERS_FILE: &str = "OTEL_EXPORTER_OTLP_HEADERS_FILE";

impl Reader<'_> {
    /// Reads the variables of traces. `Some(None)` if traces are off.
    pub fn traces(&mut self) -> Option<Option<TracesConfig>> {
        let Some(endpoint) = self.get(ENDPOINT) else { return Some(None) };
        let endpoint = self.keep(ENDPOINT, traces::parse_endpoint(&endpoint));
        let service = self.get("OTEL_SERVICE_NAME").unwrap_or_else(|| "regcred".to_owned());
        let headers = if self.get(HEADERS).or_else(|| self.get(HEADERS_FILE)).is_some() {
            let (headers, _) = self.secret(HEADERS)?;
            self.keep(HEADERS, traces::parse_headers(headers.expose_secret()))
        } else {
            Some(Vec::new())
        };
        Some(Some(TracesConfig { endpoint: endpoint?, service, headers: headers? }))
    }

    /// Notes the file with headers if other users can read it.
    pub(super) fn note_traces_file(&mut self) {
        if let Some(file) = self.get(HEADERS_FILE) {
            self.note_exposed(HEADERS_FILE, file.as_ref());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::ConfigError;

    fn read(variables: &[(&str, &str)]) -> Result<Option<TracesConfig>, ConfigError> {
        let variables: HashMap<&str, &str> = variables.iter().copied().collect();
        let lookup = |name: &str| variables.get(name).map(|value| (*value).to_owned());
        let mut reader = Reader::new(&lookup);
        let traces = reader.traces();
        reader.finish(|| traces)
    }

    #[test]
    fn traces_are_off_without_an_endpoint() {
        assert!(read(&[]).unwrap().is_none());
        assert!(read(&[(ENDPOINT, ""), (HEADERS, "no header")]).unwrap().is_none());
    }

    #[test]
    fn endpoint_and_headers_are_read() {
        let config =
            read(&[(ENDPOINT, "https://collector:4318/base/"), (HEADERS, "Authorization=Bearer%20a=b, x-b=1")]);
        let config = config.unwrap().unwrap();
        assert_eq!(config.endpoint, "https://collector:4318/base/v1/traces");
        assert_eq!(config.service, "regcred");
        let headers: Vec<_> = config.headers.iter().map(|(name, value)| (&**name, value.expose_secret())).collect();
        assert_eq!(headers, [("Authorization", "Bearer%20a=b"), ("x-b", "1")]);
        assert!(!format!("{config:?}").contains("Bearer"), "{config:?}");
    }

    #[test]
    fn invalid_values_are_refused_without_their_text() {
        let valid = (ENDPOINT, "http://collector:4318");
        for variables in [
            &[(ENDPOINT, "canary")][..],
            &[(ENDPOINT, "grpc://canary:4317")],
            &[valid, (HEADERS, "canary")],
            &[valid, (HEADERS, "bad name=canary")],
            &[valid, (HEADERS, "name=canary%0A")],
            &[valid, (HEADERS, "name=canary"), (HEADERS_FILE, "/nowhere")],
            &[valid, (HEADERS_FILE, "/nowhere")],
        ] {
            let error = read(variables).unwrap_err().to_string();
            assert!(error.contains("OTEL_EXPORTER_OTLP_") && !error.contains("canary"), "{error}");
        }
    }
}
