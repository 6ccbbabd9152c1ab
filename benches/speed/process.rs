//! Processes under test, and what the kernel says of them.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};

use crate::load;

/// How long a server may take to be ready.
const READY_WITHIN: Duration = Duration::from_secs(30);
/// The kernel counts a process's CPU time in ticks of this length (`USER_HZ`, the same on every Linux).
const TICK: Duration = Duration::from_millis(10);

/// How many cores there are: for workers, and for threads of the load.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A port of loopback that was free a moment ago.
pub fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// A server that ends with this value.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    /// From the process's start to its first good answer.
    pub ready_after: Duration,
}

impl Server {
    /// Starts a server and waits until `path` answers 200. Nobody reads what it logs.
    pub fn start(command: &mut Command, address: SocketAddr, path: &str) -> anyhow::Result<Self> {
        Self::start_logging(command, address, path, Stdio::null())
    }

    /// The same, with its log.
    pub fn start_logging(command: &mut Command, address: SocketAddr, path: &str, log: Stdio) -> anyhow::Result<Self> {
        let start = Instant::now();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        let mut server = Self { child, address, ready_after: Duration::ZERO };
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

    /// Sends it a signal, such as `STOP`.
    pub fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let sent = Command::new("kill").args(["-s", signal, &self.child.id().to_string()]).status()?;
        ensure!(sent.success(), "the process is gone");
        Ok(())
    }

    /// CPU time that it has used, in user mode and in the kernel.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        Ok(Stat::read(self.child.id())?.cpu_time)
    }

    /// Resident memory, in MiB.
    pub fn resident_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmRSS:")
    }

    /// The most resident memory that it ever had, in MiB.
    pub fn peak_mib(&self) -> anyhow::Result<f64> {
        self.status_mib("VmHWM:")
    }

    fn status_mib(&self, field: &str) -> anyhow::Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }
}

/// CPU time that this process has used.
pub fn own_cpu_time() -> anyhow::Result<Duration> {
    Ok(Stat::read(std::process::id())?.cpu_time)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A local Postgres, by its main process.
pub struct Postgres(u32);

impl Postgres {
    /// The Postgres that this backend belongs to; `None` where it runs on another machine.
    pub fn of_backend(pid: u32) -> Option<Self> {
        let backend = Stat::read(pid).ok()?;
        (backend.name == "postgres").then_some(Self(backend.parent))
    }

    /// CPU time of all backends that live.
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        // One that ended meanwhile is none of ours.
        let processes = pids.filter_map(|pid| Stat::read(pid).ok());
        Ok(processes.filter(|process| process.parent == self.0).map(|process| process.cpu_time).sum())
    }
}

/// The parts of `/proc/PID/stat` that are needed here.
struct Stat {
    name: String,
    parent: u32,
    cpu_time: Duration,
}

impl Stat {
    fn read(pid: u32) -> anyhow::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name is in parentheses and may hold anything.
        let (before, after) = stat.rsplit_once(") ").context("no name")?;
        let (_, name) = before.split_once('(').context("no name")?;
        let fields: Vec<&str> = after.split(' ').collect();
        // `proc(5)`: 4 is the parent, 14 and 15 are ticks in user mode and in the kernel; `fields` starts with 3.
        let field = |number: usize| fields.get(number - 3).context("too few fields");
        let ticks: u32 = field(14)?.parse::<u32>()? + field(15)?.parse::<u32>()?;
        Ok(Self { name: name.to_owned(), parent: field(4)?.parse()?, cpu_time: TICK * ticks })
    }
}
