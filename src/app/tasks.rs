//! Long-lived tasks of the process, and the order in which they stop.
//!
//! A shutdown has two steps. Cancelling the soft tokens drains: work tasks finish first, support
//! tasks after them, because work still needs them. Cancelling the hard token drops every task at
//! its next await point.

use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Tracks tasks by name. Dropping it aborts them.
#[derive(Debug)]
pub struct Tasks {
    work: TaskTracker,
    support: TaskTracker,
    /// Soft: work tasks finish.
    draining: CancellationToken,
    /// Soft: support tasks finish.
    finishing: CancellationToken,
    /// Hard: all tasks are dropped. Parent of the soft tokens.
    aborting: CancellationToken,
    ended: mpsc::UnboundedSender<&'static str>,
    ended_early: mpsc::UnboundedReceiver<&'static str>,
}

impl Tasks {
    pub fn new() -> Self {
        let aborting = CancellationToken::new();
        let (ended, ended_early) = mpsc::unbounded_channel();
        Self {
            work: TaskTracker::new(),
            support: TaskTracker::new(),
            draining: aborting.child_token(),
            finishing: aborting.child_token(),
            aborting,
            ended,
            ended_early,
        }
    }

    /// Token that tells work tasks to finish.
    pub fn draining(&self) -> CancellationToken {
        self.draining.clone()
    }

    /// Token that tells support tasks to finish.
    pub fn finishing(&self) -> CancellationToken {
        self.finishing.clone()
    }

    /// Spawns a task that accepts work until [`Tasks::draining`] is cancelled.
    pub fn spawn_work(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(&self.work, self.draining(), name, task);
    }

    /// Spawns a task that work depends on and that runs until [`Tasks::finishing`] is cancelled.
    pub fn spawn_support(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(&self.support, self.finishing(), name, task);
    }

    /// Spawns a support task that has nothing to finish: it is dropped.
    pub fn spawn_background(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.finishing();
        self.spawn_support(name, async move {
            stop.run_until_cancelled(task).await;
        });
    }

    fn spawn(
        &self,
        tracker: &TaskTracker,
        stop: CancellationToken,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let hard = self.aborting.clone();
        let end = End { name, stop, ended: self.ended.clone() };
        tracker.spawn(async move {
            let _end = end;
            hard.run_until_cancelled(task).await;
        });
    }

    /// Waits until a task ends or panics before its token is cancelled; returns its name.
    pub async fn ended_early(&mut self) -> &'static str {
        match self.ended_early.recv().await {
            Some(name) => name,
            // Unreachable: `self.ended` is a sender.
            None => std::future::pending().await,
        }
    }

    /// Stops work tasks, then support tasks, and waits for all of them.
    pub async fn drain(&self) {
        for (stop, tasks) in [(&self.draining, &self.work), (&self.finishing, &self.support)] {
            stop.cancel();
            tasks.close();
            tasks.wait().await;
        }
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.aborting.cancel();
    }
}

/// Reports the end of a task. A destructor, because it also runs when the task panics.
struct End {
    name: &'static str,
    stop: CancellationToken,
    ended: mpsc::UnboundedSender<&'static str>,
}

impl Drop for End {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            let _ = self.ended.send(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::Arc};

    use parking_lot::Mutex;

    use super::*;

    #[tokio::test]
    async fn task_that_ends_or_panics_is_reported_by_name() {
        let mut tasks = Tasks::new();
        tasks.spawn_work("steady", pending());
        tasks.spawn_work("finished", async {});
        assert_eq!(tasks.ended_early().await, "finished");
        tasks.spawn_background("panicked", async { panic!("on purpose") });
        assert_eq!(tasks.ended_early().await, "panicked");
    }

    #[tokio::test]
    async fn work_drains_before_support_stops() {
        let tasks = Tasks::new();
        let order = Arc::new(Mutex::new(Vec::new()));
        let record = |name, stop: CancellationToken| {
            let order = Arc::clone(&order);
            async move {
                stop.cancelled().await;
                tokio::task::yield_now().await;
                order.lock().push(name);
            }
        };
        tasks.spawn_support("support", record("support", tasks.finishing()));
        tasks.spawn_work("work", record("work", tasks.draining()));
        tasks.spawn_background("background", pending());
        tasks.drain().await;
        assert_eq!(*order.lock(), ["work", "support"]);
    }

    #[tokio::test]
    async fn dropping_aborts_tasks_that_do_not_drain() {
        let tasks = Tasks::new();
        let trackers = [tasks.work.clone(), tasks.support.clone()];
        tasks.spawn_work("work", pending());
        tasks.spawn_support("support", pending());
        drop(tasks);
        for tracker in trackers {
            tracker.close();
            tracker.wait().await;
        }
    }
}
