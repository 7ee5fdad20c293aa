//! CreateVolume, GetCapacity, ListVolumes, ValidateVolumeCapabilities and DeleteVolume.

use std::fs;

use hostdir::csi::proto::volume_capability::access_mode::Mode;
use hostdir::csi::proto::volume_capability::{AccessType, BlockVolume};
use hostdir::csi::proto::volume_content_source::{SnapshotSource, Type as Source};
use hostdir::csi::proto::{
    CreateVolumeRequest, GetCapacityRequest, ListVolumesRequest, Topology, TopologyRequirement,
    ValidateVolumeCapabilitiesRequest, VolumeContentSource,
};
use tonic::Code;

use hostdir_lab::client::{capability, create_request, map, of_size};
use hostdir_lab::scene::start;
use hostdir_lab::scratch::names;
use hostdir_lab::{Client, Driver, Process, Scratch, needs, wait_until};

const MIB: i64 = 1 << 20;

/// A driver with one pool on a filesystem of 256 MiB.
fn small() -> (Scratch, Process, Client) {
    let scratch = Scratch::new();
    let pool = scratch.tmpfs("disk", "256M").join("pool");
    let (process, client) = start(&Driver::new(&scratch).pool("default", &pool));
    (scratch, process, client)
}

/// A topology that only has `node`.
fn only_on(node: &str) -> TopologyRequirement {
    let segments = map(&[("topology.hostdir.csi/node", node)]);
    TopologyRequirement {
        requisite: vec![Topology { segments }],
        preferred: Vec::new(),
    }
}

/// Checks that CreateVolume fails with `code` and a message that contains `word`.
fn refused(client: &Client, request: CreateVolumeRequest, code: Code, word: &str) {
    let status = client.create_as(request).expect_err(word);
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(
        status.message().contains(word),
        "{word:?} is not in {:?}",
        status.message()
    );
}

#[needs(Root)]
fn creating_a_volume_twice_gives_one_volume() {
    let (_scratch, _process, client) = small();
    let first = client.create("pvc-1").unwrap();
    assert_eq!(client.create("pvc-1").unwrap(), first);
    assert_eq!(first.capacity_bytes, MIB);
    assert_eq!(client.list(0), ["pvc-1"]);
}

#[needs(Root)]
fn a_repeated_create_with_another_size_parameters_or_topology_is_refused() {
    let (_scratch, _process, client) = small();
    let request = || create_request("pvc-1");
    client.create_as(request()).unwrap();
    refused(
        &client,
        of_size(request(), 1, 0),
        Code::AlreadyExists,
        "another size (1 MiB)",
    );
    let parameters = |entries| CreateVolumeRequest {
        parameters: map(entries),
        ..request()
    };
    refused(
        &client,
        parameters(&[("mode", "0700")]),
        Code::AlreadyExists,
        "other parameters",
    );
    refused(
        &client,
        parameters(&[("pool", "other")]),
        Code::AlreadyExists,
        "other parameters",
    );
    let there = CreateVolumeRequest {
        accessibility_requirements: Some(only_on("node-b")),
        ..request()
    };
    refused(&client, there, Code::AlreadyExists, "another topology");
    let here = CreateVolumeRequest {
        accessibility_requirements: Some(only_on("node-a")),
        ..request()
    };
    client.create_as(here).unwrap();
}

#[needs(Root)]
fn a_create_that_this_node_cannot_serve_gets_resource_exhausted() {
    let (scratch, _process, client) = small();
    let request = || create_request("pvc-1");
    let there = CreateVolumeRequest {
        accessibility_requirements: Some(only_on("node-b")),
        ..request()
    };
    refused(&client, there, Code::ResourceExhausted, "does not include this node");
    let other_pool = CreateVolumeRequest {
        parameters: map(&[("pool", "fast")]),
        ..request()
    };
    refused(&client, other_pool, Code::ResourceExhausted, "it has: default");
    refused(
        &client,
        of_size(request(), 1, 0),
        Code::ResourceExhausted,
        "1 GiB do not fit in pool default",
    );
    assert_eq!(names(scratch.path("disk/pool/volumes")), [""; 0]);
}

