//! The OpenAPI document, made from the routes, and what follows from it: which methods a path takes.

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
        description = "A credential broker: registry accounts go in, Kubernetes image pull secrets come out.",
        license(name = "Proprietary"),
    ),
    components(schemas(Problem)),
    tags(
        (name = "registry-accounts", description = "Credentials for registries, sealed"),
        (name = "docker-configs", description = "Docker configs for the programs that read them"),
        (name = "clusters", description = "Kubernetes API servers"),
        (name = "secrets", description = "The direct road: one Secret, now"),
        (name = "pull-secrets", description = "The declared road: these accounts, as this Secret, in all these namespaces"),
        (name = "api-keys", description = "Callers"),
        (name = "identity-providers", description = "Callers with a token of their own"),
        (name = "audit", description = "Who did what, when, with what result; never a value"),
        (name = "operation", description = "Health and metrics"),
    ),
)]
struct Api;

/// The document without its paths, as [`UtoipaApp`](utoipa_actix_web::UtoipaApp) starts with it.
pub(super) fn frame() -> Document {
    Api::openapi()
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> Document {
    document_of(RouteSet::All.routes())
}

/// The OpenAPI document of these routes.
pub(super) fn document_of(routes: fn(&mut ServiceConfig)) -> Document {
    let (_, document) = App::new().into_utoipa_app().openapi(frame()).configure(routes).split_for_parts();
    complete(document)
}

/// Adds to every operation what all of its kind have: the key, and the problems that can come of it.
fn complete(mut document: Document) -> Document {
    let components = document.components.get_or_insert_default();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("rgc_…").description(Some(
        "An API key, or a token of an identity provider; `regcred api-key create` makes the first key",
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

/// The statuses of the problems that an operation can answer with.
fn problems(path: &str, method: &HttpMethod, operation: &Operation) -> Vec<&'static str> {
    let mut statuses = vec!["400", "401", "403", "429", "500", "503"];
    if path.contains('{') {
        statuses.push("404");
    }
    if matches!(method, HttpMethod::Put | HttpMethod::Patch | HttpMethod::Delete) {
        statuses.push("412");
    }
    if operation.request_body.is_some() {
        statuses.extend(["408", "409", "413", "415"]);
    }
    if operation.request_body.is_some() || operation.parameters.as_ref().is_some_and(|p| !p.is_empty()) {
        statuses.push("422");
    }
    if path == "/v1/api-keys/{id}" || matches!(method, HttpMethod::Delete) {
        statuses.push("409");
    }
    // The dry run of a pull secret calls clusters too.
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
    let mut response = Response::new("A problem");
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

/// Which methods each path takes, for an honest 405: actix answers 404 where the path fits and the method does not.
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

    /// The methods of a path, if any route has it.
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
