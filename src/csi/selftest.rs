//! `hostdir selftest`: takes a volume through its life over the socket, as a cluster does for a claim and its pods.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::proto::controller_client::ControllerClient;
use super::proto::identity_client::IdentityClient;
use super::proto::node_client::NodeClient;
use super::proto::volume_capability::access_mode::Mode;
use super::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use super::proto::{
    CapacityRange, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest, GetPluginInfoRequest,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, VolumeCapability,
};
use super::{Endpoint, probe};
use crate::volume::id::{PoolName, SELF_TEST};
use crate::volume::size::Bytes;

/// Longest time for one call: a slow disk syncs within it.
const TIMEOUT: Duration = Duration::from_mins(1);
/// The error for a disk that does not answer in that time.
const HANGS: &str = "the disk does not answer";
const SIZE: i64 = 64 << 20;
const CONTENT: &str = "written by one pod, read by the next\n";

/// Takes a volume of a pool through its life: create, publish, write, unpublish, publish, read, unpublish, delete. Returns a
/// table of what each step did, and whether all steps succeeded. What an interrupted self-test left behind is used and
/// removed.
///
/// # Errors
/// Nobody answers on the socket.
pub(crate) async fn selftest(endpoint: &Endpoint, pool: &PoolName) -> anyhow::Result<(String, bool)> {
    let mut test = SelfTest {
        channel: probe::connect(endpoint, TIMEOUT).await?,
        pool: pool.to_string(),
        volume: volume_of(pool),
        // In a container this is the only writable directory, and a mount there is visible nowhere else.
        target: endpoint.path().with_extension(format!("selftest-{pool}")),
        created: false,
        table: format!("{:<21} {:<7} {:>8}  {}\n", "STEP", "RESULT", "TIME", "DETAIL"),
    };
    let passed = test.run().await;
    // Removes only what this self-test has created, or what an earlier one left behind.
    if !passed && test.created {
        test.clean_up().await;
    }
    Ok((test.table, passed))
}

/// A volume name that is a valid id: at most 63 bytes.
fn volume_of(pool: &PoolName) -> String {
    let short: String = pool.as_str().chars().take(63 - SELF_TEST.len()).collect();
    format!("{SELF_TEST}{}", short.trim_end_matches('-'))
}

struct SelfTest {
    channel: Channel,
    pool: String,
    volume: String,
    target: PathBuf,
    created: bool,
    table: String,
}

impl SelfTest {
    /// Runs all steps until one fails. Returns whether all succeeded.
    async fn run(&mut self) -> bool {
        macro_rules! steps {
            ($($name:literal: $step:expr),+ $(,)?) => {
                $( let start = Instant::now(); let ended = $step.await; if !self.note($name, start, &ended) { return false; } )+
            };
        }
        steps![
            "GetPluginInfo": self.info(),
            "GetCapacity": self.capacity(),
            "CreateVolume": self.create(),
            "NodePublishVolume": self.publish(),
            "a pod writes": self.write(),
            "NodeUnpublishVolume": self.unpublish(),
            "NodePublishVolume": self.publish(),
            "the next pod reads": self.read(),
            "NodeUnpublishVolume": self.unpublish(),
            "DeleteVolume": self.delete(),
        ];
        true
    }