#[needs(Root)]
fn a_create_that_no_node_can_serve_is_refused_with_the_reason() {
    let (_scratch, _process, client) = small();
    let request = || create_request("pvc-1");
    let with = |capability| CreateVolumeRequest {
        volume_capabilities: vec![capability],
        ..request()
    };
    let block = AccessType::Block(BlockVolume {});
    let block = hostdir::csi::proto::VolumeCapability {
        access_type: Some(block),
        ..capability(Mode::SingleNodeWriter, &[])
    };
    refused(
        &client,
        with(block),
        Code::InvalidArgument,
        "block volumes are not supported",
    );
    refused(
        &client,
        with(capability(Mode::MultiNodeMultiWriter, &[])),
        Code::InvalidArgument,
        "lives on one node",
    );
    refused(
        &client,
        with(capability(Mode::SingleNodeWriter, &["suid"])),
        Code::InvalidArgument,
        "suid",
    );
    let snapshot = Source::Snapshot(SnapshotSource {
        snapshot_id: "s".into(),
    });
    let copy = CreateVolumeRequest {
        volume_content_source: Some(VolumeContentSource { r#type: Some(snapshot) }),
        ..request()
    };
    refused(
        &client,
        copy,
        Code::InvalidArgument,
        "snapshots and clones are not supported",
    );
    let attributes = CreateVolumeRequest {
        mutable_parameters: map(&[("iops", "1")]),
        ..request()
    };
    refused(&client, attributes, Code::InvalidArgument, "VolumeAttributesClasses");
    let unknown = CreateVolumeRequest {
        parameters: map(&[("poool", "x")]),
        ..request()
    };
    refused(&client, unknown, Code::InvalidArgument, "poool");
    refused(&client, of_size(request(), 2, 1), Code::OutOfRange, "no size");
}

#[needs(Root)]
fn concurrent_creates_never_allocate_more_than_the_room() {
    let (scratch, mut process, client) = small();
    let clients: Vec<Client> = (0..8).map(|_| process.connect()).collect();
    let made: usize = std::thread::scope(|scope| {
        let callers = clients.iter().enumerate().map(|(number, client)| {
            let request = CreateVolumeRequest {
                capacity_range: Some(hostdir::csi::proto::CapacityRange {
                    required_bytes: 100 * MIB,
                    limit_bytes: 0,
                }),
                ..create_request(&format!("pvc-{number}"))
            };
            scope.spawn(move || match client.create_as(request) {
                Ok(_) => 1,
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    0
                }
            })
        });
        let callers: Vec<_> = callers.collect();
        callers.into_iter().map(|caller| caller.join().expect("no panic")).sum()
    });
    assert_eq!(made, 2, "256 MiB hold two volumes of 100 MiB");
    assert_eq!(names(scratch.path("disk/pool/volumes")).len(), 2);
    assert!(client.capacity("default") < 100 * MIB);
}

#[needs(Root)]
fn capacity_is_the_largest_volume_that_can_be_created() {
    let (scratch, process, client) = small();
    let empty = client.capacity("default");
    assert!((192 * MIB..=256 * MIB).contains(&empty), "{empty}");
    let request = |mib| CreateVolumeRequest {
        capacity_range: Some(hostdir::csi::proto::CapacityRange {
            required_bytes: mib * MIB,
            limit_bytes: 0,
        }),
        ..create_request("pvc-1")
    };
    client.create_as(request(150)).unwrap();
    assert_eq!(client.capacity("default"), 256 * MIB - 150 * MIB);
    drop(process);
    let (process, client) = start(&Driver::new(&scratch).pool("default", &scratch.path("disk/pool")));
    assert_eq!(
        client.capacity("default"),
        256 * MIB - 150 * MIB,
        "the restart forgot pvc-1"
    );
    client.delete("pvc-1").unwrap();
    assert_eq!(client.capacity("default"), empty);

    fs::write(scratch.path("disk/somebody-elses"), vec![1; 128 << 20]).unwrap();
    wait_until("space that others use is no room", || {
        client.capacity("default") <= 128 * MIB
    });
    refused(&client, request(129), Code::ResourceExhausted, "do not fit");
    // A request that no node can serve must reach CreateVolume, which says why. The scheduler would stop it if there were no
    // capacity.
    assert_eq!(client.capacity("no-such-pool"), i64::MAX);
    let request = GetCapacityRequest {
        parameters: map(&[("poool", "x")]),
        ..GetCapacityRequest::default()
    };
    let wrong = client.wait(client.controller().get_capacity(request)).unwrap();
    assert_eq!(wrong.available_capacity, i64::MAX);
    let request = GetCapacityRequest {
        accessible_topology: Some(Topology {
            segments: map(&[("topology.hostdir.csi/node", "node-b")]),
        }),
        ..GetCapacityRequest::default()
    };
    let elsewhere = client.wait(client.controller().get_capacity(request)).unwrap();
    assert_eq!(elsewhere.available_capacity, 0);
    drop(process);
}

#[needs(Root)]
fn reserve_and_overcommit_limit_what_is_allocated() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "256M");
    let config = format!(
        "pools:\n- {{name: kept, path: {0}/kept, reserve: 25%}}\n- {{name: thin, path: {0}/thin, overcommit: 4}}\n",
        disk.display()
    );
    fs::write(scratch.path("config.yaml"), config).unwrap();
    let driver = Driver::new(&scratch)
        .arg("--config")
        .arg(scratch.path("config.yaml").display().to_string());
    let (_process, client) = start(&driver);
    assert!(client.capacity("kept") <= 192 * MIB && client.capacity("kept") > 64 * MIB);
    assert!(client.capacity("thin") > 900 * MIB);
}

