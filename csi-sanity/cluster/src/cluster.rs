//! A whole cluster.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::control_plane::{self, ADDRESS, SERVER, SERVICE_ADDRESS};
use crate::images::{self, Image};
use crate::janitor::Janitor;
use crate::kubectl::Kubectl;
use crate::machine::{Machine, wait_until};
use crate::node::Node;
use crate::pki::Pki;
use crate::tools;

/// The image that hostdir is in.
pub const HOSTDIR_IMAGE: &str = "hostdir:0.1.0";
/// The image of pods that do something: busybox.
pub const BUSYBOX_IMAGE: &str = "hostdir-lab/busybox:1";

/// The machine of the control plane.
pub struct ControlPlane {
    pub(crate) machine: Machine,
}

/// A cluster that runs. Dropping it takes it down.
pub struct Cluster {
    /// Its nodes: `node-1`, `node-2`, …
    pub nodes: Vec<Node>,
    /// The control plane's machine.
    pub control_plane: ControlPlane,
    /// kubectl for its administrator.
    pub kubectl: Kubectl,
    /// The administrator's kubeconfig, for use in the control plane's network.
    pub kubeconfig: String,
    dir: PathBuf,
    // Last, so that everything else is gone when it cleans.
    _janitor: Janitor,
}

impl Cluster {
    /// Builds what is needed, makes a cluster of so many nodes, and waits until they are ready. The nodes have the images
    /// of hostdir, of the sidecars and of busybox.
    ///
    /// # Errors
    /// Something cannot be built or does not start.
    pub fn up(nodes: usize) -> Result<Self> {
        let bin = tools::cluster().context("build the programs of a cluster")?;
        let hostdir = tools::static_hostdir()?;
        let start = Instant::now();
        let dir = tempfile::Builder::new().prefix("hostdir-lab-").tempdir()?.keep();
        let janitor = Janitor::new(&dir)?;
        let names: Vec<String> = (1..=nodes).map(|number| format!("node-{number}")).collect();
        let addresses: [IpAddr; 3] = [ADDRESS.parse()?, SERVICE_ADDRESS.parse()?, "127.0.0.1".parse()?];
        let pki = Pki::new(&dir.join("pki"), &addresses, &names)?;
        let kubeconfig = pki.kubeconfig("admin", SERVER)?;

        let machine = Machine::start("control-plane", &dir.join("control-plane"))?;
        control_plane::prepare_network(&machine)?;
        let net = machine.pid().to_string();
        let kubectl = bin.join("kubectl").display().to_string();
        let prefix = [
            "nsenter",
            "-t",
            &net,
            "--net",
            "--",
            &kubectl,
            "--kubeconfig",
            &kubeconfig,
        ];
        let kubectl = Kubectl {
            prefix: prefix.map(str::to_owned).to_vec(),
        };
        control_plane::start(&machine, &pki, &bin, &kubectl)?;

        let archive = dir.join("images.tar");
        images::archive(&images_of(&bin, &hostdir), &archive)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            control_plane: ControlPlane { machine },
            kubectl,
            kubeconfig,
            dir: dir.clone(),
            _janitor: janitor,
        };
        for (number, name) in names.iter().enumerate() {
            let cgroup = cluster._janitor.make_cgroup(name)?;
            let mut node = Node::new(number + 1, name, &dir, &bin, cgroup, &pki)?;
            node.power_on(&cluster.control_plane)?;
            node.import(&archive)?;
            cluster.nodes.push(node);
        }
        cluster.join_pod_networks()?;
        cluster.wait_ready(nodes)?;
        eprintln!("a cluster of {nodes} nodes is up after {:.0?}", start.elapsed());
        Ok(cluster)
    }

    /// Routes from every node to the pods of every other.
    fn join_pod_networks(&self) -> Result<()> {
        for node in &self.nodes {
            for other in self.nodes.iter().filter(|other| other.name != node.name) {
                node.sh(&format!("ip route replace {} via {}", other.pods(), other.address()))?;
            }
        }
        Ok(())
    }

    /// Waits until so many nodes are Ready.
    ///
    /// # Errors
    /// They are not in time.
    pub fn wait_ready(&self, nodes: usize) -> Result<()> {
        wait_until("all nodes are Ready", || {
            let path = "jsonpath={range .items[*]}{.status.conditions[?(@.type=='Ready')].status}{' '}{end}";
            let ready = self.kubectl.run(&["get", "nodes", "-o", path])?;
            Ok(ready.split_whitespace().filter(|status| *status == "True").count() == nodes)
        })
        .inspect_err(|_| eprintln!("{}", self.logs()))
    }

    /// Switches a node on again.
    ///
    /// # Errors
    /// It does not start.
    pub fn power_on(&mut self, node: usize) -> Result<()> {
        self.nodes[node].power_on(&self.control_plane)?;
        self.join_pod_networks()
    }

    /// Stops (`true`) or continues the API server, as a machine that swaps would.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze_api_server(&self, frozen: bool) -> Result<()> {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        self.control_plane.machine.signal("kube-apiserver", signal)
    }

    /// Cuts a node from the network, or plugs it in again.
    ///
    /// # Errors
    /// There is no such node.
    pub fn cut_network(&self, node: usize, cut: bool) -> Result<()> {
        let state = if cut { "down" } else { "up" };
        self.control_plane
            .machine
            .sh(&format!("ip link set node{} {state}", node + 1))
            .map(drop)
    }

    /// The ends of all logs, for whoever wonders.
    #[must_use]
    pub fn logs(&self) -> String {
        let mut text = control_plane::tail_of_logs(&self.dir.join("control-plane")).unwrap_or_default();
        for node in &self.nodes {
            text.push_str(&node.logs().unwrap_or_default());
        }
        text
    }

    /// Copies all logs of the machines to a directory that stays.
    ///
    /// # Errors
    /// They cannot be copied.
    pub fn keep_logs(&self, to: &Path) -> Result<()> {
        for machine in std::iter::once("control-plane").chain(self.nodes.iter().map(|node| node.name.as_str())) {
            let into = to.join(machine);
            std::fs::create_dir_all(&into)?;
            for part in ["log", "disk/var/log/pods"] {
                let from = self.dir.join(machine).join(part);
                let _ = std::process::Command::new("cp").arg("-r").arg(from).arg(&into).status();
            }
        }
        Ok(())
    }
}

