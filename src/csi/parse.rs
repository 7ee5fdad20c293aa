//! Parses the fields of requests. Every refusal names the field and says what would be accepted.

use std::collections::HashMap;
use std::fmt::Display;

use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, MapDeserializer};
use serde::{Deserialize, Deserializer};
use tonic::Status;

use super::TOPOLOGY_KEY;
use super::proto::volume_capability::AccessType;
use super::proto::volume_capability::access_mode::Mode;
use super::proto::{CapacityRange, Topology, TopologyRequirement, VolumeCapability};
use crate::volume::access::{AccessMode, MountOptions, TargetPath};
use crate::volume::error::subject;
use crate::volume::id::{NodeName, PoolName, VolumeId};
use crate::volume::record::{Claim, Directory};
use crate::volume::size::{Bytes, SizeRange};
use crate::volume::{self, Parameters};

/// Longest string field, in bytes (CSI, "Size Limits").
const STRING_MAX: usize = 128;

/// Longest map field, keys and values together, in bytes (CSI, "Size Limits").
const MAP_MAX: usize = 4096;

/// Keys that external-provisioner adds (`--extra-create-metadata`).
const METADATA: &str = "csi.storage.k8s.io/";

fn invalid(why: impl Into<String>) -> Status {
    Status::invalid_argument(why)
}

/// Returns a function that prefixes a refusal with the volume, and with the node if it is known.
pub(super) fn about(volume: impl Display, node: Option<&NodeName>) -> impl Fn(Status) -> Status {
    let subject = subject(Some(&volume), node);
    move |status| Status::new(status.code(), format!("{subject}{}", status.message()))
}

/// CreateVolume's `name`: any Unicode but control characters, 1 to 128 bytes.
pub(super) fn name(name: String) -> Result<String, Status> {
    if name.is_empty() {
        Err(invalid("name is missing"))
    } else if name.len() > STRING_MAX {
        Err(invalid(format!(
            "name is {} bytes long, CSI allows {STRING_MAX}",
            name.len()
        )))
    } else if name.chars().any(char::is_control) {
        Err(invalid(format!(
            "name {name:?} contains control characters, which CSI forbids"
        )))
    } else {
        Ok(name)
    }
}

/// A `volume_id` that hostdir can have returned.
pub(super) fn volume_id(id: &str) -> Result<VolumeId, Status> {
    if id.is_empty() {
        return Err(invalid("volume_id is missing"));
    }
    VolumeId::parse(id).map_err(|why| invalid(format!("{why}; hostdir never returns such an id")))
}

/// A `target_path`.
pub(super) fn target(path: String) -> Result<TargetPath, Status> {
    if path.is_empty() {
        return Err(invalid("target_path is missing"));
    }
    TargetPath::parse(path).map_err(|why| invalid(why.to_string()))
}

pub(super) fn size(range: Option<CapacityRange>) -> Result<SizeRange, Status> {
    let CapacityRange {
        required_bytes,
        limit_bytes,
    } = range.unwrap_or_default();
    let bytes = |field, value: i64| {
        u64::try_from(value)
            .map(Bytes)
            .map_err(|_| invalid(format!("capacity_range.{field} is negative: {value}")))
    };
    let required = bytes("required_bytes", required_bytes)?;
    let limit = bytes("limit_bytes", limit_bytes)?;
    Ok(SizeRange {
        required,
        limit: (limit != Bytes(0)).then_some(limit),
    })
}

