//! Completes the generated document with what utoipa cannot derive.

use std::collections::BTreeSet;

use actix_web::http::StatusCode;
use serde_json::{Map, Value, json};

use crate::http::idempotency;

/// A schema whose fields depend on its `type`: for each type, the required and the optional fields
/// that only some types have.
struct Tagged {
    schema: &'static str,
    types: &'static [(&'static str, &'static [&'static str], &'static [&'static str])],
}

const TAGGED: [Tagged; 2] = [
    Tagged {
        schema: "ClusterAuthInput",
        types: &[
            ("token", &["token"], &[]),
            ("clientCertificate", &["certificate", "key"], &[]),
            ("inCluster", &[], &[]),
            ("none", &[], &[]),
        ],
    },
    Tagged {
        schema: "CreateIdentityProvider",
        types: &[("oidc", &["issuer"], &["caCertificate", "login"]), ("tokenReview", &["cluster"], &[])],
    },
];

/// Fields whose values a later release may extend, by schema: they refer to the values of this one.
const OPEN_ENUMS: [(&str, &str); 2] = [("Problem", "type"), ("TargetError", "type")];

/// Request and response of each operation, by operation id, from a run against real services.
const EXAMPLES: &str = include_str!("../../../openapi/examples.json");

/// Statuses after which a client may retry, with `Retry-After` if the time is known.
const RETRYABLE: [&str; 2] = ["429", "503"];

/// Adds servers, authentication, problems and headers to a generated document, and states what the
/// schemas of responses guarantee.
pub(super) fn complete(mut document: Value) -> Value {
    document["servers"] = json!([{"url": "/", "description": "The server of this document"}]);
    add_components(&mut document["components"]);
    // A file that is not JSON fails the test that compares it with a run.
    let examples: Value = serde_json::from_str(EXAMPLES).unwrap_or_default();
    let mut shared = Map::new();
    for (path, item) in members(&mut document["paths"]) {
        for (method, operation) in members(item) {
            share_idempotency_key(operation, &mut shared);
            complete_operation(path, method, operation);
            add_example(operation, &examples);
        }
    }
    document["components"]["parameters"] = shared.into();
    let returned = schemas_of_responses(&document);
    let accepted = schemas_of_requests(&document);
    let versioned = versioned(&document["components"]["schemas"]);
    add_etags(&mut document["paths"], &versioned);
    let schemas = &mut document["components"]["schemas"];
    for (name, schema) in members(schemas) {
        if let Some(item) = name.strip_prefix("Page_") {
            schema["properties"]["items"]["items"] = reference("schemas", item);
        }
        if returned.contains(name) && !accepted.contains(name) {
            require_nullable(schema);
        }
    }
    for (schema, field) in OPEN_ENUMS {
        open_enum(&mut document["components"]["schemas"][schema]["properties"][field]);
    }
    for tagged in &TAGGED {
        split_by_type(&mut document["components"]["schemas"], tagged);
    }
    allow_members(&mut document);
    document
}

fn add_components(components: &mut Value) {
    components["securitySchemes"]["bearer"] = json!({
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "rgc_…",
        "description": "API key, or token of an identity provider. `regcred api-key create` creates \
            the first key.",
    });
    components["headers"] = json!({
        "RequestId": {
            "description": "Id of the request in logs and audit events",
            "schema": {"type": "string", "format": "uuid"},
        },
        "ETag": {
            "description": "Version of the resource, for `If-Match`",
            "schema": {"type": "string"},
            "example": "\"1\"",
        },
        "RetryAfter": {
            "description": "Seconds after which to retry",
            "schema": {"type": "integer", "minimum": 0},
        },
        "Authenticate": {
            "description": "Authentication scheme (RFC 6750)",
            "schema": {"type": "string"},
        },
    });
    let problem = |description: &str, header: Option<(&str, &str)>| {
        let mut headers = json!({"X-Request-Id": reference("headers", "RequestId")});
        if let Some((name, component)) = header {
            headers[name] = reference("headers", component);
        }
        let schema = reference("schemas", "Problem");
        json!({
            "description": description,
            "headers": headers,
            "content": {"application/problem+json": {"schema": schema}},
        })
    };
    components["responses"] = json!({
        "Problem": problem("The request failed", None),
        "Unauthenticated": problem(
            "The credential is missing, unknown, expired or revoked",
            Some(("WWW-Authenticate", "Authenticate")),
        ),
        "Unavailable": problem("Retry later", Some(("Retry-After", "RetryAfter"))),
    });
}