/// Waiting time of those who ask a whole cluster for something.
pub const PATIENCE: Duration = Duration::from_secs(180);

fn images_of(bin: &Path, hostdir: &Path) -> Vec<Image> {
    let program = |name: &str, file: &'static str, entrypoint: &'static [&'static str]| Image {
        name: name.to_owned(),
        entrypoint,
        files: vec![(bin.join(&file[1..]), &file[1..])],
        applets: &[],
    };
    let busybox = |name: &str, entrypoint: &'static [&'static str]| Image {
        name: name.to_owned(),
        entrypoint,
        files: vec![(PathBuf::from("/usr/bin/busybox"), "bin/busybox")],
        applets: &[
            "sh", "sleep", "cat", "touch", "ls", "id", "mount", "df", "dd", "stat", "test", "rm", "mkdir", "seq",
            "true",
        ],
    };
    vec![
        Image {
            name: HOSTDIR_IMAGE.to_owned(),
            entrypoint: &["/hostdir"],
            files: vec![(hostdir.to_owned(), "hostdir")],
            applets: &[],
        },
        program(
            "registry.k8s.io/sig-storage/csi-provisioner:v6.4.0",
            "/csi-provisioner",
            &["/csi-provisioner"],
        ),
        program(
            "registry.k8s.io/sig-storage/csi-resizer:v2.3.0",
            "/csi-resizer",
            &["/csi-resizer"],
        ),
        program(
            "registry.k8s.io/sig-storage/csi-node-driver-registrar:v2.17.0",
            "/csi-node-driver-registrar",
            &["/csi-node-driver-registrar"],
        ),
        busybox(BUSYBOX_IMAGE, &["/bin/sh"]),
        busybox("hostdir-lab/pause:1", &["/bin/sleep", "2147483647"]),
    ]
}
