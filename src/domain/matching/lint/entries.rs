//! Warnings about one entry: its key, and what it holds.

use super::probes::lint_key;
use crate::domain::docker_config::{
    Consumer, Warning, WarningCode, auth,
    import::shown,
    parse::Entry,
    reading::{Reading, read},
};

/// The readers that are asked, k8schain with the kubelet. A document for `DOCKER_AUTH_CONFIG` is made for it alone.
const ASKED: [Consumer; 3] = [Consumer::Kubernetes, Consumer::Docker, Consumer::Podman];

/// Warns about an entry that some reader does not find, uses for more than it says, or cannot log in with.
pub(in crate::domain::matching) fn lint_entry(entry: &Entry) -> Vec<Warning> {
    let mut warnings = lint_key(&entry.key);
    let readings = ASKED.map(|consumer| (consumer, read(consumer, entry)));
    warnings.extend(said(
        entry,
        WarningCode::Refused,
        "this entry makes the whole document useless for",
        &readings,
        |reading| match reading {
            Reading::FailsAll(why) => Some(why),
            _ => None,
        },
    ));
    warnings.extend(said(
        entry,
        WarningCode::HoldsNothing,
        "there is nothing to log in with for",
        &readings,
        |reading| match reading {
            Reading::Nothing(why) | Reading::Fails(why) => Some(why),
            _ => None,
        },
    ));
    warnings.extend(auth_wins(entry));
    warnings
}

/// One warning for all readers that make this of the entry.
fn said(
    entry: &Entry,
    code: WarningCode,
    what: &str,
    readings: &[(Consumer, Reading)],
    why: impl Fn(&Reading) -> Option<&std::borrow::Cow<'static, str>>,
) -> Option<Warning> {
    let reasons = readings.iter().filter_map(|(consumer, reading)| Some((consumer, why(reading)?)));
    let each: Vec<_> = reasons.map(|(consumer, why)| format!("{consumer} ({why})")).collect();
    (!each.is_empty()).then(|| Warning::new(code, None, &shown(&entry.key), format!("{what} {}", each.join(", "))))
}

/// The fields in the clear are for show where there is an `auth`, until somebody changes them and not the `auth`.
fn auth_wins(entry: &Entry) -> Option<Warning> {
    let login = auth::decode_leniently(entry.auth.text()).ok()?;
    let differs = |field: &str, said: &[u8]| !field.is_empty() && field.as_bytes() != said;
    let is_stale = differs(entry.username.text(), &login.username) || differs(entry.password.text(), &login.password);
    is_stale.then(|| {
        let detail = "`username` or `password` says something else than `auth`, and every reader takes `auth`";
        Warning::new(WarningCode::AuthWins, None, &shown(&entry.key), detail)
    })
}
