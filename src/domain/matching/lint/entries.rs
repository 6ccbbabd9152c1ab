//! Warnings about one entry: its key and its content.

use super::probes::lint_key;
use crate::domain::{
    account::ends_with_whitespace,
    docker_config::{
        Consumer, Warning, WarningCode, auth,
        import::redact_key,
        parse::Entry,
        reading::{Reading, read},
    },
};

/// Consumers to check. k8schain behaves like the kubelet, and a document for `DOCKER_AUTH_CONFIG`
/// is always rendered for that consumer alone.
const CONSUMERS: [Consumer; 3] = [Consumer::Kubernetes, Consumer::Docker, Consumer::Podman];

/// Warns about an entry that a consumer does not find, uses for more images than intended, or
/// cannot log in with.
pub(in crate::domain::matching) fn lint_entry(entry: &Entry) -> Vec<Warning> {
    let mut warnings = lint_key(&entry.key);
    let readings = CONSUMERS.map(|consumer| (consumer, read(consumer, entry)));
    warnings.extend(warning_for(
        entry,
        WarningCode::Refused,
        "this entry makes the complete document unusable for",
        &readings,
        |reading| match reading {
            Reading::FailsAll(reason) => Some(reason),
            _ => None,
        },
    ));
    warnings.extend(warning_for(entry, WarningCode::HoldsNothing, "no credential for", &readings, |reading| {
        match reading {
            Reading::Nothing(reason) | Reading::Fails(reason) => Some(reason),
            _ => None,
        }
    }));
    warnings.extend(auth_wins(entry));
    warnings.extend(white_space(entry));
    warnings
}

/// Makes one warning for all consumers with a matching reading.
fn warning_for(
    entry: &Entry,
    code: WarningCode,
    effect: &str,
    readings: &[(Consumer, Reading)],
    reason: impl Fn(&Reading) -> Option<&std::borrow::Cow<'static, str>>,
) -> Option<Warning> {
    let reasons = readings.iter().filter_map(|(consumer, reading)| Some((consumer, reason(reading)?)));
    let each: Vec<_> = reasons.map(|(consumer, reason)| format!("{consumer} ({reason})")).collect();
    (!each.is_empty())
        .then(|| Warning::new(code, None, &redact_key(&entry.key), format!("{effect} {}", each.join(", "))))
}

/// Warns if `username` and `password` differ from `auth`, for example after only they were edited.
fn auth_wins(entry: &Entry) -> Option<Warning> {
    let login = auth::decode_leniently(entry.auth.text()).ok()?;
    let differs = |field: &str, said: &[u8]| !field.is_empty() && field.as_bytes() != said;
    let is_stale = differs(entry.username.text(), &login.username) || differs(entry.password.text(), &login.password);
    is_stale.then(|| {
        let detail = "`username` or `password` differs from `auth`, and every consumer uses `auth`";
        Warning::new(WarningCode::AuthWins, None, &redact_key(&entry.key), detail)
    })
}

/// Warns if the password that consumers use ends with white space.
fn white_space(entry: &Entry) -> Option<Warning> {
    let is_padded = if entry.auth.text().is_empty() {
        ends_with_whitespace(entry.password.text())
    } else {
        let login = auth::decode_leniently(entry.auth.text()).ok()?;
        str::from_utf8(&login.password).is_ok_and(ends_with_whitespace)
    };
    is_padded.then(|| Warning::of_whitespace(None, &redact_key(&entry.key)))
}
