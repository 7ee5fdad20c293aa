//! The CSI client of tests and benchmarks: one method per RPC, with the usual request filled in. [`Csi`] is asynchronous,
//! [`Client`] blocks.

use std::collections::HashMap;
use std::path::Path;

use hostdir::csi::proto::controller_client::ControllerClient;
use hostdir::csi::proto::identity_client::IdentityClient;
use hostdir::csi::proto::node_client::NodeClient;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use hostdir::csi::proto::{
    CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest,
    GetCapacityResponse, GetPluginInfoRequest, ListVolumesRequest, ListVolumesResponse, NodeGetVolumeStatsRequest,
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, Volume, VolumeCapability, VolumeUsage,
};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const GIB: i64 = 1 << 30;

/// A connection to a driver; clones share it.
#[derive(Clone)]
pub struct Csi {
    channel: Channel,
}

/// A connection to a driver, with blocking methods.
pub struct Client {
    runtime: Runtime,
    csi: Csi,
}

/// The options of NodePublishVolume.
#[derive(Clone, Debug)]
pub struct Mount {
    pub mode: Mode,
    pub read_only: bool,
    pub flags: Vec<&'static str>,
    pub context: HashMap<String, String>,
}

impl Default for Mount {
    fn default() -> Self {
        Self {
            mode: Mode::SingleNodeMultiWriter,
            read_only: false,
            flags: Vec::new(),
            context: HashMap::new(),
        }
    }
}

/// A mount capability.
pub fn capability(mode: Mode, flags: &[&str]) -> VolumeCapability {
    let mount_flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            mount_flags,
            ..MountVolume::default()
        })),
    }
}

/// A request for a volume of 1 MiB.
pub fn create_request(name: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes: 1 << 20,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability(Mode::SingleNodeMultiWriter, &[])],
        ..CreateVolumeRequest::default()
    }
}

pub fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
    entries
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

impl Csi {
    /// Connects, and waits for a first answer: the kernel accepts connections before the driver is ready.
    pub async fn connect(socket: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?.timeout(super::DEADLINE);
        let csi = Self {
            channel: endpoint.connect().await?,
        };
        csi.info().await?;
        Ok(csi)
    }

    pub fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel.clone())
    }

    pub fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel.clone())
    }

    pub fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    pub async fn info(&self) -> Result<(), Status> {
        self.identity().get_plugin_info(GetPluginInfoRequest {}).await.map(drop)
    }

    /// Whether the driver reports that it is ready.
    pub async fn probe(&self) -> Result<bool, Status> {
        let answer = self.identity().probe(ProbeRequest {}).await?.into_inner();
        Ok(answer.ready.unwrap_or(true))
    }

    pub async fn create(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let answer = self.controller().create_volume(request).await?.into_inner();
        Ok(answer.volume.expect("the answer has a volume"))
    }

    pub async fn expand(&self, id: &str, required_bytes: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes,
                limit_bytes: 0,
            }),
            ..ControllerExpandVolumeRequest::default()
        };
        let answer = self.controller().controller_expand_volume(request).await?;
        Ok(answer.into_inner().capacity_bytes)
    }

    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        self.controller().delete_volume(request).await.map(drop)
    }

    pub async fn publish(&self, id: &str, target: &str, mount: Mount) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
            volume_capability: Some(capability(mount.mode, &mount.flags)),
            readonly: mount.read_only,
            volume_context: mount.context,
            ..NodePublishVolumeRequest::default()
        };
        self.node().node_publish_volume(request).await.map(drop)
    }

    pub async fn unpublish(&self, id: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
        };
        self.node().node_unpublish_volume(request).await.map(drop)
    }

    pub async fn stats(&self, id: &str, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        let answer = self.node().node_get_volume_stats(request).await?;
        Ok(answer.into_inner().usage)
    }

    pub async fn capacity(&self, request: GetCapacityRequest) -> Result<GetCapacityResponse, Status> {
        let answer = self.controller().get_capacity(request).await?;
        Ok(answer.into_inner())
    }

    pub async fn list(&self, max_entries: i32, starting_token: String) -> Result<ListVolumesResponse, Status> {
        let request = ListVolumesRequest {
            max_entries,
            starting_token,
        };
        Ok(self.controller().list_volumes(request).await?.into_inner())
    }
}

