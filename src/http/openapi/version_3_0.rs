//! The document as OpenAPI 3.0, for generators that do not read 3.1.
//!
//! Such generators, as progenitor for Rust, support one media type per body and one schema for all
//! successful responses. The document states JSON only, and other forms are in the 3.1 document.
//!
//! Differences: <https://spec.openapis.org/oas/v3.1.0> against
//! <https://spec.openapis.org/oas/v3.0.3>.

use serde_json::{Map, Value, json};

use super::complete::members;

const JSON: &str = "application/json";

/// Converts an OpenAPI 3.1 document.
pub(super) fn convert(mut document: Value) -> Value {
    document["openapi"] = "3.0.3".into();
    document["info"]["license"] = json!({"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"});
    let schemas = document["components"]["schemas"].clone();
    close_open_enums(&mut document["components"]["schemas"]);
    convert_schemas(&mut document, &schemas);
    for (_, item) in members(&mut document["paths"]) {
        for (_, operation) in members(item) {
            if let Some(body) = operation.get_mut("requestBody") {
                keep_json(body);
            }
            for (_, response) in members(&mut operation["responses"]) {
                keep_json(response);
            }
            unify_successes(&mut operation["responses"]);
        }
    }
    document
}

/// A choice between known values and any text becomes text with `x-extensible-enum`: Rust generators
/// make a struct of `anyOf`. The schemas of the known values are not used then.
fn close_open_enums(schemas: &mut Value) {
    let known = schemas.clone();
    let mut unused = Vec::new();
    for (_, schema) in members(schemas) {
        for (_, property) in schema.get_mut("properties").into_iter().flat_map(members) {
            let name = property["anyOf"][0]["$ref"].as_str().and_then(|path| path.rsplit('/').next());
            let Some(name) = name.filter(|_| property["anyOf"][1] == json!({"type": "string"})) else { continue };
            let (name, values) = (name.to_owned(), known[name]["enum"].clone());
            if let Some(property) = property.as_object_mut() {
                property.remove("anyOf");
                property.insert("type".to_owned(), "string".into());
                property.insert("x-extensible-enum".to_owned(), values);
            }
            unused.push(name);
        }
    }
    if let Some(schemas) = schemas.as_object_mut() {
        schemas.retain(|name, _| !unused.contains(name));
    }
}

/// Removes the other media types of a body that may be JSON.
fn keep_json(body: &mut Value) {
    if let Some(content) = body.get_mut("content").and_then(Value::as_object_mut)
        && content.contains_key(JSON)
    {
        content.retain(|media_type, _| media_type == JSON);
    }
}

/// Gives a 201 the schema of the 200, which includes what is created.
fn unify_successes(responses: &mut Value) {
    let Some(schema) = responses.pointer("/200/content/application~1json/schema").cloned() else { return };
    if let Some(created) = responses.pointer_mut("/201/content/application~1json/schema") {
        *created = schema;
    }
}

/// Converts every schema. Schemas are recognised by their members, which no other object has.
fn convert_schemas(value: &mut Value, schemas: &Value) {
    match value {
        Value::Object(members) => {
            members.values_mut().for_each(|member| convert_schemas(member, schemas));
            convert_type(members);
            convert_null_alternative(members, schemas);
            convert_reference(members);
            members.remove("propertyNames");
            if let Some(constant) = members.remove("const") {
                members.insert("enum".to_owned(), json!([constant]));
            }
            if let Some(examples) = members.get_mut("examples")
                && let Some(first) = examples.as_array().and_then(|all| all.first().cloned())
            {
                members.remove("examples");
                members.insert("example".to_owned(), first);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| convert_schemas(item, schemas)),
        _ => {}
    }
}

/// `type: [T, "null"]` becomes `type: T` with `nullable`, several types become `oneOf`.
fn convert_type(schema: &mut Map<String, Value>) {
    let Some(types) = schema.get("type").and_then(Value::as_array).cloned() else { return };
    if !types.iter().all(Value::is_string) {
        return;
    }
    if types.contains(&json!("null")) {
        schema.insert("nullable".to_owned(), Value::Bool(true));
    }
    let types: Vec<Value> = types.into_iter().filter(|name| name != "null").collect();
    schema.remove("type");
    if let [only] = &types[..] {
        schema.insert("type".to_owned(), only.clone());
    } else {
        let types = types.into_iter().map(|name| json!({"type": name}));
        schema.insert("oneOf".to_owned(), types.collect());
    }
}

/// Returns the type of a schema, or the one that all its alternatives have.
fn type_of(schema: &Value, schemas: &Value) -> Option<Value> {
    if let Some(path) = schema["$ref"].as_str() {
        return type_of(schemas.get(path.rsplit('/').next()?)?, schemas);
    }
    if schema["type"].is_string() {
        return Some(schema["type"].clone());
    }
    let (first, others) = schema["oneOf"].as_array()?.split_first()?;
    let of_first = type_of(first, schemas)?;
    others.iter().all(|other| type_of(other, schemas).as_ref() == Some(&of_first)).then_some(of_first)
}

/// `oneOf: [S, {type: null}]` becomes `S` with `nullable`, which requires a `type`. A choice between
/// several types and `null` becomes any value, because 3.0 cannot express it.
fn convert_null_alternative(schema: &mut Map<String, Value>, schemas: &Value) {
    let Some(alternatives) = schema.get("oneOf").and_then(Value::as_array).cloned() else { return };
    let is_null = |one: &Value| one["type"] == "null";
    if !alternatives.iter().any(is_null) {
        return;
    }
    schema.remove("oneOf");
    let mut others = alternatives.into_iter().filter(|one| !is_null(one));
    if let (Some(Value::Object(only)), None) = (others.next(), others.next()) {
        let inner = only.get("allOf").and_then(|all| all[0].get("$ref"));
        let target = only.get("$ref").or(inner).and_then(Value::as_str);
        let target = target.and_then(|path| path.strip_prefix("#/components/schemas/"));
        let named = target.and_then(|name| type_of(&schemas[name], schemas));
        schema.insert("nullable".to_owned(), Value::Bool(true));
        schema.extend(only);
        if let Some(name) = named {
            schema.insert("type".to_owned(), name);
        }
    }
}

/// A reference with siblings becomes `allOf`: 3.0 ignores the siblings.
fn convert_reference(schema: &mut Map<String, Value>) {
    if schema.len() > 1
        && let Some(target @ Value::String(_)) = schema.get("$ref").cloned()
    {
        schema.remove("$ref");
        schema.insert("allOf".to_owned(), json!([{"$ref": target}]));
    }
}
