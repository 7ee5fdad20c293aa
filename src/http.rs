//! Serves `/healthz`, `/readyz` and `/metrics` to the kubelet and to Prometheus, and gets what other servers serve.
//!
//! Any pod may be able to reach the port. So connections are few, short and small, and a new one takes the place of the oldest of
//! whoever has most: a flood from one address keeps nobody else from being answered.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::routing::get;
use futures::future::{BoxFuture, FutureExt as _, Shared};
use hyper::server::conn::http1;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::errno::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::background::ACCEPT_PAUSE;
use crate::metrics::Metrics;
use crate::volume::Health;

/// How many connections there may be.
const CONNECTIONS_MAX: usize = 64;

/// How long a connection may take, for its only request. The kubelet and Prometheus wait for less.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the header of a request may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The size of the buffers of a connection, in bytes: the least that hyper allows. Longer headers are refused.
const BUFFER: usize = 8 << 10;

/// How long an answer about health is used. So any number of requests needs one thread, and asks once.
const FRESH: Duration = Duration::from_secs(1);

/// Asks whether something works.
pub(crate) type Check = Arc<dyn Fn() -> BoxFuture<'static, anyhow::Result<()>> + Send + Sync>;

/// Serves until the process ends. `alive` asks whether this process answers on its own socket.
///
/// # Errors
/// The address cannot be bound.
pub(crate) async fn serve(
    address: SocketAddr,
    alive: Check,
    health: Arc<dyn Health>,
    metrics: Arc<Metrics>,
) -> anyhow::Result<()> {
    let listener = listen(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let router = router(alive, health, metrics);
    let mut connections = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => admit(&mut connections, stream, peer.ip().to_canonical(), router.clone()).await,
            Err(error) => {
                warn!(%error, "cannot accept an HTTP connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Listens on an address. `[::]` means all addresses of the machine, also where it has no IPv6.
async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && has_no_ipv6(&error) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        other => other,
    }
}

/// See ipv6(7): the kernel was built or started without it, or it is disabled (net.ipv6.conf.all.disable_ipv6).
fn has_no_ipv6(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

/// A connection, and whose it is.
struct Connection {
    peer: IpAddr,
    task: AbortHandle,
}

/// Serves a new connection, in place of another if there are too many.
async fn admit(connections: &mut VecDeque<Connection>, stream: TcpStream, peer: IpAddr, router: Router) {
    connections.retain(|connection| !connection.task.is_finished());
    if connections.len() >= CONNECTIONS_MAX {
        let others = |peer: IpAddr| connections.iter().filter(|other| other.peer == peer).count();
        // Of equal ones, `max_by_key` returns the last: from the newest to the oldest.
        let most = (0..connections.len())
            .rev()
            .max_by_key(|at| others(connections[*at].peer));
        if let Some(replaced) = most.and_then(|at| connections.remove(at)) {
            replaced.task.abort();
        }
    }
    let mut server = http1::Builder::new();
    server
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER);
    let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // What goes wrong with a connection is its client's to notice.
    let task = tokio::spawn(timeout(CONNECTION_TIMEOUT, connection)).abort_handle();
    connections.push_back(Connection { peer, task });
    // It is answered now if its request is there, before others can take its place.
    tokio::task::yield_now().await;
}

fn router(alive: Check, health: Arc<dyn Health>, metrics: Arc<Metrics>) -> Router {
    let alive = Question::new(move || {
        let answer = alive();
        async move {
            match answer.await {
                Ok(()) => well(),
                Err(error) => ill(&error),
            }
        }
        .boxed()
    });
    let ready = Question::new(move || {
        let health = Arc::clone(&health);
        let asked = tokio::task::spawn_blocking(move || health.probe(false));
        async move {
            match asked.await {
                Ok(Ok(true)) => well(),
                Ok(Ok(false)) => ill(&"starting"),
                Ok(Err(error)) => ill(&error),
                Err(panic) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{panic}\n")),
            }
        }
        .boxed()
    });
    let measured = move || {
        let metrics = Arc::clone(&metrics);
        async move {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], metrics.encode())
        }
    };
    Router::new()
        .route("/healthz", get(async move || alive.answer().await))
        .route("/readyz", get(async move || ready.answer().await))
        .route("/metrics", get(measured))
}

type Answer = (StatusCode, String);
/// An answer that many wait for.
type Answered = Shared<BoxFuture<'static, Answer>>;

fn well() -> Answer {
    (StatusCode::OK, "ok\n".to_owned())
}

fn ill(why: &dyn std::fmt::Display) -> Answer {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why:#}\n"))
}

/// A question about the health of this process, the last time it was asked, and the answer once there is one.
#[derive(Clone)]
struct Question {
    ask: Arc<dyn Fn() -> BoxFuture<'static, Answer> + Send + Sync>,
    last: Arc<Mutex<Option<(Instant, Answered)>>>,
}

impl Question {
    fn new(ask: impl Fn() -> BoxFuture<'static, Answer> + Send + Sync + 'static) -> Self {
        Self {
            ask: Arc::new(ask),
            last: Arc::default(),
        }
    }

    /// Asks, unless that was done within the last second, or the answer is still to come.
    fn answer(&self) -> Answered {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, answer)) = &*last
            && (since.elapsed() < FRESH || answer.peek().is_none())
        {
            return answer.clone();
        }
        let answer = (self.ask)().shared();
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// How long an answer may be, in bytes. The metrics of a sidecar are about 100 KiB.
const ANSWER_MAX: usize = 4 << 20;

/// Gets a path from an HTTP server.
///
/// # Errors
/// The server does not answer, not with a success, or its answer is no text or too long.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let answer = client.get(format!("http://{address}{path}").parse()?).await?;
    ensure!(answer.status().is_success(), "{address} answers {}", answer.status());
    let text = axum::body::to_bytes(Body::new(answer.into_body()), ANSWER_MAX).await?;
    Ok(String::from_utf8(text.into())?)
}