impl Client {
    /// Connects, and waits for a first answer.
    pub fn connect(socket: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("start a runtime");
        let csi = runtime.block_on(Csi::connect(socket))?;
        Ok(Self { runtime, csi })
    }

    pub fn csi(&self) -> &Csi {
        &self.csi
    }

    pub fn identity(&self) -> IdentityClient<Channel> {
        self.csi.identity()
    }

    pub fn controller(&self) -> ControllerClient<Channel> {
        self.csi.controller()
    }

    pub fn node(&self) -> NodeClient<Channel> {
        self.csi.node()
    }

    /// Waits for the answer to a call.
    pub fn wait<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
        self.block_on(call).map(tonic::Response::into_inner)
    }

    /// Runs a future that uses this connection.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Begins a call, which has been sent when this returns.
    pub fn begin<T: Send + 'static>(&self, call: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        let call = self.runtime.spawn(call);
        self.block_on(async {
            tokio::task::yield_now().await;
            drop(self.csi().info().await);
        });
        call
    }

    pub fn probe(&self) -> Result<(), Status> {
        self.block_on(self.csi.probe()).map(drop)
    }

    pub fn is_ready(&self) -> bool {
        self.block_on(self.csi.probe()).unwrap_or(false)
    }

    pub fn create(&self, name: &str) -> Result<Volume, Status> {
        self.create_as(create_request(name))
    }

    pub fn create_as(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        self.block_on(self.csi.create(request))
    }

    pub fn expand(&self, id: &str, required_bytes: i64) -> Result<i64, Status> {
        self.block_on(self.csi.expand(id, required_bytes))
    }

    pub fn delete(&self, id: &str) -> Result<(), Status> {
        self.block_on(self.csi.delete(id))
    }

    pub fn publish(&self, id: &str, target: &Path) -> Result<(), Status> {
        self.publish_as(id, &target.to_string_lossy(), Mount::default())
    }

    pub fn publish_as(&self, id: &str, target: &str, mount: Mount) -> Result<(), Status> {
        self.block_on(self.csi.publish(id, target, mount))
    }

    pub fn unpublish(&self, id: &str, target: &Path) -> Result<(), Status> {
        self.unpublish_at(id, &target.to_string_lossy())
    }

    pub fn unpublish_at(&self, id: &str, target: &str) -> Result<(), Status> {
        self.block_on(self.csi.unpublish(id, target))
    }

    pub fn stats(&self, id: &str, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        self.block_on(self.csi.stats(id, path))
    }

    /// The available capacity of a pool. Checks that the maximum volume size is the same.
    pub fn capacity(&self, pool: &str) -> i64 {
        let request = GetCapacityRequest {
            parameters: map(&[("pool", pool)]),
            ..GetCapacityRequest::default()
        };
        let answer = self.block_on(self.csi.capacity(request)).expect("GetCapacity");
        assert_eq!(answer.maximum_volume_size, Some(answer.available_capacity));
        answer.available_capacity
    }

    /// The ids of all volumes, listed in pages of `page`.
    pub fn list(&self, page: i32) -> Vec<String> {
        let (mut ids, mut token) = (Vec::new(), String::new());
        loop {
            let answer = self.block_on(self.csi.list(page, token)).expect("ListVolumes");
            let volumes = answer.entries.into_iter().filter_map(|entry| entry.volume);
            ids.extend(volumes.map(|volume| volume.volume_id));
            token = answer.next_token;
            if token.is_empty() {
                return ids;
            }
        }
    }
}

/// `request` for at least `required` and at most `limit` GiB; zero means unset.
pub fn of_size(request: CreateVolumeRequest, required: i64, limit: i64) -> CreateVolumeRequest {
    let range = CapacityRange {
        required_bytes: required * GIB,
        limit_bytes: limit * GIB,
    };
    CreateVolumeRequest {
        capacity_range: Some(range),
        ..request
    }
}
