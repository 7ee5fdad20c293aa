//! The command line and the configuration file, read and checked once at start.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;

use crate::csi::{DRIVER_NAME, Endpoint};
use crate::leader::identity;
use crate::volume::disk::PoolConfig;
use crate::volume::id::{NodeName, PoolName};
use crate::volume::quota::{QuotaConfig, QuotaPolicy};
use crate::volume::record::PoolId;
use crate::volume::room::{Limits, OVERCOMMIT_MAX, Reserve};

/// A CSI driver that turns directories on a node's own disks into Kubernetes volumes.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// What to run.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve CSI Identity, Controller and Node for this node's pools, with all records kept on the pools themselves.
    Local(NodeArgs),
    /// Serve CSI Identity and Node for this node's pools, and carry out what its HostVolumes in the API server ask for.
    Node(NodeArgs),
    /// Serve CSI Identity and Controller for all nodes: record volumes as HostVolumes in the API server.
    Controller(ControllerArgs),
    /// Print the CustomResourceDefinitions of HostVolume and HostNode.
    Crds,
    /// Ask a running hostdir whether it answers; for liveness and readiness probes.
    Probe(ProbeArgs),
    /// Take a volume of a pool through its life over the socket of a running hostdir: create, publish, write, read, delete.
    Selftest(SelftestArgs),
    /// Print which controller leads in elected mode, whether it may lead, and which controllers stand by.
    Leader(LeaderArgs),
}

/// Options of every command that serves.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArgs {
    /// The socket to serve on: unix:///path/to.sock
    #[arg(long, env = "CSI_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Endpoint,

    /// The name that the driver is registered under; two names let two hostdirs run in one cluster
    #[arg(long, env = "DRIVER_NAME", value_name = "NAME", default_value = DRIVER_NAME)]
    pub(crate) driver_name: String,

    /// Serve /healthz, /readyz and /metrics at this address, such as `[::]:9808`: with IPv4 and IPv6, as far as the machine has them
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) http_endpoint: Option<SocketAddr>,

    /// The least severe level to log: error, warn, info, debug, trace
    #[arg(long, env = "HOSTDIR_LOG", value_name = "LEVEL", default_value = "info")]
    pub(crate) log_level: tracing::Level,

    /// The format of the log, which goes to standard error
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub(crate) log_format: LogFormat,
}

/// The command line of `hostdir controller`.
#[derive(Debug, Args)]
pub(crate) struct ControllerArgs {
    /// Options of every command that serves.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,

    /// The name of this pod, for events; the host name if left out
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub(crate) pod_name: Option<String>,

    /// A sidecar of this pod: the Lease that it is elected by, and the address where it serves /healthz, such as
    /// hostdir-csi=127.0.0.1:9809. This controller then watches that election. May be repeated
    #[arg(long = "sidecar", value_name = "LEASE=ADDRESS", requires = "namespace")]
    pub(crate) sidecars: Vec<SidecarArg>,

    /// The namespace of this pod
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME")]
    pub(crate) namespace: Option<String>,

    /// The label selector of the pods of `hostdir node` in this pod's namespace. A volume that may go to any node then goes only where
    /// such a pod is Ready
    #[arg(long, env = "NODE_PODS", value_name = "SELECTOR", requires = "namespace")]
    pub(crate) node_pods: Option<String>,

    /// Seconds that a Node object must be gone before deletes stop waiting for that node
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) node_grace: u64,

    /// Seconds after which a volume is deleted if it was never used and has neither a PersistentVolume nor a claim
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) unused_age: u64,
}

/// `LEASE=ADDRESS`.
#[derive(Clone, Debug)]
pub(crate) struct SidecarArg {
    /// The Lease that the sidecar is elected by.
    pub(crate) lease: String,
    /// Where the sidecar serves HTTP.
    pub(crate) address: SocketAddr,
}

impl FromStr for SidecarArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (lease, address) = text
            .split_once('=')
            .context("write LEASE=ADDRESS, such as hostdir-csi=127.0.0.1:9809")?;
        Ok(Self {
            lease: lease.to_owned(),
            address: address.parse().with_context(|| format!("address {address}"))?,
        })
    }
}

/// The command line of `hostdir selftest`.
#[derive(Clone, Debug, Args)]
pub(crate) struct SelftestArgs {
    /// The socket that hostdir serves: unix:///path/to.sock
    #[arg(long, env = "CSI_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Endpoint,

    /// The pool to test; may be repeated
    #[arg(long = "pool", value_name = "NAME", value_parser = PoolName::parse, default_value = PoolName::DEFAULT)]
    pub(crate) pools: Vec<PoolName>,
}

/// The command line of `hostdir leader`.
#[derive(Debug, Args)]
pub(crate) struct LeaderArgs {
    /// The namespace of the controllers
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME", default_value = "hostdir-system")]
    pub(crate) namespace: String,

