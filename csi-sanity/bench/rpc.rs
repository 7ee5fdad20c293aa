//! The driver as a process, and calls over its socket.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use hostdir::csi::proto::controller_client::ControllerClient;
use hostdir::csi::proto::identity_client::IdentityClient;
use hostdir::csi::proto::node_client::NodeClient;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use hostdir::csi::proto::{
    CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest,
    GetPluginInfoRequest, ListVolumesRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::bare::Bare;
use super::{per_second, target};

/// A driver that serves, and a connection to it.
pub(crate) struct Served {
    dir: PathBuf,
    child: Child,
    runtime: Runtime,
    caller: Caller,
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What makes calls.
#[derive(Clone)]
struct Caller {
    channel: Channel,
    dir: PathBuf,
}

impl Served {
    /// Starts the driver and waits for its first answer.
    pub(crate) fn start(dir: &Path) -> Self {
        Self::start_with(dir, "overcommit: 1")
    }

    /// The same, with wishes about its pool, in YAML.
    pub(crate) fn start_with(dir: &Path, wishes: &str) -> Self {
        fs::create_dir_all(dir.join("pods")).expect("make a directory");
        let (socket, config) = (dir.join("csi.sock"), dir.join("config.yaml"));
        let pool = dir.join("pool");
        let pools = format!("pools: [{{name: default, path: {}, {wishes}}}]\n", pool.display());
        fs::write(&config, pools).expect("write a configuration");
        let child = Command::new(env!("CARGO_BIN_EXE_hostdir"))
            .args(["local", "--node-name", "bench", "--log-level", "warn"])
            .arg(format!("--endpoint=unix://{}", socket.display()))
            .arg("--config")
            .arg(&config)
            .stderr(
                File::options()
                    .create(true)
                    .append(true)
                    .open(dir.join("log"))
                    .expect("open a log"),
            )
            .spawn()
            .expect("start the driver");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("start a runtime");
        let channel = runtime.block_on(async {
            let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).expect("an endpoint");
            loop {
                if let Ok(channel) = endpoint.connect().await
                    && IdentityClient::new(channel.clone())
                        .probe(ProbeRequest {})
                        .await
                        .is_ok()
                {
                    return channel;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let caller = Caller {
            channel,
            dir: dir.to_owned(),
        };
        Self {
            dir: dir.to_owned(),
            child,
            runtime,
            caller,
        }
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill the driver");
        self.child.wait().expect("reap the driver");
    }

    /// The life of one volume, and how long each step took.
    pub(crate) fn cycle(&self, name: &str) -> [Duration; 4] {
        self.runtime.block_on(self.caller.cycle(name))
    }

    /// Cycles a second, made by callers that share a connection, as a sidecar's workers do.
    pub(crate) fn rate_of_many(&self, callers: usize, cycles: usize) -> f64 {
        let start = Instant::now();
        self.runtime.block_on(async {
            let tasks: Vec<_> = (0..callers)
                .map(|number| {
                    let caller = self.caller.clone();
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

    /// The calls that change nothing, each with its bare counterpart, if it has one: name, bare times, times.
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
                self.runtime.block_on(self.caller.read(number, &path));
                of_served.push(start.elapsed());
            }
        }
        self.unpublish("read");
        self.delete("read");
        all
    }

    /// Makes and mounts a volume; where.
    pub(crate) fn make(&self, name: &str) -> PathBuf {
        self.runtime.block_on(async {
            self.caller.create(name).await;
            self.caller.publish(name).await;
        });
        target(&self.dir, name)
    }

    /// Statistics of the volume `read`, mounted there.
    pub(crate) fn stats(&self, path: &Path) {
        self.runtime.block_on(self.caller.read(0, path));
    }

    /// The name of the driver, which it has at hand.
    pub(crate) fn info(&self) {
        let mut client = IdentityClient::new(self.caller.channel.clone());
        let name = self.runtime.block_on(client.get_plugin_info(GetPluginInfoRequest {}));
        name.expect("GetPluginInfo");
    }

    /// Lets a volume grow.
    pub(crate) fn expand(&self, name: &str, bytes: i64) {
        let request = ControllerExpandVolumeRequest {
            volume_id: name.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: bytes,
                limit_bytes: 0,
            }),
            ..ControllerExpandVolumeRequest::default()
        };
        let mut client = ControllerClient::new(self.caller.channel.clone());
        let grown = self.runtime.block_on(client.controller_expand_volume(request));
        grown.expect("ControllerExpandVolume");
    }

    pub(crate) fn unpublish(&self, name: &str) {
        self.runtime.block_on(self.caller.unpublish(name));
    }

    pub(crate) fn delete(&self, name: &str) {
        self.runtime.block_on(self.caller.delete(name));
    }

    /// Makes and mounts volumes until there are so many.
    pub(crate) fn fill(&self, count: usize) {
        for number in self.count()..count {
            self.make(&format!("crowd-{number}"));
        }
    }

    /// Unmounts the volumes of [`Served::fill`].
    pub(crate) fn unpublish_all(&self, count: usize) {
        for number in 0..count {
            self.unpublish(&format!("crowd-{number}"));
        }
    }

    /// Waits until nothing that was deleted is left on the disk.
    pub(crate) fn wait_for_eraser(&self) {
        let trash = self.dir.join("pool/trash");
        while fs::read_dir(&trash).expect("list the trash").next().is_some() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn count(&self) -> usize {
        fs::read_dir(self.dir.join("pool/volumes"))
            .expect("list the volumes")
            .count()
    }

    /// `VmRSS`, see proc_pid_status(5).
    pub(crate) fn resident_mib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("read the status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("a figure of memory");
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib / 1024.0
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
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes: 1 << 20,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability()],
            ..CreateVolumeRequest::default()
        };
        ControllerClient::new(self.channel.clone())
            .create_volume(request)
            .await
            .expect("CreateVolume");
    }

    async fn publish(&self, name: &str) {
        let request = NodePublishVolumeRequest {
            volume_id: name.to_owned(),
            target_path: target(&self.dir, name).display().to_string(),
            volume_capability: Some(capability()),
            ..NodePublishVolumeRequest::default()
        };
        NodeClient::new(self.channel.clone())
            .node_publish_volume(request)
            .await
            .expect("NodePublishVolume");
    }

    async fn unpublish(&self, name: &str) {
        let request = NodeUnpublishVolumeRequest {
            volume_id: name.to_owned(),
            target_path: target(&self.dir, name).display().to_string(),
        };
        NodeClient::new(self.channel.clone())
            .node_unpublish_volume(request)
            .await
            .expect("NodeUnpublishVolume");
    }

    async fn delete(&self, name: &str) {
        let request = DeleteVolumeRequest {
            volume_id: name.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        ControllerClient::new(self.channel.clone())
            .delete_volume(request)
            .await
            .expect("DeleteVolume");
    }

    async fn read(&self, which: usize, path: &Path) {
        let channel = self.channel.clone();
        match which {
            0 => {
                let request = NodeGetVolumeStatsRequest {
                    volume_id: "read".into(),
                    volume_path: path.display().to_string(),
                    ..NodeGetVolumeStatsRequest::default()
                };
                NodeClient::new(channel).node_get_volume_stats(request).await.map(drop)
            }
            1 => ControllerClient::new(channel)
                .get_capacity(GetCapacityRequest::default())
                .await
                .map(drop),
            2 => IdentityClient::new(channel).probe(ProbeRequest {}).await.map(drop),
            _ => {
                let request = ListVolumesRequest {
                    max_entries: 1,
                    ..ListVolumesRequest::default()
                };
                ControllerClient::new(channel).list_volumes(request).await.map(drop)
            }
        }
        .expect("a call that changes nothing");
    }
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeMultiWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}
