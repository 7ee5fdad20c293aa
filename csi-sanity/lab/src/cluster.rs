//! A cluster: a control plane and nodes.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;

use hostdir_prove::upstream;

use crate::control_plane::{self, ADDRESS, SERVER, SERVICE_ADDRESS};
pub use crate::control_plane::{ControlPlane, ControllerManager};
use crate::harness;
use crate::images::{self, Image};
use crate::janitor::Janitor;
use crate::kubectl::Kubectl;
use crate::machine::{Machine, wait_until};
use crate::node::Node;
use crate::pki::Pki;
use crate::reader::Reader;

/// The image of hostdir.
pub const HOSTDIR_IMAGE: &str = "hostdir:0.1.0";
/// The chart, relative to the repository's root.
pub const CHART: &str = "deploy/chart";
/// The namespace that hostdir is installed in.
pub const NAMESPACE: &str = "hostdir-system";
/// The image of test pods: busybox.
pub const BUSYBOX_IMAGE: &str = "hostdir-lab/busybox:1";

/// A running cluster. Dropping it takes the cluster down.
pub struct Cluster {
    /// The nodes `node-1`, `node-2`, …
    pub nodes: Vec<Node>,
    /// The control plane's machine.
    pub control_plane: ControlPlane,
    /// kubectl with an administrator's rights.
    pub kubectl: Kubectl,
    /// The administrator's kubeconfig, usable in the control plane's network.
    pub kubeconfig: String,
    /// The directory with the cluster's programs.
    pub bin: PathBuf,
    dir: PathBuf,
    // The last field, so that everything else is dropped before the janitor cleans up.
    _janitor: Janitor,
}

impl Cluster {
    /// Builds the programs, makes a cluster of `nodes` nodes, and waits until they are ready. The nodes have the images of
    /// hostdir, the sidecars and busybox.
    ///
    /// # Errors
    /// Something cannot be built or does not start; the error includes the tails of all logs.
    pub fn up(nodes: usize) -> Result<Self> {
        let bin = upstream::cluster().context("build the programs of a cluster")?;
        let hostdir = harness::hostdir();
        let start = Instant::now();
        let dir = tempfile::Builder::new().prefix("hostdir-lab-").tempdir()?.keep();
        let janitor = Janitor::new(&dir)?;
        let names: Vec<String> = (1..=nodes).map(|number| format!("node-{number}")).collect();
        let cluster = Self::start(&bin, hostdir, &dir, janitor, &names).map_err(|(error, _janitor)| {
            error.context(names.iter().fold(tail_of_logs(&dir, "control-plane"), |text, name| {
                text + &tail_of_logs(&dir, name)
            }))
        })?;
        eprintln!("a cluster of {nodes} nodes is up after {:.0?}", start.elapsed());
        Ok(cluster)
    }

    /// Starts the cluster. On error, returns the janitor too, which must not clean up before the logs are read.
    fn start(
        bin: &Path,
        hostdir: &Path,
        dir: &Path,
        janitor: Janitor,
        names: &[String],
    ) -> Result<Self, (anyhow::Error, Janitor)> {
        match Self::start_machines(bin, hostdir, dir, &janitor, names) {
            Ok((control_plane, nodes, kubectl, kubeconfig)) => Ok(Self {
                nodes,
                control_plane,
                kubectl,
                kubeconfig,
                bin: bin.to_owned(),
                dir: dir.to_owned(),
                _janitor: janitor,
            }),
            Err(error) => Err((error, janitor)),
        }
    }

    fn start_machines(
        bin: &Path,
        hostdir: &Path,
        dir: &Path,
        janitor: &Janitor,
        names: &[String],
    ) -> Result<(ControlPlane, Vec<Node>, Kubectl, String)> {
        let addresses: [IpAddr; 3] = [ADDRESS.parse()?, SERVICE_ADDRESS.parse()?, "127.0.0.1".parse()?];
        let pki = Pki::new(&dir.join("pki"), &addresses, names)?;
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
            reader: Reader::new(machine.pid(), &kubeconfig),
        };
        control_plane::start(&machine, &pki, bin, &kubectl)?;
        let control_plane = ControlPlane { machine, pki };

