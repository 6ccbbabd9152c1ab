//! The server: middleware around the routes, on a listener that is already bound.

use std::{net::TcpListener, time::Duration};

use actix_web::{
    App, HttpRequest, HttpResponse, HttpServer,
    dev::Server,
    get,
    middleware::{DefaultHeaders, from_fn},
    web::{Data, PathConfig, redirect, route},
};
use tracing_actix_web::TracingLogger;
use utoipa_actix_web::AppExt;
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::http::{
    State,
    attempts::Attempts,
    metrics,
    openapi::{self, Methods},
    problem::{ApiError, write_problems},
    request_id,
    root_span::RootSpan,
    routes,
};

/// Starts to serve; the returned server runs once it is polled.
///
/// `grace` is how long requests that are under way may take when the server is told to stop.
///
/// # Errors
///
/// What the operating system says of the listener.
pub fn start(listener: TcpListener, state: State, workers: usize, grace: Duration) -> std::io::Result<Server> {
    let document = openapi::document();
    let document_json = Data::new(DocumentJson(serde_json::to_string(&document)?));
    let methods = Data::new(Methods::of(document));
    let attempts = Data::new(Attempts::default());
    let server = HttpServer::new(move || {
        let (app, _) = App::new().into_utoipa_app().openapi(openapi::frame()).configure(routes).split_for_parts();
        app.app_data(state.door.clone())
            .app_data(state.token_door.clone())
            .app_data(attempts.clone())
            .app_data(state.api_keys.clone())
            .app_data(state.identity_providers.clone())
            .app_data(state.accounts.clone())
            .app_data(state.verifications.clone())
            .app_data(state.imports.clone())
            .app_data(state.docker_configs.clone())
            .app_data(state.clusters.clone())
            .app_data(state.secrets.clone())
            .app_data(state.audit_events.clone())
            .app_data(state.recorder.clone())
            .app_data(state.pool.clone())
            .app_data(state.metrics.clone())
            .app_data(document_json.clone())
            .app_data(methods.clone())
            .app_data(PathConfig::default().error_handler(|_, _| ApiError::NoRoute.into()))
            .service(get_document)
            .service(redirect("/docs", "/docs/"))
            .service(SwaggerUi::new("/docs/{_:.*}").config(Config::from("/openapi.json")))
            .default_service(route().to(no_route))
            .wrap(from_fn(write_problems))
            .wrap(TracingLogger::<RootSpan>::new())
            .wrap(from_fn(metrics::measure))
            .wrap(DefaultHeaders::new().add(("X-Content-Type-Options", "nosniff")))
            .wrap(from_fn(request_id::assign))
    })
    .workers(workers)
    .shutdown_timeout(grace.as_secs())
    .disable_signals()
    .listen(listener)?
    .run();
    Ok(server)
}

struct DocumentJson(String);

/// The OpenAPI document. It is not part of itself.
#[get("/openapi.json")]
async fn get_document(document: Data<DocumentJson>) -> HttpResponse {
    HttpResponse::Ok().content_type("application/json").body(document.0.clone())
}

/// What no route takes: 405 where the path is there for other methods, else 404.
async fn no_route(request: HttpRequest, methods: Data<Methods>) -> Result<HttpResponse, ApiError> {
    Err(methods.allowed(request.path()).map_or(ApiError::NoRoute, ApiError::MethodNotAllowed))
}
