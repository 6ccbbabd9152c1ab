//! Required fields that a body lacks, by the schema of its type.

use serde_json::{Value, json};
use utoipa::ToSchema;

/// Maximum number of fields that an error names.
const FIELDS_MAX: usize = 20;

/// Names the required fields that are missing in objects of a body.
pub(super) fn missing<T: ToSchema>(body: &Value) -> Vec<String> {
    let mut schemas = Vec::new();
    T::schemas(&mut schemas);
    let schemas = schemas.into_iter().map(|(name, schema)| (name, json!(schema))).collect();
    let mut search = Search { schemas, missing: Vec::new() };
    search.visit(&json!(T::schema()), body, "");
    search.missing
}

struct Search {
    schemas: Vec<(String, Value)>,
    missing: Vec<String>,
}

impl Search {
    fn visit(&mut self, schema: &Value, value: &Value, path: &str) {
        if let Some(target) = schema["$ref"].as_str() {
            let name = target.rsplit('/').next().unwrap_or_default();
            let named = self.schemas.iter().find(|(known, _)| known == name).map(|(_, schema)| schema.clone());
            return self.visit(&named.unwrap_or_default(), value, path);
        }
        // An optional object is a choice between its schema and null.
        let choices = schema["oneOf"].as_array().into_iter().flatten();
        let choices: Vec<&Value> = choices.filter(|choice| choice["type"] != "null").collect();
        if let [only] = choices[..] {
            return self.visit(only, value, path);
        }
        for part in schema["allOf"].as_array().into_iter().flatten() {
            self.visit(part, value, path);
        }
        match value {
            Value::Object(members) => {
                for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if !members.contains_key(name) && self.missing.len() < FIELDS_MAX {
                        self.missing.push(joined(path, name));
                    }
                }
                for (name, value) in members {
                    if let Some(property) = schema["properties"].get(name) {
                        self.visit(property, value, &joined(path, name));
                    }
                }
            }
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.visit(&schema["items"], item, &format!("{path}[{index}]"));
                }
            }
            _ => {}
        }
    }
}

fn joined(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}