    fn note(&mut self, name: &str, start: Instant, ended: &anyhow::Result<String>) -> bool {
        let (result, detail) = match ended {
            Ok(detail) => ("ok", detail.clone()),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        let time = format!("{:.1} ms", start.elapsed().as_secs_f64() * 1000.0);
        // Writing to a String cannot fail.
        let _ = writeln!(self.table, "{name:<21} {result:<7} {time:>8}  {detail}");
        ended.is_ok()
    }

    async fn info(&self) -> anyhow::Result<String> {
        let call = IdentityClient::new(self.channel.clone())
            .get_plugin_info(GetPluginInfoRequest {})
            .await;
        let info = answer(call)?;
        Ok(format!("{} {}", info.name, info.vendor_version))
    }

    async fn capacity(&self) -> anyhow::Result<String> {
        let request = GetCapacityRequest {
            parameters: [("pool".to_owned(), self.pool.clone())].into(),
            ..GetCapacityRequest::default()
        };
        let room = answer(self.controller().get_capacity(request).await)?.available_capacity;
        ensure!(room < i64::MAX, "there is no pool {}", self.pool);
        let room = Bytes(room.try_into().unwrap_or_default());
        Ok(format!("pool {} has room for {room}", self.pool))
    }

    async fn create(&mut self) -> anyhow::Result<String> {
        let request = CreateVolumeRequest {
            name: self.volume.clone(),
            capacity_range: Some(CapacityRange {
                required_bytes: SIZE,
                limit_bytes: 0,
            }),
            volume_capabilities: vec![capability()],
            parameters: [("pool".to_owned(), self.pool.clone())].into(),
            ..CreateVolumeRequest::default()
        };
        let volume = answer(self.controller().create_volume(request).await)?.volume;
        let volume = volume.context("the answer has no volume")?;
        self.created = true;
        let size = Bytes(volume.capacity_bytes.try_into().unwrap_or_default());
        Ok(format!("{}, {size}", volume.volume_id))
    }

    async fn publish(&self) -> anyhow::Result<String> {
        let request = NodePublishVolumeRequest {
            volume_id: self.volume.clone(),
            target_path: self.target.display().to_string(),
            volume_capability: Some(capability()),
            ..NodePublishVolumeRequest::default()
        };
        answer(NodeClient::new(self.channel.clone()).node_publish_volume(request).await)?;
        // Without the mount, the next steps would write outside of the volume.
        ensure!(
            is_mount_point(&self.target)?,
            "hostdir has mounted the volume, but nothing is mounted at {} here; run the self-test where hostdir runs",
            self.target.display()
        );
        Ok(format!("at {}", self.target.display()))
    }

    async fn write(&self) -> anyhow::Result<String> {
        let file = self.file();
        timeout(TIMEOUT, spawn_blocking(move || write_durably(&file)))
            .await
            .context(HANGS)??
    }

    async fn read(&self) -> anyhow::Result<String> {
        let file = self.file();
        let read = timeout(TIMEOUT, spawn_blocking(move || std::fs::read_to_string(file))).await;
        let text = read
            .context(HANGS)??
            .with_context(|| format!("cannot read {}", self.file().display()))?;
        ensure!(text == CONTENT, "{CONTENT:?} was written, but {text:?} was read");
        Ok("what was written".to_owned())
    }

    async fn unpublish(&self) -> anyhow::Result<String> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: self.volume.clone(),
            target_path: self.target.display().to_string(),
        };
        answer(
            NodeClient::new(self.channel.clone())
                .node_unpublish_volume(request)
                .await,
        )?;
        ensure!(
            !self.target.exists(),
            "{} still exists after NodeUnpublishVolume",
            self.target.display()
        );
        Ok(String::new())
    }

    async fn delete(&self) -> anyhow::Result<String> {
        let request = DeleteVolumeRequest {
            volume_id: self.volume.clone(),
            ..DeleteVolumeRequest::default()
        };
        answer(self.controller().delete_volume(request).await)?;
        Ok(format!("{} is gone", self.volume))
    }

    /// Removes what it can after a failure; the table already says what is wrong.
    async fn clean_up(&mut self) {
        let _ = self.unpublish().await;
        let start = Instant::now();
        let deleted = self
            .delete()
            .await
            .map(|_| format!("nothing is left of {}", self.volume));
        self.note("clean up", start, &deleted);
    }

    fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    fn file(&self) -> PathBuf {
        self.target.join("file")
    }
}

/// Whether something is mounted exactly at `path`, as this process sees it (proc(5), mountinfo).
fn is_mount_point(path: &Path) -> anyhow::Result<bool> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    // mountinfo escapes spaces.
    let path = path.display().to_string().replace(' ', "\\040");
    Ok(table.lines().any(|line| line.split(' ').nth(4) == Some(path.as_str())))
}

fn write_durably(file: &Path) -> anyhow::Result<String> {
    let write = || {
        std::fs::write(file, CONTENT)?;
        std::fs::File::open(file)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", file.display()))?;
    Ok(format!("{} bytes, synced", CONTENT.len()))
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

/// The answer to a call; a refusal becomes an error in words.
fn answer<T>(call: Result<Response<T>, Status>) -> anyhow::Result<T> {
    match call {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::Unimplemented && status.message().is_empty() => {
            bail!("this hostdir does not serve the call; run the self-test in hostdir's pod on a node")
        }
        Err(status) => bail!("{} ({:?})", status.message(), status.code()),
    }
}
