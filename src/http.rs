//! Serves `/healthz`, `/readyz` and `/metrics` to the kubelet and to Prometheus, and asks whether other servers are healthy.
//!
//! Any pod may be able to reach the port. So connections are few, short and small, and a new one takes the place of the oldest:
//! who opens many only keeps himself from being answered.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
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

/// How long an answer about readiness is used. So any number of requests needs one thread, and asks once.
const FRESH: Duration = Duration::from_secs(1);

/// Serves until the process ends.
///
/// # Errors
/// The address cannot be bound.
pub(crate) async fn serve(address: SocketAddr, health: Arc<dyn Health>, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    let router = router(health, metrics);
    let mut connections = VecDeque::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => admit(&mut connections, stream, router.clone()).await,
            Err(error) => {
                warn!(%error, "cannot accept an HTTP connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves a new connection, in place of the oldest if there are too many.
async fn admit(connections: &mut VecDeque<AbortHandle>, stream: TcpStream, router: Router) {
    connections.retain(|connection| !connection.is_finished());
    if connections.len() >= CONNECTIONS_MAX
        && let Some(oldest) = connections.pop_front()
    {
        oldest.abort();
    }
    let mut server = http1::Builder::new();
    server
        .keep_alive(false)
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(BUFFER);
    let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // What goes wrong with a connection is its client's to notice.
    connections.push_back(tokio::spawn(timeout(CONNECTION_TIMEOUT, connection)).abort_handle());
    // It is answered now if its request is there, before others can take its place.
    tokio::task::yield_now().await;
}

fn router(health: Arc<dyn Health>, metrics: Arc<Metrics>) -> Router {
    let readiness = Arc::new(Readiness {
        health,
        last: Mutex::default(),
    });
    let ready = move || {
        let readiness = Arc::clone(&readiness);
        async move { readiness.answer().await }
    };
    let measured = move || {
        let metrics = Arc::clone(&metrics);
        async move {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], metrics.encode())
        }
    };
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(measured))
}

/// The last answer about readiness.
struct Readiness {
    health: Arc<dyn Health>,
    last: Mutex<Option<(Instant, Answer)>>,
}

type Answer = (StatusCode, String);

impl Readiness {
    /// Goes on when the client leaves: it must not start more threads by asking again.
    async fn answer(self: Arc<Self>) -> Answer {
        let found = tokio::spawn(async move { self.look().await }).await;
        found.unwrap_or_else(|panic| (StatusCode::INTERNAL_SERVER_ERROR, format!("{panic}\n")))
    }

    async fn look(&self) -> Answer {
        // Further requests wait for the answer to the first one.
        let mut last = self.last.lock().await;
        match &*last {
            Some((since, answer)) if since.elapsed() < FRESH => answer.clone(),
            _ => {
                let answer = self.ask().await;
                *last = Some((Instant::now(), answer.clone()));
                answer
            }
        }
    }

    async fn ask(&self) -> Answer {
        let health = Arc::clone(&self.health);
        match tokio::task::spawn_blocking(move || health.probe(false)).await {
            Ok(Ok(true)) => (StatusCode::OK, "ok\n".to_owned()),
            Ok(Ok(false)) => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
            Ok(Err(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
            Err(panic) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{panic}\n")),
        }
    }
}

/// Requests a path from an HTTP server, and only checks that the status is a success.
///
/// # Errors
/// The server does not answer, or not with a success.
pub(crate) async fn ask(address: SocketAddr, path: &str) -> anyhow::Result<()> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Body>();
    let answer = client.get(format!("http://{address}{path}").parse()?).await?;
    ensure!(answer.status().is_success(), "{address} answers {}", answer.status());
    Ok(())
}
