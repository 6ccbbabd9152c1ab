//! The HTTP server: routes, middleware and connection handling on a bound listener.

use std::{collections::BTreeMap, io, net::TcpListener, rc::Rc, sync::Arc, time::Duration};

use actix_http::{HttpService, Protocol, error::DispatchError};
use actix_service::{IntoServiceFactory, ServiceFactory, ServiceFactoryExt, map_config};
use actix_web::{
    App, Error, HttpRequest, HttpResponse,
    body::MessageBody,
    dev::{AppConfig, Server, ServiceRequest, ServiceResponse, fn_service},
    get,
    http::header,
    middleware::{Condition, from_fn},
    web::{Data, PathConfig, ServiceConfig, redirect, route},
};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tracing_actix_web::TracingLogger;
use utoipa_actix_web::AppExt;
use utoipa_swagger_ui::{Config, SwaggerUi};

#[cfg(feature = "console")]
use crate::http::console;
use crate::{
    domain::{origin::Origins, proxies::Proxies},
    http::{
        RouteSet,
        connection::{Stream, Timed},
        cors,
        edge::{self, Edge},
        normalize::normalize,
        openapi::{self, Methods},
        problem::{ApiError, write_problems},
        rate_limit::{FailedAuthenticationLimiter, RequestLimiter},
        root_span::RootSpan,
    },
    metrics::Metrics,
};

pub use crate::http::rate_limit::Rate;

/// Time limit for the TLS handshake, and for the first request head of a connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle time after which a connection is closed.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// Time for which the rest of a refused body is read, so that the client sees the response.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Configuration of the server.
#[derive(Debug)]
pub struct ServerConfig {
    /// Routes to serve.
    pub routes: RouteSet,
    /// Number of worker threads.
    pub workers: usize,
    /// Time for requests in flight during a shutdown.
    pub grace: Duration,
    /// Request rate limit per caller; unlimited if absent.
    pub requests: Option<Rate>,
    /// Proxies that are trusted to report the client address.
    pub proxies: Proxies,
    /// Origins of web pages that may call the API.
    pub origins: Origins,
    /// TLS configuration; plain HTTP if absent.
    pub tls: Option<rustls::ServerConfig>,
}

/// Builds the server, which accepts connections once it is polled. `services` registers the
/// application data that handlers extract.
///
/// # Errors
///
/// Returns the error of the operating system if the listener cannot be used.
pub fn start<S>(listener: TcpListener, metrics: Data<Metrics>, services: S, config: ServerConfig) -> io::Result<Server>
where
    S: Fn(&mut ServiceConfig) + Clone + Send + 'static,
{
    let builder = Server::build().workers(config.workers).shutdown_timeout(config.grace.as_secs()).disable_signals();
    let stopping = builder.graceful_shutdown_signal();
    let (site, tls) = Site::new(metrics, config);
    let acceptor = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
    // Like `HttpServer`, except that streams are `Timed`.
    let builder = builder.listen("http", listener, move || {
        let (acceptor, stopping) = (acceptor.clone(), stopping.clone());
        let app = site.clone().app(services.clone()).into_factory().map_err(|error: Error| error.error_response());
        let http = HttpService::build()
            .keep_alive(KEEP_ALIVE)
            .client_request_timeout(HEAD_TIMEOUT)
            .client_disconnect_timeout(DISCONNECT_TIMEOUT)
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
                let stream = handshake(stream, acceptor).await.map_err(DispatchError::Io)?;
                Ok((Timed::new(stream), Protocol::Http1, peer))
            }
        });
        connect.and_then(http)
    })?;
    Ok(builder.run())
}

/// What the applications of all worker threads share.
#[derive(Clone)]
struct Site {
    routes: RouteSet,
    edge: Edge,
    origins: Data<Origins>,
    failed_authentications: Data<FailedAuthenticationLimiter>,
    limit: Data<RequestLimiter>,
    document: Data<DocumentJson>,
    methods: Data<Methods>,
}

impl Site {
    fn new(metrics: Data<Metrics>, config: ServerConfig) -> (Self, Option<rustls::ServerConfig>) {
        let site = Self {
            routes: config.routes,
            edge: Edge { metrics, proxies: Arc::new(config.proxies), speaks_tls: config.tls.is_some() },
            origins: Data::new(config.origins),
            failed_authentications: Data::new(FailedAuthenticationLimiter::default()),
            limit: Data::new(RequestLimiter::new(config.requests)),
            document: Data::new(DocumentJson(openapi::document().to_string())),
            methods: Data::new(Methods::of(openapi::generated(config.routes.routes()))),
        };
        (site, config.tls)
    }

