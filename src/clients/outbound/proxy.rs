//! The outbound proxy of a network without direct access to the internet.
//!
//! Calls to public addresses go through a tunnel (`CONNECT`, RFC 9110, section 9.3.6). The guard
//! resolves and admits the destination first, as without a proxy, and the tunnel leads to an
//! admitted *address*: the proxy resolves nothing, so a name has one meaning. TLS inside the tunnel
//! names and verifies the host. All other admitted addresses are inner ones: they are called
//! directly, and the proxy never learns of them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use http::{HeaderValue, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use memchr::memmem;
use percent_encoding::percent_decode_str;
use reqwest::{Body, Request, Response};
use rustls::{ClientConfig, pki_types::ServerName};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::either::Either;
use url::Url;
use zeroize::Zeroizing;

use super::{Cause, HEADERS_MAX, USER_AGENT, address};
use crate::domain::invalid::Invalid;

/// Maximum length of the head of the proxy's response.
const HEAD_MAX: usize = 8 * 1024;

/// HTTP proxy, with its credentials.
#[derive(Clone)]
pub struct OutboundProxy {
    host: String,
    port: u16,
    /// Value of `Proxy-Authorization`.
    authorization: Option<SecretString>,
}

impl fmt::Debug for OutboundProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OutboundProxy({}:{})", self.host, self.port)
    }
}