        let archive = dir.join("images.tar");
        images::archive(&images_of(bin, hostdir), &archive)?;
        let mut nodes = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let mut node = Node::new(
                number + 1,
                name,
                dir,
                bin,
                janitor.make_cgroup(name)?,
                &control_plane.pki,
            )?;
            node.power_on(&control_plane)?;
            node.import(&archive)?;
            nodes.push(node);
        }
        join_pod_networks(&nodes)?;
        wait_ready(&kubectl, names.len())?;
        Ok((control_plane, nodes, kubectl, kubeconfig))
    }

    /// Installs or upgrades hostdir by its chart, with settings as `helm --set-json` expects them (`key=value`), and waits
    /// until its pods run.
    ///
    /// # Errors
    /// Helm fails, or the pods do not start.
    pub fn install(&self, release: &str, settings: &[&str]) -> Result<()> {
        let mut args = vec![
            "upgrade",
            "--install",
            release,
            CHART,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
            // Undoes what a test has patched by hand.
            "--force-conflicts",
            "--take-ownership",
        ];
        // Tests wait for capacity: poll it every five seconds instead of every minute.
        for setting in [&["provisioner.capacityPollInterval=\"5s\""], settings].concat() {
            args.extend(["--set-json", setting]);
        }
        self.helm(&args)?;
        wait_until("hostdir is rolled out", || {
            let status = self.kubectl.get(&["daemonset", release, "-n", NAMESPACE])?;
            let (wanted, nodes) = rolled_out(&status, "desiredNumberScheduled", "updatedNumberScheduled");
            let controllers = ["deployments", "-n", NAMESPACE, "-l", &instance(release)];
            let controllers = self.kubectl.list(&controllers)?;
            let mut pods = wanted;
            let mut all = nodes;
            for deployment in &controllers {
                let (replicas, updated) = rolled_out(deployment, "replicas", "updatedReplicas");
                pods += replicas;
                all &= updated && deployment["status"]["readyReplicas"] == deployment["status"]["replicas"];
            }
            Ok(all && wanted > 0 && self.running_drivers(release)? == pods)
        })
    }

    /// Counts the pods of a release whose containers all run, whether or not their pools are usable.
    fn running_drivers(&self, release: &str) -> Result<u64> {
        let pods = self
            .kubectl
            .list(&["pods", "-n", NAMESPACE, "-l", &instance(release)])?;
        let runs = |pod: &&serde_json::Value| {
            let list = |of: &serde_json::Value| of.as_array().cloned().unwrap_or_default();
            let containers = list(&pod["status"]["containerStatuses"]);
            pod["metadata"]["deletionTimestamp"].is_null()
                && containers.len() == list(&pod["spec"]["containers"]).len()
                && containers
                    .iter()
                    .all(|container| container["state"]["running"].is_object())
        };
        Ok(pods.iter().filter(runs).count() as u64)
    }

    /// A directory that all nodes and this machine see at the same path. It is removed with the cluster.
    #[must_use]
    pub fn shared_dir(&self) -> PathBuf {
        self.dir.join("shared")
    }

    /// Runs Helm against the cluster, in the repository's root. Returns its output.
    ///
    /// # Errors
    /// Helm fails; the error includes its output.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        let net = self.control_plane.machine.pid().to_string();
        let output = std::process::Command::new("nsenter")
            .args(["-t", &net, "--net", "--"])
            .arg(self.bin.join("helm"))
            .args(["--kubeconfig", &self.kubeconfig])
            .args(args)
            .current_dir(hostdir_prove::root())
            .output()
            .context("run helm")?;
        crate::machine::text_of(&output).with_context(|| format!("helm {}", args.join(" ")))
    }

    /// Moves the calling thread into the control plane's network namespace. The thread and its children then reach the API
    /// server and pods, but no longer this machine's own network.
    ///
    /// # Errors
    /// The process is not root.
    pub fn join_network(&self) -> Result<()> {
        let path = format!("/proc/{}/ns/net", self.control_plane.machine.pid());
        let namespace = std::fs::File::open(&path).with_context(|| format!("open {path}"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET).context("enter the network of the control plane")
    }

    /// Connects this machine's own network to the cluster's by a veth pair, for `hostdir-lab up`. The kernel removes the
    /// pair some time after the cluster is down, when the last connections have timed out.
    ///
    /// # Errors
    /// The address is in use.
    pub fn connect_this_machine(&self) -> Result<()> {
        let hub = self.control_plane.machine.pid();
        let script = format!(
            "ip link del hostdir-lab 2>/dev/null || :
             ip link add hostdir-lab type veth peer name lab0 netns {hub}
             ip addr add 10.42.0.254/24 dev hostdir-lab
             ip link set hostdir-lab up"
        );
        let output = std::process::Command::new("sh").args(["-ec", &script]).output()?;
        crate::machine::text_of(&output).context("connect this machine to the cluster")?;
        self.control_plane
            .machine
            .sh("ip link set lab0 master br0 up")
            .map(drop)
    }

    /// Waits until `nodes` nodes are Ready.
    ///
    /// # Errors
    /// The wait timed out.
    pub fn wait_ready(&self, nodes: usize) -> Result<()> {
        wait_ready(&self.kubectl, nodes)
    }

    /// Switches a node on again.
    ///
    /// # Errors
    /// The node does not start.
    pub fn power_on(&mut self, node: usize) -> Result<()> {
        self.nodes[node].power_on(&self.control_plane)?;
        join_pod_networks(&self.nodes)
    }

    /// Freezes (`true`) or unfreezes the API server by SIGSTOP or SIGCONT, as heavy swapping would.
    ///
    /// # Errors
    /// The API server does not run.
    pub fn freeze_api_server(&self, frozen: bool) -> Result<()> {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        self.control_plane.machine.signal("kube-apiserver", signal)
    }

    /// Kills the API server.
    ///
    /// # Errors
    /// The API server does not run.
    pub fn stop_api_server(&self) -> Result<()> {
        self.control_plane.machine.signal("kube-apiserver", Signal::SIGKILL)
    }

    /// Starts the API server again.
    ///
    /// # Errors
    /// The API server cannot be started.
    pub fn start_api_server(&self) -> Result<()> {
        control_plane::start_api_server(&self.control_plane.machine, &self.control_plane.pki, &self.bin)
    }

    /// Restarts the controller manager with these settings.
    ///
    /// # Errors
    /// The controller manager does not run, or cannot be started.
    pub fn restart_controller_manager(&self, settings: ControllerManager) -> Result<()> {
        let machine = &self.control_plane.machine;
        machine.signal("kube-controller-manager", Signal::SIGKILL)?;
        control_plane::start_controller_manager(machine, &self.control_plane.pki, &self.bin, settings)
    }

    /// Disconnects a node from the network (`true`), or connects it again.
    ///
    /// # Errors
    /// The node does not exist.
    pub fn cut_network(&self, node: usize, cut: bool) -> Result<()> {
        let state = if cut { "down" } else { "up" };
        self.control_plane
            .machine
            .sh(&format!("ip link set node{} {state}", node + 1))
            .map(drop)
    }

    /// Copies all logs of the machines to a directory that outlives the cluster.
    ///
    /// # Errors
    /// The logs cannot be copied.
    pub fn keep_logs(&self, to: &Path) -> Result<()> {
        for machine in std::iter::once("control-plane").chain(self.nodes.iter().map(|node| node.name.as_str())) {
            let into = to.join(machine);
            std::fs::create_dir_all(&into)?;
            for part in ["log", "disk/var/log/pods"] {
                let from = self.dir.join(machine).join(part);
                if from.exists() {
                    let _ = std::process::Command::new("cp").arg("-r").arg(from).arg(&into).status();
                }
            }
        }
        Ok(())
    }
}