/// Replaces the parameter `Idempotency-Key` of an operation by a reference to a component.
fn share_idempotency_key(operation: &mut Value, shared: &mut Map<String, Value>) {
    const COMPONENT: &str = "IdempotencyKey";
    for parameter in operation["parameters"].as_array_mut().into_iter().flatten() {
        if parameter["name"] == idempotency::HEADER {
            forbid_null(&mut parameter["schema"]);
            shared.insert(COMPONENT.to_owned(), parameter.take());
            *parameter = reference("parameters", COMPONENT);
        }
    }
}

/// Adds the recorded request and response of an operation.
fn add_example(operation: &mut Value, examples: &Value) {
    let Some(example) = operation["operationId"].as_str().and_then(|id| examples.get(id)) else { return };
    if let Some(request) = example.get("request") {
        let contents = members(&mut operation["requestBody"]["content"]);
        for (_, content) in contents.filter(|(media_type, _)| media_type.ends_with("json")) {
            content["example"] = request.clone();
        }
    }
    if let (Some(status), Some(media_type)) = (example["status"].as_str(), example["mediaType"].as_str())
        && let Some(content) = operation["responses"][status]["content"].get_mut(media_type)
    {
        content["example"] = match (media_type, example["response"].as_str()) {
            ("text/event-stream", Some(stream)) => first_event_data(stream),
            _ => example["response"].clone(),
        };
    }
}

/// Data of the first event of a stream: the schema of a stream is that of the data of its events.
fn first_event_data(stream: &str) -> Value {
    let data = stream.lines().find_map(|line| line.strip_prefix("data: ")).unwrap_or_default();
    serde_json::from_str(data).unwrap_or_default()
}

/// Adds security, problems, descriptions and headers to an operation.
fn complete_operation(path: &str, method: &str, operation: &mut Value) {
    let is_authenticated = path.starts_with("/v1/");
    operation["security"] = if is_authenticated { json!([{"bearer": []}]) } else { json!([]) };
    if let Some(parameters) = operation["parameters"].as_array_mut() {
        for parameter in parameters.iter_mut().filter(|parameter| parameter["in"] == "header") {
            // A header is absent or has a value; utoipa derives `null` from `Option`.
            forbid_null(&mut parameter["schema"]);
        }
    } else if let Some(operation) = operation.as_object_mut() {
        operation.remove("parameters");
    }
    let statuses = if is_authenticated {
        problems(path, method, operation)
    } else if path.starts_with("/login") {
        open_problems(operation)
    } else {
        Vec::new()
    };
    let mut parameters = operation["parameters"].as_array().into_iter().flatten();
    let is_changing = parameters.any(|parameter| parameter["name"] == "dryRun");
    let responses = &mut operation["responses"];
    for (status, response) in members(responses) {
        if response["description"].as_str().unwrap_or_default().is_empty() {
            response["description"] = reason(status).into();
        }
        response["headers"]["X-Request-Id"] = reference("headers", "RequestId");
    }
    if responses.get("200").is_none()
        && let Some(created) = responses.get("201").filter(|_| is_changing).cloned()
    {
        responses["200"] = json!({
            "description": "Dry run: nothing was created",
            "headers": {"X-Request-Id": reference("headers", "RequestId")},
            "content": created["content"],
        });
    }
    for status in statuses {
        if responses.get(status).is_none() {
            responses[status] = reference("responses", component_of(status));
        }
    }
}

