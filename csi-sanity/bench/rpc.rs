//! The driver as a process, and calls over its socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostdir::csi::proto::GetCapacityRequest;
use hostdir_lab::client::create_request;
use hostdir_lab::{Client, Csi, Driver, Mount, Process, wait_until};

use super::bare::Bare;
use super::{per_second, target};

/// A running driver, and a connection to it.
pub(crate) struct Served {
    dir: PathBuf,
    process: Process,
    client: Client,
}

/// Makes calls to a driver.
#[derive(Clone)]
struct Caller {
    csi: Csi,
    dir: PathBuf,
}

impl Served {
    /// Starts the driver and waits for its first answer.
    pub(crate) fn start(dir: &Path) -> Self {
        Self::start_with(dir, "overcommit: 1")
    }

    /// Like [`Served::start`], with settings of the pool in YAML.
    pub(crate) fn start_with(dir: &Path, settings: &str) -> Self {
        fs::create_dir_all(dir.join("pods")).expect("make a directory");
        let (config, pool) = (dir.join("config.yaml"), dir.join("pool"));
        let pools = format!("pools: [{{name: default, path: {}, {settings}}}]\n", pool.display());
        fs::write(&config, pools).expect("write a configuration");
        let args = ["local", "--node-name", "bench", "--log-level", "warn", "--config"];
        let mut process = Driver::with_args(dir, &args).arg(config.display().to_string()).spawn();
        Self {
            dir: dir.to_owned(),
            client: process.connect_ready(),
            process,
        }
    }

    fn caller(&self) -> Caller {
        Caller {
            csi: self.client.csi().clone(),
            dir: self.dir.clone(),
        }
    }

    pub(crate) fn kill(self) {
        self.process.kill();
    }

    /// Takes one volume through its life. Returns the time of each step.
    pub(crate) fn cycle(&self, name: &str) -> [Duration; 4] {
        self.client.block_on(self.caller().cycle(name))
    }

    /// Cycles per second, made by concurrent callers that share a connection, as a sidecar's workers do.
    pub(crate) fn rate_of_many(&self, callers: usize, cycles: usize) -> f64 {
        let start = Instant::now();
        self.client.block_on(async {
            let tasks: Vec<_> = (0..callers)
                .map(|number| {
                    let caller = self.caller();
                    tokio::spawn(async move {
                        for cycle in 0..cycles {
                            caller.cycle(&format!("many-{number}-{cycle}")).await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.expect("no panic");
            }
        });
        per_second(callers * cycles, start.elapsed())
    }

    /// Measures the calls that change nothing. Returns for each: name, times of the bare counterpart (if it has one), times.
    pub(crate) fn reads(&self, bare: &Bare, count: usize) -> [(&'static str, Vec<Duration>, Vec<Duration>); 4] {
        let path = self.make("read");
        let mut all =
            ["NodeGetVolumeStats", "GetCapacity", "Probe", "ListVolumes (1)"].map(|name| (name, vec![], vec![]));
        for _ in 0..count {
            for (number, (_, of_bare, of_served)) in all.iter_mut().enumerate() {
                let bare_read: Option<fn(&Bare)> = match number {
                    0 | 1 => Some(Bare::space),
                    2 => Some(Bare::probe),
                    _ => None,
                };
                if let Some(read) = bare_read {
                    let start = Instant::now();
                    read(bare);
                    of_bare.push(start.elapsed());
                }
                let start = Instant::now();
                self.client.block_on(self.caller().read(number, &path));
                of_served.push(start.elapsed());
            }
        }
        self.unpublish("read");
        self.delete("read");
        all
    }

    /// Creates and publishes a volume. Returns its mount point.
    pub(crate) fn make(&self, name: &str) -> PathBuf {
        self.client.block_on(async {
            self.caller().create(name).await;
            self.caller().publish(name).await;
        });
        target(&self.dir, name)
    }

    /// Calls NodeGetVolumeStats for the volume `read`, mounted at `path`.
    pub(crate) fn stats(&self, path: &Path) {
        self.client.block_on(self.caller().read(0, path));
    }

    /// Calls GetPluginInfo, for which the driver does no work.
    pub(crate) fn info(&self) {
        self.client.block_on(self.client.csi().info()).expect("GetPluginInfo");
    }

    pub(crate) fn expand(&self, name: &str, bytes: i64) {
        self.client.expand(name, bytes).expect("ControllerExpandVolume");
    }

    pub(crate) fn unpublish(&self, name: &str) {
        self.client.block_on(self.caller().unpublish(name));
    }

    pub(crate) fn delete(&self, name: &str) {
        self.client.block_on(self.caller().delete(name));
    }

    /// Creates and publishes volumes until there are `count`.
    pub(crate) fn fill(&self, count: usize) {
        for number in self.count()..count {
            self.make(&format!("crowd-{number}"));
        }
    }

    /// Unpublishes the volumes of [`Served::fill`].
    pub(crate) fn unpublish_all(&self, count: usize) {
        for number in 0..count {
            self.unpublish(&format!("crowd-{number}"));
        }
    }

    /// Waits until all deleted volumes are erased.
    pub(crate) fn wait_for_eraser(&self) {
        let trash = self.dir.join("pool/trash");
        wait_until("the trash is empty", || {
            fs::read_dir(&trash).expect("list the trash").next().is_none()
        });
    }

    pub(crate) fn count(&self) -> usize {
        fs::read_dir(self.dir.join("pool/volumes"))
            .expect("list the volumes")
            .count()
    }

    pub(crate) fn resident_mib(&self) -> f64 {
        self.process.memory().0
    }
}

impl Caller {
    async fn cycle(&self, name: &str) -> [Duration; 4] {
        let mut times = [Duration::ZERO; 4];
        for (step, time) in times.iter_mut().enumerate() {
            let start = Instant::now();
            match step {
                0 => self.create(name).await,
                1 => self.publish(name).await,
                2 => self.unpublish(name).await,
                _ => self.delete(name).await,
            }
            *time = start.elapsed();
        }
        times
    }

    async fn create(&self, name: &str) {
        let made = self.csi.create(create_request(name)).await;
        made.expect("CreateVolume");
    }

    async fn publish(&self, name: &str) {
        let published = self.csi.publish(name, &self.target(name), Mount::default()).await;
        published.expect("NodePublishVolume");
    }

    async fn unpublish(&self, name: &str) {
        let unpublished = self.csi.unpublish(name, &self.target(name)).await;
        unpublished.expect("NodeUnpublishVolume");
    }

    async fn delete(&self, name: &str) {
        self.csi.delete(name).await.expect("DeleteVolume");
    }

    async fn read(&self, which: usize, path: &Path) {
        let read = match which {
            0 => self.csi.stats("read", &path.display().to_string()).await.map(drop),
            1 => self.csi.capacity(GetCapacityRequest::default()).await.map(drop),
            2 => self.csi.probe().await.map(drop),
            _ => self.csi.list(1, String::new()).await.map(drop),
        };
        read.expect("a call that changes nothing");
    }

    fn target(&self, name: &str) -> String {
        target(&self.dir, name).display().to_string()
    }
}
