//! The control plane: etcd, kube-apiserver, kube-controller-manager and kube-scheduler on one machine.

use std::path::Path;

use anyhow::Result;

use crate::kubectl::Kubectl;
use crate::machine::{Machine, wait_until};
use crate::pki::Pki;

/// The address of the control plane's machine; the nodes are .11, .12, …
pub(crate) const ADDRESS: &str = "10.42.0.1";
/// The first address of the service network: `kubernetes.default`. The machine itself has it, so that no proxy is needed.
pub(crate) const SERVICE_ADDRESS: &str = "10.96.0.1";
/// The URL of the API server, on all machines.
pub(crate) const SERVER: &str = "https://10.42.0.1:443";

/// The machine of the control plane.
pub struct ControlPlane {
    pub(crate) machine: Machine,
    pub(crate) pki: Pki,
}

/// Makes the bridge that connects all machines.
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
            // etcd's data is never read again after the cluster is down.
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
    wait_until("the default service account exists", || {
        kubectl.run(&["get", "serviceaccount", "default"]).map(|_| true)
    })
}

/// Settings of the controller manager.
#[derive(Clone, Copy, Debug)]
pub struct ControllerManager {
    /// `--kube-api-qps`: requests to the API server per second.
    pub qps: u32,
    /// `--kube-api-burst`: requests that may exceed `qps` for a moment.
    pub burst: u32,
    /// `--node-monitor-grace-period`: seconds of a silent kubelet before its Node is not Ready.
    pub node_grace: u32,
}

impl Default for ControllerManager {
    fn default() -> Self {
        Self {
            // The defaults (20 and 30) make binding slow, which the tests do not measure.
            qps: 200,
            burst: 400,
            // The default.
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

/// Starts the API server.
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
