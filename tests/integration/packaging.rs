//! Files of packages, and readiness for a service manager.

use std::{fs, os::unix::net::UnixDatagram};

use sqlx::{ConnectOptions, PgPool};

use crate::support::{PATIENCE, files::TempDir, process::Installation};

#[tokio::test]
async fn package_files_cover_every_visible_command() {
    let folder = TempDir::new();
    let installation = Installation::new("");

    installation.must_run(&["package-files", folder.path().to_str().expect("UTF-8")]).await;

    let read =
        |path: &str| fs::read_to_string(folder.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let page = read("man/regcred.1");
    let help = installation.must_run(&["--help"]).await;
    let commands: Vec<&str> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(commands.contains(&"serve") && commands.contains(&"audit"), "{help}");
    let completions = ["completions/regcred.bash", "completions/regcred.fish", "completions/_regcred"].map(read);
    for command in commands {
        assert!(page.contains(&format!("regcred\\-{}(1)", command.replace('-', "\\-"))), "{command}: {page}");
        assert!(read(&format!("man/regcred-{command}.1")).contains(".SH SYNOPSIS"), "{command}");
        assert!(completions.iter().all(|completion| completion.contains(command)), "{command}");
    }
    assert!(read("man/regcred-serve.1").contains("migrate"), "options are described");
    assert!(!page.contains("package\\-files"), "the command is for packagers");
}

#[sqlx::test(migrations = false)]
async fn service_manager_is_told_once_the_service_answers(pool: PgPool) {
    let folder = TempDir::new();
    let socket = folder.path().join("notify");
    let manager = UnixDatagram::bind(&socket).expect("a socket");
    manager.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let mut message = [0; 64];
    let receive = |message: &mut [u8]| manager.recv(message).map(|length| message[..length].to_vec());
    let installation = Installation::new(pool.connect_options().to_url_lossy().as_str())
        .with("NOTIFY_SOCKET", socket.to_str().expect("UTF-8"));

    installation.must_run(&["migrate"]).await;
    manager.set_nonblocking(true).expect("a socket");
    assert!(receive(&mut message).is_err(), "a command is no service");
    manager.set_nonblocking(false).expect("a socket");
    let service = installation.serve().await;

    assert_eq!(receive(&mut message).expect("a message"), b"READY=1");
    assert_eq!(service.anonymous().get("/healthz").await.status, 200);
}
