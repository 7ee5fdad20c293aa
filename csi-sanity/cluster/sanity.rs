//! The real csi-sanity against elected mode: a controller and a node, on two sockets, with an API server between them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use hostdir_lab::{needs, sanity};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::lab::{Lab, Mode, lab};

/// A node that no kubelet runs on.
const NODE: &str = "sanity";

#[needs(Root, Go, Cluster)]
fn csi_sanity_passes_in_elected_mode() {
    let title = "csi-sanity passes against a controller and a node";
    let lab = lab(Mode::Elected, "sanity", title);
    lab.join_network().unwrap();
    // What is mounted here goes with this thread.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    let scratch = tempfile::Builder::new().prefix("hostdir-").tempdir().unwrap();
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}});
    lab.kubectl().apply(&node.to_string()).unwrap();
    let path = |name: &str| scratch.path().join(name);
    let pool = path("pool").display().to_string();
    // csi-sanity asks for 10 GiB at a time, whatever disk it runs on.
    let config = format!("pools: [{{name: default, path: {pool}, overcommit: 1000}}]\n");
    fs::write(path("config.yaml"), config).unwrap();

    let config = path("config.yaml").display().to_string();
    let agent = Process::start(
        &lab,
        scratch.path(),
        &["node", "--node-name", NODE, "--config", &config],
    );
    let controller = Process::start(&lab, scratch.path(), &["controller"]);
    lab.wait("the node has published its pool", || {
        let node = lab.kubectl().get(&["hostnode", NODE])?;
        Ok(node["status"]["pools"][0]["free"].is_string())
    });
    lab.wait("both answer", || Ok(agent.answers()? && controller.answers()?));
    let args = [format!(
        "-csi.controllerendpoint=unix://{}",
        controller.socket.display()
    )];
    let passed = sanity::run(scratch.path(), "csi-sanity", &agent.socket, &args);
    passed.unwrap_or_else(|error| panic!("{error:#}\n{}\n{}", controller.log(), agent.log()));
    lab.wait("no HostVolume is left", || {
        Ok(lab.kubectl().list(&["hostvolumes"])?.is_empty())
    });
    drop((agent, controller));
    for object in ["hostnode", "node"] {
        lab.kubectl().run(&["delete", object, NODE]).unwrap();
    }
}

/// A hostdir on this machine. It is killed when this is dropped, and when the test is.
struct Process {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Process {
    fn start(lab: &Lab, dir: &Path, args: &[&str]) -> Self {
        let (socket, log) = (
            dir.join(format!("{}.sock", args[0])),
            dir.join(format!("{}.log", args[0])),
        );
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(hostdir_lab::harness::hostdir())
            .args(args)
            .arg(format!("--endpoint=unix://{}", socket.display()))
            .env("KUBECONFIG", &lab.kubeconfig)
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Self { child, socket, log }
    }

    fn answers(&self) -> anyhow::Result<bool> {
        let endpoint = format!("--endpoint=unix://{}", self.socket.display());
        let mut probe = Command::new(hostdir_lab::harness::hostdir());
        Ok(probe.args(["probe", "--ready", &endpoint]).output()?.status.success())
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
