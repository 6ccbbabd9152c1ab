//! The OpenAPI document, generated from the routes, and the methods that each path supports.

use actix_web::App;
use actix_web::dev::ResourceDef;
use actix_web::http::Method;
use utoipa::{
    OpenApi,
    openapi::{
        Content, HttpMethod, OpenApi as Document, Ref, RefOr, Response,
        path::{Operation, PathItem},
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};
use utoipa_actix_web::{AppExt, service_config::ServiceConfig};

use crate::http::{RouteSet, problem::Problem};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "regcred",
        description = "Credential broker: stores registry accounts and delivers them as Kubernetes image pull secrets.\n\nRoutes under `/v1` refuse unknown query parameters and unknown fields with 422.",
        license(name = "Proprietary"),
    ),
    components(schemas(Problem)),
    tags(
        (name = "registry-accounts", description = "Credentials of container registries"),
        (name = "docker-configs", description = "Docker configs for kubelet, docker CLI and other readers"),
        (name = "clusters", description = "Registered Kubernetes clusters"),
        (name = "secrets", description = "Direct delivery of a Secret"),
        (name = "pull-secrets", description = "Declared delivery: Secrets that a worker keeps up to date in many namespaces"),
        (name = "api-keys", description = "API keys of callers"),
        (name = "identity-providers", description = "Trusted issuers of tokens"),
        (name = "audit", description = "Audit log, without secret values"),
        (name = "operation", description = "Health and metrics"),
    ),
)]
struct Api;

/// The document without paths, the starting point of [`UtoipaApp`](utoipa_actix_web::UtoipaApp).
pub(super) fn frame() -> Document {
    Api::openapi()
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> Document {
    document_of(RouteSet::All.routes())
}

/// The OpenAPI document of the given routes.
pub(super) fn document_of(routes: fn(&mut ServiceConfig)) -> Document {
    let (_, document) = App::new().into_utoipa_app().openapi(frame()).configure(routes).split_for_parts();
    complete(document)
}

/// Adds the security requirement and the problems to every operation.
fn complete(mut document: Document) -> Document {
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("rgc_…").description(Some(
        "API key, or token of an identity provider. `regcred api-key create` creates the first key.",
    ));
    components.add_security_scheme("apiKey", SecurityScheme::Http(bearer.build()));
    for (path, item) in &mut document.paths.paths {
        for (method, operation) in operations_mut(item) {
            if path.starts_with("/v1/") {
                operation.security = Some(vec![SecurityRequirement::new("apiKey", Vec::<String>::new())]);
                for status in problems(path, &method, operation) {
                    let responses = &mut operation.responses.responses;
                    responses.entry(status.to_owned()).or_insert_with(problem_response);
                }
            }
        }
    }
    document
}

/// Statuses of the problems that an operation may return.
fn problems(path: &str, method: &HttpMethod, operation: &Operation) -> Vec<&'static str> {
    // 422: every operation refuses unknown query parameters.
    let mut statuses = vec!["400", "401", "403", "422", "429", "500", "503"];
    if path.contains('{') {
        statuses.push("404");
    }
    if matches!(method, HttpMethod::Put | HttpMethod::Patch | HttpMethod::Delete) {
        statuses.push("412");
    }
    if operation.request_body.is_some() {
        statuses.extend(["408", "409", "413", "415"]);
    }
    if path == "/v1/api-keys/{id}" || matches!(method, HttpMethod::Delete) {
        statuses.push("409");
    }
    // The dry run of a pull secret calls clusters.
    if path.ends_with("/secrets") || matches!(method, HttpMethod::Put) {
        statuses.extend(["502", "504"]);
    }
    if path == "/v1/docker-configs" {
        statuses.push("406");
    }
    statuses
}

fn problem_response() -> RefOr<Response> {
    let content = Content::new(Some(RefOr::Ref(Ref::from_schema_name("Problem"))));
    let mut response = Response::new("Problem");
    response.content.insert("application/problem+json".to_owned(), RefOr::T(content));
    RefOr::T(response)
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
        let names: Vec<&str> = methods.iter().map(Method::as_str).collect();
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
