//! The OpenAPI document.

use std::collections::BTreeSet;

use serde_json::{Value, json};

fn document() -> Value {
    serde_json::to_value(regcred::http::document()).expect("JSON")
}

/// Every operation with its path and method.
fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, item)| {
        let item = item.as_object().expect("operations");
        item.iter().map(move |(method, operation)| (path.as_str(), method.as_str(), operation))
    });
    operations.collect()
}

#[test]
fn the_committed_document_is_up_to_date() {
    let committed = include_str!("../../openapi/openapi.json");
    let generated = regcred::http::document().to_pretty_json().expect("JSON");
    assert!(committed.trim_end() == generated.trim_end(), "run: make openapi");
}

#[test]
fn every_operation_has_a_name_a_tag_and_a_summary() {
    let document = document();
    let known: BTreeSet<&str> =
        document["tags"].as_array().expect("tags").iter().filter_map(|tag| tag["name"].as_str()).collect();
    let mut names = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let name = operation["operationId"].as_str().unwrap_or_default();
        assert!(!name.is_empty() && names.insert(name), "{method} {path}: {name:?} is missing or not unique");
        let tags = operation["tags"].as_array().cloned().unwrap_or_default();
        assert!(tags.len() == 1 && known.contains(tags[0].as_str().unwrap_or_default()), "{method} {path}: {tags:?}");
        let summary = operation["summary"].as_str().unwrap_or_default();
        assert!(summary.ends_with('.'), "{method} {path}: {summary:?} does not end with a full stop");
    }
    assert!(names.len() >= 17, "{names:?}");
}

#[test]
fn every_operation_under_v1_documents_its_authentication() {
    let document = document();
    assert_eq!(document["components"]["securitySchemes"]["apiKey"]["scheme"], "bearer");
    for (path, method, operation) in operations(&document) {
        let is_authenticated = path.starts_with("/v1/");
        let security = operation.get("security");
        assert_eq!(security, is_authenticated.then_some(&json!([{"apiKey": []}])), "{method} {path}");
        if is_authenticated {
            let problem = &operation["responses"]["401"]["content"]["application/problem+json"]["schema"]["$ref"];
            assert_eq!(problem, "#/components/schemas/Problem", "{method} {path}");
        }
    }
}

#[test]
fn every_parameter_is_described() {
    let document = document();
    for (path, method, operation) in operations(&document) {
        let in_path: BTreeSet<&str> =
            path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
        let described = parameters.iter().filter(|parameter| parameter["in"] == "path");
        let described: BTreeSet<&str> = described.filter_map(|parameter| parameter["name"].as_str()).collect();
        assert_eq!(described, in_path, "{method} {path}");
        for parameter in &parameters {
            assert!(
                parameter["description"].as_str().is_some_and(|text| !text.is_empty()),
                "{method} {path}: {parameter}"
            );
        }
    }
}

#[test]
fn secrets_are_write_only() {
    const SECRETS: [&str; 4] = ["password", "token", "key", "kubeconfig"];
    let document = document();
    let schemas = document["components"]["schemas"].as_object().expect("schemas");
    let in_responses = response_schemas(&document);
    let mut written = BTreeSet::new();
    let mut todo: Vec<(&str, &str, &Value)> =
        schemas.iter().map(|(name, schema)| (name.as_str(), "", schema)).collect();
    while let Some((name, property, schema)) = todo.pop() {
        match schema {
            Value::Object(members) => {
                let is_text = schema["type"] == "string" || schema["type"] == json!(["string", "null"]);
                // The only response with a secret: a new API key.
                let is_new_key = name == "CreatedApiKey" && property == "key";
                if SECRETS.contains(&property) && is_text && schema["format"] == "password" && !is_new_key {
                    assert_eq!(schema["writeOnly"], true, "{name}.{property}");
                    assert!(!in_responses.contains(name), "{name}.{property} is in a response");
                    written.insert((name, property));
                }
                // Without its format, tools would display the password.
                assert!(property != "password" || !is_text || schema["format"] == "password", "{name}.{property}");
                for (member, value) in members {
                    match value {
                        Value::Object(properties) if member == "properties" => {
                            todo.extend(properties.iter().map(|(property, value)| (name, property.as_str(), value)));
                        }
                        _ => todo.push((name, "", value)),
                    }
                }
            }
            Value::Array(items) => todo.extend(items.iter().map(|item| (name, property, item))),
            _ => {}
        }
    }
    for expected in [
        ("CreateRegistryAccount", "password"),
        ("UpdateRegistryAccount", "password"),
        ("ClusterAuthInput", "token"),
        ("ClusterAuthInput", "key"),
        ("CreateCluster", "kubeconfig"),
        ("UpdateCluster", "kubeconfig"),
    ] {
        assert!(written.contains(&expected), "{expected:?} is not write-only in {written:?}");
    }
}

/// Names of the schemas of responses.
fn response_schemas(document: &Value) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut todo: Vec<&Value> =
        operations(document).into_iter().map(|(.., operation)| &operation["responses"]).collect();
    while let Some(value) = todo.pop() {
        match value {
            Value::Object(members) => todo.extend(members.values()),
            Value::Array(items) => todo.extend(items),
            Value::String(text) => {
                if let Some(name) = text.strip_prefix("#/components/schemas/")
                    && names.insert(name.to_owned())
                {
                    todo.push(&document["components"]["schemas"][name]);
                }
            }
            _ => {}
        }
    }
    names
}
