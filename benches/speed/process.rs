//! Processes under test and their resource usage from `/proc`.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::load;

/// Deadline for readiness.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// Deadline for the exit after SIGTERM.
const EXIT_WITHIN: Duration = Duration::from_mins(1);
/// Length of a CPU time tick (`USER_HZ`, the same on every Linux).
const TICK: Duration = Duration::from_millis(10);

/// Number of cores, used for workers and load threads.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Returns a loopback address with a free port.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Server process, killed on drop.
pub struct Server {
    child: Child,
    /// Listening address.
    pub address: SocketAddr,
    /// Address that serves the metrics.
    pub operations: SocketAddr,
    /// From process start to the first 200.
    pub ready_after: Duration,
}

impl Server {
    /// Starts a server, discards its log, and waits until `path` answers 200.
    pub fn start(command: &mut Command, address: SocketAddr, path: &str) -> anyhow::Result<Self> {
        Self::start_logging(command, address, path, Stdio::null())
    }

    /// Like [`start`](Self::start), with a destination for the log.
    pub fn start_logging(command: &mut Command, address: SocketAddr, path: &str, log: Stdio) -> anyhow::Result<Self> {
        let start = Instant::now();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        let mut server = Self { child, address, operations: address, ready_after: Duration::ZERO };
        let request = load::request("GET", path, None, "");
        while !load::once(address, &request).is_ok_and(|(status, _)| status == 200) {
            if let Some(status) = server.child.try_wait()? {
                bail!("{command:?} ended with {status}");
            }
            if start.elapsed() > READY_WITHIN {
                bail!("{command:?} is not ready");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        server.ready_after = start.elapsed();
        Ok(server)
    }

    /// Sends a signal, such as `STOP`.
    pub fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let sent = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status()?;
        ensure!(sent.success(), "the process is gone");
        Ok(())
    }

    /// Sends SIGTERM and waits until the process exits, which must be with success. Returns the
    /// time that it took.
    pub fn terminate(mut self) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.signal("TERM")?;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "the server ended with {status}");
                return Ok(start.elapsed());
            }
            ensure!(start.elapsed() < EXIT_WITHIN, "the server does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// CPU time used so far, user and system.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(Stat::read(self.child.id())?.cpu_time)
    }

    /// Resident memory, in MiB.
    pub fn resident_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmRSS:")
    }

    /// Peak resident memory, in MiB.
    pub fn peak_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmHWM:")
    }

    fn status_mib(&self, field: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }
}

/// CPU time used by this process.
pub fn own_cpu_time() -> anyhow::Result<Duration> {
    Ok(Stat::read(std::process::id())?.cpu_time)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A local Postgres, identified by its postmaster.
pub struct Postgres(u32);

impl Postgres {
    /// The Postgres of this backend; `None` if it runs on another machine.
    pub fn of_backend(pid: u32) -> Option<Self> {
        let backend = Stat::read(pid).ok()?;
        (backend.name == "postgres").then_some(Self(backend.parent))
    }

    /// CPU time of all running backends.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        // The process may have ended meanwhile.
        let processes = pids.filter_map(|pid| Stat::read(pid).ok());
        Ok(processes.filter(|process| process.parent == self.0).map(|process| process.cpu_time).sum())
    }
}

/// Fields of `/proc/PID/stat`.
struct Stat {
    name: String,
    parent: u32,
    cpu_time: Duration,
}

impl Stat {
    fn read(pid: u32) -> anyhow::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name is in parentheses and may contain anything.
        let (before, after) = stat.rsplit_once(") ").context("no name")?;
        let (_, name) = before.split_once('(').context("no name")?;
        let fields: Vec<&str> = after.split(' ').collect();
        // `proc(5)`: field 4 is the parent, 14 and 15 are user and system ticks; `fields` starts at
        // 3.
        let field = |number: usize| fields.get(number - 3).context("too few fields");
        let ticks: u32 = field(14)?.parse::<u32>()? + field(15)?.parse::<u32>()?;
        Ok(Self { name: name.to_owned(), parent: field(4)?.parse()?, cpu_time: TICK * ticks })
    }
}
