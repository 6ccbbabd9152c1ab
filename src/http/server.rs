//! The server: middleware around the routes, on a listener that is already bound.

use std::{net::TcpListener, rc::Rc, sync::Arc, time::Duration};

use actix_http::{HttpService, Protocol, error::DispatchError};
use actix_service::{IntoServiceFactory, ServiceFactoryExt, map_config};
use actix_web::{
    App, HttpRequest, HttpResponse,
    dev::{AppConfig, Server, fn_service},
    get,
    middleware::{Condition, from_fn},
    web::{Data, PathConfig, ServiceConfig, redirect, route},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tracing_actix_web::TracingLogger;
use utoipa_actix_web::AppExt;
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::{
    domain::{origin::Origins, proxies::Proxies},
    http::{
        Serves, State,
        connection::{Stream, Timed},
        cors,
        edge::{self, Edge},
        openapi::{self, Methods},
        problem::{ApiError, write_problems},
        rate_limit::{FailedAuthenticationLimiter, RequestLimiter},
        root_span::RootSpan,
    },
};

pub use crate::http::rate_limit::Rate;

/// How long the first head of a connection may take, and a TLS handshake before it.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection is kept on which nothing comes.
const IDLE_FOR: Duration = Duration::from_secs(5);
/// How long the rest of a body that was refused is read, so that its sender finds the answer.
const LINGER_FOR: Duration = Duration::from_secs(1);

/// How to serve.
#[derive(Debug)]
pub struct ServerConfig {
    /// What is served.
    pub serves: Serves,
    /// Worker threads.
    pub workers: usize,
    /// How long requests that are under way may take when the server is told to stop.
    pub grace: Duration,
    /// How many requests one caller may send, if there is a limit.
    pub requests: Option<Rate>,
    /// Whose word about a client's address is believed.
    pub proxies: Proxies,
    /// Which pages of browsers may call.
    pub origins: Origins,
    /// How TLS is spoken; plain HTTP if not.
    pub tls: Option<rustls::ServerConfig>,
}

/// Starts to serve; the returned server runs once it is polled.
///
/// # Errors
///
/// What the operating system says of the listener.
pub fn start(listener: TcpListener, state: State, config: ServerConfig) -> std::io::Result<Server> {
    let (routes, has_documents) = (config.serves.routes(), config.serves == Serves::Everything);
    let document = openapi::document_of(routes);
    let document_json = Data::new(DocumentJson(serde_json::to_string(&document)?));
    let methods = Data::new(Methods::of(document));
    let failed_authentications = Data::new(FailedAuthenticationLimiter::default());
    let limit = Data::new(RequestLimiter::new(config.requests));
    let has_origins = !config.origins.is_empty();
    let origins = Data::new(config.origins);
    let edge =
        Edge { metrics: state.metrics.clone(), proxies: Arc::new(config.proxies), speaks_tls: config.tls.is_some() };
    let acceptor = config.tls.map(|config| TlsAcceptor::from(Arc::new(config)));
    let app = move || {
        let edge = Rc::new(edge.clone());
        let (app, _) = App::new().into_utoipa_app().openapi(openapi::frame()).configure(routes).split_for_parts();
        app.app_data(state.authenticator.clone())
            .app_data(state.token_authenticator.clone())
            .app_data(failed_authentications.clone())
            .app_data(limit.clone())
            .app_data(origins.clone())
            .app_data(state.api_keys.clone())
            .app_data(state.identity_providers.clone())
            .app_data(state.accounts.clone())
            .app_data(state.imports.clone())
            .app_data(state.docker_configs.clone())
            .app_data(state.clusters.clone())
            .app_data(state.secrets.clone())
            .app_data(state.pull_secrets.clone())
            .app_data(state.streams.clone())
            .app_data(state.previews.clone())
            .app_data(state.audit_events.clone())
            .app_data(state.audit_writer.clone())
            .app_data(state.pool.clone())
            .app_data(state.metrics.clone())
            .app_data(document_json.clone())
            .app_data(methods.clone())
            .app_data(PathConfig::default().error_handler(|_, _| ApiError::NoRoute.into()))
            .configure(|config| {
                if has_documents {
                    documents(config);
                }
            })
            .default_service(route().to(no_route))
            .wrap(from_fn(write_problems))
            .wrap(TracingLogger::<RootSpan>::new())
            .wrap(Condition::new(has_origins, from_fn(cors::allow_origins)))
            .wrap(from_fn(move |request, next| edge::pass(Rc::clone(&edge), request, next)))
    };
    // As `HttpServer` does it, but that the streams are `Timed`.
    let builder = Server::build().workers(config.workers).shutdown_timeout(config.grace.as_secs()).disable_signals();
    let stopping = builder.graceful_shutdown_signal();
    let builder = builder.listen("http", listener, move || {
        let (acceptor, stopping) = (acceptor.clone(), stopping.clone());
        let app = app().into_factory().map_err(|error: actix_web::Error| error.error_response());
        let http = HttpService::build()
            .keep_alive(IDLE_FOR)
            .client_request_timeout(HEAD_WITHIN)
            .client_disconnect_timeout(LINGER_FOR)
            .graceful_shutdown_signal(move || {
                let stopping = stopping.clone();
                async move { stopping.notified().await }
            })
            .on_connect_ext(|stream: &Timed, data| drop(data.insert(stream.clock())))
            .finish(map_config(app, |()| AppConfig::default()));
        let connect = fn_service(move |stream: TcpStream| {
            let acceptor = acceptor.clone();
            async move {
                let peer = stream.peer_addr().ok();
                let stream = secure(stream, acceptor).await.map_err(DispatchError::Io)?;
                Ok((Timed::new(stream), Protocol::Http1, peer))
            }
        });
        connect.and_then(http)
    })?;
    Ok(builder.run())
}

/// Does the TLS handshake where there is TLS.
async fn secure(stream: TcpStream, acceptor: Option<TlsAcceptor>) -> std::io::Result<Stream> {
    let Some(acceptor) = acceptor else { return Ok(Stream::Plain(stream)) };
    let stream = tokio::time::timeout(HEAD_WITHIN, acceptor.accept(stream)).await??;
    Ok(Stream::Tls(Box::new(stream)))
}

/// The OpenAPI document, for programs and for people.
fn documents(config: &mut ServiceConfig) {
    config
        .service(get_document)
        .service(redirect("/docs", "/docs/"))
        .service(SwaggerUi::new("/docs/{_:.*}").config(Config::from("/openapi.json")));
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