#[needs(Root)]
fn lists_come_in_pages_and_invalid_tokens_are_refused() {
    let (_scratch, _process, client) = small();
    let ids: Vec<String> = (0..7).map(|number| format!("pvc-{number}")).collect();
    for id in &ids {
        client.create(id).unwrap();
    }
    for page in [0, 1, 3, 7, 8] {
        assert_eq!(client.list(page), ids, "in pages of {page}");
    }
    for token in ["pvc-1", "after:", "after:../x", "7"] {
        let request = ListVolumesRequest {
            max_entries: 1,
            starting_token: token.into(),
        };
        let status = client.wait(client.controller().list_volumes(request)).unwrap_err();
        assert_eq!(status.code(), Code::Aborted);
    }
    let request = ListVolumesRequest {
        max_entries: -1,
        starting_token: String::new(),
    };
    assert_eq!(
        client
            .wait(client.controller().list_volumes(request))
            .unwrap_err()
            .code(),
        Code::InvalidArgument
    );
    // A volume deleted between two pages does not break the token that names it.
    client.delete("pvc-3").unwrap();
    let request = ListVolumesRequest {
        max_entries: 1,
        starting_token: "after:pvc-3".into(),
    };
    let page = client.wait(client.controller().list_volumes(request)).unwrap();
    assert_eq!(page.entries[0].volume.as_ref().unwrap().volume_id, "pvc-4");
}

#[needs(Root)]
fn capabilities_are_confirmed_or_refused_with_the_reason() {
    let (_scratch, _process, client) = small();
    client.create("pvc-1").unwrap();
    let validate = |mode, parameters| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: "pvc-1".into(),
            volume_capabilities: vec![capability(mode, &[])],
            parameters,
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        let mut controller = client.controller();
        client.wait(controller.validate_volume_capabilities(request)).unwrap()
    };
    assert!(validate(Mode::SingleNodeSingleWriter, map(&[])).confirmed.is_some());
    let refusal = validate(Mode::MultiNodeMultiWriter, map(&[]));
    assert!(
        refusal.confirmed.is_none() && refusal.message.contains("one node"),
        "{refusal:?}"
    );
    assert!(
        validate(Mode::SingleNodeWriter, map(&[("mode", "0700")]))
            .confirmed
            .is_none()
    );
}

#[needs(Root)]
fn the_record_of_a_volume_names_its_claim() {
    let (scratch, _process, client) = small();
    let parameters = map(&[
        ("csi.storage.k8s.io/pvc/name", "data"),
        ("csi.storage.k8s.io/pvc/namespace", "shop"),
    ]);
    client
        .create_as(CreateVolumeRequest {
            parameters,
            ..create_request("pvc-1")
        })
        .unwrap();
    let record = fs::read(scratch.path("disk/pool/volumes/pvc-1/volume.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    assert_eq!(
        record["claim"],
        serde_json::json!({"namespace": "shop", "name": "data"})
    );
    assert_eq!(record["phase"], "claimed");
    assert_eq!(record["bytes"], MIB);
}

#[needs(Root)]
fn a_volume_recreated_under_the_same_name_is_empty() {
    let (scratch, _process, client) = small();
    let target = scratch.mkdir("pods").join("target");
    for _ in 0..3 {
        client.create("pvc-1").unwrap();
        client.publish("pvc-1", &target).unwrap();
        assert_eq!(names(&target), [""; 0]);
        fs::write(target.join("secret"), "x").unwrap();
        client.unpublish("pvc-1", &target).unwrap();
        client.delete("pvc-1").unwrap();
    }
    wait_until("the trash is empty", || {
        names(scratch.path("disk/pool/trash")).is_empty()
    });
}

#[needs(Root)]
fn space_that_others_free_becomes_room() {
    let scratch = Scratch::new();
    let disk = scratch.tmpfs("disk", "256M");
    fs::write(disk.join("junk"), vec![1; 100 << 20]).unwrap();
    let (_process, client) = start(&Driver::new(&scratch).pool("default", &disk.join("pool")));
    let before = client.capacity("default");
    assert!(before <= 156 * MIB, "{before}");
    fs::remove_file(disk.join("junk")).unwrap();
    wait_until("the room grows", || client.capacity("default") > 250 * MIB);
}