    /// The name that the driver is registered under
    #[arg(long, env = "DRIVER_NAME", value_name = "NAME", default_value = DRIVER_NAME)]
    pub(crate) driver_name: String,
}

impl LeaderArgs {
    /// The Leases that this driver's sidecars are elected by: external-provisioner's and external-resizer's.
    pub(crate) fn leases(&self) -> [String; 2] {
        let name = identity(&self.driver_name);
        [name.clone(), format!("external-resizer-{name}")]
    }
}

/// The command line of `hostdir probe`.
#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// The socket that hostdir serves: unix:///path/to.sock
    #[arg(long, env = "CSI_ENDPOINT", value_name = "URL")]
    pub(crate) endpoint: Endpoint,

    /// Also check every pool: it is present, writable, and still the same pool
    #[arg(long)]
    pub(crate) ready: bool,
}

/// The command line of `hostdir local` and `hostdir node`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// Options of every command that serves.
    #[command(flatten)]
    pub(crate) serve: ServeArgs,

    /// A pool: the name that StorageClasses use, and its directory. May be repeated
    #[arg(long = "pool", value_name = "NAME=PATH")]
    pools: Vec<PoolArg>,

    /// A YAML file that configures pools in more detail: see deploy/README.md
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// The Kubernetes name of this node; the host name if left out
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    node_name: Option<String>,
}

/// Formats of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Plain text, one line per event
    Text,
    /// One JSON object per line
    Json,
}

/// `NAME=PATH`.
#[derive(Clone, Debug)]
struct PoolArg {
    name: PoolName,
    path: PathBuf,
}

impl FromStr for PoolArg {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (name, path) = text
            .split_once('=')
            .context("write NAME=PATH, such as default=/var/lib/hostdir")?;
        Ok(Self {
            name: PoolName::parse(name)?,
            path: path.into(),
        })
    }
}

/// The configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct File {
    pools: Vec<FilePool>,
}

/// A pool in the configuration file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct FilePool {
    name: PoolName,
    path: PathBuf,
    reserve: Option<String>,
    overcommit: Option<f64>,
    #[serde(default)]
    require_mount: bool,
    pool_id: Option<PoolId>,
    #[serde(default)]
    quota: QuotaPolicy,
    project_ids: Option<String>,
    #[serde(rename = "inodesPerGiB")]
    inodes_per_gib: Option<u64>,
}

/// What `hostdir local` and `hostdir node` work with.
#[derive(Debug)]
pub(crate) struct LocalPools {
    /// This node.
    pub(crate) node: NodeName,
    /// Its pools: at least one, each with its own name and path.
    pub(crate) pools: Vec<PoolConfig>,
}

impl NodeArgs {
    /// Reads the configuration file and checks what can be checked without touching a pool.
    ///
    /// # Errors
    /// A setting is wrong; the error names it.
    pub(crate) fn resolve(self) -> anyhow::Result<LocalPools> {
        let Self {
            serve: _,
            pools,
            config,
            node_name,
        } = self;
        let node = match node_name {
            Some(name) => name,
            None => host_name()?,
        };
        let node = NodeName::parse(&node).context("--node-name")?;
        let mut all: Vec<PoolConfig> = pools.into_iter().map(PoolArg::into_config).collect();
        if let Some(path) = config {
            all.extend(read(&path).with_context(|| format!("configuration {}", path.display()))?);
        }
        check(&all)?;
        Ok(LocalPools { node, pools: all })
    }
}

impl PoolArg {
    fn into_config(self) -> PoolConfig {
        let Self { name, path } = self;
        PoolConfig {
            name,
            path,
            require_mount: false,
            expected: None,
            limits: Limits::default(),
            quotas: QuotaConfig::default(),
        }
    }
}

