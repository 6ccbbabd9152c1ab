//! Export of the audit log: one event is one line of JSON, whatever its row contains.

#![no_main]

use std::collections::BTreeMap;

use chrono::DateTime;
use libfuzzer_sys::fuzz_target;
use regcred::{
    domain::audit::{Event, StoredEvent},
    http::json_line,
};
use regcred_fuzz::{RECORD_SEPARATOR, UNIT_SEPARATOR, limited};
use serde_json::{Value, value::RawValue};
use uuid::Uuid;

fuzz_target!(|input: &[u8]| limited(|| {
    let Ok(text) = str::from_utf8(input) else { return };
    let stored = stored(text);
    let line = json_line(stored.clone());
    let content = line.strip_suffix('\n').expect("a line");
    assert!(!content.contains(['\n', '\r']), "{line:?}");
    // The details are as deep as their row, deeper than serde_json parses.
    let read: BTreeMap<String, Box<RawValue>> = serde_json::from_str(content).expect("an object");
    let member = |name: &str| -> Value { serde_json::from_str(read[name].get()).expect("JSON") };
    let StoredEvent { event, sequence, .. } = stored;
    assert_eq!(member("id"), event.id.to_string());
    assert_eq!(member("actor")["name"].as_str(), event.actor_name.as_deref());
    assert_eq!(member("resource").as_str(), event.resource.as_deref());
    assert_eq!(member("related").as_array().map(Vec::len), Some(event.related.len()));
    assert_eq!(member("chain")["sequence"], sequence);
    let details = event.details.replace(['\n', '\r'], " ");
    let is_json = serde_json::from_str::<&RawValue>(&details).is_ok();
    assert_eq!(read["details"].get(), if is_json { details.trim() } else { "null" });
}));

/// A row as a writer of the database may have made it. Absent fields are NULL or empty.
fn stored(text: &str) -> StoredEvent {
    let mut fields = text.split(UNIT_SEPARATOR).map(str::to_owned);
    let [actor_type, action, outcome] = [(); 3].map(|()| fields.next().unwrap_or_default());
    let details = fields.next().unwrap_or_default();
    let [actor_name, resource, source_ip, related] = [(); 4].map(|()| fields.next());
    let event = Event {
        id: Uuid::max(),
        at: DateTime::default(),
        actor_type,
        actor_id: None,
        actor_name,
        action,
        resource,
        related: related.iter().flat_map(|related| related.split(RECORD_SEPARATOR)).map(str::to_owned).collect(),
        outcome,
        request_id: Some(Uuid::nil()),
        source_ip,
        details,
    };
    let hash = text.as_bytes().to_vec();
    StoredEvent { event, key_id: None, chain_id: Uuid::nil(), sequence: -1, previous_hash: Vec::new(), hash }
}
