//! Client of event streams.

use serde_json::Value;

use super::client::Client;

/// An open event stream.
pub struct Stream {
    response: reqwest::Response,
    unread: String,
}

/// An event. A comment has an empty name.
#[derive(Debug)]
pub struct Event {
    pub name: String,
    pub id: String,
    pub data: Value,
}

impl Stream {
    pub async fn open(client: &Client, path: &str) -> Self {
        Self::send(client.request("GET", path)).await
    }

    /// Opens a stream that continues after an event.
    pub async fn resume(client: &Client, path: &str, last: &str) -> Self {
        Self::send(client.request("GET", path).header("Last-Event-ID", last)).await
    }

    async fn send(request: reqwest::RequestBuilder) -> Self {
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status().as_u16(), 200);
        for (header, value) in [
            ("content-type", "text/event-stream"),
            ("cache-control", "no-store"),
            ("x-accel-buffering", "no"),
            ("connection", "close"),
        ] {
            assert_eq!(response.headers()[header], value);
        }
        assert!(!response.headers().contains_key("content-encoding"));
        Self { response, unread: String::new() }
    }

    /// Returns the next event or comment, or `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(end) = self.unread.find("\n\n") {
                let block: String = self.unread.drain(..end + 2).collect();
                let field = |name: &str| {
                    let prefix = format!("{name}: ");
                    block.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default().to_owned()
                };
                return Some(Event {
                    name: field("event"),
                    id: field("id"),
                    data: serde_json::from_str(&field("data")).unwrap_or_default(),
                });
            }
            let chunk = self.response.chunk().await.expect("whole events")?;
            self.unread.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
    }

    /// Returns the next event.
    pub async fn event(&mut self) -> Event {
        loop {
            let event = self.next().await.expect("the stream goes on");
            if !event.name.is_empty() {
                return event;
            }
        }
    }

    /// Returns the events up to and including the first match.
    pub async fn until(&mut self, is_last: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            events.push(self.event().await);
            if events.last().is_some_and(&is_last) {
                return events;
            }
        }
    }

    /// Returns the reason in the `end` event, which is the last one.
    pub async fn end(mut self) -> String {
        let events = self.until(|event| event.name == "end").await;
        assert!(self.next().await.is_none(), "nothing follows the end");
        events.last().expect("an event").data["reason"].as_str().expect("a reason").to_owned()
    }
}