/// Statuses of the problems that an operation may return.
fn problems(path: &str, method: &str, operation: &Value) -> Vec<&'static str> {
    // 422: every operation refuses unknown query parameters.
    let mut statuses = vec!["400", "401", "403", "422", "429", "500", "503"];
    if path.contains('{') {
        statuses.push("404");
    }
    if matches!(method, "put" | "patch" | "delete") {
        statuses.push("412");
    }
    if operation.get("requestBody").is_some() {
        statuses.extend(["408", "409", "413", "415"]);
    }
    if method == "delete" || path.ends_with("/sync") {
        statuses.push("409");
    }
    // The dry run of a pull secret calls clusters.
    if path.ends_with("/secrets") || method == "put" || path == "/v1/pull-secrets/{name}" && method == "patch" {
        statuses.extend(["502", "504"]);
    }
    if path.starts_with("/v1/docker-configs") && !path.ends_with("/explain") {
        statuses.push("406");
    }
    statuses
}

/// Statuses of the problems that a route for callers without a credential may return.
fn open_problems(operation: &Value) -> Vec<&'static str> {
    match operation.get("requestBody") {
        Some(_) => vec!["400", "403", "408", "413", "415", "422", "429", "500", "503"],
        None => vec!["422", "500", "503"],
    }
}

fn component_of(status: &str) -> &'static str {
    match status {
        "401" => "Unauthenticated",
        _ if RETRYABLE.contains(&status) => "Unavailable",
        _ => "Problem",
    }
}

fn reason(status: &str) -> &'static str {
    let status = StatusCode::from_bytes(status.as_bytes()).ok();
    status.and_then(|status| status.canonical_reason()).unwrap_or("Response")
}

/// Documents the `ETag` of successful responses with a resource that has a version.
fn add_etags(paths: &mut Value, versioned: &BTreeSet<String>) {
    for (_, item) in members(paths) {
        for (_, operation) in members(item) {
            for (_, response) in members(&mut operation["responses"]) {
                let schema = response["content"]["application/json"]["schema"]["$ref"].as_str();
                let name = schema.and_then(|path| path.strip_prefix("#/components/schemas/"));
                if name.is_some_and(|name| versioned.contains(name)) {
                    response["headers"]["ETag"] = reference("headers", "ETag");
                }
            }
        }
    }
}

/// Schemas of resources with a version.
fn versioned(schemas: &Value) -> BTreeSet<String> {
    let schemas = schemas.as_object().into_iter().flatten();
    let resources = schemas.filter(|(_, schema)| {
        let properties = &schema["properties"];
        properties["version"]["type"] == "integer" && properties["updatedAt"].is_object()
    });
    resources.map(|(name, _)| name.clone()).collect()
}

/// Requires the properties of a response that may be `null`: serde writes them always.
///
/// A field that is omitted must have a schema without `null`.
fn require_nullable(schema: &mut Value) {
    let properties = schema["properties"].as_object().into_iter().flatten();
    let nullable = properties.filter(|(_, property)| is_nullable(property));
    let mut required: BTreeSet<String> = nullable.map(|(name, _)| name.clone()).collect();
    let known = schema["required"].as_array().into_iter().flatten();
    required.extend(known.filter_map(Value::as_str).map(str::to_owned));
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
}

