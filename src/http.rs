//! Serves `/healthz`, `/readyz` and `/metrics` to the kubelet and to Prometheus, and asks whether other servers are healthy.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::Router;
use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::routing::get;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;

use crate::metrics::Metrics;
use crate::volume::Health;

/// Serves until the process ends.
///
/// # Errors
/// The address cannot be bound.
pub(crate) async fn serve(address: SocketAddr, health: Arc<dyn Health>, metrics: Arc<Metrics>) -> anyhow::Result<()> {
    let ready = move || {
        let health = Arc::clone(&health);
        async move {
            match tokio::task::spawn_blocking(move || health.probe(false)).await {
                Ok(Ok(true)) => (StatusCode::OK, "ok\n".to_owned()),
                Ok(Ok(false)) => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
                Ok(Err(error)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
                Err(panic) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{panic}\n")),
            }
        }
    };
    let measured = move || {
        let metrics = Arc::clone(&metrics);
        async move {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], metrics.encode())
        }
    };
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(measured));
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))?;
    axum::serve(listener, router).await.context("the HTTP server failed")
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
