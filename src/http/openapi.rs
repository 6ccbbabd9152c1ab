//! The OpenAPI document, generated from the routes, and the methods that each path supports.

use actix_web::App;
use actix_web::dev::ResourceDef;
use actix_web::http::Method;
use serde_json::{Value, json};
use utoipa::{
    OpenApi,
    openapi::{
        HttpMethod, OpenApi as Document,
        path::{Operation, PathItem},
    },
};
use utoipa_actix_web::{AppExt, service_config::ServiceConfig};

use crate::{
    domain::resource_event::ResourceKind,
    http::{RouteSet, problem::Problem},
};

mod complete;
mod version_3_0;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "regcred",
        description = "Credential broker: stores registry accounts and delivers them as Kubernetes image pull secrets.\n\nRoutes under `/v1` refuse unknown query parameters and unknown fields with 422. `HEAD` is served wherever `GET` is.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
        contact(name = "regcred", url = "https://regcred.dev"),
    ),
    // Parameters do not register their types.
    components(schemas(Problem, ResourceKind)),
    tags(
        (name = "registry-accounts", description = "Credentials of container registries"),
        (name = "docker-configs", description = "Docker configs for kubelet, docker CLI and other readers"),
        (name = "clusters", description = "Registered Kubernetes clusters"),
        (name = "secrets", description = "Direct delivery of a Secret"),
        (name = "diagnosis", description = "Why a pod does not pull its images"),
        (name = "coverage", description = "Which images of a cluster have a working login, and what uses each login"),
        (name = "pull-secrets", description = "Declared delivery: Secrets that a worker keeps up to date in many namespaces"),
        (name = "events", description = "Changes of all resources, as they happen"),
        (name = "api-keys", description = "API keys of callers"),
        (name = "sessions", description = "Sessions of the web console"),
        (name = "identity-providers", description = "Trusted issuers of tokens"),
        (name = "audit", description = "Audit log, without secret values"),
        (name = "operation", description = "Health"),
    ),
)]
struct Api;

/// The document without paths, the starting point of [`UtoipaApp`](utoipa_actix_web::UtoipaApp).
pub(super) fn frame() -> Document {
    Api::openapi()
}

/// The OpenAPI 3.1 document of the API.
#[must_use]
pub fn document() -> Value {
    complete::complete(json!(generated(RouteSet::Api.routes())))
}

/// The document as OpenAPI 3.0, for generators that do not read 3.1.
#[must_use]
pub fn document_3_0() -> Value {
    version_3_0::convert(document())
}

/// The document of the given routes, as utoipa generates it.
pub(super) fn generated(routes: fn(&mut ServiceConfig)) -> Document {
    let (_, document) = App::new().into_utoipa_app().openapi(frame()).configure(routes).split_for_parts();
    document
}

fn operations_mut(item: &mut PathItem) -> Vec<(HttpMethod, &mut Operation)> {
    [
        (HttpMethod::Get, &mut item.get),
        (HttpMethod::Put, &mut item.put),
        (HttpMethod::Post, &mut item.post),
        (HttpMethod::Delete, &mut item.delete),
        (HttpMethod::Patch, &mut item.patch),
    ]
    .into_iter()
    .filter_map(|(method, operation)| operation.as_mut().map(|operation| (method, operation)))
    .collect()
}

/// Methods of each path. actix-web responds 404 instead of 405 to an unsupported method.
pub(super) struct Methods(Vec<(ResourceDef, Vec<Method>)>);

impl Methods {
    pub(super) fn of(mut document: Document) -> Self {
        let methods = |item: &mut PathItem| {
            let operations = operations_mut(item).into_iter();
            operations.map(|(method, _)| to_method(&method)).collect()
        };
        let paths = document.paths.paths.iter_mut();
        Self(paths.map(|(path, item)| (ResourceDef::new(path.as_str()), methods(item))).collect())
    }

    /// Methods of a path; `None` if no route has it.
    pub(super) fn allowed(&self, path: &str) -> Option<String> {
        let (_, methods) = self.0.iter().find(|(pattern, _)| pattern.is_match(path))?;
        let head = methods.contains(&Method::GET).then_some(&Method::HEAD);
        let names: Vec<&str> = methods.iter().chain(head).map(Method::as_str).collect();
        Some(names.join(", "))
    }
}

fn to_method(method: &HttpMethod) -> Method {
    match method {
        HttpMethod::Get => Method::GET,
        HttpMethod::Put => Method::PUT,
        HttpMethod::Post => Method::POST,
        HttpMethod::Delete => Method::DELETE,
        HttpMethod::Options => Method::OPTIONS,
        HttpMethod::Head => Method::HEAD,
        HttpMethod::Patch => Method::PATCH,
        HttpMethod::Trace => Method::TRACE,
    }
}
