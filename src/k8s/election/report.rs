//! The report of `hostdir leader`.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context;
use axum::http::Request;
use axum::http::header::DATE;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::client::Body;
use kube::{Client, ResourceExt};

use super::leases::{Elections, HAND_OVER, Reading, election};
use crate::leader::{Guilt, Heartbeat};
use crate::volume::Reason;

/// Reports who holds each of these Leases, whether the holder may lead, and who stands by. Also returns whether every Lease
/// is held by a controller that may lead. Ages are by the clock of the API server, which this machine's may differ from.
///
/// # Errors
/// The API server does not answer, or none of the Leases exists.
pub(crate) async fn report(client: Client, namespace: &str, leases: &[String]) -> anyhow::Result<(String, bool)> {
    let elections = Elections::new(client.clone(), namespace, leases.to_vec(), String::new());
    let now = server_time(&client).await?;
    let reading = elections.read_leases().await.map_err(Reason::from)?;
    let found: Vec<&Lease> = leases.iter().filter_map(|name| reading.leases.get(name)).collect();
    anyhow::ensure!(
        !found.is_empty(),
        "there is no Lease {} in namespace {namespace}: nobody has ever led; is hostdir installed there, in elected mode?",
        leases.join(" or ")
    );
    let (mut text, mut well) = (String::new(), true);
    for lease in found {
        let (about, leads) = holder(&reading, lease, now);
        well &= leads;
        text += &about;
    }
    Ok((text, well))
}

/// The controllers that do not hold the Lease, and whether they could lead.
fn others(reading: &Reading, lease: &str, holder: &str, now: Timestamp) -> String {
    let mut text = String::new();
    for (name, heartbeat) in &reading.view.heartbeats {
        if name != holder && heartbeat.elections.contains_key(lease) {
            let guilt = Guilt::at_first_sight(lease, Some(heartbeat), age(heartbeat.sent, now));
            let state = guilt.map_or("could lead".to_owned(), |guilt| format!("could not lead: {guilt}"));
            let _ = writeln!(text, "stands by        {name} on node {}: {state}", heartbeat.node);
        }
    }
    text
}

/// The report on a Lease, its holder and who stands by. Also returns whether the holder leads and may lead.
fn holder(reading: &Reading, lease: &Lease, now: Timestamp) -> (String, bool) {
    let election = election(lease);
    let renewed = lease
        .spec
        .as_ref()
        .and_then(|spec| Some(age(spec.renew_time.as_ref()?.0, now)));
    let heartbeat = reading.view.heartbeats.get(&election.holder);
    let silence = heartbeat.map(|heartbeat| age(heartbeat.sent, now));
    let name = lease.name_any();
    let mut text = format!("Lease            {name}\n");
    let mut line = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:<16} {value}");
    };
    let seconds = |age: Option<Duration>| age.map_or("never".to_owned(), |age| format!("{} s ago", age.as_secs()));
    let guilt = Guilt::at_first_sight(&name, heartbeat, silence.unwrap_or(Duration::MAX));
    let expired = renewed.is_none_or(|age| age > Duration::from_secs(election.term));
    if election.holder.is_empty() {
        line("holder", "nobody");
    } else {
        line("holder", &election.holder);
        line("renewed", &seconds(renewed));
        line(
            "on node",
            heartbeat.map_or("unknown: it sends no heartbeat", |one| &one.node),
        );
        line("heartbeat", &seconds(silence));
    }
    if let Some(note) = lease.annotations().get(HAND_OVER) {
        line("last hand-over", note);
    }
    let verdict = match &guilt {
        _ if election.holder.is_empty() => "nobody leads; the sidecars elect a leader within seconds".to_owned(),
        _ if expired => "nobody leads: the Lease has expired; a healthy sidecar takes it within seconds".to_owned(),
        Some(guilt) => format!(
            "it must not lead: {guilt}. {}",
            successor(reading, &name, &election.holder, now)
        ),
        None => "it leads".to_owned(),
    };
    line("verdict", &verdict);
    // The holder of one Lease stands by for the others.
    text += &others(reading, &name, &election.holder, now);
    (text, guilt.is_none() && !expired && !election.holder.is_empty())
}

/// What becomes of a Lease whose holder must not lead.
fn successor(reading: &Reading, lease: &str, holder: &str, now: Timestamp) -> &'static str {
    let could = |(name, one): (&String, &Heartbeat)| {
        name != holder && Guilt::at_first_sight(lease, Some(one), age(one.sent, now)).is_none()
    };
    if reading.view.heartbeats.iter().any(could) {
        "A controller that could lead takes over; deploy/README.md says when"
    } else {
        "No other controller could lead either: correct what they say below"
    }
}

fn age(then: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(then).try_into().unwrap_or_default()
}

/// The time of the API server, in whole seconds (RFC 9110, section 6.6.1).
async fn server_time(client: &Client) -> anyhow::Result<Timestamp> {
    let request = Request::get("/version").body(Body::empty())?;
    let answer = client.send(request).await?;
    let date = answer
        .headers()
        .get(DATE)
        .context("the API server does not say what time it is")?;
    let date = jiff::fmt::rfc2822::parse(date.to_str()?)?;
    Ok(date.timestamp())
}