impl FilePool {
    fn into_config(self) -> anyhow::Result<PoolConfig> {
        let Self {
            name,
            path,
            reserve,
            overcommit,
            require_mount,
            pool_id,
            quota: policy,
            project_ids,
            inodes_per_gib,
        } = self;
        let default = Limits::default();
        let reserve: Reserve = match reserve {
            None => default.reserve,
            Some(text) => text.parse().with_context(|| format!("pool {name}: reserve"))?,
        };
        let overcommit = overcommit.unwrap_or(default.overcommit);
        ensure!(
            overcommit > 0.0 && overcommit <= OVERCOMMIT_MAX,
            "pool {name}: overcommit {overcommit} must be above 0 and at most {OVERCOMMIT_MAX}"
        );
        let projects = match project_ids {
            None => QuotaConfig::default().projects,
            Some(text) => text.parse().with_context(|| format!("pool {name}: projectIds"))?,
        };
        ensure!(
            inodes_per_gib != Some(0),
            "pool {name}: inodesPerGiB 0 leaves no inode for the volume's own directory; leave it out for no limit"
        );
        Ok(PoolConfig {
            name,
            path,
            require_mount,
            expected: pool_id,
            limits: Limits { reserve, overcommit },
            quotas: QuotaConfig {
                policy,
                projects,
                inodes_per_gib,
            },
        })
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<PoolConfig>> {
    parse(&std::fs::read_to_string(path)?)
}

fn parse(text: &str) -> anyhow::Result<Vec<PoolConfig>> {
    let file: File = serde_saphyr::from_str(text)?;
    file.pools.into_iter().map(FilePool::into_config).collect()
}

fn check(pools: &[PoolConfig]) -> anyhow::Result<()> {
    ensure!(
        !pools.is_empty(),
        "no pool is configured; give at least one --pool NAME=PATH, or a --config with pools"
    );
    let (mut names, mut paths) = (HashSet::new(), HashSet::new());
    for PoolConfig { name, path, .. } in pools {
        let shown = path.display();
        ensure!(path.is_absolute(), "pool {name}: path {shown} must be absolute");
        let plain = path
            .components()
            .skip(1)
            .all(|part| matches!(part, std::path::Component::Normal(_)));
        ensure!(
            plain && path.file_name().is_some(),
            "pool {name}: path {shown} must not contain '..' and must not be /"
        );
        ensure!(names.insert(name), "pool {name} is configured twice");
        ensure!(paths.insert(path), "pool {name}: another pool already has path {shown}");
    }
    for (pool, other) in pools
        .iter()
        .flat_map(|pool| pools.iter().map(move |other| (pool, other)))
    {
        if pool.name != other.name && pool.path.starts_with(&other.path) {
            bail!(
                "the directory of pool {} is inside that of pool {}: tenants of one could reach into the other; move one of them",
                pool.name,
                other.name
            );
        }
    }
    Ok(())
}

pub(crate) fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("cannot read the host name; set --node-name or --pod-name")?;
    name.into_string()
        .ok()
        .context("the host name is not UTF-8; set --node-name or --pod-name")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::size::Bytes;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_file_describes_pools() {
        let text = "pools:\n- name: fast\n  path: /mnt/fast/hostdir\n  reserve: 10Gi\n  overcommit: 1.5\n  requireMount: true\n- {name: default, path: /d}\n";
        let pools = parse(text).unwrap();
        assert_eq!(pools.len(), 2);
        assert!(pools[0].require_mount);
        assert_eq!(
            pools[0].limits,
            Limits {
                reserve: Reserve::Bytes(Bytes(10 << 30)),
                overcommit: 1.5
            }
        );
        assert_eq!(pools[1].limits, Limits::default());
    }

    #[test]
    fn a_file_describes_quotas() {
        let text = "pools:\n- {name: a, path: /a, quota: required, projectIds: 5-9, inodesPerGiB: 1000}\n\
                    - {name: b, path: /b, quota: off}\n- {name: c, path: /c, quota: \"off\"}\n- {name: d, path: /d}\n";
        let quotas: Vec<QuotaConfig> = parse(text).unwrap().iter().map(|pool| pool.quotas).collect();
        let strict = QuotaConfig {
            policy: QuotaPolicy::Required,
            projects: "5-9".parse().unwrap(),
            inodes_per_gib: Some(1000),
        };
        assert_eq!(quotas[0], strict);
        assert_eq!(quotas[1].policy, QuotaPolicy::Off);
        assert_eq!(quotas[2].policy, QuotaPolicy::Off);
        assert_eq!(quotas[3], QuotaConfig::default());
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        for (text, word) in [
            ("pools:\n- {name: a, path: /a, reserv: 1}\n", "reserv"),
            ("pools:\n- {name: A, path: /a}\n", "pool name"),
            ("pools:\n- {name: a, path: /a, reserve: much}\n", "reserve"),
            ("pools:\n- {name: a, path: /a, overcommit: 0}\n", "overcommit"),
            ("pools:\n- {name: a, path: /a, quota: always}\n", "quota"),
            ("pools:\n- {name: a, path: /a, projectIds: 0-5}\n", "projectIds"),
            ("pools:\n- {name: a, path: /a, inodesPerGiB: 0}\n", "inodesPerGiB"),
            ("pools:\n- {name: a}\n", "path"),
            ("pools:\n- {name: a, path: /a, poolId: mine}\n", "poolId"),
            ("pool: []\n", "pool"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn pools_do_not_share_names_or_directories() {
        let pool = |text: &str| text.parse::<PoolArg>().unwrap().into_config();
        assert!(check(&[pool("a=/x"), pool("b=/y")]).is_ok());
        for pools in [
            vec![],
            vec![pool("a=/x"), pool("a=/y")],
            vec![pool("a=/x"), pool("b=/x")],
            vec![pool("a=/x"), pool("b=/x/y")],
            vec![pool("a=x")],
            vec![pool("a=/x/../y")],
            vec![pool("a=/")],
        ] {
            assert!(check(&pools).is_err(), "{pools:?} was accepted");
        }
        assert!("a".parse::<PoolArg>().is_err());
    }
}
