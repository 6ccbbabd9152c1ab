//! Look-ups of names that do not return: they delay neither the verification of keys nor each
//! other beyond a limit.

use std::{
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use futures_util::future::join_all;
use regcred::{
    clients::outbound::{AllowList, Guard, SystemResolver},
    crypto::api_key::{KeyChecker, PresentedKey},
};
use secrecy::ExposeSecret;
use tokio::time::timeout;

use crate::support::app::peppers;

#[test]
fn slow_names_do_not_delay_the_verification_of_keys() {
    let (release, wait) = mpsc::channel::<()>();
    let (running, wait) = (Arc::new(AtomicUsize::new(0)), Mutex::new(wait));
    let counted = Arc::clone(&running);
    let resolver = SystemResolver::with_look_up(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        let _ = wait.lock().expect("the channel").recv();
        Ok(vec![IpAddr::from([8, 8, 8, 8])])
    });
    let guard = Guard::with_resolver(AllowList::default(), Arc::new(resolver));
    let peppers = peppers();
    // A pool of one thread, which a single look-up would occupy.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let names: Vec<String> = (0..100).map(|number| format!("slow-{number}.example")).collect();
        let slow_names = join_all(names.iter().map(|name| guard.admit(name, 443)));
        let key_is_valid = async {
            let checker = KeyChecker::new(peppers, 1);
            let key = checker.generate().await.expect("a key");
            let presented = PresentedKey::parse(key.text.expose_secret()).expect("a key");
            checker.check(presented, Some(&key.verifier)).await
        };
        let (admitted, checked) = tokio::join!(slow_names, timeout(Duration::from_mins(1), key_is_valid));
        assert!(admitted.iter().all(Result::is_err));
        assert!(matches!(checked, Ok(Ok(true))), "{checked:?}");
    });
    let running = running.load(Ordering::SeqCst);
    assert!((1..=16).contains(&running), "{running} look-ups at once");
    drop(release);
}
