//! The OpenAPI document.

use std::collections::BTreeSet;

use serde_json::{Value, json};

fn document() -> Value {
    regcred::http::document()
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
    let committed_3_0 = include_str!("../../openapi/openapi-3.0.json");
    for (committed, generated) in
        [(committed, regcred::http::document()), (committed_3_0, regcred::http::document_3_0())]
    {
        assert!(committed.trim_end() == format!("{generated:#}"), "run: make openapi");
    }
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
    assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
    for (path, method, operation) in operations(&document) {
        let is_authenticated = path.starts_with("/v1/");
        let expected = if is_authenticated { json!([{"bearer": []}]) } else { json!([]) };
        assert_eq!(operation["security"], expected, "{method} {path}");
        if is_authenticated {
            let response = &operation["responses"]["401"]["$ref"];
            assert_eq!(response, "#/components/responses/Unauthenticated", "{method} {path}");
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
        let resolved = |parameter: Value| match parameter["$ref"].as_str() {
            Some(reference) => document.pointer(reference.trim_start_matches('#')).expect("a component").clone(),
            None => parameter,
        };
        let parameters: Vec<Value> = parameters.into_iter().map(resolved).collect();
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
fn response_schemas_state_what_is_always_present() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let required = |schema: &str| {
        let names = schemas[schema]["required"].as_array().cloned().unwrap_or_default();
        names.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect::<BTreeSet<_>>()
    };

    assert!(
        required("RegistryAccount").is_superset(&["caCertificate", "email", "expiresAt"].map(str::to_owned).into())
    );
    assert!(required("Page_RegistryAccount").contains("next"));
    assert!(!required("Problem").contains("errors"), "only some problems have it");
    assert!(!required("PullSecret").contains("accounts"), "it has accounts or a selector");
    assert!(!required("CreateRegistryAccount").contains("email"), "requests may omit it");
}

#[test]
fn fields_that_depend_on_the_type_are_separate_schemas() {
    let document = document();
    let schemas = &document["components"]["schemas"];

    let mapping = &schemas["ClusterAuthInput"]["discriminator"]["mapping"];
    assert_eq!(mapping["token"], "#/components/schemas/ClusterAuthInputToken");
    let certificate = &schemas["ClusterAuthInputClientCertificate"];
    assert_eq!(certificate["required"], json!(["certificate", "key", "type"]));
    assert_eq!(certificate["properties"]["type"], json!({"type": "string", "enum": ["clientCertificate"]}));
    assert_eq!(certificate["properties"]["token"], Value::Null);
    let oidc = &schemas["CreateIdentityProviderOidc"];
    assert!(oidc["properties"]["caCertificate"].is_object() && oidc["properties"]["cluster"].is_null());
}

#[test]
fn the_3_0_document_has_no_3_1_schemas() {
    let document = regcred::http::document_3_0();
    assert_eq!(document["openapi"], "3.0.3");
    let mut pending = vec![("", &document)];
    while let Some((name, value)) = pending.pop() {
        match value {
            Value::Object(members) => {
                assert!(name == "properties" || !members.get("type").is_some_and(Value::is_array), "{value}");
                for word in ["propertyNames", "const", "examples"] {
                    assert!(name == "properties" || !members.contains_key(word), "{word} in {value}");
                }
                assert!(!members.contains_key("$ref") || members.len() == 1, "{value}");
                pending.extend(members.iter().map(|(name, value)| (name.as_str(), value)));
            }
            Value::Array(items) => pending.extend(items.iter().map(|item| (name, item))),
            _ => assert!(*value != "null" || name != "type", "{name}"),
        }
    }
    let email = &document["components"]["schemas"]["RegistryAccount"]["properties"]["email"];
    assert_eq!((&email["type"], &email["nullable"]), (&json!("string"), &json!(true)));
}

#[test]
fn secrets_are_in_requests_only() {
    const SECRETS: [&str; 9] =
        ["password", "token", "key", "kubeconfig", "clientSecret", "code", "secretAccessKey", "keyFile", "privateKey"];
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
        ("ClusterAuthInputToken", "token"),
        ("ClusterAuthInputClientCertificate", "key"),
        ("CreateCluster", "kubeconfig"),
        ("UpdateCluster", "kubeconfig"),
        ("LoginInput", "clientSecret"),
        ("CompleteLogin", "code"),
        ("IdentityInput", "secretAccessKey"),
        ("IdentityInput", "keyFile"),
        ("IdentityInput", "clientSecret"),
        ("IdentityInput", "privateKey"),
    ] {
        assert!(written.contains(&expected), "{expected:?} is not a secret in {written:?}");
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

/// Words in backquotes of the first cell of each row of a table.
fn slugs_of_table(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>()).collect()
}

#[test]
fn every_problem_type_is_in_the_document_and_in_the_operations_guide() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let values = |schema: &Value| {
        let values = schema["enum"].as_array().expect("an enum").iter();
        values.map(|value| value.as_str().expect("text").to_owned()).collect::<BTreeSet<_>>()
    };
    let base = "https://regcred.dev/problems/";
    let listed: BTreeSet<String> = values(&schemas["ProblemType"])
        .iter()
        .map(|uri| uri.strip_prefix(base).expect("a problem type").to_owned())
        .collect();

    let guide = include_str!("../../docs/OPERATIONS.md");
    let problems =
        guide.split("\n## Problems\n").nth(1).and_then(|rest| rest.split("\n## ").next()).expect("a chapter");
    let table = problems.split("| Slug |").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("a table");
    assert_eq!(listed, slugs_of_table(table));
    let of_targets = values(&schemas["TargetErrorType"]);
    let chapter = guide.split("| Type of `lastError` |").nth(1).and_then(|rest| rest.split("\n\n").next());
    let own: BTreeSet<String> = of_targets.difference(&listed).cloned().collect();
    assert_eq!(own, slugs_of_table(chapter.expect("a table")), "types that are no problem types");

    // A client must accept other values: a later release has more.
    for (schema, known) in [("Problem", "ProblemType"), ("TargetError", "TargetErrorType")] {
        let expected = json!([{"$ref": format!("#/components/schemas/{known}")}, {"type": "string"}]);
        assert_eq!(schemas[schema]["properties"]["type"]["anyOf"], expected, "{schema}");
        let version_3_0 = regcred::http::document_3_0();
        let field = &version_3_0["components"]["schemas"][schema]["properties"]["type"];
        assert_eq!((&field["type"], &field["x-extensible-enum"]), (&json!("string"), &schemas[known]["enum"]));
    }
}
