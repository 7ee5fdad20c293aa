//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler, on a machine of their own.

use std::path::Path;

use anyhow::Result;

use crate::kubectl::Kubectl;
use crate::machine::{Machine, wait_until};
use crate::pki::Pki;

/// The address of the machine; nodes are .11, .12, …
pub(crate) const ADDRESS: &str = "10.42.0.1";
/// The first address of the service network: `kubernetes.default`. The machine has it, so that no proxy is needed.
pub(crate) const SERVICE_ADDRESS: &str = "10.96.0.1";
/// Where all machines find the API server.
pub(crate) const SERVER: &str = "https://10.42.0.1:443";

/// The machine of the control plane.
pub struct ControlPlane {
    pub(crate) machine: Machine,
    pub(crate) pki: Pki,
}

/// Makes the bridge that all machines are plugged into.
pub(crate) fn prepare_network(machine: &Machine) -> Result<()> {
    machine.sh(&format!(
        "ip link add br0 type bridge; ip addr add {ADDRESS}/24 dev br0; ip link set br0 up; \
         ip addr add {SERVICE_ADDRESS}/32 dev lo"
    ))?;
    Ok(())
}

/// Starts the control plane and waits until it answers.
pub(crate) fn start(machine: &Machine, pki: &Pki, bin: &Path, kubectl: &Kubectl) -> Result<()> {
    let spawn = |name: &str, args: Vec<String>| machine.spawn(name, &bin.join(name), &args, bin);
    spawn(
        "etcd",
        vec![
            arg("data-dir", "/var/lib/etcd"),
            // The machine's power is cut at the end; nothing of it is ever read again.
            arg("unsafe-no-fsync", "true"),
            arg("listen-client-urls", "http://127.0.0.1:2379"),
            arg("advertise-client-urls", "http://127.0.0.1:2379"),
            arg("listen-peer-urls", "http://127.0.0.1:2380"),
        ],
    )?;
    start_api_server(machine, pki, bin)?;
    wait_until("the API server is ready", || {
        Ok(kubectl.run(&["get", "--raw", "/readyz"])? == "ok")
    })?;
    start_controller_manager(machine, pki, bin, ControllerManager::default())?;
    let kubeconfig = pki.kubeconfig("scheduler", SERVER)?;
    spawn(
        "kube-scheduler",
        vec![
            arg("kubeconfig", &kubeconfig),
            arg("authentication-kubeconfig", &kubeconfig),
            arg("authorization-kubeconfig", &kubeconfig),
            arg("leader-elect", "false"),
        ],
    )?;
    wait_until("service accounts are made", || {
        kubectl.run(&["get", "serviceaccount", "default"]).map(|_| true)
    })
}

/// What of a controller manager may be set.
#[derive(Clone, Copy, Debug)]
pub struct ControllerManager {
    /// Requests to the API server per second.
    pub qps: u32,
    /// Requests at once.
    pub burst: u32,
    /// How long a kubelet may be silent before its Node is not Ready, in seconds.
    pub node_grace: u32,
}

impl Default for ControllerManager {
    fn default() -> Self {
        Self {
            // What issue trackers call "slow binding" is this limit (20 and 30 by default); the tests are not about it.
            qps: 200,
            burst: 400,
            // As it is by default.
            node_grace: 50,
        }
    }
}

/// Starts the controller manager.
pub(crate) fn start_controller_manager(
    machine: &Machine,
    pki: &Pki,
    bin: &Path,
    settings: ControllerManager,
) -> Result<()> {
    let ControllerManager { qps, burst, node_grace } = settings;
    let kubeconfig = pki.kubeconfig("controller-manager", SERVER)?;
    let args = vec![
        arg("kubeconfig", &kubeconfig),
        arg("authentication-kubeconfig", &kubeconfig),
        arg("authorization-kubeconfig", &kubeconfig),
        arg("use-service-account-credentials", "true"),
        arg("service-account-private-key-file", &pki.path("sa.key")),
        arg("root-ca-file", &pki.path("ca.crt")),
        arg("leader-elect", "false"),
        arg("kube-api-qps", &qps.to_string()),
        arg("kube-api-burst", &burst.to_string()),
        arg("node-monitor-grace-period", &format!("{node_grace}s")),
    ];
    let name = "kube-controller-manager";
    machine.spawn(name, &bin.join(name), &args, bin)
}

/// Starts the API server, at first or again.
pub(crate) fn start_api_server(machine: &Machine, pki: &Pki, bin: &Path) -> Result<()> {
    let args = vec![
        arg("etcd-servers", "http://127.0.0.1:2379"),
        arg("bind-address", "0.0.0.0"),
        arg("secure-port", "443"),
        arg("advertise-address", ADDRESS),
        arg("service-cluster-ip-range", "10.96.0.0/16"),
        arg("tls-cert-file", &pki.path("apiserver.crt")),
        arg("tls-private-key-file", &pki.path("apiserver.key")),
        arg("client-ca-file", &pki.path("ca.crt")),
        arg("token-auth-file", &pki.path("tokens.csv")),
        arg("kubelet-client-certificate", &pki.path("apiserver-kubelet.crt")),
        arg("kubelet-client-key", &pki.path("apiserver-kubelet.key")),
        arg("kubelet-certificate-authority", &pki.path("ca.crt")),
        arg("kubelet-preferred-address-types", "InternalIP"),
        arg("service-account-issuer", "https://kubernetes.default.svc"),
        arg("service-account-key-file", &pki.path("sa.pub")),
        arg("service-account-signing-key-file", &pki.path("sa.key")),
        arg("authorization-mode", "Node,RBAC"),
        arg("enable-admission-plugins", "NodeRestriction"),
        arg("allow-privileged", "true"),
    ];
    machine.spawn("kube-apiserver", &bin.join("kube-apiserver"), &args, bin)
}

fn arg(name: &str, value: &str) -> String {
    format!("--{name}={value}")
}
