//! Reads objects from a cluster's API server over a connection that stays open.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kube::Client;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

/// How long to wait for an answer: the API server of some tests is frozen.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The kinds that tests read: their names for kubectl, and where the API server serves them, in all namespaces or in one.
const KINDS: &[(&[&str], &str, &str)] = &[
    (&["pod", "pods"], "/api/v1", "pods"),
    (&["pvc"], "/api/v1", "persistentvolumeclaims"),
    (&["pv"], "/api/v1", "persistentvolumes"),
    (&["node", "nodes"], "/api/v1", "nodes"),
    (&["lease", "leases"], "/apis/coordination.k8s.io/v1", "leases"),
    (&["csinode"], "/apis/storage.k8s.io/v1", "csinodes"),
    (
        &["csistoragecapacities"],
        "/apis/storage.k8s.io/v1",
        "csistoragecapacities",
    ),
    (&["daemonset"], "/apis/apps/v1", "daemonsets"),
    (&["deployments"], "/apis/apps/v1", "deployments"),
    (
        &["hostvolume", "hostvolumes"],
        "/apis/hostdir.csi/v1alpha1",
        "hostvolumes",
    ),
    (&["hostnode", "hostnodes"], "/apis/hostdir.csi/v1alpha1", "hostnodes"),
];

struct Request {
    path: String,
    answer: oneshot::Sender<kube::Result<String>>,
}

/// Reads from an API server that only one network namespace reaches.
#[derive(Clone)]
pub(crate) struct Reader {
    /// A process in that network namespace.
    process: Pid,
    kubeconfig: PathBuf,
    requests: Arc<OnceLock<mpsc::UnboundedSender<Request>>>,
}

impl Reader {
    pub(crate) fn new(process: Pid, kubeconfig: impl Into<PathBuf>) -> Self {
        Self {
            process,
            kubeconfig: kubeconfig.into(),
            requests: Arc::default(),
        }
    }

    /// What `kubectl get <what> -o json` prints; `None` if that must be left to kubectl.
    pub(crate) fn get(&self, what: &[&str]) -> Option<Result<Value>> {
        let path = path_of(what)?;
        Some(self.text(&path).and_then(|text| Ok(serde_json::from_str(&text)?)))
    }

    /// Whether an error of [`Reader::get`] says that the object does not exist.
    pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
        matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if status.code == 404)
    }

    /// The answer to a GET request of a path.
    pub(crate) fn text(&self, path: &str) -> Result<String> {
        let requests = self.requests.get_or_init(|| self.start());
        let (answer, answered) = oneshot::channel();
        let path = path.to_owned();
        let sent = requests.send(Request { path, answer });
        sent.map_err(|_| anyhow!("the thread that reads has ended"))?;
        let answer = answered.blocking_recv().context("the thread that reads has ended")?;
        Ok(answer?)
    }

    /// Starts a thread that lives in the network namespace. It ends with the process.
    fn start(&self) -> mpsc::UnboundedSender<Request> {
        let (requests, received) = mpsc::unbounded_channel();
        let reader = self.clone();
        std::thread::spawn(move || {
            if let Err(error) = reader.serve(received) {
                eprintln!("cannot read from the API server: {error:#}");
            }
        });
        requests
    }

    fn serve(&self, mut received: mpsc::UnboundedReceiver<Request>) -> Result<()> {
        let network = std::fs::File::open(format!("/proc/{}/ns/net", self.process))?;
        setns(network, CloneFlags::CLONE_NEWNET).context("enter the network of the control plane")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(&self.kubeconfig)?;
            let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            let client = Client::try_from(config)?;
            while let Some(Request { path, answer }) = received.recv().await {
                let client = client.clone();
                tokio::spawn(async move {
                    let _ = answer.send(request(&client, &path).await);
                });
            }
            Ok(())
        })
    }
}

async fn request(client: &Client, path: &str) -> kube::Result<String> {
    let request = http::Request::get(path)
        .body(Vec::new())
        .map_err(kube::Error::HttpError)?;
    let answer = tokio::time::timeout(TIMEOUT, client.request_text(request)).await;
    answer.unwrap_or_else(|_| Err(kube::Error::Service("the API server does not answer".into())))
}

/// The path of what kubectl is asked for.
fn path_of(what: &[&str]) -> Option<String> {
    let (kind, rest) = what.split_first()?;
    let (_, group, resource) = KINDS.iter().find(|(names, ..)| names.contains(kind))?;
    let (mut name, mut namespace, mut query) = (None, String::new(), Vec::new());
    let mut rest = rest.iter();
    while let Some(arg) = rest.next() {
        match *arg {
            "-n" => namespace = format!("/namespaces/{}", rest.next()?),
            "-l" => query.push(format!("labelSelector={}", encoded(rest.next()?))),
            "--field-selector" => query.push(format!("fieldSelector={}", encoded(rest.next()?))),
            flag if flag.starts_with('-') => return None,
            one if name.is_none() => name = Some(one),
            _ => return None,
        }
    }
    let name = name.map_or_else(String::new, |name| format!("/{name}"));
    Some(format!("{group}{namespace}/{resource}{name}?{}", query.join("&")))
}

/// Percent-encodes what selectors contain.
fn encoded(selector: &str) -> String {
    selector.replace('=', "%3D").replace(',', "%2C").replace('/', "%2F")
}
