//! Log lines on their way to standard error: gathered, so that many are one call of the system.
//!
//! A line that comes alone is written at once, by a thread of its own. Lines that come within [`GATHER_FOR`] after another
//! wait for the rest of that time. Who finds [`FULL`] bytes waiting writes them himself, before he goes on: so where standard
//! error is read slowly whoever logs is slowed down, and no line is lost.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// How long lines are gathered.
const GATHER_FOR: Duration = Duration::from_millis(5);
/// How many bytes may wait.
const FULL: usize = 64 * 1024;

/// The lines that were not written yet, and where they go.
#[derive(Debug)]
pub struct Lines<W> {
    waiting: Mutex<Waiting>,
    came: Condvar,
    /// Who writes holds it, from before he takes the lines: so they stay in order.
    output: Mutex<Output<W>>,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// The thread that writes sleeps until there are some.
    is_awaited: bool,
}

#[derive(Debug)]
struct Output<W> {
    to: W,
    /// An empty buffer, for the next lines.
    spare: Vec<u8>,
}

impl<W: Write + Send + 'static> Lines<W> {
    /// Starts the thread that writes.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn start(to: W) -> io::Result<Arc<Self>> {
        let lines = Arc::new(Self {
            waiting: Mutex::default(),
            came: Condvar::new(),
            output: Mutex::new(Output { to, spare: Vec::new() }),
        });
        let writer = Arc::clone(&lines);
        std::thread::Builder::new().name("log".to_owned()).spawn(move || writer.keep_writing())?;
        Ok(lines)
    }

    fn keep_writing(&self) {
        loop {
            let mut waiting = lock(&self.waiting);
            while waiting.lines.is_empty() {
                waiting.is_awaited = true;
                waiting = self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
            waiting.is_awaited = false;
            drop(waiting);
            self.write_out();
            std::thread::sleep(GATHER_FOR);
        }
    }

    /// Adds a line.
    fn add(&self, line: &[u8]) {
        let mut waiting = lock(&self.waiting);
        waiting.lines.extend_from_slice(line);
        let (is_full, is_awaited) = (waiting.lines.len() >= FULL, std::mem::take(&mut waiting.is_awaited));
        drop(waiting);
        if is_awaited {
            self.came.notify_one();
        }
        if is_full {
            self.write_out();
        }
    }

    /// Writes all lines that were added before.
    pub fn write_out(&self) {
        let mut output = lock(&self.output);
        let Output { to, spare } = &mut *output;
        std::mem::swap(&mut lock(&self.waiting).lines, spare);
        // There is nowhere to say that lines cannot be written.
        let _ = to.write_all(spare);
        spare.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes one line at each call.
impl<W: Write + Send + 'static> Write for &Lines<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.add(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Where somebody looks at what is written, piece by piece. He may keep the writer waiting.
    struct Pipe {
        written: Sender<Vec<u8>>,
        may_go_on: Receiver<()>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.written.send(bytes.to_vec()).map_err(io::Error::other)?;
            self.may_go_on.recv().map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn pipe() -> (Arc<Lines<Pipe>>, Receiver<Vec<u8>>, Sender<()>) {
        let ((written, pieces), (go_on, may_go_on)) = (channel(), channel());
        (Lines::start(Pipe { written, may_go_on }).unwrap(), pieces, go_on)
    }

    #[test]
    fn a_line_is_written_without_another_one_after_it() {
        let (lines, pieces, go_on) = pipe();
        for line in ["one\n", "two\n"] {
            lines.add(line.as_bytes());
            assert_eq!(pieces.recv().unwrap(), line.as_bytes());
            go_on.send(()).unwrap();
        }
    }

    #[test]
    fn what_comes_meanwhile_is_written_together_and_in_order() {
        let (lines, pieces, go_on) = pipe();
        lines.add(b"first\n");
        assert_eq!(pieces.recv().unwrap(), b"first\n");
        // The writer is held up.
        lines.add(b"second\n");
        lines.add(b"third\n");
        go_on.send(()).unwrap();
        assert_eq!(pieces.recv().unwrap(), b"second\nthird\n");
        go_on.send(()).unwrap();
    }

    #[test]
    fn at_the_end_all_is_written() {
        let (lines, pieces, go_on) = pipe();
        for _ in 0..3 {
            go_on.send(()).unwrap();
        }
        lines.add(b"last\n");
        lines.write_out();
        // By the thread or by the call: when the call is over, it is there.
        let written: Vec<u8> = pieces.try_iter().flatten().collect();
        assert_eq!(written, b"last\n");
    }

    #[test]
    fn who_logs_waits_where_too_much_waits_and_nothing_is_lost() {
        const THREADS: usize = 4;
        const LINES: usize = 1_000;
        let (lines, pieces, go_on) = pipe();
        let line = |thread: usize, number: usize| format!("{thread} {number} {}\n", "x".repeat(1_000));
        let (done, is_done) = channel();
        let mut written = Vec::new();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (lines, done) = (&lines, done.clone());
                scope.spawn(move || {
                    (0..LINES).for_each(|number| lines.add(line(thread, number).as_bytes()));
                    done.send(()).unwrap();
                });
            }
            // Nobody reads on: they add until it is full, one line each over it, and twice that, as one piece is being written.
            let first = pieces.recv().unwrap();
            assert!(is_done.recv_timeout(Duration::from_millis(200)).is_err());
            assert!(lock(&lines.waiting).lines.len() < FULL + THREADS * 1_100);
            written.extend(first);
            let all: usize = (0..THREADS)
                .flat_map(|thread| (0..LINES).map(move |n| (thread, n)))
                .map(|(t, n)| line(t, n).len())
                .sum();
            while written.len() < all {
                go_on.send(()).unwrap();
                written.extend(pieces.recv().unwrap());
            }
            go_on.send(()).unwrap();
        });
        let text = String::from_utf8(written).unwrap();
        for thread in 0..THREADS {
            let beginning = format!("{thread} ");
            let of_thread: Vec<&str> = text.split_inclusive('\n').filter(|line| line.starts_with(&beginning)).collect();
            assert_eq!(of_thread, (0..LINES).map(|number| line(thread, number)).collect::<Vec<_>>());
        }
    }
}
