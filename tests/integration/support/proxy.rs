//! What stands before an API server and can be sick in its place, so that the server itself, which others use too, stays well.

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

/// What becomes of connections. A change cuts those that are open.
#[derive(Debug, Clone, Copy)]
pub enum Health {
    /// They lead to the server at this address.
    LeadsTo(SocketAddr),
    /// They are closed at once, as those to a server that is down.
    Down,
    /// They are taken, and nobody says anything.
    Hangs,
    /// To a request with this head the answer is this; without one the server answers. An answer is sent as it stands, and the
    /// connection is closed.
    Answers(fn(&str) -> Option<&'static str>),
}

/// A port that leads to an API server, and bears its certificate. It is gone when this is dropped.
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
    /// Opens a port before the API server of this URL, whose folder has `server.crt`, `server.key` and `ca.crt`.
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
        // On a runtime of its own, so that it works while a test waits for a thread.
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

    /// The URL to register.
    pub fn server(&self) -> String {
        format!("https://{}", self.address)
    }

    /// From now on.
    pub fn becomes(&self, health: Health) {
        self.health.send_replace(health);
    }

    /// From now on it leads to its server again.
    pub fn heals(&self) {
        self.becomes(Health::LeadsTo(self.behind));
    }

    /// How many connections it took so far.
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

/// Whoever is at the other end of a connection may have gone: then there is nothing left to do.
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
            // One request for each connection, so that none passes unseen.
            let request = request.replacen("\r\n", "\r\nconnection: close\r\n", 1);
            if server.write_all(request.as_bytes()).await.is_ok() {
                let _ = copy_bidirectional(&mut client, &mut server).await;
            }
        }
    }
}

/// One request with the body that its Content-Length announces; bodies are text here.
async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let (mut request, mut chunk) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
        request.extend_from_slice(&chunk[..count]);
        let text = String::from_utf8_lossy(&request);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().filter_map(|line| line.split_once(": ")).find_map(|(name, value)| {
                name.eq_ignore_ascii_case("content-length").then(|| value.parse().unwrap_or(0))
            });
            if body.len() >= length.unwrap_or(0) {
                return Some(text.into_owned());
            }
        }
    }
}