/// How a volume is to be used. `filesystem` returns the filesystem type of the pool, if it is known.
pub(super) fn capability(
    capability: VolumeCapability,
    filesystem: impl Fn() -> Option<String>,
) -> Result<(AccessMode, MountOptions), Status> {
    let VolumeCapability {
        access_mode,
        access_type,
    } = capability;
    let options = match access_type {
        None => return Err(invalid("volume_capability has no access type; hostdir supports mount")),
        Some(AccessType::Block(_)) => {
            return Err(invalid(
                "block volumes are not supported: a hostdir volume is a directory; use volumeMode Filesystem",
            ));
        }
        Some(AccessType::Mount(mount)) => {
            filesystem_type(&mount.fs_type, filesystem)?;
            // Mount flags may be sensitive (CSI marks them so), but a refused one is named: it is not a flag that hostdir
            // knows.
            MountOptions::parse(mount.mount_flags.iter().map(String::as_str)).map_err(|why| invalid(why.to_string()))?
        }
    };
    let mode = access_mode.map(|mode| mode.mode()).unwrap_or_default();
    Ok((access_mode_of(mode)?, options))
}

/// A directory has the filesystem type of its pool; no other type can be requested.
fn filesystem_type(wanted: &str, filesystem: impl Fn() -> Option<String>) -> Result<(), Status> {
    if wanted.is_empty() {
        return Ok(());
    }
    match filesystem() {
        Some(has) if has != wanted => Err(invalid(format!(
            "filesystem type {wanted:?} is not available: the volume is a directory on the pool's {has}; leave fsType out"
        ))),
        Some(_) | None => Ok(()),
    }
}

fn access_mode_of(mode: Mode) -> Result<AccessMode, Status> {
    match mode {
        Mode::SingleNodeWriter => Ok(AccessMode::SingleNodeWriter),
        Mode::SingleNodeReaderOnly => Ok(AccessMode::SingleNodeReaderOnly),
        Mode::SingleNodeSingleWriter => Ok(AccessMode::SingleNodeSingleWriter),
        Mode::SingleNodeMultiWriter => Ok(AccessMode::SingleNodeMultiWriter),
        Mode::Unknown => Err(invalid("volume_capability has no access mode")),
        Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => Err(invalid(format!(
            "access mode {} is not supported: a hostdir volume lives on one node; use ReadWriteOnce or ReadWriteOncePod",
            mode.as_str_name()
        ))),
    }
}

/// All capabilities of a request.
pub(super) fn capabilities(list: Vec<VolumeCapability>, filesystem: impl Fn() -> Option<String>) -> Result<(), Status> {
    list.into_iter()
        .try_for_each(|one| capability(one, &filesystem).map(drop))
}

/// The StorageClass parameters that hostdir knows.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StorageClass {
    #[serde(default, deserialize_with = "some")]
    pool: Option<String>,
    #[serde(default, deserialize_with = "some")]
    mode: Option<String>,
    #[serde(default, deserialize_with = "some")]
    uid: Option<String>,
    #[serde(default, deserialize_with = "some")]
    gid: Option<String>,
}

/// Values in the map are strings; a key that is present has a value.
fn some<'de, D: Deserializer<'de>>(value: D) -> Result<Option<String>, D::Error> {
    String::deserialize(value).map(Some)
}

/// StorageClass parameters, and the claim that external-provisioner may have added to them.
pub(super) fn parameters(map: HashMap<String, String>) -> Result<(Parameters, Option<Claim>), Status> {
    let size: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if size > MAP_MAX {
        return Err(invalid(format!(
            "parameters are {size} bytes long, CSI allows {MAP_MAX}"
        )));
    }
    let (mut metadata, ours): (HashMap<_, _>, HashMap<_, _>) =
        map.into_iter().partition(|(key, _)| key.starts_with(METADATA));
    let entries: MapDeserializer<'_, _, ValueError> = ours.into_deserializer();
    let StorageClass { pool, mode, uid, gid } =
        StorageClass::deserialize(entries).map_err(|why| invalid(format!("StorageClass parameters: {why}")))?;
    let mut metadata = |key: &str| metadata.remove(&format!("{METADATA}{key}"));
    let claim = metadata("pvc/namespace")
        .zip(metadata("pvc/name"))
        .map(|(namespace, name)| Claim { namespace, name });
    Ok((
        Parameters {
            pool: pool_name(pool)?,
            directory: directory(mode, uid, gid)?,
        },
        claim,
    ))
}