/// The label of a release's pods.
fn instance(release: &str) -> String {
    format!("app.kubernetes.io/instance={release}")
}

/// How many pods a workload wants, and whether all of them are up to date.
fn rolled_out(workload: &serde_json::Value, wanted: &str, updated: &str) -> (u64, bool) {
    let status = &workload["status"];
    let observed = status["observedGeneration"] == workload["metadata"]["generation"];
    let wanted = status[wanted].as_u64().unwrap_or_default();
    (wanted, observed && status[updated].as_u64() == Some(wanted))
}

/// Adds routes from every node to the pods of every other node.
fn join_pod_networks(nodes: &[Node]) -> Result<()> {
    for node in nodes {
        for other in nodes.iter().filter(|other| other.name != node.name) {
            node.sh(&format!("ip route replace {} via {}", other.pods(), other.address()))?;
        }
    }
    Ok(())
}

fn wait_ready(kubectl: &Kubectl, nodes: usize) -> Result<()> {
    wait_until("all nodes are Ready", || {
        let path = "jsonpath={range .items[*]}{.status.conditions[?(@.type=='Ready')].status}{' '}{end}";
        let ready = kubectl.run(&["get", "nodes", "-o", path])?;
        Ok(ready.split_whitespace().filter(|status| *status == "True").count() == nodes)
    })
}

/// The last lines of each log of a machine.
fn tail_of_logs(dir: &Path, machine: &str) -> String {
    let logs = std::fs::read_dir(dir.join(machine).join("log"))
        .into_iter()
        .flatten()
        .flatten();
    logs.fold(String::new(), |text, log| {
        let content = std::fs::read(log.path()).unwrap_or_default();
        let content = String::from_utf8_lossy(&content);
        let lines: Vec<&str> = content.lines().collect();
        let end = lines[lines.len().saturating_sub(12)..].join("\n");
        format!("{text}\n--- {machine}: {}\n{end}", log.file_name().display())
    })
}

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
