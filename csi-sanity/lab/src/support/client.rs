//! A CSI client that blocks: one method per RPC, with the usual request filled in.

use std::collections::HashMap;
use std::path::Path;

use hostdir::csi::proto::controller_client::ControllerClient;
use hostdir::csi::proto::identity_client::IdentityClient;
use hostdir::csi::proto::node_client::NodeClient;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use hostdir::csi::proto::{
    CapacityRange, ControllerExpandVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest,
    GetPluginInfoRequest, ListVolumesRequest, NodeGetVolumeStatsRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, ProbeRequest, Volume, VolumeCapability, VolumeUsage,
};
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const GIB: i64 = 1 << 30;

/// A connection to a driver.
pub struct Client {
    runtime: Runtime,
    channel: Channel,
}

/// How to publish.
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

impl Client {
    /// A connection on which the driver has answered: the kernel alone accepts one before the driver is ready.
    pub fn connect(socket: &Path) -> Result<Self, Box<dyn std::error::Error>> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("start a runtime");
        let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?.timeout(super::DEADLINE);
        let channel = runtime.block_on(endpoint.connect())?;
        let client = Self { runtime, channel };
        client.wait(client.identity().get_plugin_info(GetPluginInfoRequest {}))?;
        Ok(client)
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

    /// Waits for the answer to a call.
    pub fn wait<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
        self.runtime.block_on(call).map(tonic::Response::into_inner)
    }

    pub fn probe(&self) -> Result<(), Status> {
        self.wait(self.identity().probe(ProbeRequest {})).map(drop)
    }

    pub fn create(&self, name: &str) -> Result<Volume, Status> {
        self.create_as(create_request(name))
    }

    pub fn create_as(&self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        self.wait(self.controller().create_volume(request))
            .map(|answer| answer.volume.expect("an answer has a volume"))
    }

    pub fn expand(&self, id: &str, required_bytes: i64) -> Result<i64, Status> {
        let request = ControllerExpandVolumeRequest {
            volume_id: id.to_owned(),
            capacity_range: Some(CapacityRange {
                required_bytes,
                limit_bytes: 0,
            }),
            ..ControllerExpandVolumeRequest::default()
        };
        self.wait(self.controller().controller_expand_volume(request))
            .map(|answer| answer.capacity_bytes)
    }

    pub fn delete(&self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        self.wait(self.controller().delete_volume(request)).map(drop)
    }

    pub fn publish(&self, id: &str, target: &Path) -> Result<(), Status> {
        self.publish_as(id, &target.to_string_lossy(), Mount::default())
    }

    pub fn publish_as(&self, id: &str, target: &str, mount: Mount) -> Result<(), Status> {
        let request = NodePublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
            volume_capability: Some(capability(mount.mode, &mount.flags)),
            readonly: mount.read_only,
            volume_context: mount.context,
            ..NodePublishVolumeRequest::default()
        };
        self.wait(self.node().node_publish_volume(request)).map(drop)
    }

    pub fn unpublish(&self, id: &str, target: &Path) -> Result<(), Status> {
        self.unpublish_at(id, &target.to_string_lossy())
    }

    pub fn unpublish_at(&self, id: &str, target: &str) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: target.to_owned(),
        };
        self.wait(self.node().node_unpublish_volume(request)).map(drop)
    }

    pub fn stats(&self, id: &str, path: &str) -> Result<Vec<VolumeUsage>, Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: id.to_owned(),
            volume_path: path.to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        self.wait(self.node().node_get_volume_stats(request))
            .map(|answer| answer.usage)
    }

    /// The capacity that a pool reports, which must be its largest volume, too.
    pub fn capacity(&self, pool: &str) -> i64 {
        let request = GetCapacityRequest {
            parameters: map(&[("pool", pool)]),
            ..GetCapacityRequest::default()
        };
        let answer = self.wait(self.controller().get_capacity(request)).expect("GetCapacity");
        assert_eq!(answer.maximum_volume_size, Some(answer.available_capacity));
        answer.available_capacity
    }

    /// The ids of all volumes, by pages of `page`.
    pub fn list(&self, page: i32) -> Vec<String> {
        let (mut ids, mut token) = (Vec::new(), String::new());
        loop {
            let request = ListVolumesRequest {
                max_entries: page,
                starting_token: token,
            };
            let answer = self.wait(self.controller().list_volumes(request)).expect("ListVolumes");
            ids.extend(
                answer
                    .entries
                    .into_iter()
                    .filter_map(|entry| Some(entry.volume?.volume_id)),
            );
            token = answer.next_token;
            if token.is_empty() {
                return ids;
            }
        }
    }
}

/// `request` for at least `required` and at most `limit` GiB; zero is no wish.
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