impl OutboundProxy {
    /// Parses `http://[USER:PASSWORD@]HOST[:PORT]`.
    ///
    /// # Errors
    ///
    /// [`Invalid`], without the URL: it may contain a password.
    pub fn parse(url: &SecretString) -> Result<Self, Invalid> {
        let form =
            || Invalid::new("must be a URL such as http://proxy.example.com:3128 or http://USER:PASSWORD@HOST:PORT");
        let url = Url::parse(url.expose_secret().trim()).map_err(|_| form())?;
        if url.scheme() != "http" {
            return Err(Invalid::new("must begin with http://; TLS to a destination goes through the proxy"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(form());
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(form)?.to_owned();
        let port = url.port_or_known_default().ok_or_else(form)?;
        Ok(Self { host, port, authorization: authorization(&url) })
    }

    /// Host, for the resolver.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    /// Whether a destination with these addresses is called through the proxy.
    pub(super) fn leads_to(addresses: &[SocketAddr]) -> bool {
        let is_public = |ip| address::not_public(ip).is_none() && !address::is_metadata(ip);
        addresses.iter().all(|address| is_public(address.ip()))
    }
}

fn authorization(url: &Url) -> Option<SecretString> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let mut login = Zeroizing::new(Vec::new());
    login.extend(percent_decode_str(url.username()));
    login.push(b':');
    login.extend(percent_decode_str(url.password().unwrap_or_default()));
    Some(format!("Basic {}", BASE64_STANDARD.encode(&*login)).into())
}

/// Why a call through the proxy failed.
#[derive(Debug)]
pub(super) enum TunnelError {
    /// The proxy cannot be reached.
    NoProxy,
    /// The proxy refused the tunnel with this status.
    Refused(u16),
    /// The response of the proxy is none to `CONNECT`.
    NotAProxy,
    /// The call failed within the tunnel.
    Within(Cause),
    /// A limit of time was exceeded.
    TimedOut,
}

impl TunnelError {
    /// Describes a failure of the proxy; `None` for a failure within the tunnel.
    pub(super) fn describe(&self, label: &str) -> Option<String> {
        Some(match self {
            Self::NoProxy => format!("{label} cannot be reached: the outbound proxy does not accept connections"),
            Self::Refused(407) => {
                format!("{label} cannot be reached: the outbound proxy does not accept regcred's credentials (407)")
            }
            Self::Refused(status) => {
                format!("{label} cannot be reached: the outbound proxy refused the connection ({status})")
            }
            Self::NotAProxy => format!("{label} cannot be reached: the outbound proxy did not answer as an HTTP proxy"),
            Self::Within(_) | Self::TimedOut => return None,
        })
    }
}

type Stream = Either<TcpStream, TlsStream<TcpStream>>;

/// Way through the proxy to one host.
#[derive(Debug)]
pub(super) struct Tunnel {
    proxy: OutboundProxy,
    proxy_addresses: Vec<SocketAddr>,
    /// Admitted addresses of the host.
    addresses: Vec<SocketAddr>,
    /// TLS and the name to verify; `None` for plain HTTP.
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    connect_timeout: Duration,
}

impl Tunnel {
    pub(super) fn new(
        proxy: &OutboundProxy,
        proxy_addresses: Vec<IpAddr>,
        addresses: &[SocketAddr],
        tls: Option<(ClientConfig, ServerName<'static>)>,
        connect_timeout: Duration,
    ) -> Self {
        let port = proxy.port;
        Self {
            proxy: proxy.clone(),
            proxy_addresses: proxy_addresses.into_iter().map(|address| SocketAddr::new(address, port)).collect(),
            addresses: addresses.to_owned(),
            tls: tls.map(|(config, name)| (Arc::new(config), name)),
            connect_timeout,
        }
    }

    /// Sends a request and returns the head of the response. Connects anew for each request.
    pub(super) async fn send(&self, request: Request, deadline: Instant) -> Result<Response, TunnelError> {
        let connected_by = deadline.min(Instant::now() + self.connect_timeout);
        let stream = timeout_at(connected_by, self.connect()).await.unwrap_or(Err(TunnelError::TimedOut))?;
        let exchange = async {
            let builder = &mut http1::Builder::new();
            let (mut sender, connection) = builder.max_headers(HEADERS_MAX).handshake(TokioIo::new(stream)).await?;
            // Ends with the response. The limit is for a peer that neither sends nor closes.
            tokio::spawn(timeout_at(deadline, connection));
            let request = origin_form(request).ok_or(None)?;
            Ok(sender.send_request(request).await?)
        };
        let sent = timeout_at(deadline, exchange).await.map_err(|_| TunnelError::TimedOut)?;
        let response = sent.map_err(|error: Option<hyper::Error>| {
            TunnelError::Within(error.map_or(Cause::Protocol, |error| Cause::of(&error)))
        })?;
        Ok(Response::from(response.map(Body::wrap)))
    }

    /// Connects to the first address that the proxy reaches.
    async fn connect(&self) -> Result<Stream, TunnelError> {
        let mut last = TunnelError::NoProxy;
        for address in &self.addresses {
            match self.connect_to(*address).await {
                Ok(stream) => return self.secure(stream).await,
                // The proxy did not reach this address; it may reach another one.
                Err(error @ TunnelError::Refused(500..)) => last = error,
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    /// Asks the proxy for a tunnel to an address.
    async fn connect_to(&self, address: SocketAddr) -> Result<TcpStream, TunnelError> {
        let stream = TcpStream::connect(&self.proxy_addresses[..]).await;
        let mut stream = stream.map_err(|_| TunnelError::NoProxy)?;
        let authorization = self
            .proxy
            .authorization
            .as_ref()
            .map(|value| Zeroizing::new(format!("Proxy-Authorization: {}\r\n", value.expose_secret())));
        let authorization = authorization.as_ref().map_or("", |line| line.as_str());
        let head = Zeroizing::new(format!(
            "CONNECT {address} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: {USER_AGENT}\r\n{authorization}\r\n"
        ));
        stream.write_all(head.as_bytes()).await.map_err(|_| TunnelError::NoProxy)?;
        let status = read_status(&mut stream).await?;
        if (200..300).contains(&status) { Ok(stream) } else { Err(TunnelError::Refused(status)) }
    }

    async fn secure(&self, stream: TcpStream) -> Result<Stream, TunnelError> {
        let Some((tls, name)) = &self.tls else { return Ok(Either::Left(stream)) };
        let connected = TlsConnector::from(Arc::clone(tls)).connect(name.clone(), stream).await;
        connected.map(Either::Right).map_err(|error| TunnelError::Within(Cause::of(&error)))
    }
}

/// Reads the head of the proxy's response and returns its status.
async fn read_status(stream: &mut TcpStream) -> Result<u16, TunnelError> {
    let mut response = Vec::with_capacity(HEAD_MAX);
    let end = loop {
        let count = stream.read_buf(&mut response).await.unwrap_or_default();
        if let Some(end) = memmem::find(&response, b"\r\n\r\n") {
            break end + 4;
        }
        if count == 0 || response.len() >= HEAD_MAX {
            return Err(TunnelError::NotAProxy);
        }
    };
    let status = parse_status(&response).ok_or(TunnelError::NotAProxy)?;
    // The destination does not speak first, so nothing follows the head of a tunnel.
    if (200..300).contains(&status) && response.len() > end {
        return Err(TunnelError::NotAProxy);
    }
    Ok(status)
}

fn parse_status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\r').next()?;
    let mut words = str::from_utf8(line).ok()?.splitn(3, ' ');
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words.next().filter(|code| code.len() == 3)?.parse().ok()
}

/// Converts a request to the form for an origin server: a path, and the host as a header.
fn origin_form(request: Request) -> Option<http::Request<Body>> {
    let url = request.url();
    let port = url.port().map_or_else(String::new, |port| format!(":{port}"));
    let host = HeaderValue::try_from(format!("{}{port}", url.host_str()?)).ok()?;
    let mut request = http::Request::try_from(request).ok()?;
    *request.uri_mut() = request.uri().path_and_query()?.clone().into();
    let headers = request.headers_mut();
    headers.insert(header::HOST, host);
    headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
    headers.entry(header::ACCEPT).or_insert(HeaderValue::from_static("*/*"));
    Some(request)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn parse(url: &str) -> Result<OutboundProxy, Invalid> {
        OutboundProxy::parse(&SecretString::from(url))
    }

    #[rstest]
    #[case("http://proxy.example:3128", "proxy.example", 3128, None)]
    #[case("http://proxy.example", "proxy.example", 80, None)]
    #[case("http://proxy.example:3128/\n", "proxy.example", 3128, None)]
    #[case("http://[fd00::7]:3128", "[fd00::7]", 3128, None)]
    #[case("http://dev:p%40ss%3A@10.0.0.7:3128", "10.0.0.7", 3128, Some("dev:p@ss:"))]
    fn url_of_a_proxy_is_parsed(#[case] url: &str, #[case] host: &str, #[case] port: u16, #[case] login: Option<&str>) {
        let proxy = parse(url).unwrap();
        assert_eq!((proxy.host(), proxy.port), (host, port));
        let expected = login.map(|login| format!("Basic {}", BASE64_STANDARD.encode(login)));
        assert_eq!(proxy.authorization.as_ref().map(|value| value.expose_secret().to_owned()), expected);
        assert!(!format!("{proxy:?}").contains("p@ss"), "{proxy:?}");
    }

    #[rstest]
    #[case("")]
    #[case("proxy.example:3128")]
    #[case("https://dev:canary@proxy.example")]
    #[case("socks5://dev:canary@proxy.example")]
    #[case("http://dev:canary@proxy.example/path")]
    #[case("http://dev:canary@proxy.example?x")]
    #[case("http://dev:canary@")]
    fn other_urls_are_refused_without_their_text(#[case] url: &str) {
        let refused = parse(url).unwrap_err().to_string();
        assert!(refused.contains("http://") && !refused.contains("canary"), "{refused}");
    }

    #[rstest]
    #[case(b"HTTP/1.1 200 Connection established\r\n\r\n", Some(200))]
    #[case(b"HTTP/1.0 407\r\nX: y\r\n\r\n<html>", Some(407))]
    #[case(b"HTTP/2 200\r\n\r\n", None)]
    #[case(b"HTTP/1.1 2000\r\n\r\n", None)]
    #[case(b"220 smtp.example ESMTP\r\n\r\n", None)]
    #[case(b"\xff\r\n\r\n", None)]
    fn status_of_a_response_is_parsed(#[case] head: &[u8], #[case] status: Option<u16>) {
        assert_eq!(parse_status(head), status);
    }
}