/// Replaces a flat schema by one schema for each type and a choice between them.
fn split_by_type(schemas: &mut Value, tagged: &Tagged) {
    let flat = schemas[tagged.schema].clone();
    let mut mapping = Map::new();
    let mut choices = Vec::new();
    for (name, required, optional) in tagged.types {
        let mut schema = flat.clone();
        let belongs = |field: &str| required.contains(&field) || optional.contains(&field);
        let specific = tagged.types.iter().flat_map(|(_, required, optional)| required.iter().chain(*optional));
        for field in specific.filter(|field| !belongs(field)) {
            schema["properties"].as_object_mut().map(|properties| properties.remove(*field));
        }
        for field in *required {
            forbid_null(&mut schema["properties"][field]);
        }
        schema["properties"]["type"] = json!({"type": "string", "enum": [name]});
        let common = flat["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        schema["required"] = common.chain(required.iter().copied()).collect::<BTreeSet<_>>().into_iter().collect();
        let part = format!("{}{}", tagged.schema, capitalised(name));
        let target = reference("schemas", &part);
        mapping.insert((*name).to_owned(), target["$ref"].clone());
        choices.push(target);
        schemas[part] = schema;
    }
    schemas[tagged.schema] = json!({
        "description": flat["description"],
        "type": "object",
        "oneOf": choices,
        "discriminator": {"propertyName": "type", "mapping": mapping},
    });
}

/// States that a field may have other values than the known ones: a client must not fail on them.
fn open_enum(property: &mut Value) {
    let Some(property) = property.as_object_mut() else { return };
    if let Some(known) = property.remove("$ref") {
        property.insert("anyOf".to_owned(), json!([{"$ref": known}, {"type": "string"}]));
    }
}

fn capitalised(name: &str) -> String {
    let (first, rest) = name.split_at(1);
    first.to_uppercase() + rest
}

fn is_nullable(schema: &Value) -> bool {
    let has_null = |types: &Value| types.as_array().is_some_and(|types| types.contains(&json!("null")));
    has_null(&schema["type"])
        || schema["oneOf"].as_array().is_some_and(|schemas| schemas.contains(&json!({"type": "null"})))
}

fn forbid_null(schema: &mut Value) {
    let Some(types) = schema["type"].as_array() else { return };
    let types: Vec<&Value> = types.iter().filter(|name| *name != "null").collect();
    schema["type"] = if let [only] = types[..] { only.clone() } else { json!(types) };
}

/// States that an object without properties has any: generators read a missing
/// `additionalProperties` as none.
fn allow_members(value: &mut Value) {
    match value {
        Value::Object(members) => {
            let is_object = members.get("type").is_some_and(|name| {
                *name == "object" || name.as_array().is_some_and(|names| names.contains(&json!("object")))
            });
            if is_object && !members.contains_key("properties") && !members.contains_key("additionalProperties") {
                members.insert("additionalProperties".to_owned(), Value::Bool(true));
            }
            members.values_mut().for_each(allow_members);
        }
        Value::Array(items) => items.iter_mut().for_each(allow_members),
        _ => {}
    }
}

/// Names of the schemas that responses contain.
fn schemas_of_responses(document: &Value) -> BTreeSet<String> {
    referenced(document, |operation| &operation["responses"])
}

/// Names of the schemas that requests contain.
fn schemas_of_requests(document: &Value) -> BTreeSet<String> {
    referenced(document, |operation| &operation["requestBody"])
}

/// Names of the schemas that a part of any operation refers to, directly or through others.
fn referenced(document: &Value, part: impl Fn(&Value) -> &Value) -> BTreeSet<String> {
    let items = document["paths"].as_object().into_iter().flatten();
    let operations = items.flat_map(|(_, item)| item.as_object().into_iter().flatten());
    let mut pending: Vec<&Value> = operations.map(|(_, operation)| part(operation)).collect();
    let mut names = BTreeSet::new();
    while let Some(value) = pending.pop() {
        match value {
            Value::Object(members) => pending.extend(members.values()),
            Value::Array(items) => pending.extend(items),
            Value::String(text) => {
                if let Some(name) = text.strip_prefix("#/components/schemas/")
                    && names.insert(name.to_owned())
                {
                    pending.push(&document["components"]["schemas"][name]);
                }
            }
            _ => {}
        }
    }
    names
}

fn reference(kind: &str, name: &str) -> Value {
    json!({"$ref": format!("#/components/{kind}/{name}")})
}

/// Members of an object; none of any other value.
pub(super) fn members(value: &mut Value) -> impl Iterator<Item = (&String, &mut Value)> {
    value.as_object_mut().into_iter().flat_map(Map::iter_mut)
}
