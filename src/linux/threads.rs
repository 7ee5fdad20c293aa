//! The threads of a pool, or those that mount and unmount, which share a table of file descriptors that no other thread has.
//!
//! A thread that hangs in a system call on a bad disk outlives even SIGKILL, and keeps every descriptor of its table open: the
//! locks of pools (flock(2)), and the socket. With one table for all, one bad disk would keep the next hostdir from serving the
//! good ones. So whatever touches the disk of a pool runs on its own threads, and the other threads only wait for their answers:
//! when a process dies, each lock is released as soon as no thread of it can work on that pool any more.
//!
//! So these threads must not call what keeps a descriptor for all threads: the tokio runtime, or `uuid` for a random id.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::warn;

use super::pool::PoolDisk;
use super::sys;
use crate::background;
use crate::volume::access::{MountOptions, TargetPath};
use crate::volume::disk::{Absent, BindError, Disk, DiskError, Inode, Inspection, Measure};
use crate::volume::id::{PoolName, VolumeId};
use crate::volume::quota::QuotaKind;
use crate::volume::record::Record;

/// How long a thread waits for work before it ends. One of those that wait always stays.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// As many threads as there are jobs to do at the same time, and one more: there is always one that does not hang.
pub(super) struct Threads(Arc<Shared>);

struct Shared {
    name: String,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// How many threads wait for a job.
    idle: usize,
    stop: bool,
}

impl Threads {
    /// Starts the first thread. All of them share the descriptors of the calling thread.
    fn start(name: String) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name,
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        shared.spawn()?;
        Ok(Self(shared))
    }

    /// Starts the first thread, with descriptors of its own.
    pub(super) fn with_own_descriptors(name: String) -> io::Result<Self> {
        let start = move || {
            sys::own_descriptors()
                .map_err(io::Error::from)
                .and_then(|()| Self::start(name))
        };
        let started = thread::Builder::new().name("start".into()).spawn(start)?.join();
        started.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs `work` on one of the threads, and waits until it ends. A panic of it goes on here.
    pub(super) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = sync_channel::<Result<T, Box<dyn Any + Send>>>(1);
        self.push(Box::new(move || {
            let _ = answer.send(catch_unwind(AssertUnwindSafe(work)));
        }));
        let done = answered.recv().expect("threads do all jobs before they end");
        done.unwrap_or_else(|panic| resume_unwind(panic))
    }

    fn push(&self, job: Job) {
        self.0.lock().jobs.push_back(job);
        self.0.changed.notify_one();
    }
}

impl Drop for Threads {
    /// The threads end when all jobs are done.
    fn drop(&mut self) {
        self.0.lock().stop = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        background::spawn(self.name.clone(), move || shared.work()).map(drop)
    }

    fn work(self: &Arc<Self>) {
        while let Some((job, others_wait)) = self.next() {
            // The next job must find a thread, also if this one hangs.
            if !others_wait && let Err(error) = self.spawn() {
                warn!(threads = self.name, %error, "cannot start another thread; calls wait for each other");
            }
            job();
        }
    }

    /// Waits for a job. Also returns whether another thread waits. `None`: this thread is to end.
    fn next(&self) -> Option<(Job, bool)> {
        let mut queue = self.lock();
        queue.idle += 1;
        loop {
            let nothing = |queue: &mut Queue| queue.jobs.is_empty() && !queue.stop;
            let waited = self.changed.wait_timeout_while(queue, IDLE, nothing);
            let (woken, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            if !timeout.timed_out() || queue.idle > 1 {
                break;
            }
        }
        queue.idle -= 1;
        let job = queue.jobs.pop_front()?;
        Some((job, queue.idle > 0))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Jobs do not run while it is held, so nothing panics.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pool whose verbs run on its own threads. Dropping it does not wait: the pool is closed on one of them.
pub(super) struct ThreadedDisk {
    // `None` only while it is dropped.
    disk: Option<Arc<PoolDisk>>,
    threads: Threads,
}

impl ThreadedDisk {
    /// Call this on the thread that opened the pool.
    pub(super) fn new(pool: &PoolName, disk: PoolDisk) -> io::Result<Self> {
        Ok(Self {
            disk: Some(Arc::new(disk)),
            threads: Threads::start(format!("disk {pool}"))?,
        })
    }

    fn run<T: Send + 'static>(&self, verb: impl FnOnce(&PoolDisk) -> T + Send + 'static) -> T {
        let disk = Arc::clone(self.disk());
        self.threads.run(move || verb(&disk))
    }

    fn disk(&self) -> &Arc<PoolDisk> {
        self.disk.as_ref().expect("there until it is dropped")
    }
}

impl Drop for ThreadedDisk {
    fn drop(&mut self) {
        let disk = self.disk.take();
        self.threads.push(Box::new(move || drop(disk)));
    }
}

impl Disk for ThreadedDisk {
    fn present(&self) -> Result<(), Absent> {
        self.run(Disk::present)
    }

    /// On the calling thread, which must be the one that opened the pool.
    fn inspect(&self) -> Result<Inspection, Absent> {
        self.disk().inspect()
    }

    fn is_settled(&self) -> bool {
        self.disk().is_settled()
    }

    fn settle(&self) -> Result<(), DiskError> {
        self.run(Disk::settle)
    }

    fn reload(&self, id: &VolumeId) -> Result<Record, String> {
        let id = id.clone();
        self.run(move |disk| disk.reload(&id))
    }

    fn create(&self, record: &Record) -> Result<(), DiskError> {
        let record = record.clone();
        self.run(move |disk| disk.create(&record))
    }

    fn make_directory(&self, record: &Record) -> Result<Record, DiskError> {
        let record = record.clone();
        self.run(move |disk| disk.make_directory(&record))
    }

    fn resize(&self, record: &Record) -> Result<(), DiskError> {
        let record = record.clone();
        self.run(move |disk| disk.resize(&record))
    }

    fn enforcement(&self) -> Result<QuotaKind, String> {
        self.run(Disk::enforcement)
    }

    fn unenforced(&self, id: &VolumeId) -> Option<String> {
        self.disk().unenforced(id)
    }

    fn enforce(&self, record: &Record) -> Result<(), DiskError> {
        let record = record.clone();
        self.run(move |disk| disk.enforce(&record))
    }

    fn measure(&self, record: &Record, mounted: Inode) -> Result<Measure, DiskError> {
        let record = record.clone();
        self.run(move |disk| disk.measure(&record, mounted))
    }

    fn data(&self, id: &VolumeId) -> Result<Option<Inode>, DiskError> {
        let id = id.clone();
        self.run(move |disk| disk.data(&id))
    }

    fn bind(&self, id: &VolumeId, target: &TargetPath, options: MountOptions) -> Result<bool, BindError> {
        let (id, target) = (id.clone(), target.clone());
        self.run(move |disk| disk.bind(&id, &target, options))
    }

    fn discard(&self, id: &VolumeId) -> Result<(), DiskError> {
        let id = id.clone();
        self.run(move |disk| disk.discard(&id))
    }
}
