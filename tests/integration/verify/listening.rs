//! Listeners with scripted responses that record their requests.

use std::{
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::support::listener::{listen, read_request};

/// Recorded requests.
#[derive(Clone, Default)]
pub struct Requests(Arc<Mutex<Vec<String>>>);

impl Requests {
    pub fn push(&self, request: String) {
        self.0.lock().expect("the requests").push(request);
    }

    /// All requests as one text.
    pub fn text(&self) -> String {
        self.0.lock().expect("the requests").join("\n")
    }

    pub fn count(&self) -> usize {
        self.0.lock().expect("the requests").len()
    }
}

/// Starts a plain HTTP server that answers each request with `answer` and closes the connection.
pub fn serve(answer: impl Fn(&str) -> Vec<u8> + Send + Sync + 'static) -> (SocketAddr, Requests) {
    let requests = Requests::default();
    let recorded = requests.clone();
    let address = listen(move |mut stream| {
        let request = read_request(&stream);
        recorded.push(request.clone());
        // Some tests close the connection early.
        let _ = stream.write_all(&answer(&request));
    });
    (address, requests)
}

/// Response with a body.
pub fn answer(status: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let lines: Vec<String> = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let lines = lines.concat();
    format!("HTTP/1.1 {status}\r\n{lines}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
        .into_bytes()
}

/// Response of a registry's `/v2/` that requests a token from this realm.
pub fn bearer(realm: &str) -> Vec<u8> {
    let challenge = format!(r#"Bearer realm="{realm}",service="test-registry""#);
    answer("401 Unauthorized", &[("WWW-Authenticate", &challenge)], "{}")
}

/// Listeners on the same port of several internal addresses, which no client may reach.
pub struct Trap {
    pub port: u16,
    caught: Arc<AtomicUsize>,
}

impl Trap {
    pub fn set() -> Self {
        let first = TcpListener::bind("127.0.0.2:0").expect("a port");
        let port = first.local_addr().expect("an address").port();
        let caught = Arc::new(AtomicUsize::new(0));
        // If the port is in use at another address, the trap omits it.
        let others = [TcpListener::bind(("::1", port)), TcpListener::bind(("127.0.0.3", port))];
        for listener in others.into_iter().flatten().chain([first]) {
            let caught = Arc::clone(&caught);
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    caught.fetch_add(1, Ordering::SeqCst);
                    let _: Result<(), _> = TcpStream::shutdown(&stream, std::net::Shutdown::Both);
                }
            });
        }
        Self { port, caught }
    }

    /// Number of accepted connections.
    pub fn caught(&self) -> usize {
        self.caught.load(Ordering::SeqCst)
    }
}
