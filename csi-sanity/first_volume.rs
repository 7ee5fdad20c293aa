//! A client that takes one volume through its life, and says what it does: what a cluster does for a PVC, in 80 lines.
//!
//! ```text
//! cargo run --release -- local --endpoint unix:///tmp/hostdir.sock --pool default=/tmp/hostdir    # as root, and then
//! cargo run --release --example first-volume -- unix:///tmp/hostdir.sock
//! ```

use std::path::Path;

use hostdir::csi::proto::controller_client::ControllerClient;
use hostdir::csi::proto::node_client::NodeClient;
use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::volume_capability::{AccessMode, AccessType, MountVolume};
use hostdir::csi::proto::{
    CapacityRange, CreateVolumeRequest, DeleteVolumeRequest, GetCapacityRequest, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest, VolumeCapability,
};
use tonic::transport::{Channel, Endpoint};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let endpoint = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "unix:///tmp/hostdir.sock".to_owned());
    let channel = Endpoint::try_from(endpoint)?.connect().await?;
    let pods = tempfile::tempdir()?;
    let target = pods.path().join("data");
    let mut controller = ControllerClient::new(channel.clone());

    let room = controller
        .get_capacity(GetCapacityRequest::default())
        .await?
        .into_inner();
    println!(
        "GetCapacity          {} MiB can be promised",
        room.available_capacity >> 20
    );

    let request = CreateVolumeRequest {
        name: "first-volume".into(),
        capacity_range: Some(CapacityRange {
            required_bytes: 64 << 20,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability()],
        ..CreateVolumeRequest::default()
    };
    let volume = controller
        .create_volume(request)
        .await?
        .into_inner()
        .volume
        .unwrap_or_default();
    println!(
        "CreateVolume         {} of {} MiB",
        volume.volume_id,
        volume.capacity_bytes >> 20
    );

    publish(&channel, &volume.volume_id, &target).await?;
    std::fs::write(target.join("hello"), "from a pod\n")?;
    println!(
        "a pod writes         hello: {:?}",
        std::fs::read_to_string(target.join("hello"))?
    );
    unpublish(&channel, &volume.volume_id, &target).await?;

    publish(&channel, &volume.volume_id, &target).await?;
    println!(
        "the next pod reads   hello: {:?}",
        std::fs::read_to_string(target.join("hello"))?
    );
    unpublish(&channel, &volume.volume_id, &target).await?;

    let request = DeleteVolumeRequest {
        volume_id: volume.volume_id.clone(),
        ..DeleteVolumeRequest::default()
    };
    controller.delete_volume(request).await?;
    println!("DeleteVolume         {} is gone", volume.volume_id);
    Ok(())
}

async fn publish(channel: &Channel, volume: &str, target: &Path) -> anyhow::Result<()> {
    let request = NodePublishVolumeRequest {
        volume_id: volume.to_owned(),
        target_path: target.display().to_string(),
        volume_capability: Some(capability()),
        ..NodePublishVolumeRequest::default()
    };
    NodeClient::new(channel.clone()).node_publish_volume(request).await?;
    println!("NodePublishVolume    at {}", target.display());
    Ok(())
}

async fn unpublish(channel: &Channel, volume: &str, target: &Path) -> anyhow::Result<()> {
    let request = NodeUnpublishVolumeRequest {
        volume_id: volume.to_owned(),
        target_path: target.display().to_string(),
    };
    NodeClient::new(channel.clone()).node_unpublish_volume(request).await?;
    println!("NodeUnpublishVolume  from {}", target.display());
    Ok(())
}

fn capability() -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode {
            mode: Mode::SingleNodeMultiWriter.into(),
        }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}
