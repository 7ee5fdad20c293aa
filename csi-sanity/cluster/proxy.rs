//! An API server that can be made to misbehave: a proxy in front of the real one.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{Response, StatusCode};
use kube::Client;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tokio::runtime::Runtime;

/// How a request is answered for the first time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// This status; nothing is done.
    Status(u16),
    /// What is no object; nothing is done.
    Garbage,
    /// Not at all; nothing is done.
    Silence,
    /// The request is carried out, and the connection breaks before the answer.
    Lost,
    /// The process that asks dies before its request is carried out.
    DiesBefore,
    /// The process that asks dies when its request has been carried out.
    DiesAfter,
}

struct Shared {
    client: Client,
    lie: Lie,
    plan: Mutex<Plan>,
}

#[derive(Default)]
struct Plan {
    /// What is being done: a request counts as another one when it is made for something else.
    act: &'static str,
    told: BTreeSet<String>,
    process: Option<Pid>,
}

/// Dropping it closes all connections.
pub(crate) struct Proxy {
    shared: Arc<Shared>,
    port: u16,
    _runtime: Runtime,
}

impl Proxy {
    /// In front of the API server of this kubeconfig.
    pub(crate) fn new(kubeconfig: &Path, lie: Lie) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let client = runtime.block_on(async {
            let config = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(config, &options);
            let mut config = config.await.unwrap();
            config.read_timeout = None;
            Client::try_from(config).unwrap()
        });
        let shared = Arc::new(Shared {
            client,
            lie,
            plan: Mutex::default(),
        });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let port = listener.local_addr().unwrap().port();
        let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&shared));
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self {
            shared,
            port,
            _runtime: runtime,
        }
    }

    /// Writes a kubeconfig that leads here.
    pub(crate) fn write_kubeconfig(&self, path: &Path) {
        let server = format!("http://127.0.0.1:{}", self.port);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "c", "user": {"token": "none"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        std::fs::write(path, config.to_string()).unwrap();
    }

    /// Says what is done from now on, and by which process.
    pub(crate) fn begin(&self, act: &'static str, process: Pid) {
        let mut plan = self.shared.plan.lock().unwrap();
        plan.act = act;
        plan.process = Some(process);
    }

    pub(crate) fn lie(&self) -> Lie {
        self.shared.lie
    }

    /// All requests that were answered wrongly.
    pub(crate) fn told(&self) -> BTreeSet<String> {
        self.shared.plan.lock().unwrap().told.clone()
    }
}

impl Shared {
    /// How to answer a request: each is answered wrongly once in each act.
    fn decide(&self, request: &Request) -> Option<(Lie, Option<Pid>)> {
        let mut plan = self.plan.lock().unwrap();
        if plan.act.is_empty() {
            return None;
        }
        let kind = if request.uri().query().unwrap_or_default().contains("watch=") {
            "WATCH"
        } else {
            request.method().as_str()
        };
        let what = format!("{}: {kind} {}", plan.act, request.uri().path());
        plan.told.insert(what).then_some((self.lie, plan.process))
    }

    async fn forward(&self, request: Request) -> Result<Response<Body>, String> {
        let (mut parts, body) = request.into_parts();
        let body = to_bytes(body, usize::MAX).await.map_err(|error| error.to_string())?;
        for name in ["host", "authorization", "content-length"] {
            parts.headers.remove(name);
        }
        let request = axum::http::Request::from_parts(parts, kube::client::Body::from(body.to_vec()));
        let answer = self.client.send(request).await.map_err(|error| error.to_string())?;
        Ok(answer.map(Body::new))
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    let lie = shared.decide(&request);
    let die = |process: Option<Pid>| {
        let _ = process.map(|process| kill(process, Signal::SIGKILL));
        broken()
    };
    match lie {
        None => shared.forward(request).await.unwrap_or_else(|_| broken()),
        Some((Lie::Status(code), _)) => {
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
                "message": "the proxy says so", "reason": "Proxy",
            });
            let answer = Response::builder().status(StatusCode::from_u16(code).unwrap());
            let answer = answer.header("content-type", "application/json");
            answer.body(Body::from(status.to_string())).unwrap()
        }
        Some((Lie::Garbage, _)) => Response::new(Body::from("<html>not the API server</html>")),
        Some((Lie::Silence, _)) => std::future::pending().await,
        Some((Lie::Lost, _)) => {
            let _ = shared.forward(request).await;
            broken()
        }
        Some((Lie::DiesBefore, process)) => die(process),
        Some((Lie::DiesAfter, process)) => {
            let _ = shared.forward(request).await;
            die(process)
        }
    }
}

/// An answer that breaks off.
fn broken() -> Response<Body> {
    let breaks = futures::stream::once(async { Err::<&str, _>(std::io::Error::other("the connection breaks")) });
    Response::new(Body::from_stream(breaks))
}
