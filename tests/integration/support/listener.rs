//! Listeners that stand for what no healthy server does.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use serde_json::{Value, json};

use super::eventually;

/// The URL of a port that nothing listens on.
pub fn refusing_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    format!("http://{}", listener.local_addr().expect("an address"))
}

/// Serves every connection in a thread of its own, until the process ends.
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

/// Reads one request with the body that its Content-Length announces.
pub fn read_request(mut stream: &TcpStream) -> String {
    let mut request = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().filter_map(|line| line.split_once(": ")).find_map(|(name, value)| {
                name.eq_ignore_ascii_case("content-length").then(|| value.parse().unwrap_or(0))
            });
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return text,
            Ok(count) => request.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Stands for an API server that takes its time: it holds every request until it is told to answer.
pub struct Gate {
    waiting: Mutex<usize>,
    is_open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// Starts to listen; the gate, and the cluster to register.
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
            // regcred may have been ended meanwhile.
            let _ = stream.write_all(answer.as_bytes());
        });
        let server = format!("http://{address}");
        (gate, json!({"name": name, "server": server, "auth": {"type": "none"}, "allowPlainHttp": true}))
    }

    /// Answers all requests, from now on at once.
    pub fn open(&self) {
        *self.is_open.lock().expect("the gate") = true;
        self.opened.notify_all();
    }

    /// Waits until so many requests have come.
    pub async fn until_waiting(&self, count: usize) {
        eventually("requests wait at the cluster", async || (*self.waiting.lock().ok()? >= count).then_some(())).await;
    }
}