    /// Builds the application of one worker thread. The middleware wrapped last runs first.
    fn app(
        self,
        services: impl Fn(&mut ServiceConfig),
    ) -> App<
        impl ServiceFactory<
            ServiceRequest,
            Config = (),
            Response = ServiceResponse<impl MessageBody>,
            Error = Error,
            InitError = (),
        >,
    > {
        let (routes, has_documents) = (self.routes.routes(), self.routes == RouteSet::Api);
        let (app, _) = App::new().into_utoipa_app().openapi(openapi::frame()).configure(routes).split_for_parts();
        let (edge, has_origins) = (Rc::new(self.edge.clone()), !self.origins.is_empty());
        app.configure(services)
            .app_data(self.edge.metrics.clone())
            .app_data(self.origins)
            .app_data(self.failed_authentications)
            .app_data(self.limit)
            .app_data(self.document)
            .app_data(self.methods)
            .app_data(PathConfig::default().error_handler(|_, _| ApiError::NoRoute.into()))
            .configure(|config| {
                if has_documents {
                    documents(config);
                }
            })
            .default_service(route().to(no_route))
            .wrap(from_fn(normalize))
            .wrap(from_fn(write_problems))
            .wrap(TracingLogger::<RootSpan>::new())
            .wrap(Condition::new(has_origins, from_fn(cors::allow_origins)))
            .wrap(from_fn(move |request, next| edge::pass(Rc::clone(&edge), request, next)))
    }
}

/// Performs the TLS handshake, if TLS is configured.
async fn handshake(stream: TcpStream, acceptor: Option<TlsAcceptor>) -> io::Result<Stream> {
    let Some(acceptor) = acceptor else { return Ok(Stream::Plain(stream)) };
    let stream = tokio::time::timeout(HEAD_TIMEOUT, acceptor.accept(stream)).await??;
    Ok(Stream::Tls(Box::new(stream)))
}

/// Registers the web console, and the OpenAPI document with its web page.
fn documents(config: &mut ServiceConfig) {
    #[cfg(feature = "console")]
    config.configure(console::routes);
    config
        .service(get_root)
        .service(get_document)
        .service(redirect("/docs", "/docs/"))
        .service(SwaggerUi::new("/docs/{_:.*}").config(Config::from("/openapi.json")));
}

/// Links of the root, by name.
const LINKS: &[(&str, &str)] = &[
    #[cfg(feature = "console")]
    ("console", console::PATH),
    ("documentation", "/docs/"),
    ("openapi", "/openapi.json"),
    ("health", "/healthz"),
    ("readiness", "/readyz"),
];

/// Sends browsers to the console, and answers programs with links. The route is not part of the
/// document.
#[get("/")]
async fn get_root(request: HttpRequest) -> HttpResponse {
    let accept = request.headers().get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let is_browser = accept.contains("text/html");
    #[cfg(feature = "console")]
    if is_browser {
        return console::first_page();
    }
    let mut response = HttpResponse::Ok();
    response.insert_header((header::VARY, "Accept"));
    if !is_browser {
        return response.json(LINKS.iter().copied().collect::<BTreeMap<_, _>>());
    }
    let links: Vec<String> =
        LINKS.iter().map(|(name, path)| format!("<li><a href=\"{path}\">{name}</a></li>")).collect();
    let links = links.concat();
    let page =
        format!("<!doctype html><html lang=\"en\"><title>regcred</title><h1>regcred</h1><ul>{links}</ul></html>\n");
    response.content_type("text/html; charset=utf-8").body(page)
}

struct DocumentJson(String);

/// Serves the OpenAPI document. The route itself is not part of the document.
#[get("/openapi.json")]
async fn get_document(document: Data<DocumentJson>) -> HttpResponse {
    HttpResponse::Ok().content_type("application/json").body(document.0.clone())
}

/// Answers 405 if the path exists for other methods, else 404.
async fn no_route(request: HttpRequest, methods: Data<Methods>) -> Result<HttpResponse, ApiError> {
    let path = request.path();
    Err(match methods.allowed(path) {
        Some(methods) => ApiError::MethodNotAllowed(methods),
        None if methods.allowed(path.trim_end_matches('/')).is_some() => ApiError::TrailingSlash,
        None => ApiError::NoRoute,
    })
}
