//! Protection of the listener: timeouts, limits, malformed requests, browsers and TLS.

mod browsers;
mod head_requests;
mod heads;
mod limits;
mod slow;
mod tls;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use crate::support::PATIENCE;

/// A raw TCP connection.
fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    stream.set_write_timeout(Some(PATIENCE)).expect("set");
    stream
}

/// Sends bytes and returns the responses until the server closes the connection.
fn answers(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = connect(address);
    // The server may close the connection before all bytes are sent.
    let _ = stream.write_all(bytes);
    read_to_the_end(&mut stream)
}

fn read_to_the_end(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => read.extend_from_slice(&chunk[..count]),
            // Closed with unread bytes.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the connection was not closed ({error}) after {}", String::from_utf8_lossy(&read)),
        }
    }
    String::from_utf8_lossy(&read).into_owned()
}

/// Reads until the end of a response's head.
fn read_head(stream: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let mut chunk = [0; 4096];
    while !read.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).expect("an answer");
        assert!(count > 0, "closed: {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&chunk[..count]);
    }
    String::from_utf8_lossy(&read).into_owned()
}

/// Statuses of all responses in a text.
fn statuses(answers: &str) -> Vec<&str> {
    answers.match_indices("HTTP/1.1 ").map(|(at, found)| &answers[at + found.len()..][..3]).collect()
}

/// Pause of a slow client.
fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}
