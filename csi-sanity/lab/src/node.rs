//! A node: a machine with containerd and a kubelet.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::cgroup;
use crate::control_plane::{ADDRESS, ControlPlane, SERVER, SERVICE_ADDRESS};
use crate::machine::{Machine, wait_until};
use crate::pki::Pki;

/// One node of a cluster, switched on or off.
pub struct Node {
    /// The name of the Node, and the host name.
    pub name: String,
    number: usize,
    dir: PathBuf,
    bin: PathBuf,
    cgroup: String,
    machine: Option<Machine>,
}

impl Node {
    /// Makes a node that is switched off. Nodes are numbered from 1.
    pub(crate) fn new(number: usize, name: &str, dir: &Path, bin: &Path, cgroup: String, pki: &Pki) -> Result<Self> {
        let node = Self {
            name: name.to_owned(),
            number,
            dir: dir.join(name),
            bin: bin.to_owned(),
            cgroup,
            machine: None,
        };
        fs::create_dir_all(&node.dir)?;
        pki.sign(
            name,
            &format!("system:node:{name}"),
            Some("system:nodes"),
            &[node.address()],
        )?;
        node.configure(pki)?;
        Ok(node)
    }

    /// The node's address on the network of all machines.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        // More than 245 nodes do not fit on one machine anyway.
        let host = u8::try_from(10 + self.number).unwrap_or(u8::MAX);
        IpAddr::from([10, 42, 0, host])
    }

    pub(crate) fn pods(&self) -> String {
        format!("10.244.{}.0/24", self.number)
    }

    fn machine(&self) -> Result<&Machine> {
        self.machine
            .as_ref()
            .with_context(|| format!("node {} is switched off", self.name))
    }

    /// The path of the node's root directory on this machine.
    ///
    /// # Errors
    /// The node is switched off.
    pub fn root(&self) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root", self.machine()?.pid())))
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Writes the configuration of containerd, its network plugins and the kubelet.
    fn configure(&self, pki: &Pki) -> Result<()> {
        let bin = self.bin.display();
        let containerd = format!(
            r#"version = 3
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "hostdir-lab/pause:1"
[plugins."io.containerd.cri.v1.runtime"]
# runc cannot lower oom_score_adj without CAP_SYS_RESOURCE.
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{bin}"]
conf_dir = "{}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{bin}/runc"
SystemdCgroup = false
"#,
            self.file("cni")
        );
        fs::write(self.dir.join("containerd.toml"), containerd)?;
        let ipam = json!({"type": "host-local", "subnet": self.pods(), "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": "/run/cni"});
        let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "ipam": ipam});
        let network = json!({"cniVersion": "1.0.0", "name": "lab", "plugins": [bridge]});
        fs::create_dir_all(self.dir.join("cni"))?;
        fs::write(self.dir.join("cni/lab.conflist"), network.to_string())?;
        let kubelet = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self.cgroup,
            "failSwapOn": false,
            // Naming one signal drops the default signals for disks: all nodes share the machine's disk.
            "evictionHard": {"memory.available": "100Mi"},
            // Never remove images: without a registry they cannot be pulled again.
            "imageGCHighThresholdPercent": 100,
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "authentication": {
                "anonymous": {"enabled": false},
                "webhook": {"enabled": true},
                "x509": {"clientCAFile": pki.path("ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": pki.path(&format!("{}.crt", self.name)),
            "tlsPrivateKeyFile": pki.path(&format!("{}.key", self.name)),
            // Tests kill containers often: restart them at once instead of after minutes.
            "featureGates": {"KubeletCrashLoopBackOffMax": true},
            "crashLoopBackOff": {"maxContainerRestartPeriod": "1s"},
            // How soon the kubelet expands a claim, and how often it reads volume statistics: every minute by default.
            "syncFrequency": "10s",
            "volumeStatsAggPeriod": "10s",
            "maxPods": 250,
            "serializeImagePulls": false,
        });
        fs::write(self.dir.join("kubelet.json"), kubelet.to_string())?;
        pki.kubeconfig(&self.name, SERVER)?;
        fs::write(
            self.dir.join("kubeconfig"),
            fs::read(pki.path(&format!("{}.kubeconfig", self.name)))?,
        )?;
        Ok(())
    }

    /// Switches the node on: machine, network, containerd and kubelet.
    ///
    /// # Errors
    /// Something does not start.
    pub fn power_on(&mut self, control_plane: &ControlPlane) -> Result<()> {
        let machine = Machine::start(&self.name, &self.dir)?;
        self.plug_in(&machine, control_plane)?;
        let arg = |name: &str| format!("--config={}", self.file(name));
        machine.spawn(
            "containerd",
            &self.bin.join("containerd"),
            &[arg("containerd.toml")],
            &self.bin,
        )?;
        self.machine = Some(machine);
        wait_until("containerd answers", || self.ctr(&["version"]).map(|_| true))?;
        self.start_kubelet()
    }

    /// Cuts the node's power.
    ///
    /// # Errors
    /// The node is already off.
    pub fn cut_power(&mut self) -> Result<()> {
        let machine = self
            .machine
            .take()
            .with_context(|| format!("node {} is switched off", self.name))?;
        machine.cut_power()?;
        cgroup::clear(&self.cgroup)
    }

    /// Connects the node to the bridge of the control plane by a veth pair, and adds routes.
    fn plug_in(&self, machine: &Machine, control_plane: &ControlPlane) -> Result<()> {
        let (hub, node) = (control_plane.machine.pid(), machine.pid());
        let cable = format!("node{}", self.number);
        // After a power cut the control plane's end of the old veth pair may still exist.
        control_plane
            .machine
            .sh(&format!("ip link del {cable} 2>/dev/null || :"))?;
        control_plane.machine.sh(&format!(
            "ip link add {cable} type veth peer name eth0x{0}",
            self.number
        ))?;
        let mover = format!("nsenter -t {hub} --net ip link set eth0x{} netns {node}", self.number);
        let output = std::process::Command::new("sh").args(["-ec", &mover]).output()?;
        crate::machine::text_of(&output).context("plug in the cable")?;
        control_plane.machine.sh(&format!(
            "ip link set {cable} master br0 up; ip route replace {} via {}",
            self.pods(),
            self.address()
        ))?;
        machine.sh(&format!(
            "ip link set eth0x{0} name eth0; ip addr add {1}/24 dev eth0; ip link set eth0 up; \
             ip route add {SERVICE_ADDRESS}/32 via {ADDRESS}",
            self.number,
            self.address()
        ))?;
        Ok(())
    }

    /// Starts the kubelet.
    ///
    /// # Errors
    /// The node is switched off.
    pub fn start_kubelet(&self) -> Result<()> {
        let args = [
            format!("--config={}", self.file("kubelet.json")),
            format!("--kubeconfig={}", self.file("kubeconfig")),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={}", self.address()),
        ];
        self.machine()?
            .spawn("kubelet", &self.bin.join("kubelet"), &args, &self.bin)
    }

    /// Kills the kubelet; containers keep running.
    ///
    /// # Errors
    /// The kubelet does not run.
    pub fn kill_kubelet(&self) -> Result<()> {
        self.machine()?.signal("kubelet", Signal::SIGKILL)
    }

    /// Runs a shell script on the node, as root. Returns its output.
    ///
    /// # Errors
    /// The script fails, or the node is off.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.machine()?.sh(script)
    }

    /// Imports an archive of images.
    pub(crate) fn import(&self, archive: &Path) -> Result<()> {
        self.ctr(&[
            "-n",
            "k8s.io",
            "images",
            "import",
            "--local",
            &archive.display().to_string(),
        ])
        .map(drop)
    }

    fn ctr(&self, args: &[&str]) -> Result<String> {
        let output = self
            .machine()?
            .command(self.bin.join("ctr"))
            .args(args)
            .output()
            .context("run ctr")?;
        crate::machine::text_of(&output)
    }
}
