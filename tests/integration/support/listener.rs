//! Listeners that misbehave in ways that healthy servers do not.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use parking_lot::{Condvar, Mutex};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

use super::{eventually, proxy::is_complete};

/// Returns the URL of a port without a listener.
pub fn refusing_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}

/// Serves each connection on its own thread until the process ends.
pub fn listen(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(stream));
        }
    });
    address
}

/// Connection of [`listen_tls`].
pub type TlsStream = StreamOwned<ServerConnection, TcpStream>;

/// Like [`listen`], over TLS. `certificate` and `key` are PEM.
pub fn listen_tls(certificate: &str, key: &str, serve: impl Fn(&mut TlsStream) + Send + Sync + 'static) -> SocketAddr {
    let certificates = CertificateDer::pem_slice_iter(certificate.as_bytes());
    let certificates = certificates.collect::<Result<Vec<_>, _>>().expect("a certificate");
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(certificates, key);
    let config = Arc::new(config.expect("a key that fits"));
    listen(move |stream| {
        let connection = ServerConnection::new(Arc::clone(&config)).expect("a connection");
        let mut tls = StreamOwned::new(connection, stream);
        serve(&mut tls);
        tls.conn.send_close_notify();
        // The client may have closed the connection.
        let _ = tls.flush();
    })
}

/// Reads one request with a body of `Content-Length` bytes.
pub fn read_request(mut stream: impl Read) -> String {
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        // The start of a TLS handshake. Servers of plain HTTP answer it at once.
        if is_complete(&text) || request.first() == Some(&0x16) {
            return text;
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return text,
            Ok(count) => request.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Holds requests to a listener while it is closed.
#[derive(Default)]
pub struct Gate {
    state: Mutex<GateState>,
    opened: Condvar,
}

#[derive(Default)]
struct GateState {
    is_closed: bool,
    waiting: usize,
}

impl Gate {
    /// Starts a slow API server, which holds every request until the gate is opened. Returns the gate
    /// and the body that registers the server as a cluster.
    pub fn cluster(name: &str) -> (Arc<Self>, Value) {
        let gate = Arc::new(Self::default());
        gate.close();
        let held = Arc::clone(&gate);
        let address = listen(move |mut stream| {
            read_request(&stream);
            held.pass();
            let body = r#"{"metadata":{"name":"pull","uid":"u-1","resourceVersion":"1"}}"#;
            let answer = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            // regcred may have been stopped meanwhile.
            let _ = stream.write_all(answer.as_bytes());
        });
        let server = format!("http://{address}");
        (gate, json!({"name": name, "server": server, "auth": {"type": "none"}, "allowPlainHttp": true}))
    }

    /// Holds later requests.
    pub fn close(&self) {
        self.state.lock().is_closed = true;
    }

    /// Releases all held requests.
    pub fn open(&self) {
        self.state.lock().is_closed = false;
        self.opened.notify_all();
    }

    /// Blocks the thread of a request while the gate is closed.
    pub fn pass(&self) {
        let mut state = self.state.lock();
        state.waiting += 1;
        self.opened.wait_while(&mut state, |state| state.is_closed);
        state.waiting -= 1;
    }

    /// Waits until this many requests are held.
    pub async fn until_waiting(&self, count: usize) {
        eventually("requests are held", async || (self.state.lock().waiting >= count).then_some(())).await;
    }
}
