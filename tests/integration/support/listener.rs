//! Listeners that misbehave in ways that healthy servers do not.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
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

/// Reads one request with a body of `Content-Length` bytes.
pub fn read_request(mut stream: &TcpStream) -> String {
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

/// A slow API server: holds every request until [`open`](Self::open).
pub struct Gate {
    waiting: Mutex<usize>,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Starts listening. Returns the gate and the body that registers it as a cluster.
    pub fn cluster(name: &str) -> (Arc<Self>, Value) {
        let gate = Arc::new(Self { waiting: Mutex::new(0), is_open: Mutex::new(false), opened: Condvar::new() });
        let held = Arc::clone(&gate);
        let address = listen(move |mut stream| {
            read_request(&stream);
            *held.waiting.lock().expect("a count") += 1;
            let closed = held.is_open.lock().expect("the gate");
            drop(held.opened.wait_while(closed, |is_open| !*is_open).expect("the gate"));
            let body = r#"{"metadata":{"name":"pull","uid":"u-1","resourceVersion":"1"}}"#;
            let answer = format!("HTTP/1.1 201 Created\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            // regcred may have been stopped meanwhile.
            let _ = stream.write_all(answer.as_bytes());
        });
        let server = format!("http://{address}");
        (gate, json!({"name": name, "server": server, "auth": {"type": "none"}, "allowPlainHttp": true}))
    }

    /// Answers all held requests, and later ones at once.
    pub fn open(&self) {
        *self.is_open.lock().expect("the gate") = true;
        self.opened.notify_all();
    }

    /// Waits until this many requests are held.
    pub async fn until_waiting(&self, count: usize) {
        eventually("requests are held", async || (*self.waiting.lock().ok()? >= count).then_some(())).await;
    }
}
