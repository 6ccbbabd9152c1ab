//! Separates the head of a request from its body in memory.

use actix_web::{
    dev::ServiceRequest,
    http::{
        Uri,
        header::{CONTENT_LENGTH, HeaderValue, TRANSFER_ENCODING},
    },
    web::BytesMut,
};

/// Copies the head of a request with a body out of the read buffer of its connection.
///
/// The URI and the header values are slices of that buffer, which may also hold the body with its
/// passwords. actix keeps finished heads for reuse, and the buffer with them, until another request
/// replaces them.
pub fn detach(request: &mut ServiceRequest) {
    let headers = request.headers();
    if !headers.contains_key(CONTENT_LENGTH) && !headers.contains_key(TRANSFER_ENCODING) {
        return;
    }
    let uri = request.uri().to_string();
    let head = request.head_mut();
    let mut copy = BytesMut::from(uri.as_bytes());
    head.headers.retain(|_, value| {
        copy.extend_from_slice(value.as_bytes());
        true
    });
    // The parts were valid and are the same, so none of the conversions fails.
    if let Ok(uri) = Uri::from_maybe_shared(copy.split_to(uri.len()).freeze()) {
        head.uri = uri;
    }
    // In the same order as above.
    head.headers.retain(|_, value| {
        if let Ok(detached) = HeaderValue::from_maybe_shared(copy.split_to(value.len()).freeze()) {
            *value = detached;
        }
        true
    });
    let uri = request.uri().clone();
    request.match_info_mut().get_mut().update(&uri);
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn detached_head_is_equal_and_shares_no_memory() {
        let request = TestRequest::post().uri("/v1/registry-accounts/a%2Fb?dryRun=true").set_payload("body");
        let request =
            request.insert_header((CONTENT_LENGTH, "4")).append_header(("x-a", "1")).append_header(("x-a", "2"));
        let mut detached = request.to_srv_request();
        let before = (detached.uri().clone(), detached.headers().clone());

        detach(&mut detached);

        assert_eq!(*detached.uri(), before.0);
        let values = |headers: &actix_web::http::header::HeaderMap, name: &str| -> Vec<HeaderValue> {
            headers.get_all(name).cloned().collect()
        };
        for name in ["content-length", "x-a"] {
            assert_eq!(values(detached.headers(), name), values(&before.1, name));
        }
        assert_ne!(detached.uri().path().as_ptr(), before.0.path().as_ptr());
        assert_eq!(detached.match_info().as_str(), "/v1/registry-accounts/a%2Fb");
    }
}
