//! A proxy in front of an API server that fails in its place. The server is shared and stays
//! healthy.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// How the proxy handles connections. A change closes open connections.
#[derive(Debug, Clone, Copy)]
pub enum Health {
    /// Forwards to the server at this address.
    LeadsTo(SocketAddr),
    /// Closes connections at once, as if the server were down.
    Down,
    /// Accepts connections and never answers.
    Hangs,
    /// Maps a request head to a raw response, after which the connection is closed. Requests mapped
    /// to `None` reach the server.
    Answers(fn(&str) -> Option<&'static str>),
}

/// A port in front of an API server with that server's certificate. Closed when dropped.
pub struct Proxy {
    address: SocketAddr,
    behind: SocketAddr,
    health: watch::Sender<Health>,
    connections: Arc<AtomicUsize>,
    _stop: oneshot::Sender<()>,
}

#[derive(Clone)]
struct Tls {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl Proxy {
    /// Opens a port in front of this API server. `folder` holds `server.crt`, `server.key` and
    /// `ca.crt`.
    pub fn before(server: &str, folder: &Path) -> Self {
        let behind: SocketAddr = server.trim_start_matches("https://").parse().expect("an address");
        let tls = Tls::of(folder);
        let (health, watched) = watch::channel(Health::LeadsTo(behind));
        let (stop, stopped) = oneshot::channel::<()>();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("set");
        let address = listener.local_addr().expect("an address");
        // A separate runtime keeps the proxy running while a test blocks its thread.
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                let accepting = async {
                    loop {
                        let Ok((stream, _)) = listener.accept().await else { continue };
                        counted.fetch_add(1, Ordering::SeqCst);
                        let (tls, mut watched) = (tls.clone(), watched.clone());
                        tokio::spawn(async move {
                            let health = *watched.borrow_and_update();
                            tokio::select! {
                                () = serve(stream, health, behind, &tls) => {}
                                _ = watched.changed() => {}
                            }
                        });
                    }
                };
                tokio::select! {
                    () = accepting => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, behind, health, connections, _stop: stop }
    }

    /// URL to register.
    pub fn server(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Sets the health, and closes open connections.
    pub fn becomes(&self, health: Health) {
        self.health.send_replace(health);
    }

    /// Forwards to the server again.
    pub fn heals(&self) {
        self.becomes(Health::LeadsTo(self.behind));
    }

    /// Number of connections accepted so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Tls {
    fn of(folder: &Path) -> Self {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let certificate = CertificateDer::from_pem_file(folder.join("server.crt")).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).expect("a key");
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let server = server.expect("versions").with_no_client_auth().with_single_cert(vec![certificate], key);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(folder.join("ca.crt")).expect("a CA")).expect("a CA");
        let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let client = client.expect("versions").with_root_certificates(roots).with_no_client_auth();
        Self {
            acceptor: TlsAcceptor::from(Arc::new(server.expect("a key that fits"))),
            connector: TlsConnector::from(Arc::new(client)),
        }
    }
}

/// Serves one connection. Errors mean that the peer is gone and are ignored.
async fn serve(mut stream: TcpStream, health: Health, behind: SocketAddr, tls: &Tls) {
    match health {
        Health::Down => {}
        Health::Hangs => std::future::pending().await,
        Health::LeadsTo(address) => {
            let Ok(mut server) = TcpStream::connect(address).await else { return };
            let _ = copy_bidirectional(&mut stream, &mut server).await;
        }
        Health::Answers(rule) => {
            let Ok(mut client) = tls.acceptor.accept(stream).await else { return };
            let Some(request) = read_request(&mut client).await else { return };
            let head = request.split("\r\n\r\n").next().unwrap_or_default();
            if let Some(answer) = rule(head) {
                let _ = client.write_all(answer.as_bytes()).await;
                let _ = client.shutdown().await;
                return;
            }
            let Ok(server) = TcpStream::connect(behind).await else { return };
            let name = ServerName::try_from("localhost").expect("a name");
            let Ok(mut server) = tls.connector.connect(name, server).await else { return };
            // One request per connection, so that the rule sees each.
            let request = request.replacen("\r\n", "\r\nconnection: close\r\n", 1);
            if server.write_all(request.as_bytes()).await.is_ok() {
                let _ = copy_bidirectional(&mut client, &mut server).await;
            }
        }
    }
}

/// Reads one request with a body of `Content-Length` bytes of text.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
        request.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&request);
        if is_complete(&text) {
            return Some(text.into_owned());
        }
    }
}

/// Whether this is a request with a body of `Content-Length` bytes.
pub fn is_complete(request: &str) -> bool {
    request.split_once("\r\n\r\n").is_some_and(|(head, body)| {
        let length = head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find_map(|(name, value)| name.eq_ignore_ascii_case("content-length").then(|| value.parse().unwrap_or(0)));
        body.len() >= length.unwrap_or(0)
    })
}