fn pool_name(pool: Option<String>) -> Result<PoolName, Status> {
    pool.map_or_else(
        || Ok(PoolName::default()),
        |pool| PoolName::parse(&pool).map_err(|why| invalid(format!("StorageClass parameter pool: {why}"))),
    )
}

fn directory(mode: Option<String>, uid: Option<String>, gid: Option<String>) -> Result<Directory, Status> {
    let default = Directory::default();
    let id = |key, value: Option<String>, default| match value {
        None => Ok(default),
        // To chown(2), the largest number means "do not change".
        Some(text) => text.parse().ok().filter(|id| *id != u32::MAX).ok_or_else(|| {
            invalid(format!(
                "StorageClass parameter {key}: {text:?} is not a numeric id below {}",
                u32::MAX
            ))
        }),
    };
    let mode = match mode {
        None => default.mode,
        Some(text) => u32::from_str_radix(&text, 8)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| {
                invalid(format!(
                    "StorageClass parameter mode: {text:?} is not an octal mode such as \"0770\""
                ))
            })?,
    };
    Ok(Directory {
        mode,
        uid: id("uid", uid, default.uid)?,
        gid: id("gid", gid, default.gid)?,
    })
}

/// Where a volume may be. Without a requirement, anywhere (CSI: the plugin may choose).
pub(super) fn topology(requirement: Option<TopologyRequirement>) -> volume::Topology {
    let TopologyRequirement { requisite, preferred } = requirement.unwrap_or_default();
    let choice = if requisite.is_empty() { &preferred } else { &requisite };
    let anywhere = choice.is_empty() || choice.iter().any(|topology| topology.segments.is_empty());
    volume::Topology {
        // A topology with other keys names no node of hostdir.
        requisite: (!anywhere).then(|| choice.iter().filter_map(segment).collect()),
        preferred: preferred.iter().filter_map(segment).collect(),
    }
}

/// The value that names the node in a topology; `None` if the topology has any other key.
pub(super) fn segment(topology: &Topology) -> Option<String> {
    // CSI: keys are case-insensitive.
    let mut segments = topology.segments.iter();
    let (key, value) = segments.next()?;
    (key.eq_ignore_ascii_case(TOPOLOGY_KEY) && segments.next().is_none()).then(|| value.clone())
}

/// The topology that names this node.
pub(super) fn here(node: &NodeName) -> Topology {
    Topology {
        segments: HashMap::from([(TOPOLOGY_KEY.to_owned(), node.segment())]),
    }
}

#[cfg(test)]
mod tests {
    use super::super::proto::volume_capability::{AccessMode as ProtoMode, BlockVolume, MountVolume};
    use super::*;
    use proptest::prelude::*;
    use tonic::Code;

    fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
        entries
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn mount(mode: Mode, fs_type: &str, flags: &[&str]) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(ProtoMode { mode: mode.into() }),
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: fs_type.to_owned(),
                mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
                ..MountVolume::default()
            })),
        }
    }

    #[test]
    fn parameters_are_read() {
        let (parameters, claim) = parameters(map(&[
            ("pool", "fast"),
            ("mode", "2775"),
            ("uid", "1000"),
            ("csi.storage.k8s.io/pvc/name", "data"),
            ("csi.storage.k8s.io/pvc/namespace", "shop"),
            ("csi.storage.k8s.io/pv/name", "pvc-1"),
        ]))
        .unwrap();
        assert_eq!(parameters.pool.as_str(), "fast");
        assert_eq!(
            parameters.directory,
            Directory {
                mode: 0o2775,
                uid: 1000,
                gid: 0
            }
        );
        assert_eq!(
            claim,
            Some(Claim {
                namespace: "shop".into(),
                name: "data".into()
            })
        );
        assert_eq!(
            super::parameters(HashMap::new()).unwrap(),
            (Parameters::default(), None)
        );
    }

    #[test]
    fn wrong_parameters_are_refused_by_name() {
        for (key, value) in [
            ("pol", "fast"),
            ("Pool", "fast"),
            ("path", "/etc"),
            ("pool", "../etc"),
            ("pool", ""),
            ("mode", "rwx"),
            ("mode", "10000"),
            ("mode", "-1"),
            ("uid", "root"),
            ("gid", "4294967295"),
        ] {
            let status = parameters(map(&[(key, value)])).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(key), "{key}={value}: {}", status.message());
        }
        assert!(parameters(map(&[("pool", &"x".repeat(5000))])).is_err());
    }

    #[test]
    fn what_a_directory_on_one_node_cannot_do_is_refused_in_words() {
        let block = VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            ..mount(Mode::SingleNodeWriter, "", &[])
        };
        let cases = [
            (block, "block"),
            (mount(Mode::MultiNodeMultiWriter, "", &[]), "one node"),
            (mount(Mode::MultiNodeReaderOnly, "", &[]), "one node"),
            (mount(Mode::Unknown, "", &[]), "access mode"),
            (mount(Mode::SingleNodeWriter, "xfs", &[]), "fsType"),
            (mount(Mode::SingleNodeWriter, "", &["suid"]), "suid"),
            (VolumeCapability::default(), "access type"),
        ];
        for (wanted, word) in cases {
            let status = capability(wanted, || Some("ext4".into())).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(word), "{}", status.message());
        }
        let read_only = mount(Mode::SingleNodeWriter, "ext4", &["ro"]);
        let (_, options) = capability(read_only, || Some("ext4".into())).unwrap();
        assert!(options.read_only);
    }

    #[test]
    fn topologies_that_name_this_node_are_admitted() {
        let node = NodeName::parse("node-a").unwrap();
        let of = |name: &str| here(&NodeName::parse(name).unwrap());
        let requirement = |requisite, preferred| Some(TopologyRequirement { requisite, preferred });
        let admits = |requirement| topology(requirement).admits(&node);
        assert!(admits(None));
        assert!(admits(requirement(vec![], vec![])));
        assert!(admits(requirement(vec![Topology::default()], vec![])));
        assert!(admits(requirement(
            vec![of("node-b"), of("node-a")],
            vec![of("node-b")]
        )));
        assert!(admits(requirement(vec![], vec![of("node-a")])));
        assert!(!admits(requirement(vec![of("node-b")], vec![])));
        assert!(!admits(requirement(
            vec![Topology {
                segments: map(&[("zone", "node-a")])
            }],
            vec![]
        )));
    }

    #[test]
    fn sizes_are_never_negative() {
        let size_of = |required_bytes, limit_bytes| {
            size(Some(CapacityRange {
                required_bytes,
                limit_bytes,
            }))
        };
        assert!(size_of(-1, 0).is_err());
        assert!(size_of(0, i64::MIN).is_err());
        assert_eq!(
            size_of(5, 0).unwrap(),
            SizeRange {
                required: Bytes(5),
                limit: None
            }
        );
        assert_eq!(size(None).unwrap().choose(), Some(SizeRange::DEFAULT));
    }

    proptest! {
        #[test]
        fn no_input_panics(text in any::<String>(), key in ".{0,10}", value in ".{0,10}") {
            let _ = name(text.clone());
            let _ = volume_id(&text);
            let _ = target(text.clone());
            let _ = parameters(HashMap::from([(key, value), ("mode".to_owned(), text.clone())]));
            let _ = parameters(HashMap::from([("uid".to_owned(), text)]));
        }

        #[test]
        fn a_key_we_do_not_know_is_refused(key in "[a-zA-Z/.]{1,20}") {
            prop_assume!(!["pool", "mode", "uid", "gid"].contains(&key.as_str()) && !key.starts_with(METADATA));
            prop_assert!(parameters(HashMap::from([(key, "1".to_owned())])).is_err());
        }
    }
}
